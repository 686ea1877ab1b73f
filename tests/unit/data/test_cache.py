"""Crops: the same pixels with any cache and without. Caches: bounded, and safe to delete."""

import hashlib
import io
import multiprocessing
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from protoclip.data.cache import DiskCache, MemoryCache, crop
from protoclip.data.decode import Box, Decoded, decode_crop
from protoclip.data.transforms import light_transform

PIXELS = 10**8
Cache = MemoryCache | DiskCache
Make = Callable[[int], Cache]
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


def corner(width: int, height: int) -> Box:
    return (0, 0, width // 4, height // 4)


def small(seed: int) -> bytes:
    return encoded(80, 64, seed)


@pytest.fixture(params=["memory", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """A cache, given its bytes."""
    if request.param == "memory":
        return lambda most: MemoryCache(max_bytes=most)
    return lambda most: DiskCache(tmp_path / "cache", max_bytes=most)


@pytest.mark.parametrize(("form", "mode"), FORMS)
def test_crops_are_the_same_with_any_cache(form: str, mode: str, tmp_path: Path) -> None:
    """Bit for bit, of images and results of many sizes: none, memory, disk; cold, warm, full."""
    draw = np.random.default_rng(0)
    kept = [MemoryCache(max_bytes=10**8), DiskCache(tmp_path, max_bytes=10**8)]
    reduced = served = 0
    for seed in range(16):
        width, height = (int(side) for side in np.exp(draw.uniform(2.5, 6.5, 2)))
        size = int(np.exp(draw.uniform(1.5, 4.3)))
        transform = light_transform(size=size, mean=(0.0,) * 3, std=(1.0,) * 3)
        data = encoded(width, height, seed, form, mode)
        boxes = [partial(transform.box, draws=draw.random(13, np.float32)) for _ in range(3)]
        for box in [*boxes, everything, lambda w, h: (w // 3, h // 5, w // 3 + 1, h)]:
            expected = decode_crop(data, box, size, max_pixels=PIXELS)
            for cache in (*kept, MemoryCache(max_bytes=0), *kept):
                found = crop(data, box, size, max_pixels=PIXELS, cache=cache)
                np.testing.assert_array_equal(found, expected)
        reduced += min(width, height) >= 4 * size
        served += min(width, height) < 4 * size
    assert min(reduced, served) > 2


def test_what_is_kept_is_not_decoded_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reduced JPEG is not kept, since each crop may be reduced by another factor."""
    cache, large = make(10**7), encoded(800, 800, 0)
    for data in (small(0), large):
        crop(data, everything, 32, max_pixels=PIXELS, cache=cache)

    def refuse(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("protoclip.data.decode.decode_all", refuse)
    crop(small(0), everything, 32, max_pixels=PIXELS, cache=cache)
    with pytest.raises(AssertionError, match="decoded"):
        crop(large, everything, 32, max_pixels=PIXELS, cache=cache)


def test_another_size_or_limit_is_another_entry(make: Make) -> None:
    cache, data = make(10**7), encoded(300, 300, 2)
    for size in (80, 20):
        expected = decode_crop(data, everything, size, max_pixels=PIXELS)
        for _ in range(2):
            found = crop(data, everything, size, max_pixels=PIXELS, cache=cache)
            np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="pixels are more than"):
        crop(data, everything, 80, max_pixels=100, cache=cache)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_every_crop_passes_through_the_small_copy(form: str, make: Make) -> None:
    """With a cache and without, to the bit; also a crop for which the copy has too few pixels."""
    for seed in range(8):
        data, cache = encoded(200 + 30 * seed, 160, seed, form), make(10**7)
        for box in (everything, corner):
            plain = crop(data, box, 32, max_pixels=PIXELS, small_side=64)
            for kept in (MemoryCache(max_bytes=0), cache, cache):
                found = crop(data, box, 32, max_pixels=PIXELS, small_side=64, cache=kept)
                np.testing.assert_array_equal(found, plain)
            exact = decode_crop(data, box, 32, max_pixels=PIXELS)
            assert not np.array_equal(plain, exact)
            assert np.abs(plain.astype(int) - exact).mean() < 8
        # What is kept for small copies is not served without them.
        found = crop(data, everything, 32, max_pixels=PIXELS, cache=cache)
        np.testing.assert_array_equal(found, decode_crop(data, everything, 32, max_pixels=PIXELS))


def stored(number: int) -> Decoded:
    pixels = np.random.default_rng(number).integers(0, 256, (64, 80, 3), np.uint8)
    return Decoded(pixels=pixels, orientation=number % 8 + 1)


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def assert_holds(cache: Cache, number: int) -> None:
    found = cache.get(key(number))
    assert found is not None
    assert found.orientation == stored(number).orientation
    np.testing.assert_array_equal(found.pixels, stored(number).pixels)


def test_the_cache_is_bounded(make: Make) -> None:
    """It keeps what came first."""
    cache = make(5 * 16384)
    for number in range(30):
        cache.put(key(number), stored(number))
    kept = [number for number in range(30) if cache.get(key(number)) is not None]
    assert kept == list(range(len(kept)))
    assert 4 <= len(kept) <= 5
    for number in kept:
        assert_holds(cache, number)


@pytest.mark.parametrize("damage", ["nothing", "junk", "cut", "a pixel", "zeros"])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str) -> None:
    cache = DiskCache(tmp_path, max_bytes=10**6)
    cache.put(key(0), stored(0))
    (path,) = cache.folder.glob("??/*")
    good = path.read_bytes()
    contents = {
        "nothing": b"",
        "junk": b"junk",
        "cut": good[:-7],
        "a pixel": good[:-1] + bytes([good[-1] ^ 1]),
        "zeros": bytes(len(good)),
    }
    path.write_bytes(contents[damage])
    assert cache.get(key(0)) is None
    cache.put(key(0), stored(0))
    assert_holds(cache, 0)


def test_the_folder_may_be_deleted_in_use(tmp_path: Path) -> None:
    """All of it, or replaced by what cannot be written to: crops stay the same."""
    cache = DiskCache(tmp_path / "cache", max_bytes=10**6)
    expected = decode_crop(small(0), everything, 32, max_pixels=PIXELS)
    for last in (False, False, True):
        if last:
            (tmp_path / "cache").write_text("a file where the folder was")
        found = crop(small(0), everything, 32, max_pixels=PIXELS, cache=cache)
        np.testing.assert_array_equal(found, expected)
        assert last or cache.folder.is_dir()
        if not last:
            shutil.rmtree(tmp_path / "cache")


def fill(folder: Path) -> None:
    cache = DiskCache(folder, max_bytes=100_000)
    for number in 3 * [*range(12)]:
        cache.put(key(number), stored(number))


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Three that fill one at once leave whole images, within the bound to one per process."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    cache = DiskCache(tmp_path, max_bytes=100_000)
    files = list(cache.folder.glob("??/*"))
    largest = max(path.stat().st_size for path in files)
    assert sum(path.stat().st_size for path in files) < 100_000 + 3 * largest
    assert all(len(path.name) == 32 for path in files)  # nothing unfinished
    for number in range(12):
        if cache.get(key(number)) is not None:
            assert_holds(cache, number)


def test_a_full_cache_makes_room_for_others_when_it_is_opened_again(tmp_path: Path) -> None:
    """What was used within the hour stays; of the rest the longest unused goes first."""
    cache = DiskCache(tmp_path, max_bytes=100_000)
    for number in range(12):
        cache.put(key(number), stored(number))
    full = sorted(cache.folder.glob("??/*"), key=lambda path: path.name)
    DiskCache(tmp_path, max_bytes=100_000)
    assert sorted(cache.folder.glob("??/*"), key=lambda path: path.name) == full
    held = [number for number in range(12) if cache.get(key(number)) is not None]
    for age, number in enumerate(held):
        path = next(path for path in full if path.name == key(number))
        os.utime(path, (0, 10_000 - age))
    assert cache.get(key(held[-1])) is not None  # used now, though the longest unused before
    cache = DiskCache(tmp_path, max_bytes=100_000)
    cache.put(key(12), stored(12))
    assert_holds(cache, 12)
    assert_holds(cache, held[0])
    assert_holds(cache, held[-1])
    assert cache.get(key(held[-2])) is None
