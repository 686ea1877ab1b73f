"""K-means of rows on several ranks finds what one process with all rows finds."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from protoclip.distributed import collectives
from protoclip.prototypes.kmeans import KMeans, kmeans
from protoclip.testing import run_distributed

Owners = Callable[[int, int], Tensor]


def interleaved(rows: int, world_size: int) -> Tensor:
    return torch.arange(rows) % world_size


def skewed(rows: int, world_size: int) -> Tensor:
    """Three quarters of the rows on rank 0, none on the last rank."""
    drawn = torch.rand(rows, generator=torch.Generator().manual_seed(5))
    return (4 * (drawn - 0.75).clamp(min=0) * max(1, world_size - 1)).long()


def cluster_own_rows(features: Tensor, owners: Tensor, settings: dict) -> tuple[KMeans, Tensor]:
    mine = torch.nonzero(owners == collectives.rank()).flatten()
    mine = mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(1))]
    # Only the order of positions counts, not their values.
    return kmeans(features[mine], **settings, positions=7 * mine - 11), mine


def cluster_together(features: Tensor, world_size: int, owners: Owners, settings: dict) -> KMeans:
    """The result that all ranks agree on, with the assignments of all rows."""
    owner = owners(len(features), world_size)
    found = run_distributed(cluster_own_rows, world_size, features, owner, settings)
    first = found[0][0]
    assignments = torch.full((len(features),), -1)
    for result, mine in found:
        assert torch.equal(result.centroids, first.centroids)
        assert result.history == first.history
        assignments[mine] = result.assignments
    return replace(first, assignments=assignments)


def assert_equal(ours: KMeans, expected: KMeans) -> None:
    torch.testing.assert_close(ours.centroids, expected.centroids, rtol=1e-9, atol=1e-9)
    assert torch.equal(ours.assignments, expected.assignments)
    assert ours.history == pytest.approx(expected.history, rel=1e-9, abs=1e-9)


def random_rows() -> Tensor:
    return torch.randn(203, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


GRID = torch.cartesian_prod(*[torch.arange(4.0, dtype=torch.float64)] * 3)
CASES = {
    "k-means++": (random_rows(), {"num_clusters": 50, "iterations": 6}),
    "random": (random_rows(), {"num_clusters": 50, "iterations": 6, "init": "random"}),
    "spherical": (random_rows(), {"num_clusters": 50, "iterations": 6, "spherical": True}),
    "restarts": (random_rows(), {"num_clusters": 7, "iterations": 30, "restarts": 4}),
    "more than rows of a rank": (random_rows(), {"num_clusters": 150, "iterations": 3}),
    "start": (random_rows(), {"num_clusters": 60, "iterations": 0}),
    "until nothing moves": (random_rows(), {"num_clusters": 4, "iterations": 200}),
    "empty clusters": (GRID, {"num_clusters": 9, "iterations": 12, "init": GRID[:1].repeat(9, 1)}),
    "copies": (torch.eye(3).double().repeat(10, 1), {"num_clusters": 8, "iterations": 10}),
}


@pytest.mark.parametrize("owners", [interleaved, skewed])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks_find_together_what_one_process_finds(case, world_size, owners):
    """In float64 to 1e-9, after equally many iterations; the same bits on every rank."""
    features, settings = CASES[case]
    settings = settings | {"seed": 3}
    expected = kmeans(features, **settings)
    assert_equal(cluster_together(features, world_size, owners, settings), expected)
    counts = torch.bincount(expected.assignments, minlength=settings["num_clusters"])
    assert int((counts > 0).sum()) == (3 if case == "copies" else len(counts))
    assert len(expected.history) < 100


def test_the_bfloat16_search_is_as_good_on_several_ranks(generator):
    features = torch.nn.functional.normalize(torch.randn(4096, 32, generator=generator), dim=1)
    settings = {"num_clusters": 256, "iterations": 5, "seed": 0}
    ours = cluster_together(features, 4, skewed, settings)
    assert ours.inertia == pytest.approx(kmeans(features, **settings).inertia, rel=1e-3)
    distances = torch.cdist(features, ours.centroids).square()
    assert (distances.argmin(1) == ours.assignments).float().mean() > 0.999
    assert ours.inertia == pytest.approx(float(distances.min(1).values.sum()), rel=1e-4)


def refusal(first: dict, others: dict) -> tuple[str, list[int]]:
    """What this rank raises, and whether the group still works."""
    rank = collectives.rank()
    arguments = {
        "features": torch.ones(5, 4),
        "num_clusters": 3,
        "iterations": 2,
        "seed": 0,
        "positions": torch.arange(5) + 5 * rank,
    }
    arguments |= others if rank else first
    try:
        kmeans(**arguments)
        message = "nothing"
    except Exception as error:
        message = str(error)
    return message, collectives.all_gather(torch.tensor([rank])).tolist()


NAN = torch.full((5, 4), float("nan"))
REFUSALS = {
    "non-finite rows": ({"features": NAN}, {}, "non-finite"),
    "too many clusters": ({"num_clusters": 11}, {"num_clusters": 11}, "num_clusters=11.* 10 rows"),
    "a position on both": ({"positions": torch.arange(1, 6)}, {}, "5 is there more"),
    "missing positions": ({}, {"positions": torch.arange(5, 9)}, "positions: 4 for 5 rows"),
    "another width": ({"features": torch.ones(5, 3)}, {}, "differ"),
    "another start": ({}, {"init": torch.ones(3, 4)}, "differ"),
}


@pytest.mark.parametrize(("first", "others", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_one_rank_refuses_all_refuse(first, others, message):
    """In one line; no rank waits, and the group goes on."""
    for text, gathered in run_distributed(refusal, 2, first, others):
        with pytest.raises(ValueError, match=message):
            raise ValueError(text)
        assert "\n" not in text
        assert gathered == [0, 1]
