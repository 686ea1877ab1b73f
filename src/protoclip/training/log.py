"""Metrics of a run: a JSON Lines file, which is the record, and the loggers that get the same."""

import errno
import io
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.config import LOGGERS
from protoclip.data.access import run_within
from protoclip.distributed.collectives import all_reduce, world_size
from protoclip.files import open_to_append, to_json, write_atomically
from protoclip.terminal import say, without_secrets
from protoclip.training.watch import Watch

CLOSE_SECONDS = 60.0  # that a logger may take to end
PROJECT = "protoclip"  # of W&B and Trackio; the experiment of MLflow
MOST_PARAMETERS = 100  # that MLflow takes at once


@torch.no_grad()
def feature_statistics(
    image_features: Float[Tensor, "b d"], text_features: Float[Tensor, "b d"]
) -> dict[str, Tensor]:
    """The spread of each modality's features, and the gap between the modalities.

    Spread is the variance of a batch on the unit sphere, 1 - |mean|^2: 0 if all features are one
    point (collapse), near 1 if they point everywhere. The gap is the distance between the means of
    the modalities, in [0, 2] (Liang et al. 2022).
    """
    image, text = image_features.mean(0), text_features.mean(0)
    return {
        "train/spread/image": 1 - image.square().sum(),
        "train/spread/text": 1 - text.square().sum(),
        "train/modality_gap": (image - text).norm(),
    }


def to_floats(report: Mapping[str, Tensor | float]) -> dict[str, float]:
    """All values as floats, with one transfer; of each tensor the mean over ranks."""
    tensors = {name: value for name, value in report.items() if isinstance(value, Tensor)}
    values = torch.stack([value.float() for value in tensors.values()])
    if world_size() > 1:
        values = all_reduce(values) / world_size()
    numbers = {name: value for name, value in report.items() if not isinstance(value, Tensor)}
    return numbers | dict(zip(tensors, values.tolist(), strict=True))


class MetricsLog:
    """Writes metrics to `metrics.jsonl` and to loggers, and warns of bad ones.

    None of them stops training: one that fails gets one warning, and is off from then on. A run
    that goes on from `step` keeps `size` bytes of `metrics.jsonl` and writes the rest again. That
    file never holds part of a line: those that cannot be written wait, in order, for the next call.

    Args:
        names: As `run.loggers`.
        config: All settings of the run.

    Attributes:
        size: Bytes of `metrics.jsonl` that are written, all of them whole lines.
    """

    def __init__(
        self,
        folder: Path,
        *,
        size: int = 0,
        step: int = 0,
        names: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.path, self.size = folder / "metrics.jsonl", size
        self._waiting: list[bytes] = []
        self._warned = False
        with suppress(OSError):  # a power failure may leave less than was written
            self.size = self.path.read_bytes()[:size].rfind(b"\n") + 1
        self._append()
        self._watch = watch
        self._loggers = dict[str, Any]()
        for name in names:
            self._try(name, partial(self._start, name, folder, config or {}, step))

    def write(self, step: int, episode: int, metrics: Mapping[str, float]) -> None:
        """One line: step, episode, and the metrics by name. Nothing if there are no metrics."""
        if not metrics:
            return
        values = {"step": step, "episode": episode, **metrics}
        self._waiting.append(to_json(values).encode() + b"\n")
        self._append()
        for name, logger in [*self._loggers.items()]:
            self._try(name, partial(logger.write, step, metrics))
        for line in self._watch.list_warnings(step, metrics) if self._watch is not None else ():
            say(f"warning: {line}")

    def close(self) -> None:
        """Try a last time to write, warn about lines that are lost, and close all loggers."""
        if self._waiting:
            self._append()
        if self._waiting:
            say(f"warning: {self.path.name}: its last lines could not be written and are lost")
        for name, logger in [*self._loggers.items()]:
            # One that hangs would hold the run, which hears no signal meanwhile.
            self._try(name, partial(run_within, CLOSE_SECONDS, logger.close))
            self._loggers.pop(name, None)

    def _append(self) -> None:
        """Write all lines that wait, or none; what is behind the whole lines is cut off."""
        data = b"".join(self._waiting)
        try:
            # Opened each time: handles of network file systems go stale, and some report a failed
            # write only when the file is closed.
            with open_to_append(self.path) as file:
                self.size = min(self.size, file.tell())
                file.truncate(self.size)
                try:
                    if data and file.write(data) != len(data):
                        raise OSError(errno.ENOSPC, "only a part was written; the disk may be full")
                except OSError:
                    file.truncate(self.size)  # in case this was the last attempt
                    raise
        except OSError as error:
            if not self._warned:
                say(
                    f"warning: {self.path.name}: {error}; training goes on, lines wait to be "
                    "written"
                )
            self._warned = True
            return
        self.size += len(data)
        self._waiting.clear()

    def _start(self, name: str, folder: Path, config: Mapping[str, Any], step: int) -> None:
        kind: Any = KINDS.get(name)
        if kind is None:
            module, _, attribute = name.partition(":")
            kind = getattr(import_module(module), attribute)
        self._loggers[name] = kind(folder, config=config, step=step)

    def _try(self, name: str, work: Callable[[], object]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # standard output is for results
                work()
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            say(f"warning: {name}: {reason}; training goes on without it")
            with suppress(Exception), redirect_stdout(sys.stderr):
                if logger := self._loggers.pop(name, None):
                    run_within(CLOSE_SECONDS, logger.close)


# Loggers. A class that `run.loggers` names has the methods of these.


class TensorBoard:
    """An event file in `tensorboard/`, which hides what older files hold of steps after `step`.

    torch's SummaryWriter writes in a thread, which prints a traceback when the disk is full.
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
        # W&B keeps the command line, whose URLs may hold a password.
        sys.argv = [without_secrets(word) for word in sys.argv]
        self._run = import_module("wandb").init(
            project=PROJECT,
            dir=str(folder),
            # W&B ignores steps that it has already; a resumed run repeats them exactly.
            id=keep_id(folder / "wandb" / "run-id", secrets.token_hex(8)),
            resume="allow",
            name=folder.name,
            config=dict(config),
        )


class Trackio(_Logged):
    """A run of Trackio, kept on this machine, or in a Space if `TRACKIO_SPACE_ID` is set."""

    def __init__(self, folder: Path, *, config: Mapping[str, Any], step: int) -> None:
        # Trackio knows runs by name alone.
        name = keep_id(folder / "trackio" / "run-id", f"{folder.name}-{secrets.token_hex(4)}")
        self._run = import_module("trackio").init(
            project=PROJECT, name=name, resume="allow", config=dict(config), embed=False
        )


class MLflow:
    """A run of MLflow, where `MLFLOW_TRACKING_URI` says."""

    def __init__(self, folder: Path, *, config: Mapping[str, Any], step: int) -> None:
        self._mlflow = import_module("mlflow")
        self._client = self._mlflow.MlflowClient()
        path = folder / "mlflow" / "run-id"
        with suppress(Exception):  # a new run, or a folder without the store that knows it
            self.id = self._client.get_run(path.read_text(encoding="utf-8")).info.run_id
            return
        experiment = self._client.get_experiment_by_name(PROJECT)
        number = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        self.id = self._client.create_run(number, run_name=folder.name).info.run_id
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, self.id)
        settings = [
            self._mlflow.entities.Param(f"{section}.{name}" if name else section, str(value))
            for section, values in config.items()
            for name, value in (values if isinstance(values, dict) else {"": values}).items()
        ]
        for first in range(0, len(settings), MOST_PARAMETERS):
            some = settings[first : first + MOST_PARAMETERS]
            self._client.log_batch(self.id, params=some)

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


def keep_id(path: Path, new: str) -> str:
    """The id in this file, under which an earlier start of the run has logged; or the new one."""
    if not path.is_file() or not path.read_text(encoding="utf-8"):  # or it was cut short
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, new)
    return path.read_text(encoding="utf-8")
