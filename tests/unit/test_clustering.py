"""K-means: its contract, and Lloyd's algorithm against a plain restatement."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans

from protoclip import kmeans


def blobs(generator: torch.Generator, n: int = 300, k: int = 6, d: int = 5) -> torch.Tensor:
    centres = 10 * torch.randn(k, d, generator=generator)
    return centres[torch.arange(n) % k] + torch.randn(n, d, generator=generator)


def test_lloyd_equals_scikit_learn_from_the_same_start(generator: torch.Generator) -> None:
    """Equal start, equal centroids, assignments and inertia."""
    features = blobs(generator).double()
    init = features[:6]
    ours = kmeans(features, 6, iterations=50, seed=0, init=init)
    theirs = SklearnKMeans(6, init=init.numpy(), n_init=1, max_iter=50, tol=0).fit(features.numpy())
    np.testing.assert_allclose(ours.centroids.numpy(), theirs.cluster_centers_, rtol=1e-9)
    assert ours.assignments.tolist() == theirs.labels_.tolist()
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-9)


def test_assignments_and_inertia_belong_to_the_returned_centroids(
    generator: torch.Generator,
) -> None:
    """Even when stopped early, assignments are nearest centroids and inertia is their sum."""
    features = torch.randn(200, 7, generator=generator, dtype=torch.float64)
    result = kmeans(features, 20, iterations=2, seed=3)
    distances = torch.cdist(features, result.centroids) ** 2
    assert torch.equal(distances.argmin(1), result.assignments)
    assert result.inertia == pytest.approx(float(distances.min(1).values.sum()), rel=1e-9)


def test_chunks_do_not_change_the_result(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row a chunk and all rows in one chunk give the same clustering."""
    features = torch.randn(64, 4, generator=generator, dtype=torch.float64)
    whole = kmeans(features, 8, iterations=10, seed=0)
    monkeypatch.setattr("protoclip.clustering.torch_lloyd.CHUNK_ELEMENTS", 8)
    chunked = kmeans(features, 8, iterations=10, seed=0)
    torch.testing.assert_close(whole.centroids, chunked.centroids)
    assert torch.equal(whole.assignments, chunked.assignments)


def test_equal_seeds_are_equal_and_global_generators_untouched(
    generator: torch.Generator,
) -> None:
    """Same seed, same bits; another seed, another start; torch's global state stays."""
    features = torch.randn(100, 4, generator=generator)
    torch_state = torch.get_rng_state()
    first = kmeans(features, 10, iterations=3, restarts=2, seed=5)
    second = kmeans(features, 10, iterations=3, restarts=2, seed=5)
    other = kmeans(features, 10, iterations=3, restarts=2, seed=6)
    assert torch.equal(first.centroids, second.centroids)
    assert torch.equal(first.assignments, second.assignments)
    assert not torch.equal(first.centroids, other.centroids)
    assert torch.equal(torch_state, torch.get_rng_state())


def test_restarts_keep_the_best(generator: torch.Generator) -> None:
    """More restarts never end with a higher inertia, as the first start is among them."""
    features = blobs(generator)
    one = kmeans(features, 6, iterations=20, seed=1)
    many = kmeans(features, 6, iterations=20, restarts=8, seed=1)
    assert many.inertia <= one.inertia
    assert many.inertia < 1.05 * kmeans(features, 6, iterations=20, restarts=30, seed=2).inertia


def test_empty_clusters_are_refilled(generator: torch.Generator) -> None:
    """Starts that all coincide leave clusters empty; each takes a member of a large one."""
    features = blobs(generator)
    init = features[:1].repeat(6, 1)
    result = kmeans(features, 6, iterations=30, seed=0, init=init)
    assert (torch.bincount(result.assignments, minlength=6) > 0).all()


def test_fewer_distinct_rows_than_clusters_leaves_clusters_empty() -> None:
    """Copies cannot be split: as many clusters as distinct rows are used, and nothing breaks."""
    features = torch.eye(3).repeat(10, 1)
    result = kmeans(features, 5, iterations=10, seed=0)
    assert len(result.assignments.unique()) == 3
    assert torch.isfinite(result.centroids).all()
    assert result.inertia == pytest.approx(0, abs=1e-9)


def test_spherical_centroids_have_unit_norm(generator: torch.Generator) -> None:
    """Spherical K-means assigns by cosine, and its centroids lie on the sphere."""
    features = torch.randn(80, 5, generator=generator, dtype=torch.float64) * torch.rand(80, 1)
    result = kmeans(features, 7, iterations=10, seed=0, spherical=True)
    torch.testing.assert_close(result.centroids.norm(dim=1), torch.ones(7, dtype=torch.float64))
    cosine = torch.nn.functional.normalize(features, dim=1) @ result.centroids.T
    assert torch.equal(cosine.argmax(1), result.assignments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clusters": 11}, "num_clusters=11.*10 rows"),
        ({"num_clusters": 0}, "num_clusters=0"),
        ({"restarts": 0}, "restarts=0"),
        ({"iterations": -1}, "iterations=-1"),
        ({"init": torch.zeros(2, 4)}, "init"),
        ({"backend": "abacus"}, "backend.*abacus"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    """Each wrong setting is named."""
    arguments = {"num_clusters": 3, "iterations": 2, "seed": 0} | settings
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        kmeans(torch.randn(10, 4), **arguments)


def test_non_finite_rows_are_refused() -> None:
    """NaN is neither clustered nor turned into zero."""
    features = torch.randn(10, 4)
    features[3, 1] = float("nan")
    with pytest.raises(ValueError, match="non-finite"):
        kmeans(features, 2, iterations=1, seed=0)
