"""InfoNCE, the prototypical loss, and the objective that sums them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.models.protoclip import Embeddings
from protoclip.prototypes import PrototypeTarget


def info_nce(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""] | float,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE over a batch of pairs (Radford et al. 2021).

    Args:
        image_features: Unit-norm image features; row `i` pairs with text row `i`.
        text_features: Unit-norm text features.
        logit_scale: Inverse temperature, in [1, 100].

    Returns:
        The mean of the image-to-text and text-to-image cross-entropies.
    """
    logits = logit_scale * image_features @ text_features.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def prototype_logits(
    student_projections: Float[Tensor, "b p"],
    student_centroids: Float[Tensor, "k p"],
    logit_scale: Float[Tensor, ""] | float,
    *,
    mask_empty: bool = True,
) -> Float[Tensor, "b k"]:
    """Scaled similarity of each projection to each prototype; -inf for empty clusters."""
    logits = logit_scale * student_projections @ student_centroids.T
    if mask_empty:
        logits = logits.masked_fill((student_centroids == 0).all(1), float("-inf"))
    return logits


def prototypical_loss(
    student_projections: Float[Tensor, "b p"],
    student_centroids: Float[Tensor, "k p"],
    teacher_centroids: Float[Tensor, "k q"],
    assignments: Int[Tensor, " b"],
    logit_scale: Float[Tensor, ""] | float,
    target_temperature: float | None,
    *,
    mask_empty: bool = True,
) -> Float[Tensor, ""]:
    """Cross-entropy between the student's and the teacher's choice of prototype.

    arXiv 2206.10996, "prototype-level discrimination".

    The teacher's choice for a sample that fell into prototype `a` is one-hot at `a` (hard target)
    or the softmax over the similarities of prototype `a` to all prototypes (soft target).

    Args:
        student_projections: Unit-norm projections of one modality.
        student_centroids: Prototypes in the student's space, back-translated or not. A zero row is
            an empty cluster.
        teacher_centroids: The same prototypes in the teacher's space; they need no unit norm.
        assignments: Prototype of each sample's partner, in [0, k).
        logit_scale: Inverse temperature of the student, in [1, 100].
        target_temperature: Temperature of the soft targets; `None` or <= 0 takes hard targets.
        mask_empty: Leave empty clusters out of both softmaxes. `False` is what the reference
            implementation does: an empty cluster then acts as a class with logit 0.

    Returns:
        The mean over the batch.
    """
    logits = prototype_logits(
        student_projections, student_centroids, logit_scale, mask_empty=mask_empty
    )
    if target_temperature is None or target_temperature <= 0:
        return F.cross_entropy(logits, assignments)
    scores = teacher_centroids[assignments] @ teacher_centroids.T / target_temperature
    targets = scores.masked_fill(logits == float("-inf"), float("-inf")).softmax(dim=1)
    # Empty clusters carry target 0; 0 * -inf would be NaN, so their logits are taken as 0 here.
    expected = (targets * logits.masked_fill(logits == float("-inf"), 0.0)).sum(1)
    return (logits.logsumexp(dim=1) - expected).mean()


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
    targets: Mapping[str, PrototypeTarget] | None,
    position: Int[Tensor, " b"],
    *,
    weights: LossWeights,
    target_temperatures: Mapping[str, float],
    mask_empty: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weighted terms whose sum is minimised, and what to log about them.

    L = w_i InfoNCE + w_p (L_image<-text + L_text<-image) / 2
      + sum over external teachers of w_e (L_image<-e + L_text<-e) / 2

    Args:
        embeddings: Output of the model for a batch.
        targets: Prototype targets named `<student>_from_<teacher>`; `None` for InfoNCE alone.
        position: Position of each batch row in the episode, the index into assignments.
        weights: Weight of each term.
        target_temperatures: Target temperature by teacher space; <= 0 for hard targets.
        mask_empty: See `prototypical_loss`.

    Returns:
        Weighted losses by name, and the report: unweighted losses, accuracies, scales.
    """
    losses: dict[str, Tensor] = {}
    report: dict[str, Tensor] = {"train/logit_scale": embeddings.logit_scale.detach()}
    if weights.info_nce:
        loss = info_nce(embeddings.image_features, embeddings.text_features, embeddings.logit_scale)
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
        assignments = target.assignments[position]
        loss = prototypical_loss(
            projections,
            target.student_centroids,
            target.teacher_centroids,
            assignments,
            embeddings.prototype_logit_scale,
            target_temperatures[teacher],
            mask_empty=mask_empty,
        )
        losses[name] = weight * loss / 2
        report[f"train/loss/prototypical/{name}"] = loss.detach()
        with torch.no_grad():
            choice = prototype_logits(
                projections, target.student_centroids, 1.0, mask_empty=mask_empty
            ).argmax(1)
            report[f"train/prototypes/accuracy/{name}"] = (choice == assignments).float().mean()
    if targets:
        report["train/prototype_logit_scale"] = embeddings.prototype_logit_scale.detach()
    return losses, report
