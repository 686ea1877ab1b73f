"""The index: built once, whole or not at all, bounded, and fresh when its source changes."""

import errno
import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from protoclip.data import index as module
from protoclip.data.index import build_index, even_batches, fingerprint
from protoclip.data.locations import Access
from protoclip.data.pairs import ImageTextPairs

ROWS = {"caption": [f"caption {n}" for n in range(10)], "path": [f"{n}.jpg" for n in range(10)]}


def build(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
    facts["notes"] = ["as told"]
    yield pa.RecordBatch.from_pydict(ROWS)


def build_slowly(folder: Path, barrier: Any, answers: Any) -> None:
    def slowly(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        with (folder / "builders").open("a") as log:
            log.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        yield from build(facts)

    barrier.wait()
    found = build_index("key", None, slowly, folder=folder)
    answers.put((found.path.stat().st_ino, found.table.to_pydict(), found.facts))


def test_of_four_processes_at_once_one_builds(tmp_path: Path) -> None:
    """The others wait for it, and all see the same file, rows and facts."""
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=build_slowly, args=(tmp_path, barrier, answers)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(one == found[0] for one in found)
    assert found[0][1:] == (ROWS, {"notes": ["as told"]})
    assert len((tmp_path / "builders").read_text().split()) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_an_index_that_is_there_is_not_built_again(tmp_path: Path) -> None:
    build_index("key", None, build, folder=tmp_path)

    def never(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        raise AssertionError("built again")
        yield

    assert build_index("key", None, never, folder=tmp_path).table.to_pydict() == ROWS


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (KeyError("broken"), KeyError, "broken"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
        (OSError(errno.ENOSPC, "full"), ValueError, "no room for the index; set PROTOCLIP_CACHE"),
    ],
)
def test_a_build_that_fails_leaves_nothing(
    tmp_path: Path, error: BaseException, expected: type[BaseException], message: str
) -> None:
    """Not even a part of a file; the next attempt starts afresh."""

    def fail(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        yield from build(facts)
        raise error

    with pytest.raises(expected, match=message):
        build_index("key", None, fail, folder=tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".lock"}
    assert build_index("key", None, build, folder=tmp_path).table.to_pydict() == ROWS


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_half_an_index_is_built_again(tmp_path: Path, kept: int) -> None:
    """What a crash of the machine may leave."""
    path = build_index("key", None, build, folder=tmp_path).path
    path.write_bytes(path.read_bytes()[:kept])
    assert build_index("key", None, build, folder=tmp_path).table.to_pydict() == ROWS


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """One line, with the way out."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"file/cache: cannot be written .* set PROTOCLIP_CACHE"):
        build_index("key", None, build, folder=tmp_path / "file" / "cache")


def test_the_cache_folder_is_what_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path))
    assert build_index("key", None, build).path == tmp_path / "index" / "key.arrow"


@pytest.mark.parametrize("sizes", [[1] * 50, [37], [8, 8, 8], [3, 20, 1, 9]])
def test_batches_are_evened_out(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    """The same rows in order, each batch within the bounds, and small ones put together."""
    monkeypatch.setattr(module, "BATCH_ROWS", 8)
    table = pa.table({"n": range(sum(sizes)), "text": ["x" * n for n in range(sum(sizes))]})
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    given = [table.slice(a, n).to_batches()[0] for a, n in zip(starts, sizes, strict=True)]
    found = list(even_batches(given))
    assert pa.Table.from_batches(found) == table
    assert all(batch.num_rows <= 8 for batch in found)
    assert len(found) <= 2 * -(-sum(sizes) // 8)


def test_batches_are_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of unequal size: no batch holds more than the bound, but for a single large row."""
    monkeypatch.setattr(module, "BATCH_BYTES", 1000)
    images = [b"x" * size for size in (10, 300, 700, 5000, 20, 20, 900, 400)]
    found = list(even_batches([pa.RecordBatch.from_pydict({"image": images})]))
    assert [image for batch in found for image in batch["image"].to_pylist()] == images
    assert all(batch.nbytes <= 1000 or batch.num_rows == 1 for batch in found)
    assert len(found) < len(images)


COLUMNS = {
    "text": pa.array(["a", "", None, "猫", "x" * 5000] * 20),
    "bytes": pa.array([b"\xff", None, b"", b"y" * 70_000, b"z"] * 20),
    "lists": pa.array([[b"a", b"bb"], [], None, [None, b""], [b"\xfe"]] * 20),
    "texts": pa.array([["a", "ü"], None, [], ["c"], [None]] * 20),
    "whole": pa.array([0, None, -1, 2**62, 7] * 20, pa.int64()),
    "narrow": pa.array([1, None, 3, 4, 5] * 20, pa.int32()),
    "all there": pa.array(["q"] * 100),
    "none there": pa.array([None] * 100, pa.string()),
}


def build_columns(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
    yield from pa.table(COLUMNS).to_batches()


@pytest.mark.parametrize("system", ["with pread", "without"])
def test_single_values_are_those_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    """Every type, missing and empty values, and rows at the borders of batches."""
    monkeypatch.setattr(module, "BATCH_ROWS", 7)
    if system == "without":
        monkeypatch.delattr(os, "pread")
    index = build_index("key", None, build_columns, folder=tmp_path)
    assert index.table.column("text").num_chunks > 10
    for name, column in COLUMNS.items():
        assert [index.value(name, row) for row in range(100)] == column.to_pylist()
        with pytest.raises(IndexError):
            index.value(name, 100)


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory, as Linux tells."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_reading_leaves_nothing_in_memory(tmp_path: Path) -> None:
    """Neither single values nor a walk over all ids keep the file's pages."""

    def large(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        ids = [f"{row:0100d}" for row in range(20_000)]
        yield pa.RecordBatch.from_pydict({"sample_id": ids, "caption": ids, "path": ids})

    pairs = ImageTextPairs(build_index("key", None, large, folder=tmp_path), name="pairs")
    assert pairs.index is not None
    path = pairs.index.path
    pairs.index.release()
    assert [pairs.caption(row) for row in range(0, 20_000, 100)][7] == f"{700:0100d}"
    assert resident(path) < path.stat().st_size / 10
    assert pairs.table.column("caption").to_pylist()[7] == f"{7:0100d}"
    assert resident(path) > path.stat().st_size / 10, "the measure sees pages that are read"
    assert list(pairs.sample_ids())[7] == f"{7:0100d}"
    assert resident(path) < path.stat().st_size / 10


def test_a_worker_opens_the_index_again(tmp_path: Path) -> None:
    """What is sent to it does not grow with the rows."""

    def large(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        yield pa.RecordBatch.from_pydict({"caption": ["x" * 1000] * 1000, "path": ["p"] * 1000})

    pairs = ImageTextPairs(build_index("key", None, large, folder=tmp_path), name="pairs")
    sent = pickle.dumps(pairs)
    assert len(sent) < 1000
    assert pickle.loads(sent).table == pairs.table


def rewrite(path: Path, content: bytes, time_ns: int) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(time_ns, time_ns))


def test_a_fingerprint_follows_the_file(tmp_path: Path) -> None:
    """Equal while nothing changes; another with other content, time of change, or path."""
    path = tmp_path / "a.csv"
    rewrite(path, b"one", 1)
    first = fingerprint(str(path))
    rewrite(path, b"one", 1)
    assert fingerprint(str(path)) == first
    others = []
    for content, time_ns in ((b"two", 1), (b"one", 2), (b"ones", 1)):
        rewrite(path, content, time_ns)
        others.append(fingerprint(str(path)))
    (tmp_path / "b.csv").write_bytes(b"one")
    others.append(fingerprint(str(tmp_path / "b.csv")))
    assert len({first, *others}) == 5


@pytest.mark.parametrize("protocol", ["http", "s3"])
def test_a_fingerprint_follows_a_url(
    tmp_path: Path, bucket: str, serve: Callable[..., str], protocol: str
) -> None:
    url = f"{bucket}/a.csv" if protocol == "s3" else f"{serve('ranges', tmp_path)}/a.csv"
    found = []
    for content in (b"one", b"three", b"seventeen"):
        (tmp_path / "a.csv").write_bytes(content)
        if protocol == "s3":
            fsspec.filesystem("s3").pipe(url, content)
        found += [fingerprint(url, Access(private_hosts=True)) for _ in range(2)]
    assert found[::2] == found[1::2]
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing.csv", "no such file"),
        ("s3://nothing.csv", "no such file"),
        ("nowhere://a.csv", "'nowhere://' is not read"),
        ("/dev/null", "is a device, not a file"),
    ],
)
def test_a_file_that_is_not_there_is_named(path: str, message: str, bucket: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        fingerprint(path)
    assert str(error.value).startswith(path)
    assert "\n" not in str(error.value)
