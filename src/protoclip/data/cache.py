"""Crops of images, and decoded images that are kept for the next pass.

A crop is the same to the bit with any cache and without one. An image is known by its bytes, so a
file that changes is another image. JPEGs so large that their crops are decoded at a fraction of
their size are not kept. Small copies, from which crops can be taken, do change pixels; they are the
same with a cache and without.
"""

import contextlib
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np

from protoclip.config import DataConfig
from protoclip.data.access import digest
from protoclip.data.decode import (
    ChooseBox,
    Decoded,
    Square,
    crop_decoded,
    decode,
    decode_all,
    decode_crop,
    dimensions,
    resize,
)
from protoclip.data.index import cache_folder
from protoclip.data.mixture import MixedPairs
from protoclip.data.pairs import ImageTextPairs, Pairs, SampleStream
from protoclip.files import write_atomically

# Part of the folder's name, so that caches of another form are not read.
CACHE_FORM = "images-3"
# Before the pixels in a file: their checksum with the rest, then height, width, orientation.
CHECKSUM, SHAPE = struct.Struct("<I"), struct.Struct("<III")
BLOCK = 4096  # bytes that a file system allocates at a time


def crop(
    encoded: bytes,
    box: ChooseBox,
    size: int,
    *,
    max_pixels: int,
    small_side: int | None = None,
    cache: "ImageCache | None" = None,
) -> Square:
    """`decode_crop` with a cache, or from a copy of the image whose shorter side is `small_side`.

    `box` is then given the width and height of the copy. Smaller images are taken as they are.
    """
    if cache is None and small_side is None:
        return decode_crop(encoded, box, size, max_pixels=max_pixels)
    image, key = None, ""
    if cache is not None:
        # The settings decide what is kept, and whether the image is refused.
        settings = f"{small_side} {size} {max_pixels} ".encode()
        key = hashlib.sha256(settings + encoded).hexdigest()[:32]
        image = cache.get(key)
    if image is None:
        if small_side is not None:
            image = small_copy(encoded, small_side, max_pixels=max_pixels)
        else:
            image = decode_all(encoded, size, max_pixels=max_pixels)
        if image is None:
            return decode_crop(encoded, box, size, max_pixels=max_pixels)
        if cache is not None:
            cache.put(key, image)
    return crop_decoded(image, box, size)


def small_copy(encoded: bytes, side: int, *, max_pixels: int) -> Decoded:
    """An upright copy whose shorter side has at most `side` pixels; raises as `decode_crop`."""
    width, height = dimensions(encoded, max_pixels=max_pixels)
    share = min(1.0, side / min(width, height))
    # A copy made from twice its size is as sharp as one made from all pixels.
    pixels = decode(encoded, max_pixels=max_pixels, at_least=2 * side)
    return Decoded(pixels=resize(pixels, round(height * share), round(width * share)))


class MemoryCache:
    """Images in the memory of this process, three bytes a pixel, up to `max_bytes`.

    When it is full it keeps what it has: with repeated passes that serves more requests than
    keeping the latest.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self.max_bytes, self.used = max_bytes, 0
        self._images: dict[str, Decoded] = {}

    def get(self, key: str) -> Decoded | None:
        return self._images.get(key)

    def put(self, key: str, image: Decoded) -> None:
        if key not in self._images and self.used + image.pixels.nbytes <= self.max_bytes:
            self._images[key] = image
            self.used += image.pixels.nbytes


class DiskCache:
    """Images in a folder that processes share, three bytes a pixel, each with a checksum.

    Args:
        folder: Made when the first image is written. Any part of it may be deleted at any time.
        max_bytes: Disk space to use, up to about one image per process more. Deleted images count
            until a process opens a cache that is nearly full and counts it again.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        # One byte for each block in use: an append is atomic over all processes.
        self._tally = folder / "blocks"
        if self._used() > 0.9 * max_bytes:
            with contextlib.suppress(OSError):  # another process may delete a file meanwhile
                blocks = sum(_blocks(path.stat().st_size) for path in folder.glob("??/*"))
                self._tally.write_bytes(bytes(blocks))

    def get(self, key: str) -> Decoded | None:
        path = self._path(key)
        try:
            stored = path.read_bytes()
        except OSError:
            return None
        body = memoryview(stored)[CHECKSUM.size :]
        if len(body) > SHAPE.size and CHECKSUM.unpack_from(stored)[0] == zlib.crc32(body):
            height, width, orientation = SHAPE.unpack_from(body)
            pixels = np.frombuffer(body, np.uint8, offset=SHAPE.size).reshape(height, width, 3)
            return Decoded(pixels=pixels, orientation=orientation)
        with contextlib.suppress(OSError):
            path.unlink()  # damaged: it is made again from the original
        return None

    def put(self, key: str, image: Decoded) -> None:
        body = SHAPE.pack(*image.pixels.shape[:2], image.orientation) + image.pixels.tobytes()
        content, path = CHECKSUM.pack(zlib.crc32(body)) + body, self._path(key)
        if self._used() + len(content) > self.max_bytes:
            return
        # A full disk, or a folder deleted meanwhile, costs time but is no reason to stop.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
            with self._tally.open("ab") as tally:
                tally.write(bytes(_blocks(len(content))))

    def _used(self) -> int:
        return self._tally.stat().st_size * BLOCK if self._tally.is_file() else 0

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key


ImageCache = MemoryCache | DiskCache


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def image_cache(data: DataConfig, samples: Pairs | SampleStream) -> ImageCache | None:
    """The cache that `data.cache` names, or none."""
    max_bytes = int(data.cache_gb * 1e9)
    if data.cache == "disk":
        folder = Path(data.cache_folder) if data.cache_folder else cache_folder()
        return DiskCache(folder / CACHE_FORM / identity(samples), max_bytes=max_bytes)
    # Workers do not share memory: what one of them keeps, the others decode again.
    return MemoryCache(max_bytes=max_bytes) if data.cache == "ram" and not data.workers else None


def identity(samples: Pairs | SampleStream) -> str:
    """A name for a source and its index, which is the name of its folder in the cache."""
    if isinstance(samples, MixedPairs):
        return digest({"sources": [identity(source) for source in samples.sources]})
    key = samples.key if isinstance(samples, ImageTextPairs) else ""
    return digest({"name": samples.name, "index": key or None})
