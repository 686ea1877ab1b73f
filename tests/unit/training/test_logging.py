"""Metrics are written wherever that works, and no failure there stops training."""

import json
import math
import resource
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from protoclip.data.loader import SkipLog
from protoclip.data.pairs import BadSample
from protoclip.training import log
from protoclip.training.log import MetricsLog


def steps(path: Path) -> list[int]:
    """The steps of a file of whole lines; half a line is no JSON, and raises."""
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
    """Let no file of this process grow beyond this many bytes; what fits is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_link_in_a_run_folder_is_not_followed(tmp_path, capsys):
    """What it leads to may be anything of the user's."""
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    for name in ("metrics.jsonl", "skipped.jsonl"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine.txt")
    log = MetricsLog(tmp_path / "run", names=[])
    log.write(1, 0, {"loss": 1.0})
    log.close()
    SkipLog(tmp_path / "run" / "skipped.jsonl", max_share=1.0, at_least=1).add(
        1, [BadSample("a", "there", "is damaged")]
    )
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert capsys.readouterr().err.count("is a link; put the file itself in its place") == 2


def test_each_call_is_a_line_and_a_point(tmp_path):
    """Numbers that are not finite are null in the file, so that strict parsers read it."""
    log = MetricsLog(tmp_path)
    log.write(1, 0, {"loss": 2.0, "rate": 0.5})
    assert curve(tmp_path, "rate") == [(1, 0.5)]  # at once, should the run be killed
    log.write(1, 0, {})
    log.write(2, 0, {"loss": 1.0, "norm": math.inf, "low": math.nan})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 1, "episode": 0, "loss": 2.0, "rate": 0.5}',
        '{"step": 2, "episode": 0, "loss": 1.0, "norm": null, "low": null}',
    ]
    assert log.size == (tmp_path / "metrics.jsonl").stat().st_size
    assert curve(tmp_path, "loss") == [(1, 2.0), (2, 1.0)]


def test_a_run_that_goes_on_replaces_what_came_after_its_checkpoint(tmp_path):
    """Later lines are cut off, half lines too, and TensorBoard hides later points."""
    log = MetricsLog(tmp_path)
    log.write(1, 0, {"loss": 3.0})
    size = log.size
    log.write(2, 0, {"loss": 9.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "epi')
    log = MetricsLog(tmp_path, size=size, step=1)
    assert steps(tmp_path / "metrics.jsonl") == [1]
    log.write(2, 0, {"loss": 2.0})
    log.close()
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    assert curve(tmp_path, "loss") == [(1, 3.0), (2, 2.0)]


def log_twice(folder: Path, **settings: Any) -> None:
    log = MetricsLog(folder, **settings)
    for step in (1, 2):
        log.write(step, 0, {"loss": 1.0 / step})
    log.close()


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """W&B, whose only run is `init.return_value`."""
    fake = Mock()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_what_the_file_gets(name, tmp_path, wandb, capsys, monkeypatch):
    """With the run's settings, in the run folder, and a command line without secrets, which W&B
    keeps. A run that goes on keeps its id."""
    monkeypatch.setitem(sys.modules, name, wandb)
    monkeypatch.setattr(
        sys, "argv", ["protoclip", "--data.train", "https://me:word@host/a?token=b"]
    )
    for _ in range(2):
        log_twice(tmp_path, names=[name], config={"run": {"seed": 0}})
    first, second = wandb.init.call_args_list
    assert first == second
    run_id = (tmp_path / name / "run-id").read_text()
    expected = {"project": "protoclip", "resume": "allow", "config": {"run": {"seed": 0}}}
    if name == "wandb":
        assert sys.argv == ["protoclip", "--data.train", "https://***@host/a?***"]
        expected |= {"dir": str(tmp_path), "name": tmp_path.name, "id": run_id}
    else:
        expected |= {"name": run_id}
    assert first.kwargs.items() >= expected.items()
    run = wandb.init.return_value
    assert run.log.mock_calls == [call({"loss": 1.0}, step=1), call({"loss": 0.5}, step=2)] * 2
    assert run.finish.call_count == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("fails", "error"),
    [
        ("import", "import of wandb halted; None in sys.modules"),
        ("init", RuntimeError("api_key not configured")),
        ("log", ConnectionError("no network\nand much more about it")),
        ("finish", BrokenPipeError()),
        ("tensorboard", "import of tensorboard.summary.writer.record_writer halted; None in "),
        ("folder", "[Errno 17] File exists: "),
    ],
)
def test_a_logger_that_fails_is_off(fails, error, tmp_path, wandb, monkeypatch, capsys):
    """One warning of one line; the file has every line."""
    name = "wandb"
    if fails == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    elif fails == "tensorboard":
        name = fails
        monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    elif fails == "folder":
        name = "tensorboard"
        (tmp_path / name).touch()
    else:
        failing = wandb if fails == "init" else wandb.init.return_value
        getattr(failing, fails).side_effect = error
    log_twice(tmp_path, names=["tensorboard", "wandb"])
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    assert wandb.init.return_value.finish.called == (fails not in ("import", "init"))
    (warning,) = capsys.readouterr().err.splitlines()
    reason = str(error).split("\n")[0] or "BrokenPipeError"
    assert warning.startswith(f"warning: {name}: {reason}")
    assert warning.endswith("; training goes on without it")


class Listing:
    """A logger that writes to a file what it is told."""

    def __init__(self, folder: Path, *, config: Mapping[str, Any], step: int) -> None:
        self.path = folder / "told.txt"
        self.tell(f"{config['run']['seed']} after {step}")

    def tell(self, what: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{what}\n")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.tell(f"{step} {dict(metrics)}")

    def close(self) -> None:
        self.tell("end")


def test_a_class_of_ones_own_is_a_logger(tmp_path, capsys):
    """One that is missing costs a warning."""
    names = [f"{__name__}:Listing", f"{__name__}:Missing"]
    log_twice(tmp_path, names=names, config={"run": {"seed": 7}}, step=3)
    seen = (tmp_path / "told.txt").read_text().splitlines()
    assert seen == ["7 after 3", "1 {'loss': 1.0}", "2 {'loss': 0.5}", "end"]
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {__name__}:Missing: ")
    assert not (tmp_path / "tensorboard").exists()


class Hanging(Listing):
    def close(self) -> None:
        threading.Event().wait()


def test_a_logger_that_hangs_at_the_end_costs_a_warning(tmp_path, monkeypatch, capsys):
    """While it is waited for, the run hears no signal."""
    monkeypatch.setattr(log, "CLOSE_SECONDS", 0.1)
    log_twice(tmp_path, names=[f"{__name__}:Hanging"], config={"run": {"seed": 7}})
    assert ":Hanging: not read within 0.1 s" in capsys.readouterr().err


def test_mlflow_makes_a_run_where_that_of_the_folder_is_not_known(tmp_path, monkeypatch, capsys):
    """A copy of the folder comes to a machine that has no copy of MLflow's own store. Without a
    network the id stays."""
    fake = Mock()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    client, path = fake.MlflowClient.return_value, tmp_path / "mlflow" / "run-id"
    client.get_run.side_effect = LookupError("no such run")
    for made in ("first", "second"):
        client.create_run.return_value.info.run_id = made
        log_twice(tmp_path, names=["mlflow"], config={"run": {"seed": 0}})
        assert path.read_text() == made
        assert client.set_terminated.call_args == call(made)
    client.create_run.side_effect = ConnectionError("no network")
    log_twice(tmp_path, names=["mlflow"], config={"run": {"seed": 0}})
    assert path.read_text() == "second"
    assert capsys.readouterr().err == "warning: mlflow: no network; training goes on without it\n"


def test_lines_wait_while_the_disk_is_full(tmp_path, capsys):
    """The file ends in whole lines; the next that fits brings the others along, in order."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    # A file that is shorter than it should be is not filled up.
    lines = MetricsLog(tmp_path, size=500, names=())
    with room(lines.size + 5):
        for step in (2, 3):
            lines.write(step, 0, {"loss": 1.0})
            assert steps(path) == [1]
    lines.write(4, 0, {"loss": 1.0})
    assert steps(path) == [1, 2, 3, 4]
    assert lines.size == path.stat().st_size
    with room(lines.size + 5):
        lines.write(5, 0, {"loss": 1.0})
        lines.close()
    assert steps(path) == [1, 2, 3, 4]
    first, last = capsys.readouterr().err.splitlines()
    assert first.endswith("; training goes on, lines wait to be written")
    assert "metrics.jsonl: its last lines could not be written and are lost" in last
