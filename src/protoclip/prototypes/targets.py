"""Clusters of an episode's features, and their translation into a student's space."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.distributed import collectives
from protoclip.prototypes.kmeans import KMeans, segment_mean

FEWEST_IN_GROUPS = 10  # samples whose groups tell anything: of fewer much agrees by chance
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def cluster_spaces(
    features: Mapping[str, Float[Tensor, "n _"]],
    cluster: Callable[[str, Tensor, Tensor | None], KMeans],
    positions: Int[Tensor, " p"] | None = None,
) -> dict[str, KMeans]:
    """Cluster each space of an episode: image and text projections, and the external teachers.

    arXiv 2206.10996, "online episodic training".

    A row of NaN is a sample that a teacher has no features for. It is left out and gets the
    assignment -1. A space with no other rows is left out.

    Args:
        features: Rows by space, with the same spaces in the same order on every rank.
        cluster: `(space, rows, positions of the rows) -> KMeans`.
        positions: Position of each row in the episode, if every rank has a part of the episode.

    Returns:
        Clusters by space, with the assignments of all samples: the same bits on every rank.
    """
    if positions is not None:
        everyones = collectives.all_gather(positions)
        assert torch.equal(everyones.sort().values, torch.arange(len(everyones)).to(everyones))
    clusters = {}
    for space, rows in features.items():
        has_features = torch.isfinite(rows).all(1)
        any_features = bool(has_features.any())
        if positions is not None:
            any_features = collectives.any_rank([any_features])[0]
        if not any_features:
            continue
        kmeans = cluster(
            space, rows[has_features], None if positions is None else positions[has_features]
        )
        assignments = torch.full_like(has_features, -1, dtype=torch.long)
        assignments[has_features] = kmeans.assignments
        clusters[space] = replace(kmeans, assignments=in_order(assignments, positions))
    return clusters


def in_order(values: Int[Tensor, " p"], positions: Int[Tensor, " p"] | None) -> Int[Tensor, " m"]:
    """The values of all ranks in the order of the episode. Collective if there are positions."""
    if positions is None:
        return values
    gathered = collectives.all_gather(values)
    return torch.empty_like(gathered).index_copy_(0, collectives.all_gather(positions), gathered)


def agreement(
    by: Int[Tensor, " m"], other: Int[Tensor, " m"], keys: Int[Tensor, " m"] | None = None
) -> float:
    """How much the groups of one space tell about those of another, from 0 (chance) to 1.

    The square root of the adjusted Wallace index (Severiano et al. 2011, doi
    10.1128/JCM.00624-11): of the probability, above chance, that two samples of one group in `by`
    are also in one group in `other`. Like the square of a correlation, that is of second order:
    where a fifth of the samples are grouped as the other space has it, and the rest by chance, it
    is a twenty-fifth. It is 0 if fewer than 10 samples share a group in `by` with another one.

        >>> by = torch.arange(40) // 10
        >>> agreement(by, torch.full_like(by, 5))
        0.0
        >>> agreement(by, 3 - by)
        1.0

    Args:
        by, other: Assignments of the same samples; those with -1 in either are left out.
        keys: A number for each sample. Of equal ones only the first counts, since a sample that is
            drawn twice agrees with itself.
    """
    groups = np.stack([by.cpu().numpy(), other.cpu().numpy()])
    if keys is not None:
        _, first_ones = np.unique(keys.cpu().numpy(), return_index=True)
        groups = groups[:, first_ones]
    by_group, of_group = groups[:, (groups >= 0).all(axis=0)]
    samples = len(by_group)
    same_by, same_of = pairs_in_groups(by_group), pairs_in_groups(of_group)
    _, sizes = np.unique(by_group, return_counts=True)
    if sizes[sizes > 1].sum() < FEWEST_IN_GROUPS or same_of == samples * (samples - 1):
        return 0.0
    number_of_both = by_group * (int(of_group.max()) + 1) + of_group
    chance = same_of / (samples * (samples - 1))
    above_chance = (pairs_in_groups(number_of_both) / same_by - chance) / (1 - chance)
    return math.sqrt(max(0.0, above_chance))


def pairs_in_groups(group_of: npt.NDArray[np.int64]) -> int:
    """Ordered pairs of samples of one group, given the number of each sample's group."""
    _, counts = np.unique(group_of, return_counts=True)
    return int((counts * (counts - 1)).sum())


def back_translate(
    assignments: Int[Tensor, " m"],
    student_features: Float[Tensor, "_ p"],
    num_prototypes: int,
    *,
    shared: bool = False,
) -> Float[Tensor, "k p"]:
    """Prototypical back-translation (PBT): student-space means over teacher assignments.

    arXiv 2206.10996, "prototypical back translation". The spaces need not match.

        >>> features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
        >>> back_translate(torch.tensor([0, 0, 1]), features, 3).tolist()
        [[2.0, 0.0], [0.0, 5.0], [0.0, 0.0]]

    Args:
        assignments: Teacher prototype of each sample, in [0, num_prototypes). Samples without one
            are left out.
        student_features: The student's projections of the same samples.
        shared: Take means over the samples of all ranks; a rank may have none. The result is
            the same bits on every rank and has no gradient.

    Returns:
        Back-translated prototypes `(k, p)`. An empty cluster is a zero row.

    Raises:
        ValueError: The numbers of samples differ, or an assignment is no integer or out of range.
            With `shared` every rank raises.
    """

    def check() -> None:
        check_assignments(assignments, student_features, "student_features")
        if not len(assignments):
            return
        least, most = int(assignments.min()), int(assignments.max())  # waits for a GPU
        if least < 0:
            raise ValueError(f"assignments: {least} is no prototype; leave such samples out")
        if most >= num_prototypes:
            raise ValueError(
                f"assignments: {most} is no prototype; with {num_prototypes=} they are below it"
            )

    if shared:
        collectives.raise_on_all_ranks(check)
    else:
        check()
    return segment_mean(student_features, assignments, num_prototypes, shared=shared)[0]


def check_assignments(assignments: Tensor, rows: Tensor, argument: str) -> None:
    """Refuse what is no integer for each row of the argument `of`; does not wait for a GPU."""
    fit = rows.ndim == 2 and assignments.shape == rows.shape[:1]
    if not fit or assignments.dtype not in INTEGERS:
        raise ValueError(
            f"assignments: {assignments.dtype} of shape {tuple(assignments.shape)} for {argument} "
            f"of shape {tuple(rows.shape)}; give an integer for each row"
        )
