"""Where metrics go: a JSON-lines file that is the record, and TensorBoard for looking."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


def to_floats(report: Mapping[str, Tensor | float]) -> dict[str, float]:
    """All values as floats, with a single transfer from the device."""
    tensors = {name: value for name, value in report.items() if isinstance(value, Tensor)}
    values = torch.stack([value.float() for value in tensors.values()]).tolist() if tensors else []
    return {name: value for name, value in report.items() if not isinstance(value, Tensor)} | dict(
        zip(tensors, values, strict=True)
    )


class MetricsSink:
    """Appends metrics to `<folder>/metrics.jsonl` and writes them to `<folder>/tensorboard/`."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(folder / "tensorboard")

    def write(self, *, step: int, episode: int, metrics: Mapping[str, float]) -> None:
        """One line: step, episode, and the metrics by name."""
        line = {"step": step, "episode": episode, **metrics}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()
