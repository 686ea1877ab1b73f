"""Where features of frozen models are encoded to, once, whoever asks, and found by id."""

import math
import os
import weakref
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, reduce
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from protoclip.distributed.collectives import gather_results, rank0_first, wait_to_see
from protoclip.encode.linear_maps import Features
from protoclip.files import lock_path, naming, write_atomically
from protoclip.terminal import say

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]

HALF, FULL = "<f2", "<f4"  # how features are stored
BLOCK_ROWS = 2**12  # that a store writes at once
VOLUME_ROWS = 2**22  # which are lost together if a file is damaged
KEPT_BYTES = 2**28  # of `StoredRows`, up to which memory keeps them
ROW = np.dtype([("hash", "<u8"), ("checksum", "<u4")])
ENGINES = "engines.txt"  # what computed the features, besides PyTorch
FEATURES_END, ROWS_END = ".features", ".rows"  # of a volume's files


def hash_ids(sample_ids: Iterable[str]) -> Hashes:
    """64 bits of BLAKE2b for each id."""
    return np.fromiter((hash_bytes(sample_id.encode()) for sample_id in sample_ids), np.uint64)


def hash_bytes(data: bytes) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def find_rows(hashes: Hashes, ascending: Hashes, rows: Numbers) -> Numbers:
    """The row of each hash, by hashes in ascending order and their rows; or -1."""
    found = np.full(len(hashes), -1, np.int64)
    if len(ascending):
        # A search in ascending order reuses the processor's caches: ten times as fast.
        order = np.argsort(hashes, kind="stable")
        wanted = hashes[order]
        position = np.searchsorted(ascending, wanted, side="right") - 1
        is_known = ascending[position] == wanted  # -1 is the last one, another
        found[order[is_known]] = rows[position[is_known]]
    return found


def row_checksums(hashes: Hashes, features: Features) -> npt.NDArray[np.uint32]:
    """CRC-32 of each row, which begins with the low bits of its id's hash."""
    starts = (hashes & np.uint64(0xFFFFFFFF)).tolist()
    rows = zip(np.ascontiguousarray(features), starts, strict=True)
    return np.fromiter((zlib.crc32(row, start) for row, start in rows), np.uint32, len(features))


class RowFile:
    """An array `(n, q)` in a file, of which rows are read by their numbers: in half the time of a
    memory map, whose pages would pile up in this process."""

    def __init__(
        self, path: Path, dtype: npt.DTypeLike, shape: tuple[int, int], start: int = 0
    ) -> None:
        self.path, self.dtype, self.shape, self.start = path, np.dtype(dtype), shape, start
        self.file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)

    def __reduce__(self) -> tuple[Any, ...]:
        """For a worker process that does not begin as a copy of this one."""
        return RowFile, (self.path, self.dtype, self.shape, self.start)

    def __getitem__(self, rows: npt.NDArray[np.integer]) -> Features:
        size = self.shape[1] * self.dtype.itemsize
        features: Features = np.empty((len(rows), self.shape[1]), self.dtype)
        order = np.argsort(rows, kind="stable")  # in the order of the file each page is read once
        for begin in range(0, len(rows), BLOCK_ROWS):
            some = order[begin : begin + BLOCK_ROWS]
            wanted = rows[some].astype(np.int64)
            first = np.flatnonzero(np.diff(wanted, prepend=-2) != 1)  # of each run of rows
            lengths = (size * np.diff(first, append=len(wanted))).tolist()
            starts = (size * wanted[first] + self.start).tolist()
            runs = [os.pread(self.file, *run) for run in zip(lengths, starts, strict=True)]
            features[some] = np.frombuffer(b"".join(runs), self.dtype).reshape(len(some), -1)
        return features


class Volume(NamedTuple):
    """Rows of a `Store` in two files, or in memory alone."""

    name: str  # of the files without their endings
    rows: npt.NDArray[Any]  # the hash of each row's id, and the row's checksum `(n,)`
    features: Features | RowFile  # `(n, q)`


class Listed(NamedTuple):
    """What is seen of a volume in a folder."""

    number: int  # of rows
    width: int
    last: bytes  # of the last row's hash and checksum


NONE = Listed(0, 0, b"")


class Store:
    """Features of one frozen model by id, to which blocks of rows are added.

    In its folder are volumes. Each has a file of features, and one with 12 bytes a row: the hash of
    the row's id, and a CRC-32 of both. A block of rows is on the disk before those 12 bytes of each
    are, so a row is there whole or not at all, whenever a process is killed. Rank 0 writes, and all
    ranks read. Of equal ids the last one counts.

    Args:
        folder: It need not exist; None for a store in memory.
        dtype: How features are stored: `HALF` or `FULL`.
        setting: The setting that says where the folder is. All ranks must see it then; else a
            folder that some rank does not see counts as empty.
        is_optional: What cannot be written is kept in memory alone, with a warning, and so is what
            is added while another process adds to the folder.
        before: Another store of the same model, whose rows are read like those of this one.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        dtype: str = HALF,
        setting: str = "",
        is_optional: bool = False,
        before: "Store | None" = None,
    ) -> None:
        self.folder, self.dtype, self.setting = folder, np.dtype(dtype), setting
        self.is_optional, self._is_writable = is_optional, folder is not None
        self.refusal: OSError | ValueError | None = None  # why rows cannot be added
        self.before: Sequence[Volume] = before.volumes if before else ()
        self._use(self.before)
        self.open()

    def open(self) -> None:
        """Map what rank 0 sees of the folder now. Collective."""
        if not self._is_writable:  # what is in memory alone would go
            return
        listed = gather_results(self._list_volumes)[0]
        volumes = list[Volume]()

        def map_listed() -> bool:
            assert self.folder is not None
            if self.setting:
                wait_to_see(self.folder, lambda: self._sees(listed), by=self.setting)
            if is_seen := self._sees(listed):
                for name, (number, width, _) in listed.items():
                    path = str(self.folder / name)
                    rows = np.memmap(f"{path}{ROWS_END}", ROW, "r", shape=(number,))
                    features = RowFile(Path(path + FEATURES_END), self.dtype, (number, width))
                    volumes.append(Volume(path, rows, features))
            return is_seen

        self._is_writable = all(gather_results(map_listed))
        if self._is_writable:  # else what is added stays in memory
            self._use([*self.before, *volumes])

    def _use(self, volumes: Sequence[Volume]) -> None:
        self.volumes: list[Volume] = [*volumes]
        self.starts = np.cumsum([0, *(len(volume.rows) for volume in volumes)])
        #: The width of the features; 0 while there are none.
        self.width = int(volumes[0].features.shape[1]) if volumes else 0
        self._ascending: tuple[Hashes, Numbers] | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def forget_order(self) -> None:
        """Free the memory that the last `find` took: 16 bytes a row."""
        self._ascending = None

    def find(self, hashes: Hashes) -> Numbers:
        """The number of the row of each id, or -1."""
        if self._ascending is None:
            none = np.empty(0, np.uint64)
            stored = np.concatenate([none, *(volume.rows["hash"] for volume in self.volumes)])
            order = np.argsort(stored)
            ascending = stored[order]
            if (ascending[1:] == ascending[:-1]).any():  # of equal ones the last counts
                order = np.argsort(stored, kind="stable")  # which takes twice as long
            self._ascending = ascending, order
        return find_rows(hashes, *self._ascending)

    def has(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        is_known: npt.NDArray[np.bool_] = self.find(hashes) >= 0
        return is_known

    def read(self, numbers: npt.NDArray[np.integer]) -> Features:
        """Rows by their numbers, as they are stored; `ValueError` names a damaged file."""
        features: Features = np.empty((len(numbers), self.width), self.dtype)
        which = np.searchsorted(self.starts, numbers, side="right") - 1
        for number in np.unique(which):
            volume, some = self.volumes[number], np.flatnonzero(which == number)
            rows = numbers[some] - self.starts[number]
            stored, facts = volume.features[rows], volume.rows[rows]
            if (row_checksums(facts["hash"], stored) != facts["checksum"]).any():
                raise ValueError(
                    f"{volume.name}{FEATURES_END}: damaged (a checksum differs); delete it, and "
                    "give the command again"
                )
            features[some] = stored
        return features

    def add(self, hashes: Hashes, features: Features, *, engine: str = "") -> None:
        """Write rows, in blocks, which `open` maps. All ranks call it with the same rows. Those of
        an optional store are in memory from now on, and ids that it has are passed over.

        The folder lists every `engine` that is not PyTorch.
        """
        if self.refusal is not None:
            raise self.refusal
        if self.is_optional:
            new = np.sort(np.unique(hashes, return_index=True)[1])
            new = new[~self.has(hashes[new])]
            hashes, features = hashes[new], features[new]
        features, rows = np.ascontiguousarray(features, self.dtype), np.empty(len(hashes), ROW)
        rows["hash"], rows["checksum"] = hashes, row_checksums(hashes, features)
        if self._is_writable:
            self._is_writable = rank0_first(lambda: self._write(rows, features, engine))
        if self.is_optional and len(hashes):
            self._use([*self.volumes, Volume("", rows, features)])

    def _list_volumes(self) -> dict[str, Listed]:
        volumes = dict[str, Listed]()
        assert self.folder is not None
        for path in sorted(self.folder.glob(f"*{ROWS_END}")):
            name = path.name.removesuffix(ROWS_END)
            features = path.with_name(name + FEATURES_END)
            if not features.is_file():
                continue
            width = int(name.partition("-")[2])
            size = features.stat().st_size // (width * self.dtype.itemsize)
            if number := min(path.stat().st_size // ROW.itemsize, size):
                with path.open("rb") as file:
                    file.seek((number - 1) * ROW.itemsize)
                    volumes[name] = Listed(number, width, file.read(ROW.itemsize))
        return volumes

    def _sees(self, listed: Mapping[str, Listed]) -> bool:
        """Whether this rank sees these volumes, which may take a moment on some file systems."""
        mine = self._list_volumes()
        pairs = [(mine.get(name, NONE), facts) for name, facts in listed.items()]
        return all(seen == facts or seen.number > facts.number for seen, facts in pairs)

    def _write(self, rows: npt.NDArray[Any], features: Features, engine: str) -> bool:
        """Whether the folder can be written, which all but an optional one must be."""
        assert self.folder is not None
        width = features.shape[1]
        try:
            with lock_path(self.folder) if self.is_optional else nullcontext():
                for first in range(0, len(rows), BLOCK_ROWS):
                    block = slice(first, first + BLOCK_ROWS)
                    self.folder.mkdir(parents=True, exist_ok=True)
                    name, last = max(self._list_volumes().items(), default=("", NONE))
                    done = last.number
                    if last.width != width or done + len(rows[block]) > VOLUME_ROWS:
                        files = self.folder.glob(f"*{FEATURES_END}")
                        number = max((int(path.name[:6]) for path in files), default=-1) + 1
                        name, done = f"{number:06d}-{width}", 0
                    # The features are on the disk before what says that they are there.
                    for end, items in ((FEATURES_END, features), (ROWS_END, rows)):
                        write_behind(self.folder / f"{name}{end}", done, items[block])
                if engine:
                    path = self.folder / ENGINES
                    listed = path.read_text() if path.exists() else ""
                    if f"{engine}\n" not in listed:
                        write_atomically(path, f"{listed}{engine}\n")
        except (OSError, ValueError) as error:
            if not self.is_optional:
                raise
            if isinstance(error, OSError):  # else another process adds to it
                say(f"warning: features are not kept ({error})")
            return False
        return True


class StoredRows:
    """Rows of a store, by their numbers there; they are read once if memory can keep them.

    A number may be -1, of a row that is not there and is not asked for.
    """

    def __init__(self, store: Store, numbers: npt.NDArray[np.int32]) -> None:
        self.store, self.numbers, self.width = store, numbers, store.width

    @cached_property
    def _kept(self) -> Features | None:
        if len(self.numbers) * self.width * self.store.dtype.itemsize > KEPT_BYTES:
            return None
        return self.store.read(np.maximum(self.numbers, 0))

    def __getitem__(self, rows: npt.NDArray[np.integer]) -> Features:
        if self._kept is None:
            return self.store.read(self.numbers[rows])
        some: Features = self._kept[rows]
        return some


class JoinedRows:
    """Rows of several stores side by side; a number is -1 if a store lacks the row."""

    def __init__(self, parts: Sequence[StoredRows]) -> None:
        self.parts, self.width = parts, sum(part.width for part in parts)
        self.numbers = reduce(np.minimum, [part.numbers for part in parts])  # one stays mapped

    def __getitem__(self, rows: npt.NDArray[np.integer]) -> Features:
        return np.concatenate([part[rows] for part in self.parts], axis=1)


def write_behind(path: Path, number: int, rows: npt.NDArray[Any]) -> None:
    """Write rows behind the first `number` of a file, durably; what else is there goes."""
    with naming(path), path.open("r+b" if path.exists() else "xb") as file:
        file.truncate(number * rows.itemsize * math.prod(rows.shape[1:]))
        file.seek(0, os.SEEK_END)
        file.write(rows.tobytes())
        file.flush()
        os.fsync(file.fileno())
