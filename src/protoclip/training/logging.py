"""Metrics of a run: a JSON Lines file, which is the record, and the loggers that get the same.

The loggers are in `loggers.py`; lines of progress for people are in `progress.py`.
"""

import errno
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.data.access import within
from protoclip.distributed.collectives import all_reduce, world_size
from protoclip.files import open_to_append, require_regular, to_json
from protoclip.terminal import say
from protoclip.training import loggers
from protoclip.training.guard import Watch
from protoclip.training.symptoms import Symptoms

# Lines of metrics.jsonl to keep while they cannot be written; older ones are dropped.
MOST_WAITING = 10_000
LONGEST_LINE = 2**20  # bytes
CLOSE_SECONDS = 60.0  # that a logger may take to end


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


class JsonLines:
    """Writes one line of JSON for each call, to a file that never holds part of a line.

    Lines that cannot be written wait, in order, for the next call. A checkpoint does not hold the
    lines that wait: a run that goes on from one made meanwhile lacks them. `size` is the
    number of bytes that are whole lines; anything after them is cut off.
    """

    def __init__(self, path: Path, *, size: int) -> None:
        self.path, self.size = path, whole_lines(path, size)
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._warned = False
        self._append()

    def write(self, values: Mapping[str, Any]) -> None:
        self._waiting.append(to_json(values).encode() + b"\n")
        self._append()

    def close(self) -> None:
        """Try a last time, and warn about lines that are lost."""
        if self._waiting:
            self._append()
        if self._waiting:
            warn(self.path.name, "its last lines could not be written and are lost")

    def _append(self) -> None:
        """Write all lines that wait, or none."""
        data = b"".join(self._waiting)
        try:
            # Opened each time, since a handle goes stale when a network file system is away for a
            # while, and some file systems report a failed write only when the file is closed.
            if self.path.exists():
                require_regular(self.path)
            with open_to_append(self.path) as file:
                self.size = min(self.size, file.tell())
                file.truncate(self.size)
                try:
                    if data and file.write(data) != len(data):
                        raise OSError(errno.ENOSPC, "only a part was written; the disk may be full")
                except OSError:
                    file.truncate(self.size)  # in case this was the last attempt
                    raise
        except (OSError, ValueError) as error:
            if not self._warned:
                warn(self.path.name, f"{error}; training goes on, lines wait to be written")
            self._warned = True
            return
        self.size += len(data)
        self._waiting.clear()


def whole_lines(path: Path, size: int) -> int:
    """At most so many bytes of a file, up to the end of a line: a power failure may leave less than
    was written."""
    if size == 0 or not path.is_file():
        return size
    try:
        with path.open("rb") as file:
            end = min(size, file.seek(0, os.SEEK_END))
            start = file.seek(max(0, end - LONGEST_LINE))
            return start + file.read(end - start).rfind(b"\n") + 1
    except OSError:  # the writer warns of it
        return size


class MetricsLog:
    """Writes metrics to `metrics.jsonl` and to loggers, and warns of bad ones.

    None of them stops training: one that fails gets one warning, and is off from then on. A run
    that goes on from `step` keeps `size` bytes of `metrics.jsonl` and writes the rest again.

    Args:
        names: As `run.loggers`.
        config: All settings of the run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        size: int = 0,
        step: int = 0,
        names: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
        symptoms: Symptoms | None = None,
    ) -> None:
        self._lines = JsonLines(folder / "metrics.jsonl", size=size)
        self._watch, self._symptoms = Watch(), symptoms
        self._others: dict[str, loggers.Logger] = {}
        for name in names:
            self._try(name, partial(self._start, name, folder, config or {}, step))

    @property
    def size(self) -> int:
        """Bytes of `metrics.jsonl` that are written, all of them whole lines."""
        return self._lines.size

    def write(self, step: int, episode: int, metrics: Mapping[str, float]) -> None:
        """One line: step, episode, and the metrics by name. Nothing if there are no metrics."""
        if not metrics:
            return
        self._lines.write({"step": step, "episode": episode, **metrics})
        for name, other in [*self._others.items()]:
            self._try(name, partial(other.write, step, metrics))
        for warning in self._watch.warnings(step, metrics):
            say(f"warning: {warning}")
        for line in self._symptoms.lines(step, metrics) if self._symptoms is not None else ():
            say(f"warning: {line}")

    def close(self) -> None:
        self._lines.close()
        while self._others:
            name, other = self._others.popitem()
            self._try(name, partial(self._end, other))

    def _end(self, other: loggers.Logger) -> None:
        """Close a logger. One that hangs would hold the run, which hears no signal meanwhile."""
        try:
            within(CLOSE_SECONDS, other.close)
        except TimeoutError:
            raise TimeoutError(f"not done within {CLOSE_SECONDS:g} s of the end") from None

    def _start(self, name: str, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self._others[name] = loggers.open_logger(name, folder, config=config, step=step)

    def _try(self, name: str, work: Callable[[], None]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # standard output is for results
                work()
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warn(name, f"{reason}; training goes on without it")
            with suppress(Exception), redirect_stdout(sys.stderr):
                if other := self._others.pop(name, None):
                    self._end(other)


def warn(name: str, reason: str) -> None:
    say(f"warning: {name}: {reason}")
