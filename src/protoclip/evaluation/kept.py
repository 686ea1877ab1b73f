"""Features that evaluation keeps, each by what it was made of, so that it is encoded once.

`features.py` makes them, and `features/store.py` has the form of a folder of features.
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

from protoclip.distributed.collectives import any_rank, rank, rank0_first
from protoclip.features import store
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

    def _use(self, segments: list[store.StoredFeatures]) -> None:
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
        """The features of ids that are kept; raises `ValueError` for damaged ones."""
        return torch.from_numpy(self._segments.rows(self._segments.find(hashes)))

    def add(self, ids: Sequence[str], features: Float[Tensor, "n d"]) -> None:
        """Keep the features of different ids that are not kept yet."""
        if not ids:
            return
        rows = features.numpy()
        segment = self.folder / checksum(json.dumps([*ids]).encode())

        def write() -> None:
            with locked(segment):
                segment.mkdir(exist_ok=True)
                store.write_folder(segment, ids, [rows], {}, dtype=store.FULL)

        self._write(write)
        new = store.StoredFeatures.in_memory(name=str(segment), sample_ids=ids, features=rows)
        self._use([*self._segments.segments, new])

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

    def _write(self, write: Callable[[], None]) -> None:
        """Let the first rank write, unless another process writes the same."""
        if rank() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write()
            except OSError as error:
                say(f"warning: features are not kept ({error})")
            except ValueError:
                pass


def open_whole(folder: Path) -> store.StoredFeatures | None:
    """Features that were kept; None if they are damaged, or another process still writes them."""
    try:
        kept = store.open_folder(folder)
        kept.whole()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept
