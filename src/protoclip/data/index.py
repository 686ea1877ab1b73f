"""Indexes: facts about a source's samples in a memory-mapped Arrow file that is built once."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from protoclip.files import replacing

# Captions as stored; the image is a path or URL.
ROWS = pa.schema({"image": pa.string(), "caption": pa.list_(pa.binary()), "sample_id": pa.string()})
BATCH_ROWS = 8192
Build = Callable[[dict[str, Any]], Iterable[pa.RecordBatch]]


class ArrowIndex:
    """A memory-mapped `table`, with `facts` about its source; pickled as its path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table: pa.Table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self.facts: dict[str, Any] = json.loads(path.with_suffix(".json").read_text("utf-8"))
        self.notes = [*self.facts.get("notes", ()), *self.facts.get("left_out", ())]

    def __reduce__(self) -> tuple[type["ArrowIndex"], tuple[Path]]:
        return ArrowIndex, (self.path,)


def cache_folder() -> Path:
    """`$PROTOCLIP_CACHE`, or `protoclip` in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PROTOCLIP_CACHE") or Path(user) / "protoclip")


def index_folder(given: str | None = None) -> Path:
    """Where indexes are, in the cache folder that the user named or in the usual one."""
    return Path(given or cache_folder()) / "index"


def batches(rows: Iterable[Sequence[Any]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows of that schema, some thousands at a time."""
    left = iter(rows)
    while held := list(islice(left, BATCH_ROWS)):
        columns = zip(zip(*held, strict=True), schema, strict=True)
        arrays = [pa.array(values, field.type) for values, field in columns]
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def build_index(key: str, build: Build, *, folder: Path, where: str, way_out: str) -> ArrowIndex:
    """Open the index of that key; one process builds it if there is none, or half of one.

    `build` yields batches, and adds facts to the dictionary that it is given: `notes`, and notes
    of what is `left_out`. Raises `ValueError` if no batch comes, which begins with the first of
    these or with `where`, and ends with the way out; or if the folder cannot be written.
    """
    path = folder / f"{key}.arrow"
    facts: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        return ArrowIndex(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            with suppress(OSError, ValueError):
                return ArrowIndex(path)
            with replacing(path) as scratch:
                found = iter(build(facts))
                first = next(found, None)
                if first is None:
                    what = next(iter(facts.get("left_out", ())), f"{where}: holds no sample")
                    raise ValueError(f"{what}; no pair is left: {way_out}")
                with pa.ipc.new_file(str(scratch), first.schema) as writer:
                    for batch in chain([first], found):
                        writer.write_batch(batch)
                path.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error})"
        raise ValueError(f"{folder}: {reason}; set PROTOCLIP_CACHE to another") from error
    return ArrowIndex(path)
