"""Prototypes of an episode that is shared out are those of one process that has all of it."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from protoclip import back_translate
from protoclip.distributed import collectives
from protoclip.prototypes.kmeans import KMeans, kmeans
from protoclip.prototypes.targets import (
    Prototypes,
    PrototypeTarget,
    build_targets,
    group,
)
from protoclip.testing import run_distributed

SAMPLES = 120


def owners(world_size: int, *, last_is_empty: bool = False) -> Tensor:
    """The process that has each sample."""
    drawn = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(2))
    return (drawn * max(1, world_size - last_is_empty)).long()


def own(owner: Tensor) -> Tensor:
    """Positions of this process's samples, in an order of their own."""
    mine = torch.nonzero(owner == collectives.rank()).flatten()
    return mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(3))]


def cluster(space: str, rows: Tensor, positions: Tensor | None) -> KMeans:
    assert torch.isfinite(rows).all()
    number = {"image": 6, "text": 9}.get(space, 4)
    return kmeans(rows, number, iterations=4, seed=0, positions=positions)


def episode(owner: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Projections, and teachers: of all samples, not of some of one process, of one, of none."""
    widths = {"image": 5, "text": 5, "whole": 7, "gaps": 3, "of the first": 3, "nothing": 4}
    spaces = {
        space: torch.randn(SAMPLES, width, generator=generator, dtype=torch.float64)
        for space, width in widths.items()
    }
    last = torch.nonzero(owner == owner.max()).flatten()
    spaces["gaps"][last[::2]] = float("nan")
    spaces["of the first"][owner != 0] = float("nan")
    spaces["nothing"][:] = float("nan")
    return spaces


def grouped_and_translated(
    spaces: Mapping[str, Tensor], owner: Tensor, settings: dict
) -> tuple[dict[str, Prototypes], dict[str, PrototypeTarget]]:
    positions = own(owner)
    mine = {space: rows[positions] for space, rows in spaces.items()}
    prototypes = group(mine, cluster, positions)
    targets = build_targets(
        prototypes,
        image_projections=mine["image"],
        text_projections=mine["text"],
        positions=positions,
        **settings,
    )
    return prototypes, targets


@pytest.mark.parametrize("last_is_empty", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"back_translation": False}, {"unit_norm": True}], ids=["", "raw", "unit"]
)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_targets_of_processes_are_those_of_one(
    world_size: int, settings: dict, last_is_empty: bool, generator: torch.Generator
) -> None:
    """Float64 to 1e-9, assignments of all samples exactly; the same bits in every process."""
    owner = owners(world_size, last_is_empty=last_is_empty)
    spaces = episode(owner, generator)
    expected = group(spaces, cluster)
    expected_targets = build_targets(
        expected, image_projections=spaces["image"], text_projections=spaces["text"], **settings
    )
    found = run_distributed(grouped_and_translated, world_size, spaces, owner, settings)
    first_prototypes, first_targets = found[0]
    assert set(first_prototypes) == {"image", "text", "whole", "gaps", "of the first"}
    for prototypes, targets in found:
        assert list(prototypes) == list(expected)
        assert list(targets) == list(expected_targets)
        for space, one in prototypes.items():
            assert torch.equal(one.centroids, first_prototypes[space].centroids)
            assert torch.equal(one.assignments, expected[space].assignments)
            torch.testing.assert_close(
                one.centroids, expected[space].centroids, rtol=1e-9, atol=1e-9
            )
        for name, target in targets.items():
            wanted = expected_targets[name]
            assert torch.equal(target.student_centroids, first_targets[name].student_centroids)
            assert torch.equal(target.assignments, wanted.assignments)
            for ours, theirs in (
                (target.student_centroids, wanted.student_centroids),
                (target.teacher_centroids, wanted.teacher_centroids),
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def translated(assignments: Tensor, features: Tensor, owner: Tensor) -> Tensor:
    mine = own(owner)
    return back_translate(assignments[mine], features[mine], 11, sharded=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last_is_empty", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_back_translation_is_the_mean_over_all_processes(
    world_size: int, last_is_empty: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """To 1e-9 in float64 and 1e-5 in float32; a cluster that is empty everywhere is a zero row."""
    features = torch.randn(SAMPLES, 6, generator=generator, dtype=dtype)
    assignments = torch.randint(0, 10, (SAMPLES,), generator=generator)
    owner = owners(world_size, last_is_empty=last_is_empty)
    found = run_distributed(translated, world_size, assignments, features, owner)
    expected = back_translate(assignments, features, 11)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for means in found:
        assert torch.equal(means, found[0])
        torch.testing.assert_close(means, expected, rtol=tolerance, atol=tolerance)
    assert not found[0][10].any()


def translated_locally(features: Tensor) -> Tensor:
    mine = features[collectives.rank() :]
    return back_translate(torch.zeros(len(mine), dtype=torch.long), mine, 1)


def test_back_translation_is_of_the_given_rows_unless_sharded(generator: torch.Generator) -> None:
    """In a group too, a process that does not ask for sums over others has its own means."""
    features = torch.randn(5, 3, generator=generator)
    for rank, means in enumerate(run_distributed(translated_locally, 2, features)):
        torch.testing.assert_close(means, features[rank:].mean(0, keepdim=True))


def refusals() -> tuple[list[str], list[int]]:
    """What this process raises in turn, and whether the group still works."""
    rank = collectives.rank()
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(rank))
    positions = torch.arange(5) + 5 * rank
    calls = [
        lambda: group({"image": rows}, cluster, positions + rank),
        lambda: group({"image": rows}, cluster, positions - rank),
        lambda: group({"image": rows[rank:]}, cluster, positions),
        lambda: back_translate(torch.zeros(5 - rank, dtype=torch.long), rows, 2, sharded=True),
    ]
    messages = []
    for call in calls:
        try:
            call()
            messages.append("nothing")
        except ValueError as error:
            messages.append(str(error))
    return messages, collectives.all_gather(torch.tensor([rank])).tolist()


def test_what_one_process_refuses_all_refuse() -> None:
    """Positions with a gap or twice, and numbers that differ in one process: all raise the same."""
    expected = [
        "positions: need to be 0 to 9 without gaps",
        "positions: 4 is there more than once",
        "image: 4 rows for 5 positions",
        "4 assignments for 5 student features",
    ]
    for messages, gathered in run_distributed(refusals, 2):
        assert messages == expected
        assert gathered == [0, 1]
