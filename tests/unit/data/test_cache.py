"""Crops are the same pixels with the cache and without; the cache is bounded."""

import io
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image

from protoclip.data.decode import Box, MemoryCache, decode_crop
from protoclip.data.transforms import light_transform

FORMS = [
    *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
    *(("PNG", "RGB"), ("PNG", "RGBA"), ("WEBP", "RGB")),
]


def encoded(width: int, height: int, seed: int, form: str = "JPEG", mode: str = "RGB") -> bytes:
    """Blobs of colour; every image lies on another side, by its EXIF orientation."""
    noise = np.random.default_rng(seed).integers(
        0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8
    )
    exif = Image.Exif()
    exif[0x0112] = seed % 8 + 1
    buffer = io.BytesIO()
    image = Image.fromarray(noise).resize((width, height)).convert(mode)
    image.save(buffer, form, exif=exif, **({"compress_level": 1} if form == "PNG" else {}))
    return buffer.getvalue()


def everything(width: int, height: int) -> Box:
    return (0, 0, width, height)


@pytest.mark.parametrize(("form", "mode"), FORMS)
def test_crops_are_the_same_with_any_cache(form, mode):
    """Bit for bit, of images and results of many sizes, with the cache cold, warm and full."""
    draw = np.random.default_rng(0)
    cache = MemoryCache(max_bytes=10**8)
    reduced = served = 0
    for seed in range(16):
        width, height = (int(side) for side in np.exp(draw.uniform(2.5, 6.0, 2)))
        size = int(np.exp(draw.uniform(1.5, 4.0)))
        transform = light_transform(size=size, mean=(0.0,) * 3, std=(1.0,) * 3)
        data = encoded(width, height, seed, form, mode)
        boxes = [partial(transform.box, draws=draw.random(13, np.float32)) for _ in range(2)]
        for box in [*boxes, everything, lambda w, h: (w // 3, h // 5, w // 3 + 1, h)]:
            expected = decode_crop(data, box, size)
            for tried in (cache, cache, MemoryCache(max_bytes=0)):
                found = tried.crop(data, box, size)
                np.testing.assert_array_equal(found, expected)
        reduced += min(width, height) >= 4 * size
        served += min(width, height) < 4 * size
    assert min(reduced, served) > 2


def test_what_is_kept_is_not_decoded_again(monkeypatch):
    """Except for another size. A reduced JPEG is not kept, since each crop may be reduced
    by another factor."""
    cache, small, large = MemoryCache(max_bytes=10**7), encoded(80, 64, 0), encoded(800, 800, 0)
    for data in (small, large):
        cache.crop(data, everything, 32)

    def refuse(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("protoclip.data.decode.decode_all", refuse)
    cache.crop(small, everything, 32)
    for data, size in ((large, 32), (small, 31)):
        with pytest.raises(AssertionError, match="decoded"):
            cache.crop(data, everything, size)


def test_the_cache_is_bounded():
    """It keeps what came first."""
    cache = MemoryCache(max_bytes=5 * 64 * 80 * 3)
    for seed in range(30):
        cache.crop(encoded(80, 64, seed), everything, 64)
        assert cache.used == min(seed + 1, 5) * 64 * 80 * 3
