"""The learning-rate schedule, as a pure function of the step."""

import math
from dataclasses import dataclass

LOCKED_WARM_UP = 2  # steps


def warm_up_cosine(step: int, *, peak: float, warm_up: int, total: int) -> float:
    """Rise linearly from peak / warm_up to peak, then follow half a cosine that is 0 at `total`.

    Args:
        step: In [0, total).
        peak: Highest learning rate.
        warm_up: Steps of the rise; at most half of `total`, so that short runs reach the peak too.
        total: Steps of the whole schedule.
    """
    warm_up = min(warm_up, total // 2)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (1 + math.cos(math.pi * (step - warm_up) / (total - warm_up))) / 2


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One cosine for all episodes before the locked-image stage, and a second one for that stage.

    The reference cools the text tower's rate to nearly zero before the locked-image stage starts.
    A second cosine lets the text tower move there. With `locked_steps=0` there is only the first.
    """

    peak: float
    warm_up: int
    main_steps: int
    locked_peak: float = 0.0
    locked_steps: int = 0

    def learning_rate(self, step: int) -> float:
        peak, warm_up, total = self.peak, self.warm_up, self.main_steps
        if step >= self.main_steps:
            step -= self.main_steps
            peak, warm_up, total = self.locked_peak, LOCKED_WARM_UP, self.locked_steps
        return warm_up_cosine(step, peak=peak, warm_up=warm_up, total=total)
