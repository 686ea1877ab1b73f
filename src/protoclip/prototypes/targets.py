"""Prototypes of an episode, and their translation into the student's space.

An episode may be shared out over processes: with `positions` a process gives its own samples, and
ends with the same prototypes as the others. What takes positions is then collective.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.distributed import collectives
from protoclip.prototypes.kmeans import KMeans, segment_mean
from protoclip.prototypes.shard import Shard


@dataclass(frozen=True, kw_only=True)
class Prototypes:
    """K-means of one space over an episode: `k` centroids, and which one each sample fell into.

    Assignments are of all samples, in the order of their positions. One of -1 is a sample that this
    space knows nothing of.
    """

    centroids: Float[Tensor, "k p"]
    assignments: Int[Tensor, " m"]


@dataclass(frozen=True, kw_only=True)
class PrototypeTarget:
    """What one student modality is to agree with, for every sample of the episode.

    Attributes:
        student_centroids: Classes of the student's softmax, in the student's space. A zero row is
            an empty cluster.
        teacher_centroids: The same prototypes in the space that grouped the samples; soft targets
            are the similarities between these.
        assignments: Prototype of each sample's partner, indexed by position in the episode.
    """

    student_centroids: Float[Tensor, "k p"]
    teacher_centroids: Float[Tensor, "k q"]
    assignments: Int[Tensor, " m"]


def back_translate(
    assignments: Int[Tensor, " m"],
    student_features: Float[Tensor, "_ p"],
    num_prototypes: int,
    *,
    sharded: bool = False,
) -> Float[Tensor, "k p"]:
    """Prototypical back-translation (PBT): student-space means over teacher assignments.

    arXiv 2206.10996, "prototypical back translation": grouping then needs no aligned spaces.

    Args:
        assignments: Teacher prototype of each sample, in [0, num_prototypes).
        student_features: The student's projections of the same samples.
        num_prototypes: Number of prototypes `k`.
        sharded: The samples are this process's share, maybe none; means are over those of all
            processes, the same bits in each, without gradient.

    Returns:
        Back-translated prototypes `(k, p)`; an empty cluster is a zero row.

    Raises:
        ValueError: The numbers of samples differ; with `sharded` raised in all processes.
    """

    def check() -> None:
        if len(assignments) != len(student_features):
            raise ValueError(
                f"{len(assignments)} assignments for {len(student_features)} student features"
            )

    if sharded:
        collectives.raise_on_all_ranks(check)
    else:
        check()
    return segment_mean(student_features, assignments, num_prototypes, sharded=sharded)[0]


def group(
    features: Mapping[str, Float[Tensor, "n _"]],
    cluster: Callable[[str, Tensor, Tensor | None], KMeans],
    positions: Int[Tensor, " p"] | None = None,
) -> dict[str, Prototypes]:
    """Cluster each space of an episode: image and text projections, and the external teachers.

    Rows of NaN, samples that a teacher has no features of, take no part; their assignment is -1. A
    space in which there is no other row has no prototypes.

    Args:
        features: By space, the same spaces in the same order in every process.
        cluster: K-means of one space, `(space, rows, positions of the rows) -> KMeans`.
        positions: Where each row given is in the episode, of whose `m` samples each process has a
            share, maybe none. Without, the rows are the episode.

    Returns:
        Prototypes by space, the same bits in every process, with the assignments of all samples.

    Raises:
        ValueError: Rows and positions differ in number, or positions of all processes are not the
            numbers from 0 to `m - 1`; raised in all processes.
    """
    shard = None if positions is None else checked_shard(features, positions)
    prototypes = {}
    for space, rows in features.items():
        known = torch.isfinite(rows).all(1)
        gaps, any_known = not bool(known.all()), bool(known.any())
        if shard is not None:
            gaps, any_known = collectives.any_rank([gaps, any_known])
        if not gaps:
            result = cluster(space, rows, positions)
            assignments = result.assignments
        elif not any_known:
            continue
        else:
            result = cluster(space, rows[known], None if positions is None else positions[known])
            assignments = torch.full_like(known, -1, dtype=torch.long)
            assignments[known] = result.assignments
        if shard is not None:
            assignments = shard.whole(assignments)
        prototypes[space] = Prototypes(centroids=result.centroids, assignments=assignments)
    return prototypes


def checked_shard(
    features: Mapping[str, Float[Tensor, "n _"]], positions: Int[Tensor, " p"]
) -> Shard:
    """The share of the samples that is at these positions.

    Raises:
        ValueError: As `group` says.
    """

    def check() -> None:
        for space, rows in features.items():
            if len(rows) != len(positions):
                raise ValueError(f"{space}: {len(rows)} rows for {len(positions)} positions")

    collectives.raise_on_all_ranks(check)
    for rows in features.values():
        positions = positions.to(rows.device)
    return Shard.of(positions, without_gaps=True)


def build_targets(
    prototypes: Mapping[str, Prototypes],
    *,
    image_projections: Float[Tensor, "n p"],
    text_projections: Float[Tensor, "n p"],
    back_translation: bool = True,
    unit_norm: bool = False,
    positions: Int[Tensor, " n"] | None = None,
) -> dict[str, PrototypeTarget]:
    """Pair each student modality with every other space that grouped the samples.

    Args:
        prototypes: By space: `image`, `text`, or the name of an external teacher.
        image_projections: Image projections of the episode.
        text_projections: Text projections of the episode.
        back_translation: Translate prototypes into the student's space (PBT). Without it, image
            and text students meet the other modality's centroids as they are; an external
            teacher lives in a space of its own and is always translated.
        unit_norm: Bring the student's prototypes to unit norm; empty ones stay zero.
        positions: Where in the episode each of the projections is, as in `group`; they are then
            this process's share, and the targets are the same bits in every process.

    Returns:
        Targets named `<student>_from_<teacher>`, such as `image_from_text`.
    """
    students = {"image": image_projections, "text": text_projections}
    targets = {}
    for space, teacher in prototypes.items():
        own = teacher.assignments if positions is None else teacher.assignments[positions]
        known = own >= 0
        for student, projections in students.items():
            if student == space:
                continue
            translate = back_translation or space not in students
            centroids = teacher.centroids
            if translate:
                centroids = back_translate(
                    own[known],
                    projections[known],
                    len(teacher.centroids),
                    sharded=positions is not None,
                )
            if unit_norm:
                centroids = F.normalize(centroids, dim=1)
            targets[f"{student}_from_{space}"] = PrototypeTarget(
                student_centroids=centroids,
                teacher_centroids=teacher.centroids,
                assignments=teacher.assignments,
            )
    return targets
