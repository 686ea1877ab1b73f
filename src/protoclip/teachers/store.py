"""External teachers: any frozen model's features, keyed by sample id.

A teacher folder, which `protoclip embed-teacher` makes, holds

* `features-00000.npy` and so on: half-precision rows `(n, q)`, `shard_rows` in each but the last;
* `ids.arrow`: the sample id of each row;
* `hashes.npy`, `rows.npy`: the ids' 64-bit hashes in ascending order, and the row of each;
* `facts.json`: what made it. It is written last, so a folder without it is unfinished.

All of it is memory-mapped: opening reads nothing but the facts, and rows cost memory once touched.
"""

import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.config import Config
from protoclip.data.emoji import emoji_teacher_path
from protoclip.data.mixture import MixedPairs
from protoclip.data.pairs import Pairs, SampleStream
from protoclip.data.sources import entries
from protoclip.files import to_json
from protoclip.teachers.feature_files import Block, open_feature_file

FACTS, IDS, HASHES, ROWS = "facts.json", "ids.arrow", "hashes.npy", "rows.npy"
# A folder within, for files that are not complete.
WRITING = ".writing"
# Each open shard holds a file descriptor, of which a process has about a thousand.
SHARD_BYTES = 1 << 30
# Rows or ids handled at once, which bounds the memory of a pass over all of them.
BLOCK_ROWS = 65_536


def hash_ids(sample_ids: Iterable[str]) -> npt.NDArray[np.uint64]:
    """64 bits of BLAKE2b of each id."""
    digests = (blake2b(i.encode(), digest_size=8).digest() for i in sample_ids)
    return np.frombuffer(b"".join(digests), dtype="<u8")


@dataclass(frozen=True, kw_only=True)
class IdIndex:
    """Where each sample's features are.

    An id that is not in the index is taken for one that is with a chance of `n / 2^64`.

    Attributes:
        hashes: Hashes of the ids, ascending.
        rows: The row of each.
    """

    hashes: npt.NDArray[np.uint64]
    rows: npt.NDArray[np.int64]

    def find(self, sample_ids: Iterable[str]) -> npt.NDArray[np.int64]:
        """The row of each id, -1 where there is none."""
        wanted = hash_ids(sample_ids)
        # In ascending order a search finds what it needs in the caches: ten times as fast.
        order = np.argsort(wanted)
        ascending = wanted[order]
        place = np.searchsorted(self.hashes, ascending).clip(max=len(self.hashes) - 1)
        found = np.empty(len(wanted), dtype=np.int64)
        found[order] = np.where(self.hashes[place] == ascending, self.rows[place], -1)
        return found


def build_index(
    hashes: npt.NDArray[np.uint64], *, name: str, ids_of: Callable[[list[int]], list[str]]
) -> IdIndex:
    """Sort the hashes of all rows.

    Args:
        hashes: Of the ids, in the order of the rows.
        name: What messages call the features.
        ids_of: The ids of some rows, to tell equal ids from different ones of equal hash.

    Raises:
        ValueError: Duplicate ids, with their number; or two ids of one hash.
    """
    rows = np.argsort(hashes, kind="stable")
    ascending = hashes[rows]
    equal = np.flatnonzero(ascending[1:] == ascending[:-1])
    if len(equal):
        first, second = ids_of(rows[equal].tolist()), ids_of(rows[equal + 1].tolist())
        for a, b in zip(first, second, strict=True):
            if a != b:
                raise ValueError(f"{name}: '{a}' and '{b}' have one hash; rename either sample")
        raise ValueError(f"{name}: {len(equal)} duplicate sample ids, such as '{first[0]}'")
    return IdIndex(hashes=ascending, rows=rows)


class TeacherFeatures:
    """Features of a frozen model for many samples.

    Args:
        name: What messages call this teacher, a file or folder usually.
        index: Where each sample is.
        shards: Rows `(n, q)`, as many in each but the last.
    """

    def __init__(
        self, *, name: str, index: IdIndex, shards: Sequence[npt.NDArray[np.floating]]
    ) -> None:
        self.name, self.index, self.shards = name, index, shards

    @classmethod
    def in_memory(
        cls, *, name: str, sample_ids: Sequence[str], features: npt.NDArray[np.floating]
    ) -> "TeacherFeatures":
        """Features that are not in a teacher folder; one id a row, each once.

        Raises:
            ValueError: Duplicate ids, non-finite rows, or another number of ids than rows; with
                counts.
        """
        if len(sample_ids) != len(features):
            raise ValueError(f"{name}: {len(sample_ids)} sample ids for {len(features)} features")
        broken = sum(
            int((~np.isfinite(features[first : first + BLOCK_ROWS]).all(1)).sum())
            for first in range(0, len(features), BLOCK_ROWS)
        )
        if broken:
            raise ValueError(f"{name}: {broken} of {len(features)} features are not finite")
        index = build_index(
            hash_ids(sample_ids), name=name, ids_of=lambda rows: [sample_ids[r] for r in rows]
        )
        return cls(name=name, index=index, shards=[features])

    def __len__(self) -> int:
        return len(self.index.rows)

    @property
    def width(self) -> int:
        """Teacher width `q`."""
        return int(self.shards[0].shape[1])

    def missing(self, sample_ids: Iterable[str]) -> int:
        """How many of these samples have no features, so that a run can say so when it starts.

        Raises:
            ValueError: None of them has any, so that these are features of other data.
        """
        remaining = iter(sample_ids)
        total, missing, example = 0, 0, ""
        while block := list(islice(remaining, BLOCK_ROWS)):
            absent = np.flatnonzero(self.index.find(block) < 0)
            total, missing = total + len(block), missing + len(absent)
            example = example or (block[absent[0]] if len(absent) else "")
        if total and missing == total:
            raise ValueError(
                f"{self.name}: no teacher features for {missing} of {total} training samples, "
                f"such as '{example}'; build them for this data set with protoclip embed-teacher"
            )
        return missing

    def lookup(self, sample_ids: Sequence[str]) -> Float[Tensor, "m q"]:
        """Features of these samples, in this order, as float32.

        A sample without features gets a row of NaN: it has no part in this teacher's loss, and in
        no other loss does it miss.
        """
        rows = self.index.find(sample_ids)
        found = np.full((len(rows), self.width), np.nan, dtype=np.float32)
        # In the order of the file, which reads pages of neighbours once.
        order = np.argsort(rows, kind="stable")
        order = order[np.searchsorted(rows[order], 0) :]
        shard_of, within = np.divmod(rows[order], len(self.shards[0]))
        for number in np.unique(shard_of):
            here = shard_of == number
            found[order[here]] = self.shards[number][within[here]]
            release(self.shards[number])
        return torch.from_numpy(found)


def release(array: npt.NDArray[Any]) -> None:
    """Give the pages of a memory-mapped array back, which random reads would else pile up.

    The system's page cache keeps them, so reading them again is cheap.
    """
    if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.base.madvise(mmap.MADV_DONTNEED)


def read_teacher(path: str | Path, *, prefixes: Sequence[str] = ("",)) -> TeacherFeatures:
    """Open a teacher folder, or a file of features (see `open_feature_file`), which is read whole.

    Args:
        path: Of the folder or file.
        prefixes: What sample ids begin with where a file's ids do not; several give each row
            several ids.

    Raises:
        ValueError: Nothing there, not of that form, or features that cannot be used.
    """
    path = Path(path)
    if path.is_dir():
        return open_folder(path)
    if not path.is_file():
        raise ValueError(f"teacher.features: {path}: no such file")
    blocks = list(open_feature_file(path).blocks())
    return TeacherFeatures.in_memory(
        name=path.name,
        sample_ids=[prefix + own for prefix in prefixes for ids, _ in blocks for own in ids],
        features=np.concatenate([features for _, features in blocks] * len(prefixes)),
    )


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What made a teacher folder; nothing where it is unfinished or none."""
    path = folder / FACTS
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error})") from None


def open_folder(folder: Path) -> TeacherFeatures:
    facts = read_facts(folder)
    if facts is None:
        raise ValueError(
            f"{folder}: no {FACTS} here; not made by protoclip embed-teacher, or unfinished: "
            "the same command again goes on where it stopped"
        )
    try:
        shards = [np.load(file, mmap_mode="r") for file in sorted(folder.glob("features-*.npy"))]
        hashes = np.load(folder / HASHES, mmap_mode="r")
        rows = np.load(folder / ROWS, mmap_mode="r")
        complete = (
            sum(map(len, shards)) == len(hashes) == len(rows) == facts["rows"]
            and all(shard.shape[1:] == (facts["width"],) for shard in shards)
            and all(len(shard) == facts["shard_rows"] for shard in shards[:-1])
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: damaged ({error}); make it again") from None
    if not complete:
        raise ValueError(
            f"{folder}: its files do not hold {facts['rows']} rows of width {facts['width']}, "
            f"as {FACTS} says; make it again"
        )
    return TeacherFeatures(name=str(folder), index=IdIndex(hashes=hashes, rows=rows), shards=shards)


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name once it is complete and on the disk, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(
    folder: Path,
    blocks: Iterable[Block],
    *,
    num_rows: int,
    width: int,
    facts: Mapping[str, Any],
    shard_rows: int | None = None,
) -> dict[str, Any]:
    """Write a teacher folder.

    Args:
        folder: It exists, and holds no teacher yet.
        blocks: Ids and rows `(n, width)`, `num_rows` in all, at least one.
        num_rows, width: Of all blocks together.
        facts: What is to be known about them; JSON.
        shard_rows: Rows a file; a gigabyte of them if unset.

    Returns:
        The facts as written: with the number of rows and their width.

    Raises:
        ValueError: Duplicate ids, or rows that are not finite in half precision; with counts.
            Nothing is left in the folder.
    """
    shard_rows = shard_rows or max(1, SHARD_BYTES // (2 * width))
    scratch = folder / WRITING
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        fill(scratch, blocks, name=folder.name, shape=(num_rows, width), shard_rows=shard_rows)
        for file in sorted(scratch.iterdir()):
            with file.open("rb") as written:
                os.fsync(written.fileno())
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    facts = {**facts, "rows": num_rows, "width": width, "shard_rows": shard_rows}
    with whole(folder / FACTS) as facts_file:
        facts_file.write((to_json(facts, indent=2) + "\n").encode())
    return facts


def fill(
    folder: Path, blocks: Iterable[Block], *, name: str, shape: tuple[int, int], shard_rows: int
) -> None:
    """Write all files of a teacher folder but the facts."""
    num_rows, width = shape
    starts = range(0, num_rows, shard_rows)
    shards = [
        np.lib.format.open_memmap(
            folder / f"features-{number:05d}.npy",
            mode="w+",
            dtype=np.float16,
            shape=(min(shard_rows, num_rows - start), width),
        )
        for number, start in enumerate(starts)
    ]
    schema = pa.schema({"sample_id": pa.string()})
    hashes, done, broken, example = [], 0, 0, ""
    with pa.ipc.new_file(str(folder / IDS), schema) as ids_file:
        for ids, features in blocks:
            with np.errstate(over="ignore"):
                half = features.astype(np.float16)
            bad = np.flatnonzero(~np.isfinite(half).all(1))
            broken, example = broken + len(bad), example or (ids[bad[0]] if len(bad) else "")
            end = done + len(ids)
            for shard, start in zip(shards, starts, strict=True):
                first, last = max(done, start), min(end, start + len(shard))
                if first < last:
                    shard[first - start : last - start] = half[first - done : last - done]
            ids_file.write_batch(pa.record_batch([pa.array(ids, pa.string())], schema=schema))
            hashes.append(hash_ids(ids))
            done = end
    assert done == num_rows
    for shard in shards:
        shard.flush()
    if broken:
        raise ValueError(
            f"{name}: {broken} of {num_rows} features are not finite, or beyond half precision's "
            f"range of 65504, such as those of '{example}'"
        )
    with pa.memory_map(str(folder / IDS)) as source:
        column = pa.ipc.open_file(source).read_all().column("sample_id")
        index = build_index(
            np.concatenate(hashes), name=name, ids_of=lambda rows: column.take(rows).to_pylist()
        )
    np.save(folder / HASHES, index.hashes)
    np.save(folder / ROWS, index.rows)


def teachers(
    config: Config, samples: Pairs | SampleStream, note: Callable[[str], None]
) -> dict[str, TeacherFeatures]:
    """The external teachers by name. Samples they know nothing of are noted, where known ahead.

    Raises:
        ValueError: No such teacher, or it knows none of the samples.
    """
    found = {}
    for name, teacher in config.external_teachers.items():
        assert teacher.features is not None
        if teacher.features == "emoji":
            features = read_teacher(emoji_teacher_path(), prefixes=emoji_prefixes(config, samples))
        else:
            features = read_teacher(teacher.features)
        if isinstance(samples, Pairs) and (missing := features.missing(samples.sample_ids())):
            note(
                f"{name}: no features of {missing} of {len(samples)} training samples, which this "
                "teacher leaves alone"
            )
        found[name] = features
    return found


def emoji_prefixes(config: Config, samples: Pairs | SampleStream) -> list[str]:
    """What the ids of the bundled samples begin with, which their features know without."""
    if not isinstance(samples, MixedPairs):
        return [""]
    sources = zip(samples.sources, entries(config.data), strict=True)
    return [f"{source.name}/" for source, entry in sources if entry.path == "emoji"] or [""]
