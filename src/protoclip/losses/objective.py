"""The objective of a training step: the weighted sum of all losses."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.config import Config
from protoclip.distributed.collectives import world_size
from protoclip.losses.balance import Balance
from protoclip.losses.distil import StartFeatures, distil, geometry_loss, keep_pairs, keep_relations
from protoclip.losses.info_nce import info_nce
from protoclip.losses.prototypical import Target
from protoclip.losses.sigmoid import sigmoid_loss
from protoclip.losses.tiles import Positives
from protoclip.models.protoclip import Embeddings


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weight of each loss. A loss of weight 0 is not computed.

    A run has InfoNCE or the sigmoid loss; `objective` is public, and takes both.
    `positives` says what InfoNCE and the sigmoid loss make of pairs of one group. `joint` names two
    distilled teachers in one space, that of images and that of texts, which also teach pairs.
    """

    info_nce: float = 1.0
    sigmoid: float = 0.0
    positives: Positives = "pair"
    prototypical: float = 1.0
    teachers: Mapping[str, float] = field(default_factory=dict)
    keep: float = 0.0
    distil: Mapping[str, float] = field(default_factory=dict)
    geometry: float = 0.0
    joint: tuple[str, ...] = ()

    def weigh(self, teacher: str) -> float:
        """Weight of one teacher's prototypes: `image`, `text`, or the name of an external one."""
        return self.prototypical if teacher in ("image", "text") else self.teachers[teacher]

    def by_student(self, targets: Mapping[tuple[str, str], Target]) -> dict[str, float]:
        """Sum of the weights of each student modality's prototypical losses, by confidence."""
        sums: dict[str, float] = {}
        for (student, teacher), target in targets.items():
            sums[student] = sums.get(student, 0.0) + self.weigh(teacher) * target.confidence
        return sums


def loss_weights(config: Config, *, geometry: float, joint: Iterable[str]) -> LossWeights:
    """The weights that settings name; each external teacher that groups has the same."""
    loss = config.loss
    sigmoid = loss.instance == "sigmoid"
    return LossWeights(
        info_nce=0.0 if sigmoid else loss.info_nce,
        sigmoid=loss.info_nce if sigmoid else 0.0,
        positives=loss.positives,
        prototypical=loss.prototypical,
        teachers=dict.fromkeys(config.grouping_teachers, loss.teacher),
        keep=loss.keep,
        distil={name: teacher.distil for name, teacher in config.distilled_teachers.items()},
        geometry=geometry,
        joint=tuple(joint),
    )


def objective(
    embeddings: Embeddings,
    targets: Mapping[tuple[str, str], Target] | None,
    assignments: Mapping[str, Int[Tensor, " b"]],
    *,
    weights: LossWeights,
    balance: Balance | None = None,
    start: StartFeatures | None = None,
    frozen: tuple[Tensor, Tensor] | None = None,
    teachers: Mapping[str, Tensor] | None = None,
    groups: Int[Tensor, "b k"] | None = None,
    samples: Int[Tensor, " b"] | None = None,
    captions: int = 1,
    detailed: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weighted losses by name, whose sum is minimised, and a report of them, unweighted.

    L = w_i InfoNCE + w_s sigmoid loss + w_p (L_image<-text + L_text<-image) / 2
      + sum over external teachers of w_e (L_image<-e + L_text<-e) / 2
      + w_k (distance from the frozen start)
      + sum over distilled teachers of w_d (distance from the teacher)
      + the mean w_d of two teachers in one space (distance from their similarities of pairs)
      + w_g (geometry of images + geometry of texts) / 2

    With `balance` each prototypical loss has two more factors: its target's confidence, and the one
    that makes the weights of a student relative to the pull of InfoNCE.

    With several ranks each value is of the local rows. The means of values and gradients over ranks
    are those of the whole batch; but geometry compares the rows of a rank with each other.

        >>> rows, one = torch.eye(2), torch.tensor(1.0)
        >>> batch = Embeddings(image_features=rows, image_projections=None, logit_scale=one,
        ...     text_features=rows, text_projections=None, prototype_logit_scale=one)
        >>> losses, report = objective(batch, None, {}, weights=LossWeights())
        >>> {name: round(loss.item(), 3) for name, loss in losses.items()}
        {'info_nce': 0.313}

    Args:
        embeddings: The model's output for a batch.
        targets: Targets by `(student, teacher)`; `None` without prototypes.
        assignments: Prototype of each row by teacher. A row with -1 has no part in that loss.
        weights: Weight of each loss.
        balance: Sets the strengths of the prototypical losses; unset, they are the weights.
        start: What the frozen start makes of the batch; needed where `weights.keep` is above 0.
        frozen: What two frozen encoders make of the batch, one row for each image; needed where
            `weights.geometry` is above 0.
        teachers: Features of the batch by teacher; needed of those in `embeddings.distilled`.
        groups: Keys of the pairs; needed where `weights.positives` is not `pair`. See `info_nce`.
        samples: The number of each pair's sample, at least 0; unset, all differ. Pairs of one
            sample are neither negatives nor targets of each other: a sample may be drawn twice.
        captions: Texts of each image, which follow each other; its rows are repeated for them.
        detailed: Also report how often a projection's nearest prototype is the assigned one, which
            costs about as much as the loss.
    """
    losses: dict[str, Tensor] = {}
    report: dict[str, Tensor] = {"train/logit_scale": embeddings.logit_scale.detach()}
    pairs = (embeddings.image_features, embeddings.text_features, embeddings.logit_scale)
    assert weights.positives == "pair" or groups is not None, "positives need the pairs' keys"
    positives, keys = weights.positives, groups
    if positives == "pair":
        positives, keys = "masked", samples
    several = world_size() > 1

    def add(name: str, weight: float, loss: Tensor, shown: str = "") -> None:
        losses[name] = weight * loss
        report[f"train/loss/{shown or name}"] = loss.detach()

    if weights.info_nce:
        loss = info_nce(*pairs, keys, positives=positives, across_ranks=several)
        add("info_nce", weights.info_nce, loss)
    if weights.sigmoid:
        assert embeddings.logit_bias is not None, "add_logit_bias comes first"
        with_bias = (*pairs, embeddings.logit_bias)
        loss = sigmoid_loss(*with_bias, keys, positives=positives, across_ranks=several)
        add("sigmoid", weights.sigmoid, loss)
        report["train/logit_bias"] = embeddings.logit_bias.detach()
    if weights.keep:
        assert start is not None, "a weight needs the start's features"
        # Features of its own: what pulls on the others counts as the pull of InfoNCE.
        image, text = (F.normalize(outputs, dim=-1) for outputs in outputs_of(embeddings))
        add("keep", weights.keep, keep_relations(image, text, start))
    for name, outputs in embeddings.distilled.items():
        assert teachers is not None, "a weight needs the teacher's features"
        # The teacher has a row for each text; an image tower has one for each image.
        step = captions if len(outputs) < len(teachers[name]) else 1
        samples_of_rows = None if samples is None else samples[::step]
        loss = distil(outputs, teachers[name][::step], samples=samples_of_rows)
        add(f"distil_{name}", weights.distil[name], loss, f"distil/{name}")
    if weights.joint and all(name in embeddings.distilled for name in weights.joint):
        assert teachers is not None, "a weight needs the teachers' features"
        seen, read = weights.joint
        loss = keep_pairs(*outputs_of(embeddings), (teachers[seen], teachers[read]))
        weight = (weights.distil[seen] + weights.distil[read]) / 2
        add("distil_pairs", weight, loss, "distil/pairs")
    if weights.geometry:
        assert frozen is not None, "a weight needs the features of the encoders"
        image, text = outputs_of(embeddings)
        image = F.normalize(image[::captions], dim=-1)
        text = F.normalize(text, dim=-1)
        of_image, of_text = frozen
        samples_of_images = None if samples is None else samples[::captions]
        parts = [
            geometry_loss(image, of_image, samples=samples_of_images),
            geometry_loss(text, of_text, samples=samples),
        ]
        add("geometry", weights.geometry, torch.stack(parts).mean())
    students = {"image": embeddings.image_projections, "text": embeddings.text_projections}
    for (student, teacher), target in (targets or {}).items():
        if not weights.weigh(teacher):
            continue
        name = f"{student}_from_{teacher}"
        projections, assigned = students[student], assignments[teacher]
        assert projections is not None
        loss = target.loss(projections, assigned, embeddings.prototype_logit_scale)
        factor = balance.factor(student) * target.confidence if balance is not None else 1.0
        losses[name] = weights.weigh(teacher) * factor * loss / 2
        report[f"train/loss/prototypical/{name}"] = loss.detach()
        if detailed:
            report[f"train/prototypes/accuracy/{name}"] = target.accuracy(projections, assigned)
    if targets:
        report["train/prototype_logit_scale"] = embeddings.prototype_logit_scale.detach()
        if balance is not None:
            for name in balance.means:
                report[f"train/balance/{name}"] = torch.as_tensor(balance.factor(name))
    return losses, report


def outputs_of(embeddings: Embeddings) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
    """The towers' outputs for images and texts, where a loss needs both."""
    assert embeddings.image_outputs is not None
    assert embeddings.text_outputs is not None
    return embeddings.image_outputs, embeddings.text_outputs
