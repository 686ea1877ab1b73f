"""The objective, and the losses that it sums."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Int
from torch import Tensor

from protoclip.distributed.collectives import world_size
from protoclip.losses.info_nce import info_nce, sharded_info_nce
from protoclip.losses.prototypical import PreparedTarget, prepare_targets, prototypical_loss
from protoclip.models.protoclip import Embeddings

__all__ = [
    "LossWeights",
    "PreparedTarget",
    "info_nce",
    "objective",
    "prepare_targets",
    "prototypical_loss",
    "sharded_info_nce",
]


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weight of each term of the objective; a term of weight 0 is not computed."""

    info_nce: float = 1.0
    prototypical: float = 1.0
    teachers: Mapping[str, float] = field(default_factory=dict)

    def of(self, teacher_space: str) -> float:
        """Weight of the prototypes of one space: `image`, `text` or an external teacher."""
        if teacher_space in ("image", "text"):
            return self.prototypical
        return self.teachers[teacher_space]


def objective(
    embeddings: Embeddings,
    targets: Mapping[str, PreparedTarget] | None,
    assignments: Mapping[str, Int[Tensor, " b"]],
    *,
    weights: LossWeights,
    detailed: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weighted terms whose sum is minimised, and what to log about them.

    L = w_i InfoNCE + w_p (L_image<-text + L_text<-image) / 2
      + sum over external teachers of w_e (L_image<-e + L_text<-e) / 2

    With several processes these are the local rows' parts: their means over processes, and those of
    the gradients, are what one process has for the whole batch.

    Args:
        embeddings: Output of the model for a batch.
        targets: Prepared targets named `<student>_from_<teacher>`; `None` for InfoNCE alone.
        assignments: Prototype of each row by teacher space, as of the episode or of this moment; -1
            where a teacher knows nothing of the sample, which then has no part in its loss.
        weights: Weight of each term.
        detailed: Also report how often the nearest prototype is the assigned one. It costs about as
            much as the loss, so only the steps that are logged ask for it.

    Returns:
        Weighted losses by name, and the report: unweighted losses, scales, accuracies.
    """
    losses: dict[str, Tensor] = {}
    report: dict[str, Tensor] = {"train/logit_scale": embeddings.logit_scale.detach()}
    if weights.info_nce:
        loss_of = info_nce if world_size() == 1 else sharded_info_nce
        loss = loss_of(embeddings.image_features, embeddings.text_features, embeddings.logit_scale)
        losses["info_nce"] = weights.info_nce * loss
        report["train/loss/info_nce"] = loss.detach()
    for name, target in (targets or {}).items():
        student, _, teacher = name.partition("_from_")
        weight = weights.of(teacher)
        if not weight:
            continue
        projections = (
            embeddings.image_projections if student == "image" else embeddings.text_projections
        )
        assert projections is not None
        loss = target.loss(projections, assignments[teacher], embeddings.prototype_logit_scale)
        losses[name] = weight * loss / 2
        report[f"train/loss/prototypical/{name}"] = loss.detach()
        if detailed:
            report[f"train/prototypes/accuracy/{name}"] = target.accuracy(
                projections, assignments[teacher]
            )
    if targets:
        report["train/prototype_logit_scale"] = embeddings.prototype_logit_scale.detach()
    return losses, report
