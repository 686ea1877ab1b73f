"""The prototypical loss and its targets.

The student's logits are linear in fixed prototypes, and the teacher's choice depends only on the
assignment `a_i`. With C the prototypes in the teacher's space and C' in the student's,

    cross-entropy_i = logsumexp_j(s h_i . c'_j) - s h_i . M[a_i],    M = softmax(C C^T / tau) C'

so no matrix of all rows times all prototypes is needed. M has one row per prototype and is computed
once per episode.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protoclip.distributed import collectives
from protoclip.losses import tiles
from protoclip.prototypes.kmeans import KMeans, segment_mean
from protoclip.prototypes.targets import agreement, check_assignments

CHUNK_ELEMENTS = 2**22  # similarities held at once while accuracy is measured


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

    arXiv 2206.10996, "prototype-level discrimination". The teacher's choice is the assigned
    prototype (hard target), or the softmax over its similarities to all (soft target). If many
    batches share prototypes, `losses.prototypical.make_targets` is faster. Rows without a
    prototype, or with one that is left out, are not in the mean. Computed in float32 or wider.

        >>> h, prototypes = torch.eye(2), torch.eye(2)
        >>> loss = prototypical_loss(h, prototypes, prototypes, torch.tensor([0, 0]), 1.0, None)
        >>> round(loss.item(), 4)
        0.8133

    Args:
        student_projections: Projections of one modality, of unit norm.
        student_centroids: Prototypes in its space, without gradient; 0 for empty clusters.
        teacher_centroids: The same prototypes in the teacher's space, of any norm.
        assignments: Prototype of each sample in [0, k), or -1 if the teacher has none for it.
        logit_scale: Inverse temperature of the student, in [1, 100].
        target_temperature: Temperature of the soft targets. `None` or <= 0 gives hard targets.
        mask_empty: Leave empty clusters out of both softmaxes. With `False`, as in the reference
            implementation, an empty cluster is a class with logit 0.

    Raises:
        ValueError: Shapes do not fit each other, or a dtype is wrong. Values are not looked at.
    """
    prototypes = len(student_centroids), student_projections.shape[-1]
    if student_centroids.shape != prototypes or len(teacher_centroids) != prototypes[0]:
        raise ValueError(
            f"student_centroids: shape {tuple(student_centroids.shape)}, with teacher_centroids of "
            f"{tuple(teacher_centroids.shape)} and student_projections of "
            f"{tuple(student_projections.shape)}; give the same prototypes in both spaces"
        )
    check_assignments(assignments, student_projections, "student_projections")
    assignments = assignments.long()  # bytes would choose rows as a mask does
    students, teachers = tiles.widen(student_centroids, teacher_centroids)
    target = prepare(students, teachers, target_temperature, assignments, mask_empty=mask_empty)
    losses = target.losses(student_projections, target.lookup, logit_scale)
    return mean_of_known(losses, target.class_of(assignments) >= 0)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What one student modality learns from one teacher during an episode; see `make_targets`.

    Attributes:
        classes: Prototypes in the student's space that its softmax runs over.
        class_index: Row of each prototype in `classes`; -1 for an empty one that is left out.
        lookup: The mean class under the soft target of each prototype: M above.
        confidence: Agreement of the teacher's groups with the student's own, in [0, 1]; 1 if the
            student was not clustered.
    """

    classes: Float[Tensor, "n p"]
    class_index: Int[Tensor, " k"]
    lookup: Float[Tensor, "_ p"]
    confidence: float = 1.0

    def loss(
        self,
        student_projections: Tensor,
        assignments: Int[Tensor, " b"],
        logit_scale: Tensor | float,
    ) -> Float[Tensor, ""]:
        """`prototypical_loss` with these prototypes. Its mean over ranks is that of all rows."""
        losses = self.losses(student_projections, self.lookup[assignments], logit_scale)
        return mean_of_known(losses, self.class_of(assignments) >= 0, shared=True)

    @torch.no_grad()
    def accuracy(
        self, student_projections: Float[Tensor, "b p"], assignments: Int[Tensor, " b"]
    ) -> Float[Tensor, ""]:
        """Fraction of rows whose most similar class is their own; over ranks as `loss`."""
        class_numbers = self.class_of(assignments)
        chunks = torch.split(student_projections, max(1, CHUNK_ELEMENTS // len(self.classes)))
        choice = torch.cat([(chunk @ self.classes.T).argmax(1) for chunk in chunks])
        return mean_of_known((choice == class_numbers).float(), class_numbers >= 0, shared=True)

    def losses(
        self, student_projections: Tensor, expected: Tensor, logit_scale: Tensor | float
    ) -> Float[Tensor, " b"]:
        """The cross-entropy of each row, given its row of M."""
        rows, classes, expected = tiles.widen(student_projections, self.classes, expected)
        queries = logit_scale * rows
        return tiles.log_sum_exp(queries, classes) - (queries * expected).sum(1)

    def class_of(self, assignments: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Class of each row's prototype; -1 if it has none."""
        return torch.where(assignments >= 0, self.class_index[assignments], -1)


def make_targets(
    clusters: Mapping[str, KMeans],
    *,
    image_projections: Float[Tensor, "n p"],
    text_projections: Float[Tensor, "n p"],
    target_temperatures: Mapping[str, float],
    back_translation: bool = True,
    mask_empty: bool = True,
    positions: Int[Tensor, " n"] | None = None,
    keys: Int[Tensor, " m"] | None = None,
) -> dict[tuple[str, str], Target]:
    """Targets of an episode: each student modality learns from every other clustered space.

    Args:
        clusters: By teacher: `image`, `text`, or the name of an external teacher.
        image_projections, text_projections: Projections of the episode's samples.
        target_temperatures: Temperature of the soft targets by teacher; <= 0 gives hard targets.
        back_translation: Translate prototypes into the student's space (PBT). Without it, image and
            text learn from each other's centroids as they are; external teachers' are translated.
        mask_empty: See `prototypical_loss`.
        positions: Position of each projection in the episode, if every rank has a part of it.
        keys: Hashes of the ids of all samples, in the order of the episode; see `agreement`.

    Returns:
        Targets by `(student, teacher)`, the same bits on every rank.
    """
    students = {"image": image_projections, "text": text_projections}
    targets = {}
    for teacher, kmeans in clusters.items():
        assignments = kmeans.assignments if positions is None else kmeans.assignments[positions]
        is_assigned = assignments >= 0
        for student, projections in students.items():
            if student == teacher:
                continue
            centroids, number = kmeans.centroids, len(kmeans.centroids)
            if back_translation or teacher not in students:
                # `back_translate` without its checks, for which the CPU would wait for the GPU.
                centroids, _ = segment_mean(
                    projections[is_assigned],
                    assignments[is_assigned],
                    number,
                    shared=positions is not None,
                )
            target = prepare(
                centroids,
                kmeans.centroids,
                target_temperatures[teacher],
                torch.arange(number, device=centroids.device),
                mask_empty=mask_empty,
            )
            if student in clusters:
                of_student = clusters[student].assignments
                confidence = agreement(kmeans.assignments, of_student, keys)
                target = replace(target, confidence=confidence)
            targets[student, teacher] = target
    return targets


def prepare(
    student_centroids: Float[Tensor, "k p"],
    teacher_centroids: Float[Tensor, "k q"],
    temperature: float | None,
    prototypes: Int[Tensor, " r"],
    *,
    mask_empty: bool,
) -> Target:
    """The classes of the student's softmax, and a row of M for each of `prototypes`.

    The row of a prototype of -1 means nothing, and has no part in a loss.
    """
    students, teachers = student_centroids.detach(), teacher_centroids
    is_class = torch.ones_like(students[:, 0], dtype=torch.bool)
    if mask_empty:
        is_class = (students != 0).any(1)
    classes, choices = students, teachers
    if not bool(is_class.all()):
        classes, choices = students[is_class], teachers[is_class]
    if temperature is None or temperature <= 0:
        lookup = students[prototypes]
    else:
        _, lookup = tiles.attend(teachers[prototypes] / temperature, choices, classes)
    class_index = torch.where(is_class, is_class.cumsum(0) - 1, -1)
    return Target(classes=classes, class_index=class_index, lookup=lookup)


def mean_of_known(
    values: Float[Tensor, " b"], is_known: Bool[Tensor, " b"], *, shared: bool = False
) -> Float[Tensor, ""]:
    """Mean over the known rows, or 0. If `shared`, the mean over ranks is that of all rows."""
    count, ranks = is_known.sum(), 1
    if shared:
        count, ranks = collectives.all_reduce(count), collectives.world_size()
    return (values * is_known).sum() / (count.clamp(min=1) / ranks)
