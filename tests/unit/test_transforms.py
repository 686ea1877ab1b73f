"""Views: per-picture parameters, in agreement with PIL and with colour theory."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from protoclip.data.transforms import (
    EvaluationView,
    clip_view,
    colour_jitter,
    gaussian_blur,
    light_view,
    luminance,
    rotate_hue,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def picture(width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1))


def test_the_evaluation_view_is_resize_and_centre_crop() -> None:
    """Equal to PIL's crop of the central square and bicubic resize, then (x - mean) / std."""
    view = EvaluationView(size=16, mean=MEAN, std=STD)
    expected = np.asarray(picture().resize((16, 16), Image.Resampling.BICUBIC, (5, 0, 35, 30)))
    normal = (expected / 255 - MEAN) / STD
    np.testing.assert_allclose(view(picture()).permute(1, 2, 0).numpy(), normal, atol=1e-5)


def test_a_training_crop_covers_the_area_it_draws() -> None:
    """Crops stay inside, cover between 50 and 100% of the area, and have ratios from 3/4 to 4/3."""
    view = light_view(size=32, mean=MEAN, std=STD)
    # A picture whose pixels say where they come from.
    grid = np.zeros((240, 240, 3), dtype=np.uint8)
    grid[..., 0], grid[..., 1] = np.arange(240)[None, :], np.arange(240)[:, None]
    shares, ratios = [], []
    for seed in range(200):
        draws = np.random.default_rng(seed).random(13, dtype=np.float32)
        crop = view.crop(Image.fromarray(grid), draws).astype(float)
        step = 31 / 32
        width = (crop[16, -1, 0] - crop[16, 0, 0]) / step
        height = (crop[-1, 16, 1] - crop[0, 16, 1]) / step
        shares.append(width * height / 240**2)
        ratios.append(width / height)
    assert 0.47 < min(shares) < 0.6
    assert 0.85 < max(shares) < 1.03
    assert 0.7 < min(ratios) < 0.85
    assert 1.2 < max(ratios) < 1.4


def test_each_picture_of_a_batch_has_its_own_parameters() -> None:
    """The result of a batch is the results of its pictures one at a time."""
    view = light_view(size=32, mean=MEAN, std=STD)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 32, 32, 3), generator=generator, dtype=torch.uint8)
    draws = torch.rand(64, 13, generator=generator)
    batch = view.finish(images, draws)
    for i in range(64):
        alone = view.finish(images[i : i + 1], draws[i : i + 1])[0]
        torch.testing.assert_close(batch[i], alone, atol=2e-3, rtol=1e-4)


def test_augmentations_happen_as_often_as_they_should() -> None:
    """Half of the pictures are flipped, and about a fifth turn grey, as the light view says."""
    view = light_view(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    image = torch.zeros(4000, 8, 8, 3, dtype=torch.uint8)
    image[:, :, :4, 0] = 200
    draws = torch.rand(4000, 13, generator=torch.Generator().manual_seed(1))
    out = view.finish(image, draws)
    flipped = out[:, 0, :, 4:].mean((1, 2)) > out[:, 0, :, :4].mean((1, 2))
    grey = (out[:, 0] - out[:, 1]).abs().amax((1, 2)) < 1e-6
    assert abs(float(flipped.float().mean()) - 0.5) < 0.04
    assert abs(float(grey.float().mean()) - 0.2) < 0.03


def test_the_clip_view_crops_and_nothing_else() -> None:
    """Whatever is drawn, CLIP's view only normalises after its crop."""
    view = clip_view(size=8, mean=MEAN, std=STD)
    images = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    expected = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / (
        torch.tensor(STD)[:, None, None]
    )
    torch.testing.assert_close(view.finish(images, torch.zeros(5, 13)), expected)


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
