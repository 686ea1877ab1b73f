"""Stand-in until `evaluation/suite.py` has this function."""

import sys
from pathlib import Path
from typing import Literal

from protoclip.data.transforms import EvaluationTransform
from protoclip.distributed.collectives import rank
from protoclip.evaluation import datasets, suite
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.towers import Tokenizer
from protoclip.progress import Progress


def evaluate(
    model: ProtoCLIP,
    transform: EvaluationTransform,
    tokenizer: Tokenizer,
    *,
    split: Literal["validation", "test"],
    show: bool = True,
    samples_to: Path | None = None,
) -> dict[str, float]:
    """All metrics on the bundled data's held-out concepts, with progress where asked.

    `samples_to` is a folder for what was found of each sample; one that cannot be written costs a
    warning.
    """
    data = datasets.emoji()
    shown: dict[str, Progress] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in shown:
            shown[stage] = Progress(f"evaluate: {stage}", total)
        shown[stage].update(done)

    metrics, samples = suite.evaluate_samples(
        model,
        transform,
        tokenizer,
        data,
        split=split,
        device=next(model.parameters()).device,
        progress=progress if show else None,
    )
    if samples_to is not None and rank() == 0:
        path = samples_to / f"{data.name}-{split}.parquet"
        try:
            samples.write(path)
        except OSError as error:
            print(f"warning: {path}: not written ({error})", file=sys.stderr)
    return metrics
