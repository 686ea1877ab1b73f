"""Where a run stands: the one thing that changes while it runs, next to model and optimizer."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class TrainState:
    """Progress of a run.

    Attributes:
        episode: Episodes finished.
        batch: Batches of the next episode that are done.
        step: Optimizer steps taken.
        samples_seen: Pairs trained on, repeats counted.
        seconds: Wall clock of training: data, extraction, clustering and steps; not evaluation.
    """

    episode: int = 0
    batch: int = 0
    step: int = 0
    samples_seen: int = 0
    seconds: float = 0.0
