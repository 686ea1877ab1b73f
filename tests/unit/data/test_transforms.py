"""Transforms: parameters per image, in agreement with PIL and with colour theory."""

import colorsys
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import functional

from protoclip.data.decode import reduction
from protoclip.data.transforms import (
    LONG,
    EvaluationTransform,
    PillowTransform,
    SquashTransform,
    blur,
    blur_weights,
    clip_transform,
    colour_jitter,
    light_transform,
    luminance,
    middle_of_long,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Each image blurred by its own deviation."""
    blurred = torch.empty_like(images)
    for rows, weights in blur_weights(sigma).values():
        blurred[rows] = blur(images[rows], weights)
    return blurred


def random_bytes(number: int, side: int) -> torch.Tensor:
    return (256 * uniform(number, side, side, 3)).byte()


def random_image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1))


def test_evaluation_is_resize_and_centre_crop():
    """PIL's crop of the central square, or all of a squashed image, and bicubic resize to a grey
    level, (x - mean) / std."""
    image = random_image()
    for kind, box in ((EvaluationTransform, (5, 0, 35, 30)), (SquashTransform, (0, 0, 40, 30))):
        square = image.crop(box).resize((16, 16), Image.Resampling.BICUBIC)
        ours = kind(size=16, mean=MEAN, std=STD)(image).permute(1, 2, 0).numpy()
        assert np.abs((ours * STD + MEAN) * 255 - np.asarray(square).astype(float)).max() < 1.01


@pytest.mark.parametrize("side", [24, 32, 96])
@pytest.mark.parametrize("shape", [(48, 48), (51, 80), (83, 40)])
def test_the_fast_resize_differs_by_rounding(shape, side):
    """The same crop: a crop that is off by one pixel would differ by far more."""
    exact = PillowTransform(size=side, mean=(0.5,) * 3, std=(0.5,) * 3)
    noise = np.random.default_rng(0).integers(50, 200, size=(*shape, 3)).astype(np.uint8)
    image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1))
    apart = exact.pixels(image).int() - replace(exact, fast=True).pixels(image).int()
    assert apart.abs().max() <= 2
    assert apart.abs().float().mean() < 0.3


def test_crops_have_the_areas_ratios_and_places_that_are_drawn():
    """Between 50 and 100% of the area, ratios from 3/4 to 4/3, up to each side of the image."""
    transform = light_transform(size=32, mean=MEAN, std=STD)
    draws = np.random.default_rng(0).random((300, 13), dtype=np.float32)
    left, top, right, bottom = np.array([transform.box(240, 240, draw) for draw in draws]).T
    shares, ratios = (right - left) * (bottom - top) / 240**2, (right - left) / (bottom - top)
    assert 0.48 < shares.min() < 0.55
    assert 0.9 < shares.max() <= 1
    assert 0.73 < ratios.min() < 0.8
    assert 1.25 < ratios.max() < 1.36
    assert min(left.min(), top.min()) == 0
    assert max(right.max(), bottom.max()) == 240


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (1, 500), (3, 2), (64, 64), (499, 333), (3001, 2003), (700, 9)]
)
@pytest.mark.parametrize("make", [clip_transform, light_transform])
def test_crops_lie_inside_images_of_any_shape(make, width, height):
    """At least one pixel, none outside, and in strides that allow a JPEG to be reduced."""
    transform = make(size=16, mean=MEAN, std=STD)
    corners = [np.zeros(13, np.float32), np.full(13, np.nextafter(np.float32(1), np.float32(0)))]
    for draws in [*corners, *np.random.default_rng(0).random((200, 13), dtype=np.float32)]:
        left, top, right, bottom = transform.box(width, height, draws)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        factor = reduction(min(right - left, bottom - top), 16)
        assert all(edge % factor == 0 for edge in (left, top, right, bottom))


@pytest.mark.parametrize("number", [0, 1, 4, 37])
def test_each_image_of_a_batch_has_its_own_parameters(number):
    """A batch of any size is its images one at a time; arguments stay as they are."""
    transform = light_transform(size=32, mean=MEAN, std=STD)
    images, draws = random_bytes(number, 32), uniform(number, 13)
    before = images.clone(), draws.clone()
    batch = transform.finish(images, draws)
    assert batch.shape == (number, 3, 32, 32)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for i in range(number):
        alone = transform.finish(images[i : i + 1], draws[i : i + 1])[0]
        torch.testing.assert_close(batch[i], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((images, draws), before, rtol=0, atol=0)


def test_the_light_transform_is_its_steps_in_order():
    """Flip, jitter, grayscale, blur, normalise, each with draws of its own."""
    transform = light_transform(size=32, mean=MEAN, std=STD)
    images, draws = random_bytes(8, 32), uniform(8, 13, seed=4)
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


def test_jitter_is_its_four_steps():
    """Brightness, contrast about the mean grey, saturation, hue; by plain numbers in float64."""
    images, draws = uniform(3, 3, 4, 4, seed=5), uniform(3, 4, seed=6)
    draws[2] = 0.5  # changes nothing
    images[0, :, 0, 0] = 0.4  # grey
    images[0, :, 0, 1] = torch.tensor([0.9, 0.9, 0.1])  # a tie for the largest
    jittered = colour_jitter(images, draws)
    torch.testing.assert_close(jittered[2], images[2])
    weights = np.array([0.299, 0.587, 0.114])
    for image, draw, result in zip(
        images.double().numpy(), draws.double().numpy(), jittered.numpy(), strict=True
    ):
        brightness, contrast, saturation = 0.2 + 1.6 * draw[:3]
        pixels = np.clip(image.reshape(3, -1).T * brightness, 0, 1)
        grey = (pixels @ weights).mean()
        pixels = np.clip(grey + contrast * (pixels - grey), 0, 1)
        greys = (pixels @ weights)[:, None]
        pixels = np.clip(greys + saturation * (pixels - greys), 0, 1)
        for (red, green, blue), found in zip(pixels, result.reshape(3, -1).T, strict=True):
            h, s, v = colorsys.rgb_to_hsv(red, green, blue)
            expected = colorsys.hsv_to_rgb((h + 0.4 * draw[3] - 0.2) % 1, s, v)
            assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_blur_is_a_sum_over_neighbours():
    """In float64: a Gaussian of up to three deviations, mirrored at the borders."""
    images, sigma = uniform(4, 3, 7, 9, seed=7), torch.tensor([0.2, 1.4, 0.9, 1.3])
    for image, deviation, result in zip(
        images.double().numpy(), sigma.tolist(), gaussian_blur(images, sigma).numpy(), strict=True
    ):
        reach = max(1, math.ceil(3 * deviation))
        weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
        for axis in (1, 2):
            padding = [(reach, reach) if axis == dimension else (0, 0) for dimension in range(3)]
            padded = np.pad(image, padding, mode="reflect")
            slide = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=axis)
            image = slide @ (weights / weights.sum())
        np.testing.assert_allclose(result, image, atol=1e-5)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("shape", [(1, 190), (3, 400), (701, 5), (9, 950), (24, 2500), (3100, 30)])
def test_of_a_long_image_the_middle_alone_is_resized(shape, fast):
    """To the pixels of the whole, except for rounding; the whole could take gigabytes."""
    noise = np.random.default_rng(0).integers(50, 200, size=(*shape, 3)).astype(np.uint8)
    image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3))
    whole = functional.resize(image, [24], functional.InterpolationMode.BICUBIC)
    expected = torch.from_numpy(np.array(functional.center_crop(whole, [24])))
    assert max(middle_of_long(image).size) <= LONG * min(shape) + 1
    transform = PillowTransform(size=24, mean=(0.5,) * 3, std=(0.5,) * 3, fast=fast)
    assert (transform.pixels(image).int() - expected.int()).abs().max() <= 2
