"""An index: what is known of a source's samples, as a memory-mapped Arrow file that is built once.

Opening it parses nothing and costs no memory that grows with it. It lies in a cache folder under a
name that says what it was built from, so a source that changes is indexed again; the folder may be
deleted at any time.
"""

import errno
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
from filelock import FileLock

from protoclip.data.locations import (
    NOTHING_MORE,
    Access,
    is_url,
    open_local,
    reason_of,
    url_facts,
)
from protoclip.data.values import Values, is_readable

# Rows and bytes of a record batch, the unit that an index is written and found by.
BATCH_ROWS, BATCH_BYTES = 65_536, 1 << 25


class ArrowIndex:
    """A memory-mapped Arrow file, with facts about its source in a JSON file beside it.

    Args:
        path: An Arrow IPC file that `build_index` wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._base = pa.py_buffer(self._map)
        self.table: pa.Table = pa.ipc.open_file(self._base).read_all()
        self._columns: dict[str, Values | pa.ChunkedArray] = {}

    def __reduce__(self) -> tuple[type["ArrowIndex"], tuple[Path]]:
        return ArrowIndex, (self.path,)

    @property
    def facts(self) -> dict[str, Any]:
        """What `build_index` was told beside the rows."""
        return dict(json.loads(self.path.with_suffix(".json").read_text(encoding="utf-8")))

    def value(self, column: str, row: int) -> Any:
        """One value, without leaving anything in memory."""
        if column not in self._columns:
            mapped = self.table.column(column)
            self._columns[column] = (
                Values(mapped, file=self._file.fileno(), base=self._base.address)
                if is_readable(mapped.type)
                else mapped
            )
        found = self._columns[column][row]
        return found.as_py() if isinstance(found, pa.Scalar) else found

    def release(self) -> None:
        """Give back the pages that reading the table left in resident memory.

        The system's page cache keeps them, so that reading them again is cheap.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def cache_folder() -> Path:
    """`$PROTOCLIP_CACHE`, or `protoclip` in the user's cache folder."""
    if given := os.environ.get("PROTOCLIP_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "protoclip"


def fingerprint(path: str, access: Access = NOTHING_MORE) -> str:
    """What identifies a file's content without reading all of it.

    Size and time of change, and the bytes at both ends; for a URL what its file system tells (size,
    and an entity tag or a time where it has one).

    Raises:
        ValueError: There is no such file, or it may not or cannot be read.
    """
    try:
        if is_url(path):
            return digest({"url": path, **url_facts(path, access)})
        file = Path(path)
        opened = open_local(file)
    except Exception as error:  # stores have errors of their own
        raise ValueError(f"{path}: {reason_of(error)}") from None
    with opened:
        status = os.fstat(opened.fileno())
        ends = opened.read(1 << 16)
        opened.seek(max(0, status.st_size - (1 << 16)))
        ends += opened.read()
    return digest(
        {
            "path": str(file.resolve()),
            "size": status.st_size,
            "time": status.st_mtime_ns,
            "ends": hashlib.blake2b(ends, digest_size=16).hexdigest(),
        }
    )


def digest(facts: Mapping[str, Any]) -> str:
    """A short name for a set of facts."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def build_index(
    key: str,
    schema: pa.Schema | None,
    build: Callable[[dict[str, Any]], Iterable[pa.RecordBatch]],
    *,
    folder: Path | None = None,
) -> ArrowIndex:
    """Open the index of that key, building it first where there is none, or none that can be read.

    Several processes may ask at once: one builds, the others wait for it. The file appears whole or
    not at all.

    Args:
        key: Names source, content and settings; see `fingerprint` and `digest`.
        schema: Of the rows; the first batch's if unset.
        build: Yields the rows, at least one batch; may put facts, such as notes for the user, into
            the dictionary it is given. What it raises is passed on and nothing is written.
        folder: Where indexes lie; the user's cache folder if unset.

    Raises:
        ValueError: The folder cannot be written.
    """
    folder = folder or cache_folder() / "index"
    path = folder / f"{key}.arrow"
    if (index := open_index(path)) is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{path}.lock")
            lock.acquire()
        except OSError as error:
            raise ValueError(
                f"{folder}: cannot be written ({error.strerror}); set PROTOCLIP_CACHE to a folder "
                "that can"
            ) from None
        try:
            if (index := open_index(path)) is None:
                write_index(path, schema, build)
                index = ArrowIndex(path)
        finally:
            lock.release()
    return index


def open_index(path: Path) -> ArrowIndex | None:
    """The index, or None where there is none or a crash left half of one."""
    try:
        return ArrowIndex(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def write_index(
    path: Path,
    schema: pa.Schema | None,
    build: Callable[[dict[str, Any]], Iterable[pa.RecordBatch]],
) -> None:
    """Write the rows to a temporary file, then give it its name; the facts lie beside it first."""
    facts: dict[str, Any] = {}
    scratch = path.with_name(f"{path.stem}.{uuid4().hex}.tmp")
    try:
        batches = even_batches(build(facts))
        first = next(batches, None)
        schema = schema or (first.schema if first else None)
        assert schema is not None, "an index without a schema needs a batch"
        with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            if first is not None:
                writer.write_batch(first)
            for batch in batches:
                writer.write_batch(batch)
        path.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")
        scratch.replace(path)
        pa.default_memory_pool().release_unused()
    except BaseException as error:
        scratch.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"{path.parent}: no room for the index; set PROTOCLIP_CACHE to a folder with more"
            ) from error
        raise


def even_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of bounded rows and bytes, however they come."""
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        for piece in split(batch):
            if held and (rows + piece.num_rows > BATCH_ROWS or size + piece.nbytes > BATCH_BYTES):
                yield join(held)
                held, rows, size = [], 0, 0
            held.append(piece)
            rows, size = rows + piece.num_rows, size + piece.nbytes
    if held:
        yield join(held)


def split(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Halves of halves, until each has few enough rows and bytes, or a single row."""
    rows = batch.num_rows
    if rows > 1 and (rows > BATCH_ROWS or batch.nbytes > BATCH_BYTES):
        yield from split(batch.slice(0, rows // 2))
        yield from split(batch.slice(rows // 2))
    elif rows:
        yield batch


def join(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    """One batch of several that are small together."""
    if len(batches) == 1:
        return batches[0]
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
