"""K-means and the search for the nearest centroid against plain restatements."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans
from torch import Tensor

from protoclip import kmeans
from protoclip.prototypes import kmeans as clustering
from protoclip.prototypes.kmeans import Bfloat16Search, nearest

both_inits = pytest.mark.parametrize("init", ["k-means++", "random"])


def blobs(generator: torch.Generator, n: int = 300, k: int = 6, d: int = 5) -> Tensor:
    centres = 10 * torch.randn(k, d, generator=generator)
    return centres[torch.arange(n) % k] + torch.randn(n, d, generator=generator)


@pytest.mark.parametrize("chunk", [8, 5_000_000])
def test_lloyd_equals_scikit_learn_from_the_same_start(chunk, generator, monkeypatch):
    monkeypatch.setattr("protoclip.prototypes.kmeans.CHUNK_ELEMENTS", {"cpu": chunk})
    features = blobs(generator).double()
    ours = kmeans(features, 6, iterations=50, seed=0, init=features[:6])
    theirs = SklearnKMeans(6, init=features[:6].numpy(), n_init=1, max_iter=50, tol=0)
    theirs.fit(features.numpy())
    np.testing.assert_allclose(ours.centroids.numpy(), theirs.cluster_centers_, rtol=1e-9)
    assert ours.assignments.tolist() == theirs.labels_.tolist()
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-9)


def test_assignments_and_history_belong_to_the_returned_centroids(generator):
    """Also when stopped early: the history is what fewer iterations end with, and never rises."""
    features = torch.randn(200, 7, generator=generator, dtype=torch.float64)
    result = kmeans(features, 20, iterations=6, seed=3)
    distances = torch.cdist(features, result.centroids) ** 2
    assert torch.equal(distances.argmin(1), result.assignments)
    assert result.inertia == pytest.approx(float(distances.min(1).values.sum()), rel=1e-9)
    shorter = [kmeans(features, 20, iterations=i, seed=3).inertia for i in range(7)]
    assert result.history == pytest.approx(shorter, rel=1e-12)
    assert all(later <= earlier for earlier, later in pairwise(shorter))
    assert result.history[-1] == result.inertia


@both_inits
def test_equal_seeds_give_equal_bits_and_leave_global_state_alone(init, generator):
    features = torch.randn(4200, 32, generator=generator)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    first, second, other = (
        kmeans(features, 300, iterations=3, restarts=2, seed=seed, init=init) for seed in (5, 5, 6)
    )
    assert torch.equal(first.centroids, second.centroids)
    assert torch.equal(first.assignments, second.assignments)
    assert first.history == second.history
    assert not torch.equal(first.centroids, other.centroids)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state[1] == np.random.get_state()[1]).all()  # noqa: NPY002


@both_inits
@pytest.mark.parametrize("n", [1, 1100])
def test_as_many_clusters_as_rows(n, init, generator):
    features = torch.randn(n, 32, generator=generator)
    result = kmeans(features, n, iterations=3, seed=0, init=init)
    assert result.assignments.sort().values.tolist() == list(range(n))
    assert result.inertia == 0
    assert torch.equal(result.centroids[result.assignments], features)


def test_kmeans_plus_plus_finds_every_group(generator):
    """Of groups of unequal size that are far apart, each gives a row; uniform draws miss some."""
    sizes = [2000, 500, 40, 20, 10, 5, 3, 2, 2, 1, 1, 1]
    groups = torch.repeat_interleave(torch.arange(12), torch.tensor(sizes))
    features = 100 * torch.eye(12)[groups] + torch.randn(len(groups), 12, generator=generator)
    far, uniform = (
        kmeans(features, 12, iterations=0, seed=0, init=init) for init in ("k-means++", "random")
    )
    for group in range(12):
        assert len(far.assignments[groups == group].unique()) == 1
    assert len(far.assignments.unique()) == 12
    assert uniform.inertia > 10 * far.inertia


def test_spherical_clusters_are_by_cosine(generator):
    features = 9 * torch.randn(80, 5, generator=generator, dtype=torch.float64)
    result = kmeans(features, 7, iterations=10, seed=0, spherical=True)
    torch.testing.assert_close(result.centroids.norm(dim=1), torch.ones(7, dtype=torch.float64))
    assert torch.equal((features @ result.centroids.T).argmax(1), result.assignments)


NAN = torch.full((10, 4), float("nan"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clusters": 11}, "num_clusters=11.*10 rows"),
        ({"num_clusters": 0}, "num_clusters=0"),
        ({"iterations": -1}, "iterations=-1"),
        ({"init": torch.zeros(2, 4)}, "init"),
        ({"init": "anywhere"}, "(?s)init.*anywhere"),
        ({"features": NAN}, "non-finite"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    arguments = {"features": torch.randn(10, 4), "num_clusters": 3, "iterations": 2, "seed": 0}
    with pytest.raises((ValueError, TypeError), match=message):
        kmeans(**arguments | settings)


@pytest.mark.parametrize(
    "given",
    [Tensor.half, Tensor.bfloat16, torch.inference_mode(Tensor.clone), Tensor.requires_grad_],
    ids=["float16", "bfloat16", "inference", "with gradient"],
)
def test_any_rows_are_clustered_in_float32(given, generator):
    rows = given(blobs(generator))
    result = kmeans(rows, 6, iterations=5, seed=0)
    assert result.centroids.dtype == torch.float32
    assert not result.centroids.requires_grad
    expected = kmeans(rows.detach().float(), 6, iterations=5, seed=0)
    assert torch.equal(result.centroids, expected.centroids)


def is_sure(features: Tensor, centroids: Tensor) -> Tensor:
    """Whether rounding cannot change which centroid is nearest to a row."""
    least = torch.cdist(features.double(), centroids.double()).topk(2, largest=False).values
    return least[:, 1] - least[:, 0] > 1e-4


def test_an_iteration_is_the_same_with_and_without_bfloat16(generator, monkeypatch):
    """Of rows that are sure of their cluster; of others rounding decides, and what follows."""
    features = unit_rows(generator, 1500)
    features = features[is_sure(features, features[:300])]
    assert len(features) > 1400
    start = features[:300]
    expected = kmeans(features.double(), 300, iterations=1, seed=0, init=start.double())
    sure = is_sure(features, expected.centroids)
    assert sure.float().mean() > 0.95
    results = []
    for fast in (True, False):
        monkeypatch.setattr(clustering, "bfloat16_pays", lambda *_, fast=fast: fast)
        results.append(kmeans(features, 300, iterations=1, seed=0, init=start))
        assert torch.equal(results[-1].assignments[sure], expected.assignments[sure])
        assert results[-1].inertia == pytest.approx(expected.inertia, rel=1e-5)
        close = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(results[-1].centroids.double(), expected.centroids, **close)
    assert torch.equal(results[0].centroids, results[1].centroids)


def unit_rows(generator: torch.Generator, n: int, d: int = 24) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)


GEOMETRIES = {
    "directions": lambda g: unit_rows(g, 700),
    "far from the origin": lambda g: unit_rows(g, 700) + 30,
    "large": lambda g: 1e12 * torch.randn(700, 24, generator=g),
    "copies": lambda g: unit_rows(g, 350).repeat(2, 1),
    "tight groups": lambda g: 10 * unit_rows(g, 7).repeat(100, 1) + 1e-3 * unit_rows(g, 700),
    "one point": lambda g: unit_rows(g, 1).repeat(700, 1),
}


@pytest.mark.parametrize("num_clusters", [3, 40, 300, 700])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_bfloat16_search_finds_the_nearest(geometry, num_clusters, generator):
    """In float64 no other centroid is nearer, up to float32's rounding of the difference."""
    features = GEOMETRIES[geometry](generator)
    centroids = features[torch.randperm(700, generator=generator)[:num_clusters]]
    assignments, distances = Bfloat16Search(features, features.mean(0)).nearest(centroids)
    expected = torch.cdist(
        features.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()
    chosen = expected.gather(1, assignments.unsqueeze(1)).squeeze(1)
    rounding = 1e-6 * expected.max()
    assert (chosen - expected.min(1).values).max() <= rounding
    torch.testing.assert_close(distances.double(), chosen, rtol=1e-4, atol=float(rounding))


def test_ties_go_to_the_lower_index(generator):
    features = unit_rows(generator, 600)
    centroids = features[:290].repeat(2, 1)
    search = Bfloat16Search(features, features.mean(0))
    for found in (search.nearest(centroids), nearest(features, centroids)):
        assert int(found[0].max()) < 290
