"""Where metrics go: a JSON-lines file that is the record, and TensorBoard for looking."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


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


class MetricsSink:
    """Appends metrics to `<folder>/metrics.jsonl` and writes them to `<folder>/tensorboard/`.

    Args:
        folder: The run folder.
        size: Bytes of `metrics.jsonl` to keep: where an interrupted run goes on, what it wrote
            after its checkpoint is cut off and written again.
        step: Step to go on from, for TensorBoard's sake.
    """

    def __init__(self, folder: Path, *, size: int = 0, step: int = 0) -> None:
        path = folder / "metrics.jsonl"
        path.touch()
        os.truncate(path, min(size, path.stat().st_size))
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

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
