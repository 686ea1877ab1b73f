"""Early stopping: when it ends a run, what it says, and that it goes on where it was."""

import math

import pytest

from protoclip.training import evaluate
from protoclip.training.evaluate import EarlyStop


@pytest.mark.parametrize(
    ("values", "patience", "stops_at", "best"),
    [
        ([0.5, 0.4, 0.3], 2, 2, (0.5, 0)),
        ([0.5, 0.4, 0.6, 0.5, 0.6], 2, 4, (0.6, 2)),  # an equal value is no better one
        ([0.1, 0.2, 0.3, 0.4], 1, None, (0.4, 3)),
        ([0.5, math.nan, 0.6, math.inf], 1, 1, (0.5, 0)),
        ([math.nan, math.nan, math.nan], 2, 2, (None, 0)),
        ([math.nan, 0.5, 0.4], 1, 2, (0.5, 1)),  # the start alone does not end a run
    ],
)
def test_it_stops_after_some_evaluations_without_a_better_value(
    values, patience, stops_at, best, monkeypatch
):
    monkeypatch.setattr(evaluate, "PATIENCE", patience)
    stop = EarlyStop(metric="eval/a/knn/acc1")
    stopped_at = None
    for step, value in enumerate(values):
        stop.observe(step, value)
        if stop.is_due:
            stopped_at = step
            break
        stop = EarlyStop(**vars(stop))
    assert (stopped_at, stop.best, stop.best_step) == (stops_at, *best)
