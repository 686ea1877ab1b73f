"""What else gets a run's metrics: TensorBoard, Weights & Biases, MLflow, Trackio, or your class.

Each takes its address and its account from its own environment variables. Of a run that goes on,
each goes on with the same curves.
"""

import io
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from protoclip.config import LOGGERS, RunConfig
from protoclip.files import write_atomically
from protoclip.terminal import say, without_secrets

PROJECT = "protoclip"  # of W&B and Trackio; the experiment of MLflow
MOST_PARAMETERS = 100  # that MLflow takes at once


@runtime_checkable
class Logger(Protocol):
    """What `run.loggers` names. Whatever it raises costs a warning, and the logger.

    A class of yours, `module:Class`, is called as `Class(folder, config=..., step=...)`: the run
    folder, all settings of the run by section, and the step after which it logs.
    """

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one step by name, some of which may not be finite."""

    def close(self) -> None:
        """The run ends here, finished or not."""


class TensorBoard:
    """An event file in `tensorboard/`, which hides what older files hold of steps after `step`.

    Each call writes all, so that an error is that call's. torch's SummaryWriter writes in a thread,
    which prints a traceback when the disk is full.
    """

    def __init__(self, folder: Path, *, config: Mapping[str, Any], step: int) -> None:
        self._events = import_module("tensorboard.compat.proto.event_pb2")
        self._record_writer = import_module("tensorboard.summary.writer.record_writer").RecordWriter
        folder = folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._append({"file_version": "brain.Event:2"}, {"step": step + 1, "session_log": start})

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [{"tag": name, "simple_value": value} for name, value in metrics.items()]
        self._append({"step": step, "summary": {"value": values}})

    def close(self) -> None:
        """Nothing is left open."""

    def _append(self, *events: Mapping[str, Any]) -> None:
        content = io.BytesIO()
        for event in events:
            made = self._events.Event(wall_time=time.time(), **event)
            self._record_writer(content).write(made.SerializeToString())
        with self.path.open("ab") as file:
            file.write(content.getvalue())


class _Logged:
    """What a library calls a run, whose metrics are logged as they are."""

    _run: Any

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class WeightsAndBiases(_Logged):
    """A Weights & Biases run, in `wandb/` of the run folder; `WANDB_MODE=offline` sends nothing."""

    def __init__(self, folder: Path, *, config: Mapping[str, Any], step: int) -> None:
        mode = config.get("run", {}).get("wandb", "off")
        # W&B keeps the command line, whose URLs may hold a password.
        sys.argv = [without_secrets(word) for word in sys.argv]
        self._run = import_module("wandb").init(
            project=PROJECT,
            dir=str(folder),
            # W&B ignores steps that it has already; a resumed run repeats them exactly.
            id=kept_id(folder / "wandb" / "run-id", secrets.token_hex(8)),
            resume="allow",
            mode=None if mode == "off" else mode,
            name=folder.name,
            config=dict(config),
        )


class Trackio(_Logged):
    """A run of Trackio, kept on this machine, or in a Space if `TRACKIO_SPACE_ID` is set."""

    def __init__(self, folder: Path, *, config: Mapping[str, Any], step: int) -> None:
        # Trackio knows runs by name alone.
        name = kept_id(folder / "trackio" / "run-id", f"{folder.name}-{secrets.token_hex(4)}")
        self._run = import_module("trackio").init(
            project=PROJECT, name=name, resume="allow", config=dict(config), embed=False
        )


class MLflow:
    """A run of MLflow, where `MLFLOW_TRACKING_URI` says."""

    def __init__(self, folder: Path, *, config: Mapping[str, Any], step: int) -> None:
        self._mlflow = import_module("mlflow")
        self._client = self._mlflow.MlflowClient()
        identity = folder / "mlflow" / "run-id"
        if identity.is_file() and not self._knows(identity.read_text(encoding="utf-8")):
            # The folder came here without the store that the run was in, or that is elsewhere now.
            lost = identity.with_name("run-id-not-found")
            say(f"note: MLflow does not know this run; its name before is in {lost}")
            identity.replace(lost)
        if is_new := not identity.is_file():
            known = self._client.get_experiment_by_name(PROJECT)
            experiment = known.experiment_id if known else self._client.create_experiment(PROJECT)
            made = self._client.create_run(experiment, run_name=folder.name).info.run_id
        self.id = kept_id(identity, made if is_new else "")
        if is_new:
            settings = [
                self._mlflow.entities.Param(f"{section}.{name}" if name else section, str(value))
                for section, values in config.items()
                for name, value in (values if isinstance(values, dict) else {"": values}).items()
            ]
            for first in range(0, len(settings), MOST_PARAMETERS):
                some = settings[first : first + MOST_PARAMETERS]
                self._client.log_batch(self.id, params=some)

    def _knows(self, run: str) -> bool:
        try:
            self._client.get_run(run)
        except Exception as error:  # MLflow's own
            if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        # It refuses other characters, as in the name that somebody gave a teacher.
        names = {name: re.sub(r"[^\w./ -]", "_", name.replace("@", "_at_")) for name in metrics}
        self._client.log_batch(
            self.id,
            metrics=[
                self._mlflow.entities.Metric(names[name], value, now, step)
                for name, value in metrics.items()
            ],
        )

    def close(self) -> None:
        self._client.set_terminated(self.id)


KINDS = dict(zip(LOGGERS, (TensorBoard, WeightsAndBiases, MLflow, Trackio), strict=True))


def names_of(run: RunConfig) -> list[str]:
    """The loggers of a run; `run.wandb` names one too, with its mode."""
    return [*dict.fromkeys([*run.loggers, *(["wandb"] if run.wandb != "off" else [])])]


def open_logger(name: str, folder: Path, *, config: Mapping[str, Any], step: int) -> Logger:
    """The logger of this name, or of a class of this name; raises whatever it raises."""
    kind: Any = KINDS.get(name)
    if kind is None:
        module, _, attribute = name.partition(":")
        kind = getattr(import_module(module), attribute)
    made: Logger = kind(folder, config=config, step=step)
    return made


def kept_id(path: Path, new: str) -> str:
    """The id in this file, under which an earlier start of the run has logged; or the new one."""
    if not path.is_file() or not path.read_text(encoding="utf-8"):  # or it was cut short
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, new)
    return path.read_text(encoding="utf-8")
