"""Indexes: facts about a source's samples in a memory-mapped Arrow file that is built once.

A file beside it has a checksum of each batch of rows. A batch is compared with it when one of its
rows is used for the first time, so that an index of any size opens at once.
"""

import os
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from protoclip.files import in_turn, read_sealed, replacing, sealed, to_json, write_atomically

# Captions as stored; the image is a path or URL.
ROWS = pa.schema({"image": pa.string(), "caption": pa.list_(pa.binary()), "sample_id": pa.string()})
BATCH_ROWS = 8192
Build = Callable[[dict[str, Any]], Iterable[pa.RecordBatch]]


class ArrowIndex:
    """A memory-mapped `table`, with `facts` about its source; pickled as its path.

    Call `check` before you use rows of the table.

    Raises:
        OSError: There is no such index.
        ValueError: The index is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = read_sealed(path.with_suffix(".json"))
        try:
            self.table = read_table(path)
            intact = self.facts.pop("frame", None) == frame(self.table)
        except pa.ArrowException:  # not all of them are a `ValueError`
            intact = False
        if not intact:
            raise ValueError(f"{path}: damaged (not what was written: its checksum differs)")
        self._checksums = self.facts.pop("batches", None)
        self._batches = self.table.to_batches()
        self._ends = list(accumulate(map(len, self._batches)))
        self._unchecked = set(range(len(self._batches)))
        self.notes = [*self.facts.get("notes", ()), *self.facts.get("left_out", ())]

    def check(self, row: int | None = None) -> None:
        """Compare the checksum of the batch that holds a row, or of all batches, once.

        Raises:
            ValueError: It differs; names the file and the rows.
        """
        if not self._unchecked:
            return
        numbers = [*self._unchecked] if row is None else [bisect_right(self._ends, row)]
        for number in numbers:
            if number not in self._unchecked:
                continue
            if batch_checksum(self._batches[number]) != self._checksums[number]:
                end, size = self._ends[number], len(self._batches[number])
                raise ValueError(
                    f"{self.path}: damaged (the checksum of rows {end - size} to {end - 1} "
                    "differs); delete it, and it is built again"
                )
            self._unchecked.discard(number)

    def __reduce__(self) -> tuple[type["ArrowIndex"], tuple[Path]]:
        return ArrowIndex, (self.path,)


def read_table(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def frame(table: pa.Table) -> list[Any]:
    """What every batch depends on: the columns, their lengths, and the values of dictionaries."""
    values = [
        buffers_checksum(column.chunk(0).dictionary)
        for column in table.columns
        if pa.types.is_dictionary(column.type) and column.num_chunks
    ]
    lengths = [len(chunk) for column in table.columns[:1] for chunk in column.iterchunks()]
    return [str(table.schema), lengths, *values]


def batch_checksum(batch: pa.RecordBatch) -> int:
    checksum = 0
    for column in batch.columns:
        checksum = buffers_checksum(column, checksum)
    return checksum


def buffers_checksum(array: pa.Array, checksum: int = 0) -> int:
    """CRC-32 of an array's bytes, and of the numbers that say how to read them."""
    parts = [array]
    while pa.types.is_list(parts[-1].type):
        parts.append(parts[-1].values)
    facts = [(str(part.type), len(part), part.null_count, part.offset) for part in parts]
    checksum = zlib.crc32(repr(facts).encode(), checksum)
    for buffer in array.buffers():
        checksum = zlib.crc32(b"" if buffer is None else buffer, checksum)
    return checksum


def cache_folder() -> Path:
    """`$PROTOCLIP_CACHE`, or `protoclip` in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PROTOCLIP_CACHE") or Path(user) / "protoclip")


def index_folder() -> Path:
    return cache_folder() / "index"


def batches(rows: Iterable[Sequence[Any]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows of that schema, some thousands at a time."""
    left = iter(rows)
    while held := list(islice(left, BATCH_ROWS)):
        columns = zip(zip(*held, strict=True), schema, strict=True)
        arrays = [pa.array(values, field.type) for values, field in columns]
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def build_index(key: str, build: Build, *, folder: Path, label: str, way_out: str) -> ArrowIndex:
    """Open the index of that key; one process builds it if there is none, or half of one.

    `build` yields batches, and adds facts to the dictionary that it is given: `notes`, and notes
    of what is `left_out`. Raises `ValueError` if no batch comes, which begins with the first of
    these or with `label`, and ends with the way out; or if the folder cannot be written.
    """
    path = folder / f"{key}.arrow"
    facts: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        return ArrowIndex(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with in_turn(path):
            with suppress(OSError, ValueError):
                return ArrowIndex(path)
            for left in folder.glob(f".{key}.*.tmp"):  # of a process that was killed
                left.unlink(missing_ok=True)
            with replacing(path) as scratch:
                parts = iter(build(facts))
                first = next(parts, None)
                if first is None:
                    what = next(iter(facts.get("left_out", ())), f"{label}: holds no sample")
                    raise ValueError(f"{what}; no pair is left: {way_out}")
                with pa.ipc.new_file(str(scratch), first.schema) as writer:
                    for batch in chain([first], parts):
                        writer.write_batch(batch)
                table = read_table(scratch)
                facts["frame"] = frame(table)
                facts["batches"] = [batch_checksum(batch) for batch in table.to_batches()]
                del table
                write_atomically(path.with_suffix(".json"), to_json(sealed(facts)))
    except OSError as error:
        raise unwritable(folder, error) from error
    return ArrowIndex(path)


def unwritable(folder: Path, error: OSError) -> ValueError:
    """An error for a folder, such as the cache, that cannot be written to."""
    is_cache = folder.is_relative_to(cache_folder())
    way_out = "set PROTOCLIP_CACHE to another" if is_cache else "choose another place"
    return ValueError(f"{folder}: cannot be written ({error.strerror or error}); {way_out}")
