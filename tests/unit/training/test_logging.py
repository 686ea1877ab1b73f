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


@pytest.mark.parametrize("how", ["missing", "folder"])
def test_tensorboard_that_cannot_start_is_off(how, tmp_path, monkeypatch, capsys):
    """Without its package, or with a file in place of its folder."""
    if how == "missing":
        monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    else:
        (tmp_path / "tensorboard").touch()
    log_twice(tmp_path)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: tensorboard: ")
    assert warning.endswith("; training goes on without it")


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


def test_wandb_gets_what_the_file_gets(tmp_path, wandb, capsys, monkeypatch):
    """With the run's settings, in the run folder, and a command line without secrets, which it
    keeps. A run that goes on keeps its id."""
    monkeypatch.setattr(
        sys, "argv", ["protoclip", "--data.train", "https://me:word@host/a?token=b"]
    )
    for _ in range(2):
        log_twice(tmp_path, names=["wandb"], config={"run": {"seed": 0}})
    first, second = wandb.init.call_args_list
    assert first == second
    assert sys.argv == ["protoclip", "--data.train", "https://***@host/a?***"]
    assert first.kwargs.pop("id")
    assert first.kwargs == {
        "project": "protoclip",
        "dir": str(tmp_path),
        "resume": "allow",
        "name": tmp_path.name,
        "config": {"run": {"seed": 0}},
    }
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
    ],
)
def test_wandb_that_fails_is_off(fails, error, tmp_path, wandb, monkeypatch, capsys):
    """One warning of one line; the file has every line. Nothing imports W&B unless asked."""
    if fails == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        failing = wandb if fails == "init" else wandb.init.return_value
        getattr(failing, fails).side_effect = error
    log_twice(tmp_path)
    assert not (tmp_path / "wandb").exists()
    assert capsys.readouterr().err == ""
    log_twice(tmp_path, names=["tensorboard", "wandb"])
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    assert wandb.init.return_value.finish.called == (fails in ("log", "finish"))
    (warning,) = capsys.readouterr().err.splitlines()
    reason = str(error).split("\n")[0] or "BrokenPipeError"
    assert warning == f"warning: wandb: {reason}; training goes on without it"


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


def test_trackio_gets_what_the_file_gets(tmp_path, monkeypatch, capsys):
    """With the run's settings; a run that goes on is the same run."""
    fake = Mock()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    log_twice(tmp_path, names=["trackio"], config={"run": {"seed": 0}})
    assert (
        fake.init.call_args.kwargs.items()
        >= {
            "name": (tmp_path / "trackio" / "run-id").read_text(),
            "resume": "allow",
            "config": {"run": {"seed": 0}},
        }.items()
    )
    run = fake.init.return_value
    assert run.log.mock_calls == [call({"loss": 1.0}, step=1), call({"loss": 0.5}, step=2)]
    assert run.finish.call_count == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("store", ["sqlite:///{}/mlflow.db", "file://{}/mlruns"])
def test_mlflow_has_the_curves_of_a_run_that_goes_on(store, tmp_path, monkeypatch, capsys):
    """By MLflow itself, in a database or folder of its own: skipped where it is not installed."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.format(tmp_path))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # or 3.17 refuses the folder
    folder = tmp_path / "run-0"
    folder.mkdir()
    for step in (0, 2):
        log = MetricsLog(folder, names=["mlflow"], config={"run": {"seed": 5}}, step=step)
        log.write(
            step + 1, 0, {"eval/text@1": 0.25 * step, "loss/a+b": 1.0, "train/loss": float("nan")}
        )
        log.close()
    assert "warning: mlflow" not in capsys.readouterr().err
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("protoclip").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run-0", "FINISHED")
    assert run.data.params == {"run.seed": "5"}
    curve = client.get_metric_history(run.info.run_id, "eval/text_at_1")
    assert [(point.step, point.value) for point in curve] == [(1, 0.0), (3, 0.5)]


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
