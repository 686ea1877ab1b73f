"""Views: per-picture parameters, in agreement with PIL and with colour theory."""

import colorsys
import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from protoclip.data.decode import crop_resize, decode_crop, reduction
from protoclip.data.transforms import (
    EvaluationTransform,
    TrainingTransform,
    Transform,
    clip_transform,
    colour_jitter,
    gaussian_blur,
    light_transform,
    luminance,
    rotate_hue,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def picture(width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1))


def test_the_evaluation_view_is_resize_and_centre_crop() -> None:
    """PIL's crop of the central square and bicubic resize to a grey level, (x - mean) / std."""
    transform = EvaluationTransform(size=16, mean=MEAN, std=STD)
    square = picture().crop((5, 0, 35, 30))
    expected = np.asarray(square.resize((16, 16), Image.Resampling.BICUBIC)).astype(float)
    ours = transform(picture()).permute(1, 2, 0).double().numpy() * STD + MEAN
    assert np.abs(ours * 255 - expected).max() < 1.01


def test_a_training_crop_covers_the_area_it_draws() -> None:
    """Crops stay inside, cover between 50 and 100% of the area, and have ratios from 3/4 to 4/3."""
    transform = light_transform(size=32, mean=MEAN, std=STD)
    # A picture whose pixels say where they come from.
    grid = np.zeros((240, 240, 3), dtype=np.uint8)
    grid[..., 0], grid[..., 1] = np.arange(240)[None, :], np.arange(240)[:, None]
    shares, ratios = [], []
    for seed in range(200):
        draws = np.random.default_rng(seed).random(13, dtype=np.float32)
        crop = crop_resize(grid, transform.box(240, 240, draws), 32).astype(float)
        step = 31 / 32
        width = (crop[16, -1, 0] - crop[16, 0, 0]) / step
        height = (crop[-1, 16, 1] - crop[0, 16, 1]) / step
        shares.append(width * height / 240**2)
        ratios.append(width / height)
    assert 0.47 < min(shares) < 0.6
    assert 0.85 < max(shares) < 1.03
    assert 0.7 < min(ratios) < 0.85
    assert 1.2 < max(ratios) < 1.4


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (1, 500), (3, 2), (64, 64), (499, 333), (3001, 2003), (700, 9)]
)
@pytest.mark.parametrize("make", [clip_transform, light_transform])
def test_crops_lie_inside_pictures_of_any_shape(
    make: Callable[..., TrainingTransform], width: int, height: int
) -> None:
    """At least one pixel, none outside, and where it can be reduced, in steps that allow it."""
    transform = make(size=16, mean=MEAN, std=STD)
    corners = [np.zeros(13, np.float32), np.full(13, np.nextafter(np.float32(1), np.float32(0)))]
    for draws in [*corners, *np.random.default_rng(0).random((200, 13), dtype=np.float32)]:
        left, top, right, bottom = transform.box(width, height, draws)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        factor = reduction(min(right - left, bottom - top), 16)
        assert all(edge % factor == 0 for edge in (left, top, right, bottom))


def test_crops_reach_every_corner() -> None:
    """A crop may touch each side of the picture, and does at the ends of what is drawn."""
    transform = TrainingTransform(size=16, mean=MEAN, std=STD, scale=(0.5, 0.5))
    low, high = np.full(13, 0.5, np.float32), np.full(13, 0.5, np.float32)
    low[2:4], high[2:4] = 0, np.nextafter(np.float32(1), np.float32(0))
    assert transform.box(100, 80, low)[:2] == (0, 0)
    assert transform.box(100, 80, high)[2:] == (100, 80)


@pytest.mark.parametrize("width", [30, 31, 64])
def test_the_evaluation_box_is_the_central_square(width: int) -> None:
    transform = EvaluationTransform(size=16, mean=MEAN, std=STD)
    assert isinstance(transform, Transform)
    nothing = np.zeros(0, np.float32)
    assert transform.box(width, 30, nothing) == ((width - 30) // 2, 0, (width - 30) // 2 + 30, 30)
    assert transform.box(30, width, nothing) == (0, (width - 30) // 2, 30, (width - 30) // 2 + 30)


def test_the_evaluation_view_takes_a_picture_of_any_mode() -> None:
    """What is transparent is white, and grey becomes RGB."""
    transform = EvaluationTransform(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    torch.testing.assert_close(
        transform(Image.new("RGBA", (9, 9), (9, 9, 9, 0))), torch.ones(3, 8, 8)
    )
    torch.testing.assert_close(
        transform(Image.new("L", (9, 9), 51)), torch.full((3, 8, 8), 0.2), atol=1e-6, rtol=0
    )


def test_each_picture_of_a_batch_has_its_own_parameters() -> None:
    """The result of a batch is the results of its pictures one at a time."""
    transform = light_transform(size=32, mean=MEAN, std=STD)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 32, 32, 3), generator=generator, dtype=torch.uint8)
    draws = torch.rand(64, 13, generator=generator)
    batch = transform.finish(images, draws)
    for i in range(64):
        alone = transform.finish(images[i : i + 1], draws[i : i + 1])[0]
        torch.testing.assert_close(batch[i], alone, atol=1e-5, rtol=1e-5)
    assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("number", [0, 1, 4, 5])
def test_a_batch_may_have_any_number_of_pictures(number: int) -> None:
    transform = light_transform(size=8, mean=MEAN, std=STD)
    images = torch.zeros(number, 8, 8, 3, dtype=torch.uint8)
    assert transform.finish(images, torch.rand(number, 13)).shape == (number, 3, 8, 8)


def test_finishing_leaves_its_arguments_alone() -> None:
    transform = light_transform(size=8, mean=MEAN, std=STD)
    images = torch.randint(0, 256, (16, 8, 8, 3), dtype=torch.uint8)
    draws = torch.zeros(16, 13)  # everything is done to every picture
    before = images.clone()
    transform.finish(images, draws)
    torch.testing.assert_close(images, before)
    torch.testing.assert_close(draws, torch.zeros(16, 13))


def test_the_light_view_is_its_steps_in_order() -> None:
    """Flip, jitter, grayscale, blur, normalise, each with the draws that are its own."""
    transform = light_transform(size=32, mean=MEAN, std=STD)
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    draws = torch.rand(8, 13, generator=torch.Generator().manual_seed(4))
    for i in range(8):
        # The bits of i say which of flip, jitter and grayscale happen; blur always does.
        draws[i, 4:8] = torch.tensor([0.1 if i & bit else 0.9 for bit in (1, 2, 4)] + [0.1])
    finished = transform.finish(images, draws)
    for i in range(8):
        expected = images[i].permute(2, 0, 1)[None] / 255
        if i & 1:
            expected = expected.flip(3)
        if i & 2:
            expected = colour_jitter(expected, draws[i : i + 1, 8:12])
        if i & 4:
            expected = luminance(expected).expand(-1, 3, -1, -1)
        sigma = (0.1 + 1.9 * draws[i, 12]) * 32 / 224
        expected = gaussian_blur(expected, sigma[None])[0].permute(1, 2, 0)
        expected = (expected - torch.tensor(MEAN)) / torch.tensor(STD)
        torch.testing.assert_close(finished[i].permute(1, 2, 0), expected, atol=1e-5, rtol=1e-5)


def test_augmentations_happen_as_often_as_they_should() -> None:
    """Half of the pictures are flipped, and about a fifth turn grey, as the light view says."""
    transform = light_transform(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    image = torch.zeros(4000, 8, 8, 3, dtype=torch.uint8)
    image[:, :, :4, 0] = 200
    draws = torch.rand(4000, 13, generator=torch.Generator().manual_seed(1))
    out = transform.finish(image, draws)
    flipped = out[:, 0, :, 4:].mean((1, 2)) > out[:, 0, :, :4].mean((1, 2))
    grey = (out[:, 0] - out[:, 1]).abs().amax((1, 2)) < 1e-6
    assert abs(float(flipped.float().mean()) - 0.5) < 0.04
    assert abs(float(grey.float().mean()) - 0.2) < 0.03


def test_the_clip_view_crops_and_nothing_else() -> None:
    """Whatever is drawn, CLIP's view only normalises after its crop."""
    transform = clip_transform(size=8, mean=MEAN, std=STD)
    images = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    expected = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / (
        torch.tensor(STD)[:, None, None]
    )
    torch.testing.assert_close(transform.finish(images, torch.zeros(5, 13)), expected)


@pytest.mark.parametrize("turn", [0.0, 0.1, -0.2, 0.5])
def test_hue_rotation_is_hsv_rotation(turn: float) -> None:
    """Every pixel agrees with the standard library's colour conversions."""
    colours = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    colours[0, :, 0, 0] = 0.4  # grey
    colours[0, :, 0, 1] = torch.tensor([0.9, 0.9, 0.1])  # a tie for the largest
    turned = rotate_hue(colours, torch.tensor([turn]))
    for y in range(6):
        for x in range(6):
            h, s, v = colorsys.rgb_to_hsv(*colours[0, :, y, x].tolist())
            expected = colorsys.hsv_to_rgb((h + turn) % 1, s, v)
            assert turned[0, :, y, x].tolist() == pytest.approx(expected, abs=1e-5)


def test_neutral_jitter_changes_nothing() -> None:
    """Factors of one and no turn leave the picture."""
    images = torch.rand(3, 3, 5, 5, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(colour_jitter(images, torch.full((3, 4), 0.5)), images)


def test_jitter_is_its_four_steps() -> None:
    """Brightness, contrast about the mean grey, saturation, hue; by plain numbers in float64."""
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    draws = torch.rand(2, 4, generator=torch.Generator().manual_seed(6))
    jittered = colour_jitter(images, draws)
    for picture, draw, result in zip(
        images.double().numpy(), draws.double().numpy(), jittered.numpy(), strict=True
    ):
        brightness, contrast, saturation = 0.2 + 1.6 * draw[:3]
        weights = np.array([0.299, 0.587, 0.114])
        pixels = np.clip(picture.reshape(3, -1).T * brightness, 0, 1)
        grey = (pixels @ weights).mean()
        pixels = np.clip(grey + contrast * (pixels - grey), 0, 1)
        greys = (pixels @ weights)[:, None]
        pixels = np.clip(greys + saturation * (pixels - greys), 0, 1)
        for (red, green, blue), found in zip(pixels, result.reshape(3, -1).T, strict=True):
            h, s, v = colorsys.rgb_to_hsv(red, green, blue)
            expected = colorsys.hsv_to_rgb((h + 0.4 * draw[3] - 0.2) % 1, s, v)
            assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_blur_is_a_sum_over_neighbours() -> None:
    """Pixel by pixel in float64: a Gaussian of up to three deviations, mirrored at the borders."""
    size = 7
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(7))
    sigma = torch.tensor([0.2, 1.4, 0.9, 1.3])
    blurred = gaussian_blur(images, sigma)
    mirror = [*range(size), *range(size - 2, 0, -1)]
    for image, deviation, result in zip(
        images.double().numpy(), sigma.tolist(), blurred.numpy(), strict=True
    ):
        reach = max(1, math.ceil(3 * deviation))
        offsets = range(-reach, reach + 1)
        weights = [math.exp(-0.5 * (offset / deviation) ** 2) for offset in offsets]
        for y in range(size):
            for x in range(size):
                total = np.zeros(3)
                for dy, down in zip(offsets, weights, strict=True):
                    for dx, right in zip(offsets, weights, strict=True):
                        row, column = mirror[(y + dy) % len(mirror)], mirror[(x + dx) % len(mirror)]
                        total += down * right * image[:, row, column]
                expected = total / sum(weights) ** 2
                np.testing.assert_allclose(result[:, y, x], expected, atol=1e-5)


def test_blur_is_a_gaussian_of_the_asked_width() -> None:
    """A point spreads to a Gaussian: its sum stays 1 and its variance is sigma squared."""
    point = torch.zeros(2, 3, 41, 41)
    point[:, :, 20, 20] = 1
    sigma = torch.tensor([1.0, 2.5])
    blurred = gaussian_blur(point, sigma)
    torch.testing.assert_close(blurred.sum((2, 3)), torch.ones(2, 3))
    offsets = torch.arange(41) - 20.0
    variance = (blurred[:, 0].sum(1) * offsets**2).sum(1)
    torch.testing.assert_close(variance.sqrt(), sigma, rtol=0.02, atol=0)


def test_luminance_is_pils() -> None:
    """Rec. 601 weights, as PIL's conversion to L, within a rounding step."""
    pixels = np.asarray(picture())
    ours = luminance(torch.tensor(pixels.copy()).permute(2, 0, 1)[None].float())[0, 0]
    assert np.abs(ours.numpy() - np.asarray(picture().convert("L"))).max() < 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9), 77])
def test_a_picture_handed_over_is_turned_as_in_training(kind: str, orientation: int | None) -> None:
    """By its EXIF orientation, or not at all: the evaluation view of a PIL image is that of its
    file."""
    rows, columns = np.mgrid[:30, :50]
    pixels = (4 * rows + 2 * columns)[..., None] * [1, 0.5, 0.25]
    image = Image.fromarray(pixels.astype(np.uint8))
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    transform = EvaluationTransform(size=20, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    draws = np.zeros(0, np.float32)
    trained = decode_crop(
        buffer.getvalue(),
        lambda w, h: transform.box(w, h, draws),
        transform.size,
        max_pixels=10_000,
    )
    expected = transform.finish(torch.from_numpy(trained)[None], torch.zeros(1, 0))[0]
    found = transform(Image.open(buffer))
    assert (found - expected).abs().max() <= (0.02 if kind == "JPEG" else 0)
    if orientation in range(2, 9):
        upright = transform(Image.fromarray(np.asarray(image)))
        assert (found - upright).abs().max() > 0.1
