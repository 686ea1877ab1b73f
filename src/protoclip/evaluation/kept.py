"""Features that evaluation keeps, each by what it was made of, so that it is encoded once.

`features.py` makes them, and `encode/store.py` has the form of a folder of features.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.distributed.collectives import any_rank, rank0_first
from protoclip.encode import store
from protoclip.encode.store import FACTS, FULL, Hashes, Segments, StoredFeatures
from protoclip.files import checksum, locked, read_sealed, sealed, to_json, write_atomically
from protoclip.terminal import say

Bad = tuple[int, str]  # the row of an image that cannot be used, and why
VERIFIED = set[tuple[Path, int]]()  # segments that this process has read whole, with their time


@dataclass(frozen=True, kw_only=True)
class Listed:
    """What a list of images or texts has, as it was when all of it was kept.

    Attributes:
        hashes: Of the ids by which the good ones are kept, in their order.
        content: Of images, 64 bits for each good one.
        bad: The bad ones.
    """

    hashes: Hashes
    content: npt.NDArray[np.int64]
    bad: Sequence[Bad] = ()


class Kept:
    """The features that a model made of images, or of texts, in a folder, by their ids.

    All ranks make one together, and call it with the same arguments. What cannot be written is kept
    in memory alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._writable = folder, True
        entries = folder.glob("[!.]*")
        names = rank0_first(lambda: sorted(path.name for path in entries if path.is_dir()))
        opened = [segment_of(folder / name) for name in names]
        missing = any_rank([segment is None for segment in opened])
        self._use(
            [one for one, is_none in zip(opened, missing, strict=True) if one and not is_none]
        )

    def _use(self, segments: Sequence[StoredFeatures]) -> None:
        self._segments = Segments(segments, segments[0].width if segments else 0)

    def hashes(self) -> Hashes:
        """Those of all ids, the least first."""
        self._verify(lambda segment: True)
        parts = [segment.hashes for segment in self._segments.segments]
        return np.sort(np.concatenate(parts)) if parts else np.empty(0, np.uint64)

    def has(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Whether the features of each id are kept, by its hash."""
        self._verify(lambda segment: bool((segment.find_hashes(hashes) >= 0).any()))
        return self._segments.find(hashes) >= 0

    def features(self, hashes: Hashes) -> Float[Tensor, "n d"]:
        """The features of ids that are kept, mapped into memory if they lie in this order.

        Raises:
            ValueError: One was damaged since `has` found it.
        """
        numbers, segments = self._segments.find(hashes), self._segments
        for segment, start in zip(segments.segments, segments.starts, strict=False):
            if np.array_equal(numbers, np.arange(start, start + len(segment.features))):
                return torch.from_numpy(segment.features)
        return torch.from_numpy(segments.rows(hashes))

    def add(self, ids: Sequence[str], features: Float[Tensor, "n d"]) -> None:
        """Keep the features of different ids that are not kept yet."""
        if not ids:
            return
        rows, folder = features.numpy(), self.folder / checksum(json.dumps([*ids]).encode())

        def write() -> None:
            with locked(folder):
                folder.mkdir(exist_ok=True)
                store.write_folder(folder, ids, [rows], {}, dtype=FULL)

        self._write(write)
        new = StoredFeatures.in_memory(name=str(folder), sample_ids=ids, features=rows)
        self._use([*self._segments.segments, new])

    def read_list(self, name: str) -> Listed | None:
        """What a list had when it was last seen whole; None if that is not known."""

        def read() -> Listed | None:
            try:
                listed = read_sealed(self._path(name))
                hashes, content = (bytearray.fromhex(listed[x]) for x in ("hashes", "content"))
                return Listed(
                    hashes=np.frombuffer(hashes, np.uint64),
                    content=np.frombuffer(content, np.int64),
                    bad=[(row, why) for row, why in listed["bad"]],
                )
            except store.DAMAGED:
                return None

        return rank0_first(read)

    def write_list(self, name: str, listed: Listed) -> None:
        hashes, content = (one.tobytes().hex() for one in (listed.hashes, listed.content))
        sealing = sealed({"hashes": hashes, "content": content, "bad": listed.bad})
        self._write(lambda: write_atomically(self._path(name), to_json(sealing) + "\n"))

    def _path(self, name: str) -> Path:
        return self.folder / f"{checksum(name.encode())}.json"

    def _verify(self, wanted: Callable[[StoredFeatures], bool]) -> None:
        """Forget those of the wanted segments that are damaged; each is read once a process."""
        segments = self._segments.segments
        damaged = any_rank([wanted(segment) and not is_whole(segment) for segment in segments])
        if any(damaged):
            self._use([one for one, bad in zip(segments, damaged, strict=True) if not bad])

    def _write(self, write: Callable[[], object]) -> None:
        """Let the first rank write, unless another process writes the same; the others wait."""

        def try_to() -> None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write()
            except OSError as error:
                say(f"warning: features are not kept ({error})")
                self._writable = False  # once is enough
            except ValueError:
                pass

        rank0_first(try_to if self._writable else lambda: None)


def segment_of(folder: Path) -> StoredFeatures | None:
    """The features in a folder; None if they are damaged, or another process still writes them."""
    try:
        return store.open_folder(folder, mode="c")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_whole(segment: StoredFeatures) -> bool:
    """Whether features are what was written, or were never written."""
    if segment.checksums is None:
        return True
    try:
        folder = Path(segment.name)
        file = folder, (folder / FACTS).stat().st_mtime_ns
        if file not in VERIFIED:
            segment.whole()
            VERIFIED.add(file)
    except (OSError, ValueError):
        return False
    return True
