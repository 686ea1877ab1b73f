"""Small copies of pictures, for data that is read many times.

A copy has a shorter side of 256 pixels, say: a crop of one from a disk cache takes about 0.6 of the
time that a crop of a 512-pixel JPEG takes, from memory a tenth. What a crop looks like does not
depend on whether its copy was there: without one, it is made and used the same way. So a cache may
be emptied or deleted at any time, and a resumed run sees the same pixels.
"""

import contextlib
import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from protoclip.data.decode import ChooseBox, crop_resize, decode, decode_crop, dimensions, resize

T = TypeVar("T")
Pixels = UInt8[np.ndarray, "h w 3"]
BLOCK = 4096  # bytes that a file system hands out at a time


class ImageCache(ABC):
    """What the two caches share: when a copy serves, and how it is made.

    Args:
        side: Pixels of a copy's shorter side; smaller pictures are copied at their size. A crop
            is taken from a copy only if it covers at least the pixels of the result there.
    """

    def __init__(self, *, side: int) -> None:
        self.side = side

    @abstractmethod
    def dimensions(self, sample_id: str) -> tuple[int, int] | None:
        """Width and height of a sample's copy, if it is kept."""

    @abstractmethod
    def get(self, sample_id: str) -> Pixels | None:
        """The copy of a sample's picture, if it is kept."""

    @abstractmethod
    def put(self, sample_id: str, pixels: Pixels) -> Pixels:
        """Keep a copy if there is room; returns it as `get` would."""

    def crop(
        self,
        sample_id: str,
        read: Callable[[], bytes],
        box: ChooseBox,
        size: int,
        *,
        max_pixels: int,
    ) -> UInt8[np.ndarray, "s s 3"]:
        """As `decode_crop` of `read()`, from a copy where it serves.

        The box is asked for in the pixels of what is cropped.

        Raises:
            ValueError: As `decode_crop`.
        """
        encoded = None
        kept = self.dimensions(sample_id)
        if kept is None:
            encoded = read()
            kept = self._copy_size(*dimensions(encoded, max_pixels=max_pixels))
        width, height = kept
        if not self._serves(width, height, box, size):
            return decode_crop(encoded or read(), box, size, max_pixels=max_pixels)
        copy = self.get(sample_id)
        if copy is None:
            # A copy made from twice its size is as sharp as one made from all pixels.
            whole = decode(encoded or read(), max_pixels=max_pixels, at_least=2 * self.side)
            copy = self.put(sample_id, resize(whole, height, width))
        return crop_resize(copy, box(width, height), size)

    def _copy_size(self, width: int, height: int) -> tuple[int, int]:
        share = min(1.0, self.side / min(width, height))
        return round(width * share), round(height * share)

    def _serves(self, width: int, height: int, box: ChooseBox, size: int) -> bool:
        left, top, right, bottom = box(width, height)
        whole = min(width, height) < self.side  # a copy of all that there is
        return whole or min(right - left, bottom - top) >= size


class MemoryCache(ImageCache):
    """Copies in this process's memory, three bytes a pixel.

    Every process has its own: made for loading without worker processes. When it is full it keeps
    what it holds, which serves repeated passes better than keeping what came last.

    Args:
        side: See `ImageCache`.
        max_bytes: How much memory the copies may take.
    """

    def __init__(self, *, side: int = 256, max_bytes: int) -> None:
        super().__init__(side=side)
        self.max_bytes, self.used = max_bytes, 0
        self._copies: dict[str, Pixels] = {}

    def dimensions(self, sample_id: str) -> tuple[int, int] | None:
        copy = self._copies.get(sample_id)
        return None if copy is None else (copy.shape[1], copy.shape[0])

    def get(self, sample_id: str) -> Pixels | None:
        return self._copies.get(sample_id)

    def put(self, sample_id: str, pixels: Pixels) -> Pixels:
        if sample_id not in self._copies and self.used + pixels.nbytes <= self.max_bytes:
            self._copies[sample_id] = pixels.copy()
            self.used += pixels.nbytes
        return pixels


class DiskCache(ImageCache):
    """Copies in a folder, which processes may share: JPEG of quality 95, PNG of small pictures.

    One folder serves one data set: samples are told apart by their id alone. Give a folder of a
    memory file system, such as /dev/shm, to keep the copies of several processes in memory.

    Args:
        folder: Where; made when the first copy is written. Any part of it may be deleted any time.
        side: See `ImageCache`; copies of another side do not meet these.
        max_bytes: How much of the disk the copies may take, to about a copy per process. It is
            counted in blocks of 4 KiB as copies are written; what is deleted counts until a
            process opens a cache that is nearly full, which is then counted again.
    """

    def __init__(self, folder: Path, *, side: int = 256, max_bytes: int) -> None:
        super().__init__(side=side)
        self.folder, self.max_bytes = folder / str(side), max_bytes
        # A byte for each block that is taken: appending is one step for all processes.
        self._tally = self.folder / "blocks"
        if self._used() > 0.9 * max_bytes:
            blocks = sum(_blocks(path.stat().st_size) for path in self.folder.glob("??/*"))
            self._tally.write_bytes(bytes(blocks))

    def dimensions(self, sample_id: str) -> tuple[int, int] | None:
        return self._read(sample_id, partial(dimensions, max_pixels=2**31))

    def get(self, sample_id: str) -> Pixels | None:
        return self._read(sample_id, partial(decode, max_pixels=2**31))

    def _read(self, sample_id: str, use: Callable[[bytes], T]) -> T | None:
        path = self._path(sample_id)
        try:
            return use(path.read_bytes())
        except OSError:
            return None
        except ValueError:  # damaged, by whatever: made again from the original
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def put(self, sample_id: str, pixels: Pixels) -> Pixels:
        buffer = io.BytesIO()
        if min(pixels.shape[:2]) < self.side:
            # An enlarged crop would show what JPEG does to a small picture.
            Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        else:
            # With colour at full resolution: at half of it, thin coloured lines would suffer.
            Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
        encoded = buffer.getvalue()
        if self._used() + len(encoded) <= self.max_bytes:
            path = self._path(sample_id)
            unfinished = path.with_name(f"{path.name}.{uuid4().hex}")
            # Without the copy everything works as well, only slower: a full disk or a folder
            # deleted in between is no reason to stop.
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished.write_bytes(encoded)
                unfinished.replace(path)
                with self._tally.open("ab") as tally:
                    tally.write(bytes(_blocks(len(encoded))))
            except OSError:
                with contextlib.suppress(OSError):
                    unfinished.unlink()
        return decode(encoded, max_pixels=2**31)

    def _used(self) -> int:
        try:
            return self._tally.stat().st_size * BLOCK
        except OSError:
            return 0

    def _path(self, sample_id: str) -> Path:
        name = hashlib.sha256(sample_id.encode()).hexdigest()
        return self.folder / name[:2] / name[2:34]


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
