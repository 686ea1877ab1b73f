"""Optimizer steps that are taken only where loss and gradient are finite."""

from collections.abc import Sequence

import torch
from torch import Tensor

from protoclip.distributed.collectives import all_reduce
from protoclip.training.health import Health, Outcome


class Guard:
    """Takes the optimizer's steps, skips those that are not finite, and has them counted.

    The device itself decides, so that the host need not wait for it; the host looks at what
    happened when it fetches numbers anyway, and on a CPU at once.

    Args:
        optimizer: A fused one, which leaves everything as it is where its `found_inf` is 1.
        scaler: Of fp16, which does the same by itself.
        health: Counts the skipped steps, and ends a run that does not recover.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, health: Health
    ) -> None:
        self.optimizer, self.scaler, self.health = optimizer, scaler, health
        self._pending: list[tuple[int, Tensor, Sequence[str]]] = []

    def step(self, number: int, loss: Tensor, norm: Tensor, sample_ids: Sequence[str]) -> None:
        """Take the step, unless the loss of any process or the gradient's norm is not finite.

        Raises:
            Diverged: See `Health`.
        """
        loss = all_reduce(loss.detach())
        if not self.scaler.is_enabled():
            finite = torch.isfinite(loss) & torch.isfinite(norm)
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._pending.append((number, torch.stack([loss, norm.detach()]), sample_ids))
        if loss.device.type == "cpu":
            self.look()

    def look(self) -> None:
        """Have the steps since the last look counted.

        Raises:
            Diverged: See `Health`.
        """
        if not self._pending:
            return
        values = torch.stack([pair for _, pair, _ in self._pending]).tolist()
        outcomes = [
            Outcome(step=number, loss=loss, gradient_norm=norm, sample_ids=sample_ids)
            for (number, _, sample_ids), (loss, norm) in zip(self._pending, values, strict=True)
        ]
        self._pending.clear()
        self.health.check(outcomes)
