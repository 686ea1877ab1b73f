"""Images that are not 8-bit RGB: read, scaled and measured as a slow restatement does it."""

import io
import struct
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from protoclip.data.bands import Bands, find_size, measure_ranges, read_bands, read_values, show
from protoclip.data.transforms import EvaluationTransform, light_transform
from testing import save_to_bytes

VALUES = np.random.default_rng(0).integers(0, 4000, (20, 30, 5)).astype(np.uint16)
RANGES = tuple((100.0 * band, 2000.0 + 300 * band) for band in range(5))


def saved(array: np.ndarray) -> bytes:
    np.save(buffer := io.BytesIO(), array)
    return buffer.getvalue()


def as_png(array: np.ndarray) -> bytes:
    return save_to_bytes(Image.fromarray(array))


def as_tiff(array: np.ndarray, **options: Any) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(buffer := io.BytesIO(), array, **options)
    return bytes(buffer.getvalue())


@pytest.mark.parametrize(
    "write",
    [
        lambda array: array,
        saved,
        lambda array: saved(np.moveaxis(array, -1, 0)),
        lambda array: saved(np.asfortranarray(array)),
        lambda array: saved(array.astype(">u2")),
        lambda array: saved(array.astype(np.float64)),
        lambda array: as_tiff(np.moveaxis(array, -1, 0), photometric="minisblack"),
        lambda array: as_tiff(array, planarconfig="contig", photometric="minisblack"),
    ],
)
def test_each_band_is_scaled_by_its_range(write):
    pixels = read_bands(write(VALUES), Bands(5, RANGES)).pixels
    for band, (low, high) in enumerate(RANGES):
        shares = (VALUES[..., band].astype(float) - low) / (high - low)
        np.testing.assert_array_equal(pixels[..., band], np.rint(shares.clip(0, 1) * 255))


def test_what_is_no_number_becomes_zero_and_what_is_beyond_the_range_is_cut():
    values = np.array([[np.nan, -np.inf, np.inf, 5.0, 1e30]], np.float32)
    pixels = read_bands(values, Bands(1, [(0.0, 10.0)])).pixels
    assert pixels.ravel().tolist() == [0, 0, 255, 128, 255]


def test_eight_bits_stay_as_they_are():
    """RGB, and grey as one channel or three; also beside images of more bits."""
    rgb = (VALUES[..., :3] % 256).astype(np.uint8)
    np.testing.assert_array_equal(read_bands(as_png(rgb), Bands(3, RANGES[:3])).pixels, rgb)
    one = read_bands(as_png(rgb[..., 0]), Bands(1, RANGES[:1])).pixels
    np.testing.assert_array_equal(one[..., 0], rgb[..., 0])
    four = as_tiff(
        np.moveaxis(VALUES[..., :4] % 256, -1, 0).astype(np.uint8), photometric="minisblack"
    )
    np.testing.assert_array_equal(read_bands(four, Bands(4)).pixels, VALUES[..., :4] % 256)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (saved(VALUES)[:-1], "cannot|decoded"),
        (saved(VALUES)[:20], "decoded"),
        (saved(np.zeros((4, 4, 5), bool)), "an array of bool"),
        (saved(np.zeros(5, np.uint16)), r"an array of uint16 \(5,\)"),
        (saved(VALUES[..., :4]), "has 4 bands, and model.image.channels is 5"),
        (as_png(VALUES[..., 0]), "has 1 bands"),
        (b"II*\0" + bytes(60), "decoded"),
        (b"nothing", "not an image"),
    ],
)
def test_faulty_images_are_refused(encoded, reason):
    with pytest.raises(ValueError, match=reason):
        read_bands(encoded, Bands(5, RANGES))


def test_no_array_is_made_that_is_larger_than_its_file():
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**20}, {2**20}, 5), }}"
    padded = header.ljust(117) + "\n"
    with pytest.raises(ValueError, match="decoded"):
        read_bands(b"\x93NUMPY\x01\0" + struct.pack("<H", 118) + padded.encode(), Bands(5, RANGES))


def read_from(images: list[bytes]) -> Any:
    return lambda number: [SimpleNamespace(image=image) for image in images[:number]]


def test_ranges_are_percentiles_over_images():
    images = [saved(VALUES + 100 * number) for number in range(3)]
    together = np.concatenate([VALUES + 100 * number for number in range(3)]).reshape(-1, 5)
    expected = [tuple(np.percentile(band, [1, 99])) for band in together.T]
    assert np.allclose(measure_ranges(read_from(images), 5), expected)
    rgb = as_png((VALUES[..., :3] % 256).astype(np.uint8))
    assert measure_ranges(read_from([rgb, b"broken"]), 3) == ()
    deep = as_png(VALUES[..., 0])
    grey = np.percentile(VALUES[..., 0], [1, 99])
    assert np.allclose(measure_ranges(read_from([rgb, deep]), 3), [grey] * 3)
    with pytest.raises(
        ValueError, match=r"model\.image\.channels: 5: no image fits; one has 3 bands"
    ):
        measure_ranges(read_from([rgb, rgb]), 5)
    with pytest.raises(ValueError, match=r"has 5 bands, and model\.image\.channels is 3"):
        measure_ranges(read_from(images), 3)


def test_a_transform_reads_an_array_as_its_file_and_leaves_colours_of_other_bands_alone():
    images: dict[str, Any] = {"size": 16, "mean": (0.5,) * 5, "std": (0.25,) * 5}
    transform = EvaluationTransform(**images, bands=Bands(5, RANGES))
    torch.testing.assert_close(transform(VALUES), transform(saved(VALUES)), rtol=0, atol=0)
    assert transform(VALUES).shape == (5, 16, 16)
    assert str(transform) != str(EvaluationTransform(**images))
    light = light_transform(**images)
    assert (light.flip, light.blur, light.jitter, light.grayscale) == (0.5, 0.2, 0.0, 0.0)
    batch = torch.randint(0, 256, (6, 16, 16, 5), dtype=torch.uint8)
    assert light.finish(batch, torch.rand(6, 13)).shape == (6, 5, 16, 16)


def test_any_image_can_be_looked_at():
    for encoded in (saved(VALUES), as_png(VALUES[..., 0])):
        assert find_size(encoded) == (30, 20)
        assert show(encoded).shape == (20, 30, 3)
        assert (show(encoded).min(), show(encoded).max()) == (0, 255)
    assert read_values(saved(VALUES))[0].shape == (20, 30, 5)
