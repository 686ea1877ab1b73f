"""Strengths of the prototypical losses that set themselves, by two things that are measured.

InfoNCE pulls on the outputs of the towers through the features, the prototypical losses through the
projections. How hard depends on data, number of prototypes and heads; `Balance` makes a weight the
ratio of these pulls. And groups of a teacher that say little about the student's own are mostly
noise as targets: each weight is multiplied by their agreement, `Target.confidence`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from protoclip.distributed.collectives import all_reduce, world_size

DECAY = 0.9  # of the running means; a batch alone is noisy
TINY = 1e-12  # A weight of 0 has no pull either, so what it is divided by does not matter.
MOST = 10.0  # Prototypes that are all but learned pull little, and need not pull harder.


def measure(
    squares: Mapping[str, Float[Tensor, ""]], *, loss_scale: float
) -> dict[str, Float[Tensor, " 2"]]:
    """The pulls of InfoNCE and of the prototypes by student modality, where both pull. Collective.

    They are those of the loss itself, so that a run may go on with other ranks or precision:
    `squares` are those of `ProtoCLIP.take_pulls` on each rank, `loss_scale` is that of fp16.
    """
    branches = {
        student: [f"{student}_features", f"{student}_projections"] for student in ("image", "text")
    }
    # Gradients are averaged over ranks later, and so are larger by their number here.
    factor = loss_scale * world_size()
    return {
        student: all_reduce(torch.stack([squares[name] for name in names])).sqrt() / factor
        for student, names in branches.items()
        if squares.keys() >= set(names)
    }


@dataclass(kw_only=True)
class Balance:
    """Factors to the prototypical losses that make weights relative to InfoNCE's pull.

    A pull is the norm of a loss's gradient with respect to the outputs of one tower, over the batch
    of all ranks; `loss.keep` has no part in it. A factor is the ratio of two running means over
    steps: of InfoNCE's pull, and of the prototypes' pull at factor 1 for each unit of their weight.
    It is 1 before the first step, and where a tower gets no gradient. `means` has both by student
    modality; they start from 0, which cancels in the ratio.
    """

    means: dict[str, Tensor] = field(default_factory=dict)

    def factor(self, student: str) -> Tensor | float:
        """The factor to the losses of a student modality; 1.0 if it was not measured yet."""
        if student not in self.means:
            return 1.0
        instance, prototypes = self.means[student]
        return torch.where(prototypes > 0, (instance / prototypes).clamp(max=MOST), 1.0)

    def update(
        self,
        pulls: Mapping[str, Float[Tensor, " 2"]],
        weights: Mapping[str, float],
        taken: Bool[Tensor, ""],
    ) -> None:
        """Take in what `measure` gave in a step, if it was taken and both losses pull.

        `weights` are the sums of the weights of a student's prototypical losses.
        """
        for student, weight in weights.items():
            if student not in pulls:
                continue
            instance, prototypes = pulls[student]
            now = torch.stack([instance, prototypes / self.factor(student) / max(weight, TINY)])
            before = self.means.get(student, torch.zeros_like(now))
            sound = taken & torch.isfinite(now).all() & (now > 0).all()
            self.means[student] = torch.where(sound, torch.lerp(now, before, DECAY), before)
