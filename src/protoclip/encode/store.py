"""What frozen models made of samples, on disk, and found by id.

A `Store` is where features are encoded to, once, whoever asks: blocks of rows are added to it.

A teacher folder, which others may read, is written once. It has `features.npy` (in half precision),
`index.npy` (the ids' 64-bit hashes in ascending order, and the row of each), `checksums.npy` (a
CRC-32 of each row and its id) and `facts.json` (what the features were made of, and checksums of
the two files before). Features are memory-mapped, and each row is compared with its checksum when
it is read.
"""

import mmap
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.distributed import collectives
from protoclip.distributed.collectives import any_rank, raise_on_all_ranks, rank, rank0_first
from protoclip.encode.whiten import Features, Whitens
from protoclip.files import (
    SEAL,
    checksum,
    file_checksum,
    locked,
    naming,
    read_json,
    read_sealed,
    replacing,
    require_regular,
    sealed,
    to_json,
    write_atomically,
)
from protoclip.terminal import say

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]

FEATURES, INDEX, CHECKSUMS, FACTS = "features.npy", "index.npy", "checksums.npy", "facts.json"
HALF, FULL = "<f2", "<f4"  # how features are stored
SAMPLE = 2**14  # rows that a whitening is fitted to
BLOCK_ROWS = 2**12  # that a store writes at once
VOLUME_ROWS = 2**18  # of a store, which are lost together if a file is damaged
ROW = np.dtype([("hash", "<u8"), ("checksum", "<u4")])
FEATURES_END, ROWS_END = ".features", ".rows"  # of a volume's files
# What is raised for a damaged file: NumPy reads the header of an array as Python.
DAMAGED = (
    *(OSError, EOFError, KeyError, ValueError, SyntaxError, TokenError),
    *(BadZipFile, pa.ArrowException),
)


def hash_ids(sample_ids: Iterable[str]) -> Hashes:
    """64 bits of BLAKE2b for each id."""
    digests = (blake2b(i.encode(), digest_size=8).digest() for i in sample_ids)
    return np.fromiter((int.from_bytes(d, "little") for d in digests), dtype=np.uint64)


def build_index(hashes: Hashes, sample_id: Callable[[int], str], *, name: str) -> Hashes:
    """The ids' hashes in ascending order, and the row of each `(2, n)`; refuses equal hashes."""
    rows = np.argsort(hashes, kind="stable")
    index = np.stack([hashes[rows], rows.astype(np.uint64)])
    if len(equal := np.flatnonzero(index[0, 1:] == index[0, :-1])):
        first, second = (sample_id(int(rows[equal[0] + i])) for i in (0, 1))
        what = "duplicate sample ids" if first == second else "sample ids with the hash of another"
        raise ValueError(f"{name}: {len(equal)} {what}, such as '{first}' and '{second}'")
    return index


def row_checksums(hashes: Hashes, features: Features) -> npt.NDArray[np.uint32]:
    """CRC-32 of each row, which begins with the low bits of its id's hash."""
    starts = (hashes & np.uint64(0xFFFFFFFF)).tolist()
    rows = zip(np.ascontiguousarray(features), starts, strict=True)
    return np.fromiter((zlib.crc32(row, start) for row, start in rows), np.uint32, len(features))


class StoredFeatures(Whitens):
    """Features of a frozen model `(n, q)`, found by sample id; `name` is for messages.

    `checksums`, if given, are `row_checksums` of the features. `whitening`, once `whiten` was
    called, is applied to what is looked up.
    """

    way_out = "delete the folder, and run protoclip embed-teacher again"  # of damaged features
    made_of: Sequence[Mapping[str, Any]] = ()  # `content` of the sources, where it is known

    def __init__(
        self,
        *,
        name: str,
        index: Hashes,
        features: Features,
        checksums: npt.NDArray[np.uint32] | None = None,
    ) -> None:
        self.name, self.features, self.width = name, features, int(features.shape[1])
        self.checksums = checksums
        self.hashes, self.row_of_hash = index[0], index[1].view(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker process that does not begin as a copy of this one, which maps the file."""
        state = vars(self).copy()
        if isinstance(self.features, np.memmap):
            state["features"] = Path(str(self.features.filename))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if isinstance(self.features, Path):
            self.features = np.load(self.features, mmap_mode="r")

    @classmethod
    def in_memory(
        cls, *, name: str, sample_ids: Sequence[str], features: npt.NDArray[Any]
    ) -> "StoredFeatures":
        """Features that are not in a teacher folder.

        Raises:
            ValueError: Duplicate ids, features that are not finite real numbers, or another number
                of ids.
        """
        if len(sample_ids) != len(features):
            raise ValueError(f"{name}: {len(sample_ids)} sample ids for {len(features)} features")
        if features.dtype.kind not in "fiu":
            raise ValueError(f"{name}: holds {features.dtype} values; features are real numbers")
        # A sum is finite if all its terms are, and needs no memory.
        bad = np.flatnonzero(~np.isfinite(features.sum(1, dtype=np.float64)))
        if len(bad):
            raise ValueError(
                f"{name}: {len(bad)} of {len(features)} features are not finite, such as those of "
                f"'{sample_ids[bad[0]]}'"
            )
        index = build_index(hash_ids(sample_ids), sample_ids.__getitem__, name=name)
        return cls(name=name, index=index, features=features)

    def find(self, sample_ids: Iterable[str]) -> Numbers:
        """The row of each id, or -1."""
        return self.find_hashes(hash_ids(sample_ids))

    def find_hashes(self, wanted: Hashes) -> Numbers:
        """The row of the id with each hash, or -1."""
        # A search in ascending order reuses the processor's caches: ten times as fast.
        order = np.argsort(wanted)
        ascending = wanted[order]
        position = np.searchsorted(self.hashes, ascending).clip(max=len(self.hashes) - 1)
        rows = np.empty(len(wanted), dtype=np.int64)
        rows[order] = np.where(self.hashes[position] == ascending, self.row_of_hash[position], -1)
        return rows

    def missing(self, sample_ids: Iterable[str]) -> int:
        """The number of these samples that have no features.

        Raises:
            ValueError: None of them has features, so these are features of other data.
        """
        remaining = iter(sample_ids)
        example = next(remaining, "")
        missing = self.find(chain([example], remaining)) < 0
        if missing.all():
            raise ValueError(
                f"{self.name}: no teacher features for {len(missing)} of {len(missing)} training "
                f"samples, such as '{example}'; make them for this data with protoclip "
                "embed-teacher"
            )
        return int(missing.sum())

    def sample(self) -> Features:
        """Damaged rows have no part in it; `lookup` tells of them when it meets one."""
        # Hashes are as good as random, so every so many of them are a fair sample.
        step = max(1, len(self.hashes) // SAMPLE)
        order = np.argsort(self.row_of_hash[::step])
        hashes, rows = self.hashes[::step][order], self.row_of_hash[::step][order]
        read: Features = self.features[rows]
        if self.checksums is not None:
            read = read[row_checksums(hashes, read) == self.checksums[rows]]
        return read

    @property
    def content(self) -> dict[str, Any]:
        """What tells these features from others: all ids, and their rows' checksums.

        Without stored checksums those of a `sample` are made.
        """
        step = 1 if self.checksums is not None else max(1, len(self.hashes) // SAMPLE)
        hashes, rows = self.hashes[::step], self.row_of_hash[::step]
        if self.checksums is not None:
            checksums = self.checksums[rows]
        else:
            checksums = row_checksums(hashes, self.features[rows])
        return {
            "rows": len(self.hashes),
            "ids": checksum(self.hashes.tobytes()),
            "features": checksum(checksums.tobytes()),
        }

    def lookup(self, sample_ids: Sequence[str]) -> Float[Tensor, "m _"]:
        """Features of these samples, as `rows`, in float32; whitened if `whiten` was called."""
        return self.whitened(self.rows(sample_ids))

    def rows(self, sample_ids: Sequence[str]) -> Float[Tensor, "m q"]:
        """Features of these samples in this order; a row of NaN for one without.

        They are in half precision if they are stored so, or else in float32.

        Raises:
            ValueError: One of them is not what was written.
        """
        hashes = hash_ids(sample_ids)
        rows = self.find_hashes(hashes)
        known = np.flatnonzero(rows >= 0)
        half = self.features.dtype == np.float16
        features = np.full((len(rows), self.width), np.nan, np.float16 if half else np.float32)
        features[known] = self.read(
            rows[known], hashes[known], name=lambda number: sample_ids[known[number]]
        )
        return torch.from_numpy(features)

    def read(
        self,
        rows: Numbers,
        hashes: Hashes,
        *,
        name: Callable[[int], str],
    ) -> Features:
        """These rows, whose ids have these hashes; `name` names one of them in a message."""
        order = np.argsort(rows, kind="stable")  # in the order of the file each page is read once
        stored = self.features[rows[order]]
        if self.checksums is not None:
            checksums = row_checksums(hashes[order], stored)
            if len(wrong := np.flatnonzero(checksums != self.checksums[rows[order]])):
                raise ValueError(
                    f"{self.name}: damaged (the checksum of the features of "
                    f"'{name(int(order[wrong[0]]))}' differs in {FEATURES}); "
                    f"{self.way_out}"
                )
        features: Features = np.empty(stored.shape, stored.dtype)
        features[order] = stored
        release(self.features)
        return features


class Volume:
    """Rows of a `Store` in two files, mapped into memory, or in memory alone.

    Attributes:
        name: The files without their endings.
        rows: The hash of each row's id, and the row's checksum `(n,)`.
        features: The rows `(n, q)`.
    """

    def __init__(self, name: str, rows: npt.NDArray[Any], features: Features) -> None:
        self.name, self.rows, self.features = name, rows, features

    def read(self, rows: Numbers) -> tuple[Features, npt.NDArray[np.bool_]]:
        """Rows by their numbers, which ascend; and whether each is what was written."""
        features: Features = np.asarray(self.features[rows])
        facts = self.rows[rows]
        is_whole = row_checksums(facts["hash"], features) == facts["checksum"]
        release(self.features)
        return features, is_whole


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

    Raises:
        ValueError: A rank does not see the folder as rank 0 does.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        dtype: str = HALF,
        setting: str = "",
        is_optional: bool = False,
    ) -> None:
        self.folder, self.dtype, self.setting = folder, np.dtype(dtype), setting
        self.is_optional, self._is_writable = is_optional, folder is not None
        self._waiting = list[tuple[Hashes, Features]]()
        self._use([])
        if folder is not None:
            self.open()

    def open(self) -> None:
        """Map what rank 0 sees of the folder now. Collective."""
        volumes = rank0_first(self._list_volumes)
        wait = collectives.UNSEEN if self.setting else 0.0
        seen = raise_on_all_ranks(lambda: self._sees(volumes, wait))
        if any_rank([not seen])[0]:
            raise_on_all_ranks(lambda: self._require_seen(seen))
            volumes = {}
        opened = raise_on_all_ranks(lambda: [self._volume(*each) for each in volumes.items()])
        self._use([volume for volume in opened if volume is not None])

    def _use(self, volumes: Sequence[Volume]) -> None:
        self.volumes: list[Volume] = [*volumes]
        self.starts = np.cumsum([0, *(len(volume.rows) for volume in volumes)])
        self.forget_order()

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def width(self) -> int:
        """Of the features; 0 while there are none."""
        return int(self.volumes[0].features.shape[1]) if self.volumes else 0

    @cached_property
    def _ascending(self) -> tuple[Hashes, Numbers]:
        """The hashes in ascending order, and the number of each row."""
        hashes = np.concatenate([np.empty(0, np.uint64), *(v.rows["hash"] for v in self.volumes)])
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order

    def forget_order(self) -> None:
        """Free the memory that the last `find` took: 16 bytes a row."""
        self.__dict__.pop("_ascending", None)

    def find(self, hashes: Hashes) -> Numbers:
        """The number of the row of each id, or -1."""
        ascending, order = self._ascending
        numbers = np.full(len(hashes), -1, np.int64)
        if len(ascending):
            # A search in ascending order reuses the processor's caches: ten times as fast.
            wanted = np.argsort(hashes)
            position = np.searchsorted(ascending, hashes[wanted], side="right") - 1
            is_known = ascending[position] == hashes[wanted]  # -1 is the last one, another
            numbers[wanted[is_known]] = order[position[is_known]]
        return numbers

    def has(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        is_known: npt.NDArray[np.bool_] = self.find(hashes) >= 0
        return is_known

    def read(self, numbers: npt.NDArray[np.integer]) -> Features:
        """Rows by their numbers, as they are stored; `ValueError` names a damaged file."""
        features, is_whole = self.read_whole(numbers)
        if not is_whole.all():
            volume = self.volumes[
                int(np.searchsorted(self.starts, numbers[~is_whole][0], "right")) - 1
            ]
            raise ValueError(
                f"{volume.name}{FEATURES_END}: damaged (a checksum differs); delete it, and give "
                "the command again"
            )
        return features

    def read_whole(
        self, numbers: npt.NDArray[np.integer]
    ) -> tuple[Features, npt.NDArray[np.bool_]]:
        """Rows by their numbers, and whether each is what was written."""
        features: Features = np.empty((len(numbers), self.width), self.dtype)
        is_whole = np.ones(len(numbers), np.bool_)
        order = np.argsort(numbers)  # in the order of the file each page is read once
        ends = np.searchsorted(numbers[order], self.starts)
        for volume, start, first, end in zip(
            self.volumes, self.starts, ends, ends[1:], strict=False
        ):
            if first < end:
                some = order[first:end]
                features[some], is_whole[some] = volume.read(numbers[some] - start)
        return features, is_whole

    def read_or_map(self, numbers: Numbers) -> Features:
        """Rows by their numbers; in one volume and in its order, they are mapped into memory."""
        if len(numbers) and np.array_equal(
            numbers, np.arange(numbers[0], numbers[0] + len(numbers))
        ):
            at = int(np.searchsorted(self.starts, numbers[0], "right")) - 1
            first = int(numbers[0] - self.starts[at])
            if len(rows := self.volumes[at].features[first : first + len(numbers)]) == len(numbers):
                return rows
        return self.read(numbers)

    def has_whole(self, hashes: Hashes) -> bool:
        """Whether all of these ids have rows that are what was written. Collective.

        Volumes with a damaged one are removed.
        """
        numbers = self.find(hashes)
        known, damaged = numbers[numbers >= 0], np.zeros(len(self.volumes), np.bool_)
        for first in range(0, len(known), BLOCK_ROWS):
            some = known[first : first + BLOCK_ROWS]
            wrong = some[~self.read_whole(some)[1]]
            damaged[np.searchsorted(self.starts, wrong, "right") - 1] = True
        damaged = np.array(any_rank(damaged.tolist()), np.bool_) if len(damaged) else damaged
        if damaged.any():
            gone = [volume for volume, bad in zip(self.volumes, damaged, strict=True) if bad]
            rank0_first(lambda: self._remove(gone))
            self._use([v for v, bad in zip(self.volumes, damaged, strict=True) if not bad])
            return False
        return len(known) == len(numbers)

    def _remove(self, volumes: Sequence[Volume]) -> None:
        for volume in volumes:
            for end in (ROWS_END, FEATURES_END) if volume.name else ():
                with suppress(OSError):
                    Path(f"{volume.name}{end}").unlink()

    def add(self, hashes: Hashes, features: Features) -> None:
        """Write rows, in blocks. All ranks call it with the same rows, and rank 0 writes.

        `open` maps them, but those of an optional store are in memory from now on.

        Raises:
            OSError: They cannot be written.
            ValueError: Features are not finite in half precision.
        """
        if self.dtype == np.float16:
            features = raise_on_all_ranks(lambda: to_half(features, hashes, name=str(self.folder)))
        if self._is_writable:
            rank0_first(lambda: self._write(hashes, features))
        if self.is_optional and len(hashes):
            self._use([*self.volumes, Volume("", rows_of(hashes, features), features)])

    def add_new(self, hashes: Hashes, features: Features) -> None:
        """The same with ids that may be here or come several times, once they make a block."""
        self._waiting.append((hashes, features))
        if sum(len(some) for some, _ in self._waiting) >= BLOCK_ROWS:
            self.flush()

    def flush(self) -> None:
        """Add what waits."""
        waiting = [(some, rows) for some, rows in self._waiting if len(some)]
        self._waiting.clear()
        if waiting:
            hashes = np.concatenate([some for some, _ in waiting])
            features = np.concatenate([rows for _, rows in waiting])
            first = np.sort(np.unique(hashes, return_index=True)[1])
            new = first[~self.has(hashes[first])]
            if len(new):
                self.add(hashes[new], features[new])

    def _list_volumes(self) -> dict[str, tuple[int, bytes]]:
        """The names of volumes, the number of rows in each, and the bytes of its last row."""
        volumes = dict[str, tuple[int, bytes]]()
        if self.folder is None or not self.folder.is_dir():
            return volumes
        for path in sorted(self.folder.glob(f"*{ROWS_END}")):
            name = path.name.removesuffix(ROWS_END)
            features = path.with_name(name + FEATURES_END)
            width = width_of(name)
            if not width or not path.is_file() or not features.is_file():
                continue
            size = features.stat().st_size // (width * self.dtype.itemsize)
            if number := min(path.stat().st_size // ROW.itemsize, size):
                with path.open("rb") as file:
                    file.seek((number - 1) * ROW.itemsize)
                    volumes[name] = number, file.read(ROW.itemsize)
        return volumes

    def _sees(self, volumes: Mapping[str, tuple[int, bytes]], wait: float) -> bool:
        """Whether this rank sees these volumes, which may take a moment on some file systems."""
        deadline = time.monotonic() + wait
        while True:
            mine = self._list_volumes() if rank() else volumes
            pairs = [(mine.get(name, (0, b"")), facts) for name, facts in volumes.items()]
            if all(seen == facts or seen[0] > facts[0] for seen, facts in pairs):
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)

    def _require_seen(self, seen: bool) -> None:
        if self.setting and not seen:
            raise ValueError(
                f"{self.folder}: {socket.gethostname()} does not see it as rank 0 does; name a "
                f"place that all hosts share by {self.setting}"
            )

    def _volume(self, name: str, facts: tuple[int, bytes]) -> Volume | None:
        assert self.folder is not None
        path, number = self.folder / name, facts[0]
        try:
            rows = np.memmap(f"{path}{ROWS_END}", ROW, "r", shape=(number,))
            shape = (number, width_of(name))
            # Writable in memory alone, as PyTorch wants it.
            features = np.memmap(f"{path}{FEATURES_END}", self.dtype, "c", shape=shape)
        except (OSError, ValueError):  # removed or cut off since
            return None
        return Volume(str(path), rows, features)

    def _write(self, hashes: Hashes, features: Features) -> None:
        if not self.is_optional:
            self._write_blocks(hashes, features)
            return
        assert self.folder is not None
        try:
            with locked(self.folder):
                self._write_blocks(hashes, features)
        except OSError as error:
            say(f"warning: features are not kept ({error})")
            self._is_writable = False  # once is enough
        except ValueError:  # another process adds to it
            pass

    def _write_blocks(self, hashes: Hashes, features: Features) -> None:
        assert self.folder is not None
        width = features.shape[1]
        for first in range(0, len(hashes), BLOCK_ROWS):
            block = np.ascontiguousarray(features[first : first + BLOCK_ROWS], self.dtype)
            rows = rows_of(hashes[first : first + BLOCK_ROWS], block)
            self.folder.mkdir(parents=True, exist_ok=True)
            volumes = self._list_volumes()
            numbers = [int(path.name[:6]) for path in self.folder.glob(f"*{FEATURES_END}")]
            name, done = f"{max(numbers, default=-1) + 1:06d}-{width}", 0
            if volumes:
                last = max(volumes)
                if width_of(last) == width and volumes[last][0] + len(rows) <= VOLUME_ROWS:
                    name, done = last, volumes[last][0]
            write_behind(self.folder / f"{name}{FEATURES_END}", done * width, block)
            write_behind(self.folder / f"{name}{ROWS_END}", done, rows)


def rows_of(hashes: Hashes, features: Features) -> npt.NDArray[Any]:
    """What a volume says of each of its rows."""
    rows = np.empty(len(hashes), ROW)
    rows["hash"], rows["checksum"] = hashes, row_checksums(hashes, features)
    return rows


def width_of(name: str) -> int:
    """The width of the features of a volume, which its name ends with; 0 for another file."""
    number, _, width = name.partition("-")
    return int(width) if number.isdecimal() and width.isdecimal() else 0


def write_behind(path: Path, number: int, items: npt.NDArray[Any]) -> None:
    """Write items behind the first `number` of a file, durably; what else is there goes."""
    with naming(path), path.open("r+b" if path.exists() else "xb") as file:
        file.truncate(number * items.dtype.itemsize)
        file.seek(0, os.SEEK_END)
        file.write(items.tobytes())
        file.flush()
        os.fsync(file.fileno())


def release(features: Features) -> None:
    """Let go of the pages of a mapped file, which random reads would pile up in this process; the
    system's cache keeps them."""
    base = features.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def load_array(path: Path, mode: Literal["r", "c"] | None = "r") -> npt.NDArray[Any]:
    """The array in an `.npy` file, memory-mapped unless the mode is None; raises as `DAMAGED`."""
    array = np.load(path, mmap_mode=mode)
    if not isinstance(array, np.ndarray):  # an .npz file under another name
        raise ValueError("holds several arrays")
    return array


def open_folder(
    folder: Path, *, mode: Literal["r", "c"] = "r", way_out: str = StoredFeatures.way_out
) -> StoredFeatures:
    """The features in a folder that is finished; `c` maps them as PyTorch wants them, writable.

    Raises:
        ValueError: It is not finished, or damaged.
    """
    facts = read_facts(folder)
    if "rows" not in facts:
        raise ValueError(
            f"{folder}: no finished teacher; if protoclip embed-teacher was stopped, the same "
            "command again finishes it"
        )
    try:
        for name in (FEATURES, INDEX):
            require_regular(folder / name)
        features, index = (load_array(folder / name, mode) for name in (FEATURES, INDEX))
        if features.shape != (facts["rows"], facts["width"]) or index.shape != (2, len(features)):
            raise ValueError(f"not {facts['rows']} rows of width {facts['width']}")
        precision = facts.get("dtype", HALF)  # earlier versions knew half precision alone
        if features.dtype != precision or not features.flags.c_contiguous:
            raise ValueError(f"{FEATURES} is not in {np.dtype(precision)}, row by row")
        for name, written in facts.get("checksums", {}).items():  # earlier versions wrote none
            if file_checksum(folder / name) != written:
                raise ValueError(f"{name} is not what was written: its checksum differs")
        checksums = load_array(folder / CHECKSUMS) if "checksums" in facts else None
    except DAMAGED as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"{folder}: damaged ({reason}); {way_out}") from None
    opened = StoredFeatures(name=str(folder), index=index, features=features, checksums=checksums)
    opened.way_out = way_out
    opened.modality, opened.made_of = facts.get("modality"), facts.get("content", ())
    return opened


def read_facts(folder: Path) -> dict[str, Any]:
    """What is known of a folder, which lacks `rows` while it is unfinished; empty without any.

    Raises:
        ValueError: The file is damaged.
    """
    path = folder / FACTS
    if not path.is_file():
        return {}
    facts = read_json(path)
    # Earlier versions wrote no checksums.
    return read_sealed(path) if SEAL in facts or (folder / CHECKSUMS).exists() else facts


def to_half(
    features: Features, sample_ids: Sequence[str] | Hashes, *, name: str
) -> npt.NDArray[np.float16]:
    """Half precision; refuses features that are not finite then."""
    with np.errstate(over="ignore"):
        half = features.astype("<f2")
    if len(bad := np.flatnonzero(~np.isfinite(half).all(1))):
        raise ValueError(
            f"{name}: {len(bad)} of {len(half)} features are not finite in half precision (at most "
            f"65504), such as those of '{sample_ids[bad[0]]}'"
        )
    return half


def write_folder(
    folder: Path,
    sample_ids: Sequence[str] | Hashes,
    blocks: Iterable[Features],
    facts: Mapping[str, Any],
    *,
    dtype: str = HALF,
) -> dict[str, Any]:
    """Write features, which come some rows at a time, into a folder; returns its facts.

    Where ids are many, their hashes stand for them.
    """
    hashes = sample_ids if isinstance(sample_ids, np.ndarray) else hash_ids(sample_ids)
    index = build_index(hashes, lambda row: str(sample_ids[row]), name=str(folder))
    # Not through a memory map: a full disk would then crash the process.
    with replacing(folder / FEATURES) as temporary, temporary.open("wb") as file:
        done = width = 0
        checksums = np.empty(len(hashes), np.uint32)
        for features in blocks:
            width = features.shape[1]
            if not file.tell():
                header = {"descr": dtype, "fortran_order": False, "shape": (len(index[0]), width)}
                np.lib.format.write_array_header_1_0(file, header)
            end = done + len(features)
            if dtype == HALF:
                features = to_half(features, sample_ids[done:end], name=str(folder))
            rows = np.ascontiguousarray(features, dtype)
            file.write(rows.tobytes())
            checksums[done:end] = row_checksums(hashes[done:end], rows)
            done = end
    facts = {**facts, "rows": done, "width": width, "dtype": dtype}
    checked: dict[str, str] = {}
    for name, array in ((INDEX, index), (CHECKSUMS, checksums)):
        with replacing(folder / name) as temporary, temporary.open("wb") as file:
            np.save(file, array)
        checked[name] = file_checksum(folder / name)
    content = to_json(sealed({**facts, "checksums": checked}), indent=2)
    write_atomically(folder / FACTS, content + "\n", durable=True)
    return facts
