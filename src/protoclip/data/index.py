"""Indexes: facts about a source's samples in a memory-mapped Arrow file that is built once."""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from protoclip.files import replacing

Build = Callable[[dict[str, Any]], Iterable[pa.RecordBatch]]


class ArrowIndex:
    """A memory-mapped `table`, with `facts` about its source; pickled as its path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table: pa.Table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self.facts: dict[str, Any] = json.loads(path.with_suffix(".json").read_text("utf-8"))

    def __reduce__(self) -> tuple[type["ArrowIndex"], tuple[Path]]:
        return ArrowIndex, (self.path,)


def cache_folder() -> Path:
    """`$PROTOCLIP_CACHE`, or `protoclip` in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PROTOCLIP_CACHE") or Path(user) / "protoclip")


def build_index(
    key: str, schema: pa.Schema | None, build: Build, *, folder: Path | None = None
) -> ArrowIndex:
    """Open the index of that key; one process builds it if there is none, or half of one.

    `build` yields rows of that schema (the first batch's if unset), and may add facts to the
    dictionary that it is given. Raises `ValueError` if the folder cannot be written.
    """
    path = (folder or cache_folder() / "index") / f"{key}.arrow"
    facts: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        return ArrowIndex(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            with suppress(OSError, ValueError):
                return ArrowIndex(path)
            with replacing(path) as scratch:
                batches = iter(build(facts))
                first = list(islice(batches, 1))
                with pa.ipc.new_file(str(scratch), schema or first[0].schema) as writer:
                    for batch in chain(first, batches):
                        writer.write_batch(batch)
                path.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error})"
        raise ValueError(f"{path.parent}: {reason}; set PROTOCLIP_CACHE to another") from error
    return ArrowIndex(path)
