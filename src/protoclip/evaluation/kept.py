"""Features that evaluation keeps, each by what it was made of, so that it is encoded once.

`features.py` makes them, and `features/store.py` has the form of a folder of features.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.distributed.collectives import any_rank, rank, rank0_first
from protoclip.features import store
from protoclip.features.whiten import Features
from protoclip.files import checksum, locked, read_sealed, sealed, to_json, write_atomically
from protoclip.terminal import say

Bad = tuple[int, str]  # the row of an image that cannot be used, and why


@dataclass(frozen=True, kw_only=True)
class Listed:
    """What is in a list of images or texts: 64 bits for each good one, and the bad ones."""

    keys: npt.NDArray[np.int64]
    bad: Sequence[Bad] = ()


class Kept:
    """The features that a model made of images, or of texts, in a folder, by their ids.

    All ranks make one together, and call it with the same arguments. What cannot be written is kept
    in memory alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = rank0_first(lambda: sorted(path.name for path in folder.glob("[!.]*")))
        opened = [open_whole(folder / name) for name in names]
        damaged = any_rank([segment is None for segment in opened])
        self._use([one for one, bad in zip(opened, damaged, strict=True) if one and not bad])
        self._added: list[tuple[Path, Sequence[str]]] = []

    def _use(self, segments: Sequence[store.StoredFeatures]) -> None:
        self._segments = store.Segments(segments, segments[0].width if segments else 0)

    @property
    def hashes(self) -> store.Hashes:
        """Those of all ids, the least first."""
        parts = [segment.hashes for segment in self._segments.segments]
        return np.sort(np.concatenate(parts)) if parts else np.empty(0, np.uint64)

    def has(self, hashes: store.Hashes) -> npt.NDArray[np.bool_]:
        """Whether the features of each id are kept, by its hash."""
        return self._segments.find(hashes) >= 0

    def features(self, hashes: store.Hashes) -> Float[Tensor, "n d"]:
        """The features of ids that are kept, mapped into memory if they lie there in this order.

        Raises:
            ValueError: Some are damaged.
        """
        numbers = self._segments.find(hashes)
        for segment, start in zip(self._segments.segments, self._segments.starts, strict=False):
            if np.array_equal(numbers, np.arange(start, start + len(segment.features))):
                return torch.from_numpy(segment.features)
        return torch.from_numpy(self._segments.rows(numbers))

    def add(self, ids: Sequence[str], features: Float[Tensor, "n d"]) -> None:
        """Keep the features of different ids that are not kept yet."""
        if not ids:
            return
        rows = features.numpy()
        folder = self._write_segment(ids, [rows])
        new = store.StoredFeatures.in_memory(name=str(folder), sample_ids=ids, features=rows)
        self._use([*self._segments.segments, new])
        self._added.append((folder, ids))

    def merge(self) -> None:
        """Make one segment of those that were added here, which is mapped from then on."""
        if not self._added:
            return
        before, number = self._segments.segments, len(self._added)
        folders = [folder for folder, _ in self._added]
        merged = folders[0]
        if number > 1:
            ids = [one for _, of_segment in self._added for one in of_segment]
            merged = self._write_segment(ids, [segment.features for segment in before[-number:]])
        mapped = open_whole(merged)
        if any_rank([mapped is None])[0] or mapped is None:
            return
        self._use([*before[:-number], mapped])
        self._added = []
        if number > 1 and rank() == 0:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)

    def _write_segment(self, ids: Sequence[str], blocks: Sequence[Features]) -> Path:
        folder = self.folder / checksum(json.dumps([*ids]).encode())

        def write() -> None:
            with locked(folder):
                folder.mkdir(exist_ok=True)
                store.write_folder(folder, ids, blocks, {}, dtype=store.FULL)

        self._write(write)
        return folder

    def read_list(self, name: str) -> Listed | None:
        """What a list had when it was last seen whole; None if that is not known."""

        def read() -> Listed | None:
            try:
                listed = read_sealed(self._path(name))
                keys = np.frombuffer(bytearray.fromhex(listed["keys"]), np.int64)
                return Listed(keys=keys, bad=[(row, why) for row, why in listed["bad"]])
            except store.DAMAGED:
                return None

        return rank0_first(read)

    def write_list(self, name: str, listed: Listed) -> None:
        content = sealed({"keys": listed.keys.tobytes().hex(), "bad": listed.bad})
        self._write(lambda: write_atomically(self._path(name), to_json(content) + "\n"))

    def _path(self, name: str) -> Path:
        return self.folder / f".{checksum(name.encode())}.json"

    def _write(self, write: Callable[[], object]) -> None:
        """Let the first rank write, unless another process writes the same; the others wait."""

        def try_to() -> None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write()
            except OSError as error:
                say(f"warning: features are not kept ({error})")
            except ValueError:
                pass

        rank0_first(try_to)


def open_whole(folder: Path) -> store.StoredFeatures | None:
    """Features that were kept; None if they are damaged, or another process still writes them."""
    try:
        kept = store.open_folder(folder, mode="c")
        kept.whole()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept
