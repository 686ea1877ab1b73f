"""Strengths of the prototypical losses that set themselves.

Both losses pull on the same tower outputs: InfoNCE through the features, the prototypical losses
through the projections. How hard each pulls depends on the data, on the number of prototypes and
on the heads: at weight 1 the prototypes pull half as hard as InfoNCE on drawings, and as hard on
photographs (docs/LOG.md). `Balance` makes a weight mean the same everywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from protoclip.distributed.collectives import all_reduce

DECAY = 0.9  # of the running means; a batch alone is noisy
MOST = 10.0  # Prototypes that are all but learned pull little, and need not pull harder.


@dataclass(kw_only=True)
class Balance:
    """Factors to the prototypical losses that make them pull `target` times as hard as InfoNCE.

    A pull is the norm of a loss's gradient with respect to the outputs of one tower, over the batch
    of all ranks. A factor is the ratio of two running means over steps: of InfoNCE's pull, and of
    what the prototypes' would be at factor 1. It is 1 before the first step, and where a tower gets
    no gradient.

    Attributes:
        target: Sum of the weights of the prototypical losses.
        means: Both running means, by student modality. They start from 0, which cancels in
            the ratio.
    """

    target: float
    means: dict[str, Tensor] = field(default_factory=dict)

    def of(self, student: str) -> Tensor | float:
        """The factor to the losses of a student modality."""
        if student not in self.means:
            return 1.0
        instance, prototypes = self.means[student]
        factor = (self.target * instance / prototypes).clamp(max=MOST)
        return torch.where(prototypes > 0, factor, 1.0)

    def update(self, pulls: Mapping[str, Tensor]) -> None:
        """Take in a step. A batch whose gradient is not finite changes nothing. Collective.

        Args:
            pulls: What `ProtoCLIP.take_pulls` returns after the backward pass.
        """
        for student in ("image", "text"):
            branches = [f"{student}_features", f"{student}_projections"]
            if not pulls.keys() >= set(branches):
                continue
            instance, prototypes = all_reduce(torch.stack([pulls[b] for b in branches])).sqrt()
            now = torch.stack([instance, prototypes / self.of(student)])
            before = self.means.get(student, torch.zeros_like(now))
            sound = torch.isfinite(now).all() & (now > 0).all()
            self.means[student] = torch.where(sound, torch.lerp(now, before, DECAY), before)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.means)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.means = dict(state)
