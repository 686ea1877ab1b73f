"""The index: built once, as a whole or not at all."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from protoclip.data.tables import ArrowIndex, build_index

ROWS = {"caption": [f"caption {n}" for n in range(1000)], "path": ["x" * 100] * 1000}


def build(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
    facts["notes"] = ["as told"]
    yield from pa.table(ROWS).to_batches(max_chunksize=300)


def never(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
    raise AssertionError("built again")
    yield


def opened(build: Any, folder: Path) -> ArrowIndex:
    return build_index("key", build, folder=folder, label="there", way_out="add some")


def build_slowly(folder: Path, barrier: Any, answers: Any) -> None:
    def slowly(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        with (folder / "builders").open("a") as log:
            log.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        yield from build(facts)

    barrier.wait()
    found = opened(slowly, folder)
    answers.put((found.path.stat().st_ino, found.table.to_pydict(), found.facts))


def test_of_four_processes_at_once_one_builds(tmp_path):
    """The others wait for it, and all see the same file, rows and facts."""
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    arguments = (tmp_path, barrier, answers)
    processes = [context.Process(target=build_slowly, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(one == found[0] for one in found)
    assert found[0][1:] == (ROWS, {"notes": ["as told"]})
    assert len((tmp_path / "builders").read_text().split()) == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".arrow", ".json", ".lock"}
    assert opened(never, tmp_path).table.to_pydict() == ROWS
