"""The prototypical loss without a matrix of all rows times all prototypes.

The student's logits are linear in fixed prototypes and the teacher's choice depends on the
assignment alone, so with C the prototypes in the teacher's space and C' in the student's

    cross-entropy_i = logsumexp_j(s h_i . c'_j) - s h_i . M[a_i],    M = softmax(C C^T / tau) C'

The look-up M has one row a prototype and is computed once an episode (`prepare_targets`). One pass
gives the log-sum-exp and its gradient, the mean prototype under the student's softmax.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.distributed import collectives
from protoclip.losses import tiles
from protoclip.prototypes.targets import PrototypeTarget

# Similarities that exist at once while accuracy is measured.
CHUNK_ELEMENTS = 2**22


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
    or the softmax over the similarities of prototype `a` to all prototypes (soft target). For many
    batches with the same prototypes, `prepare_targets` does half of the work once.

    Args:
        student_projections: Unit-norm projections of one modality.
        student_centroids: Prototypes in the student's space, back-translated or not. A zero row is
            an empty cluster. Prototypes are constants: the loss has no gradient for them.
        teacher_centroids: The same prototypes in the teacher's space; they need no unit norm.
        assignments: Prototype of each sample's partner, in [0, k); -1 where the teacher knows none.
        logit_scale: Inverse temperature of the student, in [1, 100].
        target_temperature: Temperature of the soft targets; `None` or <= 0 takes hard targets.
        mask_empty: Leave empty clusters out of both softmaxes. `False` is what the reference
            implementation does: an empty cluster then acts as a class with logit 0.

    Returns:
        The mean over the batch, without the rows that are assigned to -1 or to a cluster left out.
    """
    classes, class_index = student_classes(student_centroids, mask_empty=mask_empty)
    expected = expected_prototypes(
        student_centroids,
        teacher_centroids,
        classes,
        class_index,
        target_temperature,
        rows=assignments,
    )
    return agreement(
        student_projections, classes, expected, own_class(class_index, assignments), logit_scale
    )


def student_classes(
    student_centroids: Float[Tensor, "k p"], *, mask_empty: bool
) -> tuple[Float[Tensor, "n p"], Int[Tensor, " k"]]:
    """Prototypes that the student chooses among, and the place of each among them or -1."""
    chosen = torch.ones_like(student_centroids[:, 0], dtype=torch.bool)
    if mask_empty:
        chosen = (student_centroids != 0).any(1)
    classes = student_centroids if bool(chosen.all()) else student_centroids[chosen]
    return classes, torch.where(chosen, chosen.cumsum(0) - 1, -1)


def own_class(class_index: Int[Tensor, " k"], assignments: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """The class of each row's prototype; -1 where it has no prototype, or that one is no class."""
    return torch.where(assignments >= 0, class_index[assignments], -1)


def expected_prototypes(
    student_centroids: Float[Tensor, "k p"],
    teacher_centroids: Float[Tensor, "k q"],
    classes: Float[Tensor, "n p"],
    class_index: Int[Tensor, " k"],
    target_temperature: float | None,
    *,
    rows: Int[Tensor, " r"],
) -> Float[Tensor, "r p"]:
    """Rows of the look-up M: the mean student prototype under the teacher's choice.

    Args:
        student_centroids, teacher_centroids, target_temperature: See `prototypical_loss`.
        classes, class_index: See `student_classes`.
        rows: The assigned prototypes whose rows of M are wanted.
    """
    if target_temperature is None or target_temperature <= 0:
        return student_centroids[rows].detach()
    every = len(classes) == len(student_centroids)
    choices = teacher_centroids if every else teacher_centroids[class_index >= 0]
    return tiles.attend(teacher_centroids[rows] / target_temperature, choices, classes)[1]


def agreement(
    student_projections: Float[Tensor, "b p"],
    classes: Float[Tensor, "n p"],
    expected: Float[Tensor, "b p"],
    own: Int[Tensor, " b"],
    logit_scale: Float[Tensor, ""] | float,
    *,
    sharded: bool = False,
) -> Float[Tensor, ""]:
    """The prototypical loss, given what the teacher expects of each row (its row of M)."""
    rows, classes, expected = tiles.widened(student_projections, classes.detach(), expected)
    queries = logit_scale * rows
    losses = tiles.log_sum_exp(queries, classes) - (queries * expected).sum(1)
    return mean_of_known(losses, own, sharded=sharded)


def mean_of_known(
    values: Float[Tensor, " b"], own: Int[Tensor, " b"], *, sharded: bool = False
) -> Float[Tensor, ""]:
    """Mean over the rows that have a class; 0 where none has.

    `sharded`: a part of it, whose mean over all processes is the mean over their rows.
    """
    known = own >= 0
    count, processes = known.sum(), 1
    if sharded:
        count, processes = collectives.all_reduce(count), collectives.world_size()
    return (values * known).sum() / (count.clamp(min=1) / processes)


@dataclass(frozen=True, kw_only=True)
class PreparedTarget:
    """A `PrototypeTarget` made ready for the steps of an episode.

    Attributes:
        classes: Prototypes in the student's space that its softmax runs over.
        class_index: The place of each prototype among the classes; -1 if it is none.
        lookup: The mean class under the teacher's choice, by assigned prototype (M).
    """

    classes: Float[Tensor, "n p"]
    class_index: Int[Tensor, " k"]
    lookup: Float[Tensor, "k p"]

    def loss(
        self,
        student_projections: Float[Tensor, "b p"],
        assignments: Int[Tensor, " b"],
        logit_scale: Float[Tensor, ""] | float,
    ) -> Float[Tensor, ""]:
        """`prototypical_loss` with these prototypes.

        With several processes a part of it: the mean of the parts is that over all rows.
        """
        own = own_class(self.class_index, assignments)
        expected = self.lookup[assignments]
        return agreement(
            student_projections, self.classes, expected, own, logit_scale, sharded=True
        )

    @torch.no_grad()
    def accuracy(
        self, student_projections: Float[Tensor, "b p"], assignments: Int[Tensor, " b"]
    ) -> Float[Tensor, ""]:
        """Fraction of rows whose most similar class is that of their prototype; see `loss`."""
        own = own_class(self.class_index, assignments)
        rows = max(1, CHUNK_ELEMENTS // len(self.classes))
        choice = torch.cat(
            [(chunk @ self.classes.T).argmax(1) for chunk in torch.split(student_projections, rows)]
        )
        return mean_of_known((choice == own).float(), own, sharded=True)


def prepare_targets(
    targets: Mapping[str, PrototypeTarget],
    *,
    target_temperatures: Mapping[str, float],
    mask_empty: bool = True,
) -> dict[str, PreparedTarget]:
    """Do once an episode what its steps share: find the empty prototypes, compute the look-ups.

    Args:
        targets: Named `<student>_from_<teacher>`.
        target_temperatures: Target temperature by teacher space; <= 0 for hard targets.
        mask_empty: See `prototypical_loss`.
    """
    prepared = {}
    for name, target in targets.items():
        _, _, teacher = name.partition("_from_")
        classes, class_index = student_classes(target.student_centroids, mask_empty=mask_empty)
        lookup = expected_prototypes(
            target.student_centroids,
            target.teacher_centroids,
            classes,
            class_index,
            target_temperatures[teacher],
            rows=torch.arange(len(class_index), device=class_index.device),
        )
        prepared[name] = PreparedTarget(classes=classes, class_index=class_index, lookup=lookup)
    return prepared
