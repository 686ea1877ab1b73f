"""K-means over rows that are shared out: one result, that of one process that has all rows."""

from collections.abc import Callable

import pytest
import torch

from protoclip.distributed import collectives
from protoclip.prototypes.kmeans import KMeans, kmeans
from protoclip.prototypes.reduced import is_fast
from protoclip.testing import run_distributed

Owners = Callable[[int, int], torch.Tensor]


def blocks(rows: int, world_size: int) -> torch.Tensor:
    return torch.arange(rows) * world_size // rows


def interleaved(rows: int, world_size: int) -> torch.Tensor:
    return torch.arange(rows) % world_size


def skewed(rows: int, world_size: int) -> torch.Tensor:
    """Three quarters of the rows in the first process, none in the last of several."""
    drawn = torch.rand(rows, generator=torch.Generator().manual_seed(5))
    return (4 * (drawn - 0.75).clamp(min=0) * max(1, world_size - 1)).long()


def part(rows: int, owners: torch.Tensor) -> torch.Tensor:
    """This process's rows, in an order of their own."""
    mine = torch.nonzero(owners == collectives.rank()).flatten()
    return mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(1))]


def cluster_share(
    features: torch.Tensor, owners: torch.Tensor, settings: dict
) -> tuple[KMeans, torch.Tensor]:
    mine = part(len(features), owners)
    # Their order counts, not what they are.
    result = kmeans(features[mine], **settings, positions=7 * mine - 11)
    return result, mine


def cluster_together(
    features: torch.Tensor, world_size: int, owners: torch.Tensor, settings: dict
) -> KMeans:
    """What all processes have, with the assignments of all rows."""
    found = run_distributed(cluster_share, world_size, features, owners, settings)
    first = found[0][0]
    assignments = torch.full((len(features),), -1)
    for result, mine in found:
        assert torch.equal(result.centroids, first.centroids)
        assert result.inertia == first.inertia
        assert result.history == first.history
        assert len(result.assignments) == len(mine)
        assignments[mine] = result.assignments
    return KMeans(
        centroids=first.centroids,
        assignments=assignments,
        inertia=first.inertia,
        history=first.history,
    )


def assert_equal(ours: KMeans, expected: KMeans, tolerance: float) -> None:
    torch.testing.assert_close(ours.centroids, expected.centroids, rtol=tolerance, atol=tolerance)
    assert torch.equal(ours.assignments, expected.assignments)
    assert ours.inertia == pytest.approx(expected.inertia, rel=tolerance, abs=tolerance)
    assert ours.history == pytest.approx(expected.history, rel=tolerance, abs=tolerance)


SETTINGS = {
    "spread": {"num_clusters": 50, "iterations": 6, "seed": 3},
    "random": {"num_clusters": 50, "iterations": 6, "seed": 3, "start": "random"},
    "spherical": {"num_clusters": 50, "iterations": 6, "seed": 3, "spherical": True},
    "restarts": {"num_clusters": 7, "iterations": 30, "seed": 3, "restarts": 4},
    "more clusters than rows of a process": {"num_clusters": 150, "iterations": 3, "seed": 3},
    "one cluster": {"num_clusters": 1, "iterations": 3, "seed": 3},
}


@pytest.mark.parametrize("owners", [blocks, interleaved, skewed])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_processes_find_together_what_one_finds(
    settings: dict, world_size: int, owners: Owners, generator: torch.Generator
) -> None:
    """In float64 to 1e-9, however rows are shared out; the same bits in every process."""
    features = torch.randn(203, 5, generator=generator, dtype=torch.float64)
    ours = cluster_together(features, world_size, owners(203, world_size), settings)
    assert_equal(ours, kmeans(features, **settings), 1e-9)


@pytest.mark.parametrize("owners", [interleaved, skewed])
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_stop_together_when_nothing_moves(
    world_size: int, owners: Owners, generator: torch.Generator
) -> None:
    """After as many iterations as one process, also those whose own rows came to rest before."""
    features = torch.randn(203, 5, generator=generator, dtype=torch.float64)
    settings = {"num_clusters": 4, "iterations": 200, "seed": 3}
    ours = cluster_together(features, world_size, owners(203, world_size), settings)
    assert len(ours.history) < 100
    assert_equal(ours, kmeans(features, **settings), 1e-9)


@pytest.mark.parametrize("start", ["k-means++", "random"])
@pytest.mark.parametrize("owners", [interleaved, skewed])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_rows_to_start_from_are_those_of_one_process(
    start: str, world_size: int, owners: Owners, generator: torch.Generator
) -> None:
    """The very rows, and in the same order."""
    features = torch.randn(203, 5, generator=generator, dtype=torch.float64)
    settings = {"num_clusters": 60, "iterations": 0, "seed": 8, "start": start}
    ours = cluster_together(features, world_size, owners(203, world_size), settings)
    assert torch.equal(ours.centroids, kmeans(features, **settings).centroids)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("owners", [interleaved, skewed])
@pytest.mark.parametrize("spherical", [False, True])
def test_float32_rows_find_the_same_clusters(
    spherical: bool, world_size: int, owners: Owners, generator: torch.Generator
) -> None:
    """Centroids and inertia to 1e-4, at least 99% of the assignments."""
    centres = 3 * torch.randn(20, 16, generator=generator)
    features = centres[torch.arange(900) % 20] + torch.randn(900, 16, generator=generator)
    settings = {"num_clusters": 20, "iterations": 10, "seed": 0, "spherical": spherical}
    ours = cluster_together(features, world_size, owners(900, world_size), settings)
    expected = kmeans(features, **settings)
    assert (ours.assignments == expected.assignments).float().mean() > 0.99
    torch.testing.assert_close(ours.centroids, expected.centroids, rtol=1e-4, atol=1e-4)
    assert ours.inertia == pytest.approx(expected.inertia, rel=1e-4)


@pytest.mark.parametrize("owners", [interleaved, skewed])
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_bfloat16_search_is_as_good_over_processes(
    world_size: int, owners: Owners, generator: torch.Generator
) -> None:
    """Where the hardware has it, inertia is that of one process to 1e-3; in float32 elsewhere."""
    features = torch.nn.functional.normalize(torch.randn(4096, 32, generator=generator), dim=1)
    assert is_fast(features[:1], 256, 4096) == is_fast(features, 256)
    settings = {"num_clusters": 256, "iterations": 5, "seed": 0}
    ours = cluster_together(features, world_size, owners(4096, world_size), settings)
    assert ours.inertia == pytest.approx(kmeans(features, **settings).inertia, rel=1e-3)
    distances = torch.cdist(features, ours.centroids).square()
    assert (distances.argmin(1) == ours.assignments).float().mean() > 0.999
    assert ours.inertia == pytest.approx(float(distances.min(1).values.sum()), rel=1e-4)


@pytest.mark.parametrize("owners", [blocks, interleaved, skewed])
@pytest.mark.parametrize("world_size", [2, 4])
def test_empty_clusters_are_refilled_from_any_process(world_size: int, owners: Owners) -> None:
    """Starts that coincide: the farthest members of the largest clusters, first among equals."""
    features = torch.cartesian_prod(*[torch.arange(4.0, dtype=torch.float64)] * 3)
    settings = {"num_clusters": 9, "iterations": 12, "seed": 0}
    settings["init"] = features[:1].repeat(9, 1)
    ours = cluster_together(features, world_size, owners(64, world_size), settings)
    assert (torch.bincount(ours.assignments, minlength=9) > 0).all()
    assert_equal(ours, kmeans(features, **settings), 1e-9)


@pytest.mark.parametrize("start", ["k-means++", "random"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_fewer_distinct_rows_than_clusters(world_size: int, start: str) -> None:
    """Copies cannot be split, also when they are in several processes: the same stay empty."""
    features = torch.eye(3, dtype=torch.float64).repeat(10, 1)
    settings = {"num_clusters": 8, "iterations": 10, "seed": 0, "start": start}
    ours = cluster_together(features, world_size, interleaved(30, world_size), settings)
    assert len(ours.assignments.unique()) == 3
    assert_equal(ours, kmeans(features, **settings), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_process_with_positions_sorts_its_rows(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    """The same bits as the plain call on rows sorted by position, with the bfloat16 search too."""
    features = torch.randn(1500, 32, generator=generator, dtype=dtype)
    positions = torch.randperm(3000, generator=generator)[:1500]
    settings = {"num_clusters": 800, "iterations": 3, "seed": 0}
    ours = kmeans(features, **settings, positions=positions)
    order = positions.argsort()
    plain = kmeans(features[order], **settings)
    assert torch.equal(ours.centroids, plain.centroids)
    assert torch.equal(ours.assignments[order], plain.assignments)
    assert ours.history == plain.history


def exchanged_shapes(features: torch.Tensor, owners: torch.Tensor, settings: dict) -> list:
    shapes: list[tuple[str, torch.Size]] = []
    gathered, reduced = collectives.all_gather, collectives.all_reduce

    def gather(rows: torch.Tensor) -> torch.Tensor:
        shapes.append(("gathered", rows.shape))
        return gathered(rows)

    def reduce(values: torch.Tensor, *operation: str) -> torch.Tensor:
        shapes.append(("reduced", values.shape))
        return reduced(values, *operation)

    collectives.all_gather, collectives.all_reduce = gather, reduce
    try:
        cluster_share(features, owners, settings)
    finally:
        collectives.all_gather, collectives.all_reduce = gathered, reduced
    return shapes


def test_rows_stay_in_their_process(generator: torch.Generator) -> None:
    """One number a row is gathered; rows as wide as the features are at most the centroids."""
    features = torch.randn(400, 6, generator=generator)
    settings = {"num_clusters": 40, "iterations": 4, "seed": 0}
    first, second = run_distributed(exchanged_shapes, 2, features, blocks(400, 2), settings)
    assert [kind for kind, _ in first] == [kind for kind, _ in second]
    assert {kind for kind, _ in first} == {"gathered", "reduced"}
    for kind, shape in first + second:
        # Rounds of the start draw four rows each.
        assert len(shape) == 1 if kind == "gathered" else len(shape) < 2 or shape[0] in (4, 40)


def plain_call(features: torch.Tensor) -> KMeans:
    return kmeans(features[: 10 + collectives.rank()], 3, iterations=2, seed=collectives.rank())


def test_without_positions_a_process_clusters_its_own_rows(generator: torch.Generator) -> None:
    """In a group too: processes may differ in rows and settings, and none waits for another."""
    features = torch.randn(20, 4, generator=generator)
    for rank, found in enumerate(run_distributed(plain_call, 2, features)):
        expected = kmeans(features[: 10 + rank], 3, iterations=2, seed=rank)
        assert torch.equal(found.centroids, expected.centroids)


def refusal(first: dict, others: dict) -> tuple[str, list[int]]:
    """What this process raises, and whether the group still works."""
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
    "non-finite rows here": ({"features": NAN}, {}, "non-finite"),
    "non-finite rows there": ({}, {"features": NAN}, "non-finite"),
    "too many clusters": ({"num_clusters": 11}, {"num_clusters": 11}, "num_clusters=11.* 10 rows"),
    "a position twice here": ({"positions": torch.tensor([0, 1, 2, 3, 3])}, {}, "3 is there more"),
    "a position of both": ({"positions": torch.arange(1, 6)}, {}, "5 is there more"),
    "missing positions": ({}, {"positions": torch.arange(5, 9)}, "positions: are 4 for 5 rows"),
    "another width": ({"features": torch.ones(5, 3)}, {}, "differ"),
    "another precision": ({"features": torch.ones(5, 4).double()}, {}, "differ"),
    "another seed": ({"seed": 1}, {}, "differ"),
    "another start": ({}, {"init": torch.ones(3, 4)}, "differ"),
    "iterations": ({"iterations": -1}, {"iterations": -1}, "iterations=-1"),
    "faiss": ({"backend": "faiss"}, {"backend": "faiss"}, "backend='faiss': has no positions"),
}


@pytest.mark.parametrize(("first", "others", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_one_process_refuses_all_refuse(first: dict, others: dict, message: str) -> None:
    """Each raises, none waits, in one line, and the group goes on."""
    found = run_distributed(refusal, 2, first, others)
    for text, gathered in found:
        with pytest.raises(ValueError, match=message):
            raise ValueError(text)
        assert "\n" not in text
        assert gathered == [0, 1]


def test_other_engines_refuse_positions_in_one_process() -> None:
    """Whether or not they are installed."""
    for backend in ("faiss", "superkmeans", "flash-kmeans"):
        with pytest.raises(ValueError, match=f"^backend='{backend}': has no positions"):
            kmeans(
                torch.ones(5, 4),
                2,
                iterations=1,
                seed=0,
                backend=backend,
                positions=torch.arange(5),
            )
