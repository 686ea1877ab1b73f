"""Whether training is well: steps to skip, when to give up, what to warn of, and memory.

Nothing here holds a tensor; the trainer hands in plain numbers.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# Steps in a row with a loss or gradient that is not finite before the run is given up. Under fp16
# the loss scale is halved by each, so that it has come down to a thousandth by then.
MOST_SKIPPED = 10

# Observations of the loss before one can be a spike, and how many a mean looks back on.
OBSERVATIONS = 50
# A spike is above this multiple of the mean loss, and so many standard deviations above it.
SPIKE_FACTOR, SPIKE_DEVIATIONS = 2.0, 5.0
# Features with less variance on the unit sphere, in [0, 1], have collapsed; but towers with fresh
# weights give nearly equal ones to all inputs, which is nothing to warn of.
LEAST_SPREAD, SPREAD_FROM_STEP = 0.01, 200
# The share of clusters without a sample, or of prototypes that no sample was nearest to.
MOST_EMPTY, MOST_DEAD = 0.5, 0.75
# Steps for which a warning about a metric is not repeated.
QUIET_STEPS = 1000


class Diverged(ValueError):
    """Training no longer makes finite numbers, and does not recover."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of the backward pass of one step."""

    step: int
    """Number of the step, from 1."""
    loss: float
    """The total loss; over all processes, where several train."""
    gradient_norm: float
    """Norm of the whole gradient before clipping."""
    sample_ids: Sequence[str]
    """Of this process's batch."""

    @property
    def finite(self) -> bool:
        """Whether the step may be taken."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


class Health:
    """Counts the steps that are skipped since they are not finite, and gives up after ten in a row.

    On a CPU the trainer calls `check_step` before each optimizer step and takes it if told to. On a
    GPU that would wait for the device at every step: there the device itself skips the step, by
    the same rule as `Outcome.finite` (fused AdamW does where its `found_inf` is 1), and the trainer
    keeps the numbers and calls `check` when it fetches what it logs, and before it saves. The
    counts end equal; only the error comes later.
    Where several processes train, the loss and the norm need to be the same in all of them.

    Args:
        report: File for the losses and the samples of the batch that the run was given up at.
        skipped: Steps skipped so far, of a run that goes on.
        in_a_row: Of these, the last ones without a finite step between or after them.
    """

    def __init__(self, report: Path, *, skipped: int = 0, in_a_row: int = 0) -> None:
        self.report, self.skipped, self.in_a_row = report, skipped, in_a_row
        self._row: list[Outcome] = []

    def check_step(
        self, *, step: int, loss: float, gradient_norm: float, sample_ids: Sequence[str]
    ) -> bool:
        """Whether the optimizer step is to be taken; the arguments are as in `Outcome`.

        Raises:
            Diverged: It is the tenth in a row that is not.
        """
        outcome = Outcome(step=step, loss=loss, gradient_norm=gradient_norm, sample_ids=sample_ids)
        return self.check([outcome]) == 0

    def check(self, outcomes: Iterable[Outcome]) -> int:
        """How many of the steps were to be skipped; in order, each once.

        Raises:
            Diverged: Ten in a row were.
        """
        before = self.skipped
        for outcome in outcomes:
            if outcome.finite:
                self.in_a_row = 0
                self._row.clear()
                continue
            self.skipped += 1
            self.in_a_row += 1
            self._row.append(outcome)
            if self.in_a_row >= MOST_SKIPPED:
                raise Diverged(
                    f"training has diverged: loss or gradient not finite in {self.in_a_row} steps "
                    f"in a row, up to step {outcome.step}; lower optim.learning_rate or train in "
                    f"fp32 ({self._write_report()})"
                )
        return self.skipped - before

    def _write_report(self) -> str:
        last = self._row[-1]
        # As text, since JSON has no numbers that are not finite.
        content = {
            "step": last.step,
            "losses": [str(outcome.loss) for outcome in self._row],
            "gradient_norms": [str(outcome.gradient_norm) for outcome in self._row],
            "sample_ids": list(last.sample_ids),
        }
        try:
            self.report.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            return f"the samples of the last batch could not be written: {error}"
        return f"the samples of the last batch are in {self.report}"


class Watch:
    """Warns of what ends in a bad model though every number is finite; see the constants above.

    It looks at the metrics that are logged, and keeps no state that a run would have to restore.
    """

    def __init__(self) -> None:
        self._said: dict[str, int] = {}
        self._losses: dict[frozenset[str], Average] = {}

    def warnings(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """One line for each metric that is as it should not be, at most every 1,000 steps."""
        found = {
            name: warning
            for name, value in metrics.items()
            for prefix, look in LOOKS.items()
            if name.startswith(prefix) and (warning := look(step, name, value)) is not None
        }
        if spike := self._spike(metrics):
            found["train/loss/total"] = spike
        new = {
            name: warning
            for name, warning in found.items()
            if name not in self._said or step >= self._said[name] + QUIET_STEPS
        }
        self._said |= dict.fromkeys(new, step)
        return [f"step {step}: {warning}" for warning in new.values()]

    def _spike(self, metrics: Mapping[str, float]) -> str | None:
        value = metrics.get("train/loss/total")
        if value is None or not math.isfinite(value):
            return None
        # Losses are averaged by what they are the sum of: a stage that adds a loss is no spike.
        terms = frozenset(name for name in metrics if name.startswith("train/loss/"))
        average = self._losses.setdefault(terms, Average())
        mean, deviation, count = average.mean, average.deviation, average.count
        average.add(value)
        limit = max(SPIKE_FACTOR * mean, mean + SPIKE_DEVIATIONS * deviation)
        if count < OBSERVATIONS or value <= limit:
            return None
        return (
            f"train/loss/total is {value:.4g}, where its recent mean is {mean:.4g}; if it does not "
            "come down, lower optim.learning_rate or optim.clip_norm, or raise "
            "optim.warm_up_steps"
        )


class Average:
    """Mean and standard deviation: of all values at first, then of about the last 50."""

    def __init__(self) -> None:
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    @property
    def deviation(self) -> float:
        return math.sqrt(self.variance)

    def add(self, value: float) -> None:
        self.count += 1
        rate = max(1 / self.count, 1 / OBSERVATIONS)
        difference = value - self.mean
        self.mean += rate * difference
        self.variance = (1 - rate) * (self.variance + rate * difference**2)


def collapsed(step: int, name: str, value: float) -> str | None:
    if value >= LEAST_SPREAD or step < SPREAD_FROM_STEP:
        return None
    return (
        f"{name} is {value:.2g}, below {LEAST_SPREAD}: nearly equal features for all inputs "
        "(collapse); lower optim.learning_rate, raise optim.warm_up_steps, and look whether the "
        "captions differ"
    )


def empty(step: int, name: str, value: float) -> str | None:
    if value <= MOST_EMPTY:
        return None
    return (
        f"{name} is {value:.2g}: most clusters have no sample; lower the number of prototypes "
        "(prototypes.number, or the teacher's number) or raise episodes.size"
    )


def dead(step: int, name: str, value: float) -> str | None:
    if value <= MOST_DEAD:
        return None
    return (
        f"{name} is {value:.2g}: no sample of the episode was nearest to most prototypes, which "
        "teach nothing; lower optim.heads_lr_scale or the number of prototypes, or set "
        "prototypes.source to extract"
    )


LOOKS: Mapping[str, Callable[[int, str, float], str | None]] = {
    "train/spread/": collapsed,
    "train/prototypes/empty/": empty,
    "train/prototypes/dead/": dead,
}


def out_of_memory(error: BaseException) -> str | None:
    """One line that says which settings to lower, if the error is that memory ran out."""
    text = str(error)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
        return (
            "out of memory: set episodes.micro_batch_size (or lower it), or lower "
            "episodes.batch_size, episodes.size, data.cache_gb or data.workers"
        )
    on_device = isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text)
    )
    if on_device:
        return (
            "out of memory on the device: set episodes.micro_batch_size (or lower it; the result "
            "is that of the whole batch), or lower episodes.batch_size, episodes.size or "
            "prototypes.number, or train in bf16"
        )
    return None
