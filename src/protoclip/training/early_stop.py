"""Early stopping: a run ends when a named metric does not improve any more.

Which checkpoint is kept as the best is decided in `checkpoint.py`.
"""

import math
from dataclasses import dataclass
from typing import Any

from protoclip.config import RunConfig


@dataclass(kw_only=True)
class EarlyStop:
    """Decides after each evaluation whether the run ends there.

    Attributes:
        metric: Higher is better; a value that is not finite is no better than any other.
        patience: Evaluations in a row without a better value that end the run.
        best, best_step: The best value so far, and the step that it is of.
        step: The step of the last evaluation.
        waited: Evaluations since the best one.
    """

    metric: str
    patience: int
    best: float | None = None
    best_step: int = 0
    step: int = 0
    waited: int = 0

    def observe(self, step: int, value: float) -> None:
        """Count an evaluation after this step."""
        self.step = step
        if math.isfinite(value) and (self.best is None or value > self.best):
            self.best, self.best_step, self.waited = value, step, 0
        elif step > 0:  # the start has no evaluation before it
            self.waited += 1

    @property
    def is_due(self) -> bool:
        return self.waited >= self.patience

    @property
    def reason(self) -> str:
        best = "it was never finite"
        if self.best is not None:
            best = f"its best value is {self.best:.4f}, of step {self.best_step}"
        return (
            f"stopped early after step {self.step}: no better {self.metric} in {self.waited} "
            f"evaluations; {best}"
        )

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.keys() != vars(self).keys():
            raise KeyError("early_stop")
        vars(self).update(state)


def early_stop_of(run: RunConfig) -> EarlyStop | None:
    """What `run.stop_by` asks for."""
    return None if run.stop_by is None else EarlyStop(metric=run.stop_by, patience=run.patience)
