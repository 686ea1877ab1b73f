"""Clusters, targets and the queue of several ranks are those of one process."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from protoclip import KMeans, Target, kmeans
from protoclip.data.loader import Batch
from protoclip.data.sampler import Episode
from protoclip.distributed import collectives
from protoclip.losses.prototypical import make_targets
from protoclip.models import loading
from protoclip.models.protoclip import Embeddings
from protoclip.prototypes.features import EpisodeFeatures, QueuedFeatures
from protoclip.prototypes.targets import cluster_spaces
from protoclip.testing import run_distributed, tiny_model

SAMPLES = 120


def owners(world_size: int, *, last_is_empty: bool) -> Tensor:
    """The rank that has each sample."""
    drawn = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(2))
    return (drawn * max(1, world_size - last_is_empty)).long()


def own(owner: Tensor) -> Tensor:
    """Positions of this rank's samples, shuffled."""
    mine = torch.nonzero(owner == collectives.rank()).flatten()
    return mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(3))]


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
    ("world_size", "back_translation", "last_is_empty"),
    [(1, True, False), (2, True, True), (2, False, False), (4, True, False), (4, False, True)],
)
def test_targets_of_ranks_are_those_of_one_process(
    world_size, back_translation, last_is_empty, generator
):
    """Float64 to 1e-9, assignments of all samples exactly; the same bits on every rank."""
    owner = owners(world_size, last_is_empty=last_is_empty)
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
            torch.testing.assert_close(
                one.centroids, expected[space].centroids, rtol=1e-9, atol=1e-9
            )
        for key, target in targets.items():
            for name, value in vars(target).items():
                assert torch.equal(value, getattr(found[0][1][key], name))
                wanted = getattr(expected_targets[key], name)
                torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9)


def queue_of(state: dict[str, Any], steps: range) -> tuple[dict[str, Any], EpisodeFeatures | None]:
    """The queue after some global batches of 8 samples, and what it gives once it is full."""
    source = QueuedFeatures(
        model=loading.model(tiny_model(), seed=0),
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
        source.observe(batch, Embeddings(**same, **projections, **scales))
    full = source.pushed >= 16 // collectives.world_size()
    features = source.features(Episode(index=0, rows=torch.arange(16))) if full else None
    return source.state_dict(), features


@pytest.mark.parametrize("split", [0, 1, 3])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2)])
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
        image[slice(None) if after == 1 else features.positions] = features.image
    assert torch.equal(image, whole.image)
