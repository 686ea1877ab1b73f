"""Metrics are written where they can be, and nothing that fails there stops training."""

import json
import math
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from protoclip.files import to_json
from protoclip.training import logging
from protoclip.training.logging import JsonLines, MetricsSink


def steps(path: Path) -> list[int]:
    """The steps of a file of whole lines; a torn line is no JSON, and raises."""
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line)["step"] for line in text.splitlines()]


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard shows of a metric."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(name)]


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes; what fits is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Failing:
    """A file that opens, and fails with an error number where it is told to."""

    def __init__(self, file: Any, where: str) -> None:
        self.file, self.where = file, where

    def __enter__(self) -> "Failing":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
        if self.where == "close":
            raise OSError(116, "Stale file handle")

    def tell(self) -> int:
        return int(self.file.tell())

    def truncate(self, size: int) -> None:
        if self.where == "truncate":
            raise OSError(5, "Input/output error")
        self.file.truncate(size)

    def write(self, data: bytes) -> int:
        if self.where in ("write", "truncate"):
            self.file.write(data[: len(data) // 2])  # a torn line, and an error of the next bytes
            raise OSError(28, "No space left on device")
        return int(self.file.write(data))


def make_fail(patch: pytest.MonkeyPatch, where: str) -> None:
    """Every file that is opened from now on fails there."""
    path_open = Path.open

    def opened(path: Path, *arguments: Any, **settings: Any) -> Any:
        if where == "open":
            raise PermissionError(13, "Permission denied", str(path))
        return Failing(path_open(path, *arguments, **settings), where)

    patch.setattr(Path, "open", opened)


def test_one_line_and_one_point_a_metric(tmp_path: Path) -> None:
    """Lines in order with step, episode and metrics, and curves with the same values."""
    sink = MetricsSink(tmp_path)
    sink.write(step=1, episode=0, metrics={"loss": 2.0, "rate": 0.5})
    sink.write(step=2, episode=0, metrics={"loss": 1.0})
    sink.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == [
        '{"step": 1, "episode": 0, "loss": 2.0, "rate": 0.5}',
        '{"step": 2, "episode": 0, "loss": 1.0}',
    ]
    assert sink.size == (tmp_path / "metrics.jsonl").stat().st_size
    assert curve(tmp_path, "loss") == [(1, 2.0), (2, 1.0)]
    assert curve(tmp_path, "rate") == [(1, 0.5)]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    """Every line is JSON that strict parsers read, whatever a metric has become."""
    lines = JsonLines(tmp_path / "metrics.jsonl", size=0)
    lines.write(1, {"loss": math.nan, "norm": math.inf, "low": -math.inf, "rate": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "norm": null, "low": null, "rate": 0.5}\n'
    nested = {"a": [1.0, math.nan, {"b": (math.inf,)}], "c": "NaN"}
    assert to_json(nested) == '{"a": [1.0, null, {"b": [null]}], "c": "NaN"}'


def test_a_run_that_goes_on_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    """Lines after the given size are gone, also a torn one, and TensorBoard voids later points."""
    sink = MetricsSink(tmp_path)
    sink.write(step=1, episode=0, metrics={"loss": 3.0})
    size = sink.size
    sink.write(step=2, episode=0, metrics={"loss": 9.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "epi')
    sink = MetricsSink(tmp_path, size=size, step=1)
    assert steps(tmp_path / "metrics.jsonl") == [1]
    sink.write(step=2, episode=0, metrics={"loss": 2.0})
    sink.close()
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    assert curve(tmp_path, "loss") == [(1, 3.0), (2, 2.0)]


def test_a_file_shorter_than_the_checkpoint_says_is_not_filled_up(tmp_path: Path) -> None:
    """It goes on where it ends, without a hole."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    sink = JsonLines(tmp_path / "metrics.jsonl", size=500)
    sink.write(2, {})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    assert sink.size == (tmp_path / "metrics.jsonl").stat().st_size


@pytest.mark.parametrize("where", ["open", "write", "truncate", "close"])
def test_lines_that_cannot_be_written_wait(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it fails there is one warning, the size is that of the whole lines before, and the
    next line that can be written brings the others, in order and none twice."""
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, size=0)
    sink.write(1, {"loss": 1.0})
    size = path.stat().st_size
    with pytest.MonkeyPatch.context() as patch:
        make_fail(patch, where)
        for step in (2, 3):
            sink.write(step, {"loss": 1.0})
            assert sink.size == size
    if where in ("open", "write"):  # the other two leave the file as they made it until then
        assert steps(path) == [1]
    sink.write(4, {"loss": 1.0})
    assert steps(path) == [1, 2, 3, 4]
    assert sink.size == path.stat().st_size
    sink.close()
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: logging.jsonl: [Errno ")
    assert warning.endswith("; training goes on, lines wait to be written")


def test_a_full_disk_tears_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The system writes what fits of a line and no more; the file holds whole lines all the time,
    and so it does when the run ends before there is room."""
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, size=0)
    sink.write(1, {"loss": 1.0})
    with room(sink.size + 10):
        sink.write(2, {"loss": 1.0})
        assert steps(path) == [1]
        sink.write(3, {"loss": 1.0})
        sink.close()
    assert steps(path) == [1]
    assert sink.size == path.stat().st_size
    first, last = capsys.readouterr().err.splitlines()
    assert "training goes on" in first
    assert last == "warning: logging.jsonl: 2 lines could not be written and are lost"


def test_so_many_lines_wait_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The oldest are given up, and how many is said at the end."""
    assert logging.MOST_WAITING == 10_000
    monkeypatch.setattr(logging, "MOST_WAITING", 3)
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, size=0)
    with pytest.MonkeyPatch.context() as patch:
        make_fail(patch, "open")
        for step in range(1, 6):
            sink.write(step, {})
    sink.close()
    assert steps(path) == [3, 4, 5]
    assert "2 lines could not be written and are lost" in capsys.readouterr().err


def test_a_folder_that_is_away_at_first_is_no_obstacle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One warning; the lines are there once the folder is."""
    folder = tmp_path / "run"
    sink = JsonLines(folder / "metrics.jsonl", size=0)
    sink.write(1, {})
    folder.mkdir()
    sink.write(2, {})
    assert steps(folder / "metrics.jsonl") == [1, 2]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_tensorboard_on_a_full_disk_is_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One warning and no traceback, no thread is left behind, and points before it can be read."""
    threads = threading.active_count()
    sink = MetricsSink(tmp_path)
    sink.write(step=1, episode=0, metrics={"loss": 1.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    with room(events.stat().st_size + 10):
        sink.write(step=2, episode=0, metrics={"loss": 1.0})  # in the smaller file of lines it fits
    for step in (3, 4):
        sink.write(step=step, episode=0, metrics={"loss": 1.0})
    sink.close()
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    assert curve(tmp_path, "loss") == [(1, 1.0)]
    assert threading.active_count() == threads
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning == (
        "warning: TensorBoard: [Errno 27] File too large; training goes on without it"
    )


@pytest.mark.parametrize("how", ["missing", "folder"])
def test_tensorboard_that_cannot_begin_is_off(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its package, or with a file in its folder's place: one warning, and all the lines."""
    if how == "missing":
        monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    else:
        (tmp_path / "tensorboard").touch()
    sink = MetricsSink(tmp_path)
    for step in (1, 2):
        sink.write(step=step, episode=0, metrics={"loss": 1.0})
    sink.close()
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: TensorBoard: ")
    assert warning.endswith("; training goes on without it")


class FakeRun:
    """A W&B run that remembers, and fails where it is told to."""

    def __init__(self, fails: str) -> None:
        self.fails = fails
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def log(self, values: dict[str, float], *, step: int) -> None:
        if self.fails == "log":
            raise ConnectionError("no network\nand much more about it")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1
        if self.fails in ("log", "finish"):
            raise BrokenPipeError


class FakeWandb(ModuleType):
    def __init__(self, fails: str) -> None:
        super().__init__("wandb")
        self.fails = fails
        self.settings: list[dict[str, Any]] = []
        self.runs: list[FakeRun] = []

    def init(self, **settings: Any) -> FakeRun:
        if self.fails == "init":
            raise RuntimeError("api_key not configured")
        self.settings.append(settings)
        self.runs.append(FakeRun(self.fails))
        return self.runs[-1]


def log_twice(folder: Path, **settings: Any) -> None:
    sink = MetricsSink(folder, **settings)
    for step in (1, 2):
        sink.write(step=step, episode=0, metrics={"loss": 1.0 / step})
    sink.close()


def test_wandb_gets_what_the_file_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the run's name and settings, in the run folder; a run that goes on keeps its id."""
    fake = FakeWandb("nowhere")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        log_twice(tmp_path, wandb="offline", name="tiny", config={"run": {"seed": 0}})
    first, second = fake.settings
    assert first == second
    assert first.pop("id")
    assert first == {
        "project": "protoclip",
        "dir": str(tmp_path),
        "resume": "allow",
        "mode": "offline",
        "name": "tiny",
        "config": {"run": {"seed": 0}},
    }
    for run in fake.runs:
        assert run.logged == [(1, {"loss": 1.0}), (2, {"loss": 0.5})]
        assert run.finished == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        ("import", "import of wandb halted; None in sys.modules"),
        ("init", "api_key not configured"),
        ("log", "no network"),
        ("finish", "BrokenPipeError"),
    ],
)
def test_wandb_that_fails_is_off(
    fails: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wherever it fails there is one warning of one line, and the file has every line."""
    fake = FakeWandb(fails)
    monkeypatch.setitem(sys.modules, "wandb", None if fails == "import" else fake)
    log_twice(tmp_path, wandb="online")
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    assert [run.finished for run in fake.runs] == ([1] if fails in ("log", "finish") else [])
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning == f"warning: Weights & Biases: {reason}; training goes on without it"


def test_wandb_is_not_imported_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The package is optional."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    log_twice(tmp_path)
    assert not (tmp_path / "wandb").exists()
    assert capsys.readouterr().err == ""
