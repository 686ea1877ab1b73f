"""Clusters, targets and the queue of several ranks are those of one process."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from protoclip import KMeans, Target, kmeans
from protoclip.data.loader import Batch
from protoclip.data.sampler import Episode
from protoclip.distributed import collectives
from protoclip.losses.prototypical import make_targets
from protoclip.models.protoclip import Embeddings
from protoclip.prototypes.features import EpisodeFeatures, QueuedFeatures
from protoclip.prototypes.targets import cluster_spaces
from testing import build_model, run_distributed, tiny_model

Owners = Callable[[int, int], Tensor]


def interleaved(rows: int, world_size: int) -> Tensor:
    return torch.arange(rows) % world_size


def skewed(rows: int, world_size: int) -> Tensor:
    """Three quarters of the rows on rank 0, none on the last rank."""
    drawn = torch.rand(rows, generator=torch.Generator().manual_seed(5))
    return (4 * (drawn - 0.75).clamp(min=0) * max(1, world_size - 1)).long()


def own(owner: Tensor) -> Tensor:
    """Positions of this rank's rows, shuffled."""
    mine = torch.nonzero(owner == collectives.rank()).flatten()
    return mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(1))]


def cluster_own_rows(features: Tensor, owner: Tensor, settings: dict) -> tuple[KMeans, Tensor]:
    mine = own(owner)
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
    "restarts": (random_rows(), {"num_clusters": 7, "iterations": 10, "restarts": 2}),
    "more than rows of a rank": (random_rows(), {"num_clusters": 150, "iterations": 3}),
    "until nothing moves": (random_rows(), {"num_clusters": 4, "iterations": 200}),
    "empty clusters": (GRID, {"num_clusters": 9, "iterations": 12, "init": GRID[:1].repeat(9, 1)}),
    "copies": (torch.eye(3).double().repeat(10, 1), {"num_clusters": 8, "iterations": 10}),
}


@pytest.mark.parametrize(("world_size", "owners"), [(2, interleaved), (4, skewed)])
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


def refusal(first: dict, others: dict) -> tuple[str, list[int]]:
    """What this rank raises, and whether the group still works."""
    rank = collectives.rank()
    arguments = {"features": torch.ones(5, 4), "num_clusters": 3, "iterations": 2, "seed": 0}
    arguments |= {"positions": torch.arange(5) + 5 * rank} | (others if rank else first)
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


SAMPLES = 120


def cluster(space: str, rows: Tensor, positions: Tensor | None) -> KMeans:
    number = {"image": 6, "text": 9}.get(space, 4)
    return kmeans(rows, number, iterations=4, seed=0, positions=positions)


def episode(owner: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Projections, and teachers that know all samples, most, those of rank 0, and none."""
    widths = {"image": 5, "text": 5, "all": 7, "most": 3, "rank 0": 3, "none": 4}
    spaces = {
        space: torch.randn(SAMPLES, width, generator=generator, dtype=torch.float64)
        for space, width in widths.items()
    }
    last = torch.nonzero(owner == owner.max()).flatten()
    spaces["most"][last[::2]] = float("nan")
    spaces["rank 0"][owner != 0] = float("nan")
    spaces["none"][:] = float("nan")
    return spaces


def clusters_and_targets(
    spaces: Mapping[str, Tensor], owner: Tensor | None, back_translation: bool
) -> tuple[dict[str, KMeans], dict[tuple[str, str], Target]]:
    positions = None if owner is None else own(owner)
    mine = {space: rows if positions is None else rows[positions] for space, rows in spaces.items()}
    clusters = cluster_spaces(mine, cluster, positions)
    targets = make_targets(
        clusters,
        image_projections=mine["image"],
        text_projections=mine["text"],
        target_temperatures=dict.fromkeys(spaces, 0.1) | {"most": 0.0},
        back_translation=back_translation,
        positions=positions,
    )
    return clusters, targets


@pytest.mark.parametrize(
    ("world_size", "back_translation", "owners"),
    [(2, True, skewed), (4, False, skewed)],
)
def test_targets_of_ranks_are_those_of_one_process(world_size, back_translation, owners, generator):
    """Float64 to 1e-9, assignments of all samples exactly; the same bits on every rank."""
    owner = owners(SAMPLES, world_size)
    spaces = episode(owner, generator)
    expected, expected_targets = clusters_and_targets(spaces, None, back_translation)
    assert set(expected) == {"image", "text", "all", "most", "rank 0"}
    found = run_distributed(clusters_and_targets, world_size, spaces, owner, back_translation)
    for clusters, targets in found:
        assert list(clusters) == list(expected)
        assert list(targets) == list(expected_targets)
        for space, one in clusters.items():
            assert torch.equal(one.centroids, found[0][0][space].centroids)
            assert torch.equal(one.assignments, expected[space].assignments)
            wanted = expected[space].centroids
            torch.testing.assert_close(one.centroids, wanted, rtol=1e-9, atol=1e-9)
        for key, target in targets.items():
            assert target.confidence == expected_targets[key].confidence
            for name in ("classes", "class_index", "lookup"):
                value, wanted = getattr(target, name), getattr(expected_targets[key], name)
                assert torch.equal(value, getattr(found[0][1][key], name))
                torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9)


def queue_of(state: dict[str, Any], steps: range) -> tuple[dict[str, Any], EpisodeFeatures | None]:
    """The queue after some global batches of 8 samples, and what it gives once it is full."""
    source = QueuedFeatures(
        model=build_model(tiny_model(), seed=0),
        batches=lambda episode: [],
        teachers={},
        autocast=nullcontext,
        size=16,
    )
    source.load_state_dict(state)
    share = 8 // collectives.world_size()
    for step in steps:
        number = torch.arange(8 * step, 8 * step + 8)[share * collectives.rank() :][:share]
        rows = number.float().unsqueeze(1)
        batch = Batch(
            position=number,
            sample_id=[f"s{i}" for i in number.tolist()],
            image=torch.zeros(share, 3, 1, 1),
            text=torch.zeros(share, 1, dtype=torch.long),
        )
        scale, same = torch.tensor(1.0), {"image_features": rows, "text_features": rows}
        projections = {"image_projections": rows, "text_projections": -rows}
        scales = {"logit_scale": scale, "prototype_logit_scale": scale}
        taken = torch.tensor(True)
        source.observe(batch, Embeddings(**same, **projections, **scales), taken)
    state = source.state_dict()
    full = source.pushed >= 16 // collectives.world_size()
    return state, source.features(Episode(index=0, rows=torch.arange(16))) if full else None


@pytest.mark.parametrize(("before", "after", "split"), [(1, 2, 1), (4, 2, 3)])
def test_a_queue_goes_on_with_another_number_of_ranks(before, after, split):
    """Its samples, and the order that they are clustered in, are those of one process."""
    expected, whole = run_distributed(queue_of, 1, {}, range(5))[0]
    states = run_distributed(queue_of, before, {}, range(split))
    found = run_distributed(queue_of, after, states[0][0], range(split, 5))
    image = torch.empty(16, 1)
    for state, features in found:
        assert state["sample_ids"] == expected["sample_ids"]
        assert state["pushed"] == 40
        assert torch.equal(state["image"], expected["image"])
        assert torch.equal(state["text"], expected["text"])
        image[features.positions] = features.image
    assert torch.equal(image, whole.image)
