"""The cache of small copies: the same pixels with and without it, bounded, and safe to delete."""

import io
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from protoclip.data.cache import DiskCache, ImageCache, MemoryCache
from protoclip.data.decode import decode_crop

PIXELS = 10**8
Make = Callable[[int], ImageCache]


def jpeg(seed: int, width: int = 200, height: int = 160) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


def whole(width: int, height: int) -> tuple[int, int, int, int]:
    return (0, 0, width, height)


def corner(width: int, height: int) -> tuple[int, int, int, int]:
    return (0, 0, width // 4, height // 4)


def unread() -> bytes:
    raise AssertionError("read although there is a copy")


def crop(cache: ImageCache, seed: int, size: int = 32) -> np.ndarray:
    return cache.crop(str(seed), lambda: jpeg(seed), whole, size, max_pixels=PIXELS)


@pytest.fixture(params=["memory", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """A cache of copies of side 64, given its bytes."""
    if request.param == "memory":
        return lambda most: MemoryCache(side=64, max_bytes=most)
    return lambda most: DiskCache(tmp_path / "cache", side=64, max_bytes=most)


def test_a_crop_is_the_same_with_and_without_its_copy(make: Make) -> None:
    """Bitwise: on the first visit, on later ones without the original, and with a full cache."""
    cache, full = make(10**6), MemoryCache(side=64, max_bytes=0)
    first = crop(cache, 0)
    again = cache.crop("0", unread, whole, 32, max_pixels=PIXELS)
    np.testing.assert_array_equal(first, again)
    if isinstance(cache, MemoryCache):
        np.testing.assert_array_equal(first, crop(full, 0))
    exact = decode_crop(jpeg(0), whole, 32, max_pixels=PIXELS)
    assert np.abs(first.astype(int) - exact).mean() < 3


def test_copies_have_the_side_and_the_shape(make: Make) -> None:
    """The shorter side is the cache's; a picture without so many pixels keeps its own."""
    cache = make(10**6)
    crop(cache, 0)
    copy = cache.get("0")
    assert copy is not None
    assert copy.shape == (64, 80, 3)
    small = jpeg(1, 48, 40)
    cache.crop("small", lambda: small, corner, 32, max_pixels=PIXELS)
    copy = cache.get("small")
    assert copy is not None
    assert copy.shape == (40, 48, 3)
    np.testing.assert_array_equal(  # without loss
        cache.crop("small", unread, corner, 32, max_pixels=PIXELS),
        decode_crop(small, corner, 32, max_pixels=PIXELS),
    )


def test_a_crop_with_too_few_pixels_bypasses_the_copy(make: Make) -> None:
    """Where the copy would have to be enlarged, the original is cropped, copy or no copy."""
    cache = make(10**6)
    expected = decode_crop(jpeg(0), corner, 32, max_pixels=PIXELS)
    bypass = cache.crop("0", lambda: jpeg(0), corner, 32, max_pixels=PIXELS)
    np.testing.assert_array_equal(bypass, expected)
    assert cache.get("0") is None
    crop(cache, 0)
    bypass = cache.crop("0", lambda: jpeg(0), corner, 32, max_pixels=PIXELS)
    np.testing.assert_array_equal(bypass, expected)


def test_the_cache_is_bounded(make: Make) -> None:
    """It keeps what came first, and what does not fit is made each time."""
    cache = make(5 * 64 * 80 * 3)
    for seed in range(30):
        crop(cache, seed)
    kept = [seed for seed in range(30) if cache.get(str(seed)) is not None]
    assert kept == list(range(len(kept)))
    assert 1 <= len(kept) < 30
    if isinstance(cache, MemoryCache):
        assert len(kept) == 5
    else:
        files = list(cache.folder.glob("??/*"))
        assert len(files) == len(kept)
        assert sum(path.stat().st_size for path in files) <= 5 * 64 * 80 * 3


def test_bad_bytes_raise_as_without_a_cache(make: Make) -> None:
    cache = make(10**6)
    with pytest.raises(ValueError, match="truncated"):
        cache.crop("0", lambda: jpeg(0)[:-2], whole, 32, max_pixels=PIXELS)
    with pytest.raises(ValueError, match="200 x 160 pixels"):
        cache.crop("0", lambda: jpeg(0), whole, 32, max_pixels=100)
    assert cache.get("0") is None


@pytest.mark.parametrize("damage", [b"", b"junk", b"\xff\xd8\xff\xe0 half a picture"])
def test_a_damaged_copy_is_made_again(tmp_path: Path, damage: bytes) -> None:
    cache = DiskCache(tmp_path, side=64, max_bytes=10**6)
    expected = crop(cache, 0)
    (path,) = cache.folder.glob("??/*")
    path.write_bytes(damage)
    np.testing.assert_array_equal(crop(cache, 0), expected)
    np.testing.assert_array_equal(cache.crop("0", unread, whole, 32, max_pixels=PIXELS), expected)


def test_the_folder_may_be_deleted_in_use(tmp_path: Path) -> None:
    """Wholly, in part, or turned into what cannot be written to: pixels stay the same."""
    cache = DiskCache(tmp_path / "cache", side=64, max_bytes=10**6)
    expected = [crop(cache, seed) for seed in range(4)]
    shutil.rmtree(tmp_path / "cache")
    np.testing.assert_array_equal([crop(cache, seed) for seed in range(4)], expected)
    next(cache.folder.glob("??/*")).unlink()
    np.testing.assert_array_equal([crop(cache, seed) for seed in range(4)], expected)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the folder was")
    np.testing.assert_array_equal([crop(cache, seed) for seed in range(4)], expected)


def test_what_was_deleted_makes_room_for_a_new_process(tmp_path: Path) -> None:
    """A cache that is full when it is opened counts what is really there."""
    cache = DiskCache(tmp_path, side=64, max_bytes=100_000)
    for seed in range(30):
        crop(cache, seed)
    assert cache.get("29") is None
    for path in cache.folder.glob("??/*"):
        path.unlink()
    crop(DiskCache(tmp_path, side=64, max_bytes=100_000), 29)
    assert cache.get("29") is not None


def test_copies_of_another_side_are_kept_apart(tmp_path: Path) -> None:
    crop(DiskCache(tmp_path, side=64, max_bytes=10**6), 0)
    assert DiskCache(tmp_path, side=96, max_bytes=10**6).get("0") is None


def fill(folder: Path) -> None:
    cache = DiskCache(folder, side=64, max_bytes=40_000)
    for _ in range(3):
        for seed in range(12):
            crop(cache, seed)


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Three that fill one at once leave whole copies, within the bound to a copy per process."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    cache = DiskCache(tmp_path, side=64, max_bytes=40_000)
    files = list(cache.folder.glob("??/*"))
    largest = max(path.stat().st_size for path in files)
    assert sum(path.stat().st_size for path in files) < 40_000 + 3 * largest
    assert all(len(path.name) == 32 for path in files)  # nothing unfinished
    for seed in range(12):
        if cache.get(str(seed)) is not None:
            np.testing.assert_array_equal(
                crop(cache, seed), crop(DiskCache(tmp_path / "new", side=64, max_bytes=0), seed)
            )
