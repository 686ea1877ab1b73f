"""Crops of pictures, and decoded pictures that are kept for the next pass.

Kept is only what changes no pixel: a crop is the same to the bit with any cache, cold or warm, full
or deleted, and without one. A picture is known by its bytes, so that one whose file has changed is
another picture. Crops of JPEGs of 512 pixels take half the time from a disk and a third from
memory; JPEGs so large that their crops are decoded at a fraction of their size are not kept.

Small copies are another matter: every crop is then taken from a copy of the picture with a shorter
side of 256 pixels, say, which is less sharp and faster to keep. They are a choice of the run, made
the same way with and without a cache.
"""

import contextlib
import hashlib
import struct
import zlib
from pathlib import Path
from typing import Protocol, runtime_checkable
from uuid import uuid4

import numpy as np
from jaxtyping import UInt8

from protoclip.config import DataConfig
from protoclip.data.decode import (
    ChooseBox,
    Decoded,
    crop_decoded,
    decode,
    decode_all,
    decode_crop,
    dimensions,
    resize,
)
from protoclip.data.index import cache_folder, digest
from protoclip.data.mixture import MixedPairs
from protoclip.data.pairs import ImageTextPairs, Pairs, SampleStream

# Part of the folder name: what an earlier form of the cache left is not read.
CACHE_FORM = "pictures-2"


BLOCK = 4096  # bytes that a file system hands out at a time
# Of a file of pixels: their checksum, height, width and orientation.
HEADER = struct.Struct("<IIII")


@runtime_checkable
class ImageCache(Protocol):
    """Keeps decoded pictures by key, as long as there is room."""

    def get(self, key: str) -> Decoded | None:
        """What is kept under a key, if anything is."""
        ...

    def put(self, key: str, picture: Decoded) -> None:
        """Keep a picture if there is room."""
        ...


def crop(
    encoded: bytes,
    box: ChooseBox,
    size: int,
    *,
    max_pixels: int,
    small_side: int | None = None,
    cache: ImageCache | None = None,
) -> UInt8[np.ndarray, "s s 3"]:
    """A crop of a picture, resized: `decode_crop`, with or without a cache.

    Args:
        encoded: The bytes of the file.
        box: The crop, given the upright picture's width and height, or those of its small copy.
        size: Height and width of the result.
        max_pixels: Pictures of more pixels are refused before they are decoded.
        small_side: Take the crop from a copy of this shorter side; of the picture itself if unset,
            or if it has no more pixels.
        cache: Where decoded pictures are kept; changes no pixel.

    Raises:
        ValueError: As `decode_crop`.
    """
    if cache is None and small_side is None:
        return decode_crop(encoded, box, size, max_pixels=max_pixels)
    # Of everything that says what is kept, and whether the picture is refused.
    settings = f"{small_side} {size} {max_pixels} ".encode()
    key = hashlib.sha256(settings + encoded).hexdigest()[:32] if cache is not None else ""
    picture = cache.get(key) if cache is not None else None
    if picture is None:
        if small_side is not None:
            picture = small_copy(encoded, small_side, max_pixels=max_pixels)
        else:
            picture = decode_all(encoded, size, max_pixels=max_pixels)
        if picture is None:
            return decode_crop(encoded, box, size, max_pixels=max_pixels)
        if cache is not None:
            cache.put(key, picture)
    return crop_decoded(picture, box, size)


def small_copy(encoded: bytes, side: int, *, max_pixels: int) -> Decoded:
    """A picture, upright, with a shorter side of at most so many pixels; raises as `decode`."""
    width, height = dimensions(encoded, max_pixels=max_pixels)
    share = min(1.0, side / min(width, height))
    # A copy made from twice its size is as sharp as one made from all pixels.
    pixels = decode(encoded, max_pixels=max_pixels, at_least=2 * side)
    return Decoded(pixels=resize(pixels, round(height * share), round(width * share)))


class MemoryCache:
    """Pictures in this process's memory, three bytes a pixel.

    Every process has its own: made for loading without worker processes. When it is full it keeps
    what it holds, which serves repeated passes better than keeping what came last.

    Args:
        max_bytes: How much memory the pictures may take.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self.max_bytes, self.used = max_bytes, 0
        self._pictures: dict[str, Decoded] = {}

    def get(self, key: str) -> Decoded | None:
        return self._pictures.get(key)

    def put(self, key: str, picture: Decoded) -> None:
        if key not in self._pictures and self.used + picture.pixels.nbytes <= self.max_bytes:
            self._pictures[key] = picture
            self.used += picture.pixels.nbytes


class DiskCache:
    """Pictures in a folder, which processes may share: three bytes a pixel, with a checksum.

    Give a folder of a memory file system, such as /dev/shm, to keep the pictures of several
    processes in memory.

    Args:
        folder: Where; made when the first picture is written. Any part of it may be deleted any
            time.
        max_bytes: How much of the disk the pictures may take, to about a picture per process. It is
            counted in blocks of 4 KiB as pictures are written; what is deleted counts until a
            process opens a cache that is nearly full, which is then counted again.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        # A byte for each block that is taken: appending is one step for all processes.
        self._tally = self.folder / "blocks"
        if self._used() > 0.9 * max_bytes:
            with contextlib.suppress(OSError):  # another process may delete a file meanwhile
                blocks = sum(_blocks(path.stat().st_size) for path in self.folder.glob("??/*"))
                self._tally.write_bytes(bytes(blocks))

    def get(self, key: str) -> Decoded | None:
        path = self._path(key)
        try:
            stored = path.read_bytes()
        except OSError:
            return None
        if len(stored) >= HEADER.size:
            checksum, height, width, orientation = HEADER.unpack_from(stored)
            pixels = np.frombuffer(stored, np.uint8, offset=HEADER.size)
            whole = len(pixels) == 3 * height * width
            if whole and checksum == _checksum(pixels, height, width, orientation):
                return Decoded(pixels=pixels.reshape(height, width, 3), orientation=orientation)
        # Damaged, by whatever: made again from the original.
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def put(self, key: str, picture: Decoded) -> None:
        size = HEADER.size + picture.pixels.nbytes
        if self._used() + size > self.max_bytes:
            return
        height, width = picture.pixels.shape[:2]
        facts = (height, width, picture.orientation)
        header = HEADER.pack(_checksum(picture.pixels, *facts), *facts)
        path = self._path(key)
        unfinished = path.with_name(f"{path.name}.{uuid4().hex}")
        # Without the file everything works as well, only slower: a full disk or a folder deleted
        # in between is no reason to stop.
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                file.write(header)
                file.write(picture.pixels.data)
            unfinished.replace(path)
            with self._tally.open("ab") as tally:
                tally.write(bytes(_blocks(size)))
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink()

    def _used(self) -> int:
        try:
            return self._tally.stat().st_size * BLOCK
        except OSError:
            return 0

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key


def _checksum(pixels: UInt8[np.ndarray, "..."], *facts: int) -> int:
    return zlib.crc32(pixels.data, zlib.crc32(repr(facts).encode()))


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def image_cache(data: DataConfig, samples: Pairs | SampleStream) -> ImageCache | None:
    """Keeps decoded pictures for repeated passes."""
    most = int(data.cache_gb * 1e9)
    if data.cache == "disk":
        folder = Path(data.cache_folder) if data.cache_folder else cache_folder()
        return DiskCache(folder / CACHE_FORM / identity(samples), max_bytes=most)
    # Memory is a process's own: what one worker keeps, another has to decode.
    keeps = data.cache == "ram" and not data.workers
    return MemoryCache(max_bytes=most) if keeps else None


def identity(samples: Pairs | SampleStream) -> str:
    """A name for a source and its index, each of which has a room of its own in the cache."""
    if isinstance(samples, MixedPairs):
        return digest({"sources": [identity(source) for source in samples.sources]})
    key = samples.key if isinstance(samples, ImageTextPairs) else ""
    return digest({"name": samples.name, "index": key or None})
