"""Learning-rate schedules, as pure functions of the step."""

import math
from dataclasses import dataclass


def warm_up_cosine(step: int, *, peak: float, warm_up: int, total: int) -> float:
    """Linear from peak / warm_up to peak, then half a cosine that would reach 0 at `total`.

    Args:
        step: In [0, total).
        peak: Highest learning rate.
        warm_up: Steps of the linear part; cut to half of `total` where it is longer, so that
            short runs reach the peak and come down again.
        total: Steps in all.
    """
    warm_up = min(warm_up, total // 2)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (1 + math.cos(math.pi * (step - warm_up) / (total - warm_up))) / 2


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One cosine for all episodes but the locked ones, and another of their own for these.

    The reference cools the text tower's rate to nearly zero before the locked stage starts; a
    schedule of its own lets the text tower move there.
    """

    peak: float
    warm_up: int
    main_steps: int
    locked_peak: float
    locked_warm_up: int
    locked_steps: int

    def learning_rate(self, step: int) -> float:
        if step < self.main_steps:
            return warm_up_cosine(step, peak=self.peak, warm_up=self.warm_up, total=self.main_steps)
        return warm_up_cosine(
            step - self.main_steps,
            peak=self.locked_peak,
            warm_up=self.locked_warm_up,
            total=self.locked_steps,
        )
