"""Where metrics go: a JSON-lines file that is the record, TensorBoard and W&B for looking."""

import errno
import os
import platform
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.files import to_json

# Lines of metrics.jsonl that are kept while they cannot be written; older ones are given up.
MOST_WAITING = 10_000

Result = TypeVar("Result")


@torch.no_grad()
def feature_statistics(
    image_features: Float[Tensor, "b d"], text_features: Float[Tensor, "b d"]
) -> dict[str, Tensor]:
    """How far features are spread, and how far apart the modalities lie.

    Spread is a batch's variance on the unit sphere, 1 - |mean|^2: 0 when all features are one
    point (collapse), near 1 when they point everywhere. The gap is the distance between the
    modalities' means, in [0, 2] (Liang et al. 2022).
    """
    image, text = image_features.mean(0), text_features.mean(0)
    return {
        "train/spread/image": 1 - image.square().sum(),
        "train/spread/text": 1 - text.square().sum(),
        "train/modality_gap": (image - text).norm(),
    }


def to_floats(report: Mapping[str, Tensor | float]) -> dict[str, float]:
    """All values as floats, with a single transfer from the device."""
    tensors = {name: value for name, value in report.items() if isinstance(value, Tensor)}
    values = torch.stack([value.float() for value in tensors.values()]).tolist() if tensors else []
    return {name: value for name, value in report.items() if not isinstance(value, Tensor)} | dict(
        zip(tensors, values, strict=True)
    )


@runtime_checkable
class Sink(Protocol):
    """Takes metrics by name; several times a step where several parts of a run report."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One line of JSON a call, in a file that holds whole lines only.

    What cannot be written waits, in order, and is tried again with the next line. Lines that wait
    are in no checkpoint: a run that goes on from one made meanwhile lacks them.

    Args:
        path: The file; what it holds after `size` bytes is cut off.
        size: Bytes to keep.
    """

    def __init__(self, path: Path, *, size: int) -> None:
        self.path = path
        self.size = size
        """Bytes of the file that are whole lines."""
        self._waiting: deque[bytes] = deque()
        self._dropped = 0
        self._warned = False
        self._append()

    def write(self, step: int, metrics: Mapping[str, float | int]) -> None:
        self._waiting.append(to_json({"step": step, **metrics}).encode() + b"\n")
        if len(self._waiting) > MOST_WAITING:
            self._waiting.popleft()
            self._dropped += 1
        self._append()

    def close(self) -> None:
        """Try a last time, and say what is lost."""
        if self._waiting:
            self._append()
        if lost := len(self._waiting) + self._dropped:
            warn(self.path.name, f"{lost} lines could not be written and are lost")

    def _append(self) -> None:
        """Write what waits, all of it or nothing."""
        data = b"".join(self._waiting)
        try:
            # Opened each time: a handle may go stale while a network file system is away, and some
            # file systems tell only when a file is closed that they could not write it.
            with self.path.open("ab", buffering=0) as file:
                end = file.tell()
                self.size = min(self.size, end)
                if end > self.size:
                    file.truncate(self.size)
                try:
                    if data and file.write(data) != len(data):
                        raise OSError(errno.ENOSPC, "written in part, as if the disk were full")
                except OSError:
                    file.truncate(self.size)  # no torn line, also if this was the last attempt
                    raise
        except OSError as error:
            if not self._warned:
                warn(self.path.name, f"{error}; training goes on, lines wait to be written")
            self._warned = True
            return
        self.size += len(data)
        self._waiting.clear()


class TensorBoard:
    """Event files for TensorBoard.

    Not through `SummaryWriter`, which leaves writing to a thread: it prints a traceback of its own
    where it fails, and what it still holds is lost where the process is killed.

    Args:
        folder: Gets one file more each time a run begins or goes on.
        step: Step to go on from; what other files of the folder hold of later ones is void.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        events = import_module("tensorboard.compat.proto.event_pb2")
        records = import_module("tensorboard.summary.writer.record_writer")
        self._event = events.Event
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{platform.node()}.{os.getpid()}"
        self._file = (folder / name).open("xb")
        self._records = records.RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        start = events.SessionLog(status=events.SessionLog.START)
        self._add(step=step + 1, session_log=start)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [{"tag": name, "simple_value": value} for name, value in metrics.items()]
        self._add(step=step, summary={"value": values})

    def close(self) -> None:
        self._file.close()

    def _add(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()


class WeightsAndBiases:
    """A Weights & Biases run, for which the package `wandb` needs to be installed.

    Args:
        folder: The run folder. W&B's files lie in its `wandb/`, and the id by which it goes on.
        mode: `online` sends as it goes; `offline` keeps everything in the folder, for `wandb sync`.
        name: What W&B calls the run; it makes a name up if this is empty.
        config: Settings to show beside the run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mode: Literal["offline", "online"],
        name: str,
        config: Mapping[str, Any],
    ) -> None:
        identity = folder / "wandb" / "run-id"
        if not identity.is_file():
            identity.parent.mkdir(exist_ok=True)
            identity.write_text(secrets.token_hex(8), encoding="utf-8")
        self._run = import_module("wandb").init(
            project="protoclip",
            dir=str(folder),
            id=identity.read_text(encoding="utf-8"),
            # W&B ignores steps that it has already; a run that goes on repeats them exactly.
            resume="allow",
            mode=mode,
            name=name or None,
            config=dict(config),
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class Guarded:
    """A sink that is off after its first failure, of which one warning tells.

    Args:
        name: What the warning calls it.
        make: Makes the sink, which may fail as well.
    """

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self.name = name
        self._sink: Sink | None = None
        self._sink = self._attempt(make)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._sink is not None:
            self._attempt(partial(self._sink.write, step, metrics))

    def close(self) -> None:
        sink, self._sink = self._sink, None
        if sink is not None:
            self._attempt(sink.close)

    def _attempt(self, work: Callable[[], Result]) -> Result | None:
        try:
            return work()
        except Exception as error:
            reason = str(error).strip() or type(error).__name__
            warn(self.name, f"{reason.splitlines()[0]}; training goes on without it")
            sink, self._sink = self._sink, None
            if sink is not None:
                with suppress(Exception):
                    sink.close()
            return None


class MetricsSink:
    """Where a run's metrics go: `metrics.jsonl`, `tensorboard/`, and Weights & Biases if asked for.

    None of them stops training when it fails: TensorBoard and W&B are then off, and lines of
    `metrics.jsonl` wait until they can be written. One warning on stderr says so.

    Args:
        folder: The run folder.
        size: Bytes of `metrics.jsonl` to keep: where an interrupted run goes on, what it wrote
            after its checkpoint is cut off and written again.
        step: Step to go on from, for TensorBoard's sake.
        wandb: Whether to log to Weights & Biases, see `WeightsAndBiases`.
        name: What W&B calls the run.
        config: Settings that W&B shows beside the run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        size: int = 0,
        step: int = 0,
        wandb: Literal["off", "offline", "online"] = "off",
        name: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._lines = JsonLines(folder / "metrics.jsonl", size=size)
        self._views = [
            Guarded("TensorBoard", partial(TensorBoard, folder / "tensorboard", step=step))
        ]
        if wandb != "off":
            make = partial(WeightsAndBiases, folder, mode=wandb, name=name, config=config or {})
            self._views.append(Guarded("Weights & Biases", make))

    @property
    def size(self) -> int:
        """Bytes of `metrics.jsonl` that are safely written: all of them whole lines."""
        return self._lines.size

    def write(self, *, step: int, episode: int, metrics: Mapping[str, float]) -> None:
        """One line: step, episode, and the metrics by name."""
        self._lines.write(step, {"episode": episode, **metrics})
        for view in self._views:
            view.write(step, metrics)

    def close(self) -> None:
        self._lines.close()
        for view in self._views:
            view.close()


def warn(name: str, reason: str) -> None:
    print(f"warning: {name}: {reason}", file=sys.stderr)
