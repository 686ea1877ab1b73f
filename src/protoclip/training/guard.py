"""Steps that are not finite are skipped; metrics that end in a bad model get a warning."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protoclip.distributed.collectives import all_reduce
from protoclip.files import to_json

# Steps in a row that are not finite before the run is given up. Under fp16 each of them halves the
# loss scale, which is then at a thousandth.
MOST_SKIPPED = 10
# Features with less variance on the unit sphere, in [0, 1], have collapsed. Towers with fresh
# weights give nearly equal features to all inputs, so the first steps do not count.
LEAST_SPREAD, SPREAD_FROM_STEP = 0.01, 200
# Share of clusters without a sample, and of prototypes that no sample was assigned to.
MOST_UNUSED = {"prototypes/empty": 0.5, "prototypes/dead": 0.75}
QUIET_STEPS = 1000  # before a warning about the same metric is repeated


class Guard:
    """Takes optimizer steps, skips those that are not finite, and ends a run that diverged.

    The device decides about each step, so that the host need not wait for it. The host counts the
    skipped steps in `look`: on a CPU at once, on a GPU when metrics are fetched.

    Args:
        optimizer: A fused one, which changes nothing where its `found_inf` is 1.
        scaler: The loss scaler; for fp16 it skips steps by itself.
        report: File that gets the samples of the last batch of a diverged run.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, report: Path
    ) -> None:
        self.optimizer, self.scaler, self.report = optimizer, scaler, report
        self.skipped = self.in_a_row = 0
        self._pending: list[tuple[int, Tensor, Sequence[str]]] = []

    def step(self, number: int, loss: Tensor, norm: Tensor, sample_ids: Sequence[str]) -> None:
        """Take step `number`, unless the loss of any rank or the norm is not finite; see `look`."""
        finite = torch.isfinite(all_reduce(loss.detach())) & torch.isfinite(norm.detach())
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._pending.append((number, finite, sample_ids))
        if finite.device.type == "cpu":
            self.look()

    def look(self) -> None:
        """Count the steps that were skipped since the last look.

        Raises:
            ValueError: Ten steps in a row were skipped.
        """
        if not self._pending:
            return
        taken = torch.stack([finite for _, finite, _ in self._pending]).tolist()
        pending, self._pending = self._pending, []
        for (number, _, sample_ids), finite in zip(pending, taken, strict=True):
            self.skipped += not finite
            self.in_a_row = 0 if finite else self.in_a_row + 1
            if self.in_a_row < MOST_SKIPPED:
                continue
            content = {"step": number, "sample_ids": list(sample_ids)}
            where = f"the samples of the last batch are in {self.report}"
            try:
                self.report.write_text(to_json(content, indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                where = f"the samples of the last batch could not be written: {error}"
            raise ValueError(
                f"training has diverged: loss or gradient not finite in {self.in_a_row} steps in a "
                f"row, up to step {number}; lower optim.learning_rate or train in fp32 ({where})"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


class Watch:
    """Finds metrics that end in a bad model though every number is finite; see the constants."""

    def __init__(self) -> None:
        self._warned: dict[str, int] = {}

    def warnings(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """One line for each metric that looks bad, at most one in 1,000 steps."""
        lines = []
        for name, value in metrics.items():
            kind, advice = name.removeprefix("train/").rpartition("/")[0], ""
            if kind == "spread" and value < LEAST_SPREAD and step >= SPREAD_FROM_STEP:
                advice = (
                    "features are nearly equal for all inputs (collapse); lower "
                    "optim.learning_rate or raise optim.warm_up_steps"
                )
            elif value > MOST_UNUSED.get(kind, math.inf):
                advice = (
                    "most prototypes have no sample and teach nothing; lower prototypes.number or "
                    "the teacher's number, raise episodes.size, or lower optim.heads_lr_scale"
                )
            if advice and step >= self._warned.get(name, -QUIET_STEPS) + QUIET_STEPS:
                self._warned[name] = step
                lines.append(f"step {step}: {name} is {value:.2g}: {advice}")
        return lines


def out_of_memory(error: BaseException) -> str | None:
    """One line that names the settings to lower, if the error says that memory ran out."""
    signs = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    ran_out = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    if not ran_out and not isinstance(error, MemoryError):
        return None
    return (
        "out of memory: set episodes.micro_batch_size (or lower it; gradients stay those of the "
        "whole batch), or lower episodes.batch_size, episodes.size, prototypes.number, "
        "data.cache_gb or data.workers"
    )
