"""Prototypes of an episode, and their translation into the student's space."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.clustering import KMeans, segment_mean


@dataclass(frozen=True, kw_only=True)
class Prototypes:
    """K-means of one space over an episode: `k` centroids, and which one each sample fell into.

    An assignment of -1 is a sample that this space knows nothing of.
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
) -> Float[Tensor, "k p"]:
    """Prototypical back-translation (PBT): student-space means over teacher assignments.

    arXiv 2206.10996, "prototypical back translation": grouping then needs no aligned spaces.

    Args:
        assignments: Teacher prototype of each sample, in [0, num_prototypes).
        student_features: The student's projections of the same samples.
        num_prototypes: Number of prototypes `k`.

    Returns:
        Back-translated prototypes `(k, p)`; an empty cluster is a zero row.

    Raises:
        ValueError: The numbers of samples differ.
    """
    if len(assignments) != len(student_features):
        raise ValueError(
            f"{len(assignments)} assignments for {len(student_features)} student features"
        )
    return segment_mean(student_features, assignments, num_prototypes)[0]


def group(
    features: Mapping[str, Float[Tensor, "m _"]], cluster: Callable[[str, Tensor], KMeans]
) -> dict[str, Prototypes]:
    """Cluster each space of an episode: image and text projections, and the external teachers.

    Rows of NaN, samples that a teacher has no features of, take no part; their assignment is -1. A
    space in which there is no other row has no prototypes.
    """
    prototypes = {}
    for space, rows in features.items():
        known = torch.isfinite(rows).all(1)
        if bool(known.all()):
            result = cluster(space, rows)
            assignments = result.assignments
        elif not bool(known.any()):
            continue
        else:
            result = cluster(space, rows[known])
            assignments = torch.full_like(known, -1, dtype=torch.long)
            assignments[known] = result.assignments
        prototypes[space] = Prototypes(centroids=result.centroids, assignments=assignments)
    return prototypes


def build_targets(
    prototypes: Mapping[str, Prototypes],
    *,
    image_projections: Float[Tensor, "m p"],
    text_projections: Float[Tensor, "m p"],
    back_translation: bool = True,
    unit_norm: bool = False,
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

    Returns:
        Targets named `<student>_from_<teacher>`, such as `image_from_text`.
    """
    students = {"image": image_projections, "text": text_projections}
    targets = {}
    for space, teacher in prototypes.items():
        known = teacher.assignments >= 0
        for student, projections in students.items():
            if student == space:
                continue
            translate = back_translation or space not in students
            centroids = teacher.centroids
            if translate:
                centroids = back_translate(
                    teacher.assignments[known], projections[known], len(teacher.centroids)
                )
            if unit_norm:
                centroids = F.normalize(centroids, dim=1)
            targets[f"{student}_from_{space}"] = PrototypeTarget(
                student_centroids=centroids,
                teacher_centroids=teacher.centroids,
                assignments=teacher.assignments,
            )
    return targets
