"""Crops of images, and decoded images that are kept for the next pass.

A crop is the same to the bit with any cache and without one. An image is known by its bytes, so a
file that changes is another image. JPEGs so large that their crops are decoded at a fraction of
their size are not kept.
"""

import contextlib
import hashlib
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np

from protoclip.config import DataConfig
from protoclip.data import decode
from protoclip.data.access import digest
from protoclip.data.decode import ChooseBox, Decoded, Square
from protoclip.data.index import cache_folder
from protoclip.files import write_atomically

# Part of the folder's name, so that caches of another form are not read.
CACHE_FORM = "images-3"
# Before the pixels in a file: a checksum of all that follows it, height, width, orientation.
HEADER = struct.Struct("<IIII")
# Share of the limit that is left when a full cache is opened, but for images used more recently.
ROOM, UNUSED_SECONDS = 0.8, 3600.0
BLOCK = 4096  # bytes that a file system allocates at a time


def crop(
    encoded: bytes,
    box: ChooseBox,
    size: int,
    *,
    max_pixels: int,
    small_side: int | None = None,
    cache: "MemoryCache | DiskCache | None" = None,
) -> Square:
    """`decode_crop` with a cache, or from a copy of the image whose shorter side is `small_side`.

    `box` is then given the width and height of the copy. Smaller images are taken as they are.
    """
    image, key = None, ""
    if cache is not None:
        # The settings decide what is kept, and whether the image is refused.
        settings = f"{small_side} {size} {max_pixels} ".encode()
        key = hashlib.sha256(settings + encoded).hexdigest()[:32]
        image = cache.get(key)
    if image is None:
        if small_side is not None:
            image = small_copy(encoded, small_side, max_pixels=max_pixels)
        elif cache is not None:
            image = decode.decode_all(encoded, size, max_pixels=max_pixels)
        if image is None:
            return decode.decode_crop(encoded, box, size, max_pixels=max_pixels)
        if cache is not None:
            cache.put(key, image)
    return decode.crop_decoded(image, box, size)


def small_copy(encoded: bytes, side: int, *, max_pixels: int) -> Decoded:
    """An upright copy whose shorter side has at most `side` pixels; raises as `decode_crop`."""
    width, height = decode.dimensions(encoded, max_pixels=max_pixels)
    share = min(1.0, side / min(width, height))
    # A copy made from twice its size is as sharp as one made from all pixels.
    pixels = decode.decode(encoded, max_pixels=max_pixels, at_least=2 * side)
    return Decoded(pixels=decode.resize(pixels, round(height * share), round(width * share)))


class MemoryCache:
    """Images in the memory of this process, three bytes a pixel; when full it keeps what it has."""

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
        max_bytes: Disk space to use, up to about one image per process more. A full cache keeps
            what it has until it is opened again: then images that were not used for an hour, such
            as those of other settings, make room, the longest unused first.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        # One byte for each block in use: an append is atomic over all processes.
        self._tally = folder / "blocks"
        if self._used() > 0.9 * max_bytes:
            with contextlib.suppress(OSError):  # another process may delete a file meanwhile
                self._make_room()

    def _make_room(self) -> None:
        status = [(path.stat(), path) for path in self.folder.glob("??/*")]
        files = sorted((each.st_mtime, _blocks(each.st_size), path) for each, path in status)
        used = sum(blocks for _, blocks, _ in files)
        for last_used, blocks, path in files:
            if used * BLOCK <= ROOM * self.max_bytes or time.time() - last_used < UNUSED_SECONDS:
                break
            path.unlink(missing_ok=True)
            used -= blocks
        self._tally.write_bytes(bytes(used))

    def get(self, key: str) -> Decoded | None:
        with contextlib.suppress(OSError, struct.error):
            stored = self._path(key).read_bytes()
            checksum, *shape, orientation = HEADER.unpack_from(stored)
            if checksum == zlib.crc32(memoryview(stored)[4:]):
                with contextlib.suppress(OSError):  # that of somebody else
                    os.utime(self._path(key))
                pixels = np.frombuffer(stored, np.uint8, offset=HEADER.size)
                return Decoded(pixels=pixels.reshape(*shape, 3), orientation=orientation)
        return None  # if damaged, it is made again from the original

    def put(self, key: str, image: Decoded) -> None:
        content = HEADER.pack(0, *image.pixels.shape[:2], image.orientation)[4:]
        content += image.pixels.tobytes()
        content = zlib.crc32(content).to_bytes(4, "little") + content
        if self._used() + len(content) > self.max_bytes:
            return
        path = self._path(key)
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


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def image_cache(data: DataConfig, name: str, *, workers: int) -> MemoryCache | DiskCache | None:
    """The cache that `data.cache` names, for the source of this name, or none."""
    max_bytes = int(data.cache_gb * 1e9)
    if data.cache == "disk":
        folder = Path(data.cache_folder) if data.cache_folder else cache_folder()
        return DiskCache(folder / CACHE_FORM / digest({"name": name}), max_bytes=max_bytes)
    # Workers do not share memory: what one of them keeps, the others decode again.
    return MemoryCache(max_bytes=max_bytes) if data.cache == "ram" and not workers else None
