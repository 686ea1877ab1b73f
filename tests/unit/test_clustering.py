"""K-means: its contract, and Lloyd's algorithm against a plain restatement."""

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans

from protoclip import kmeans
from protoclip.prototypes.init import spread_start
from protoclip.prototypes.kmeans import nearest
from protoclip.prototypes.lloyd import refill_empty


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
    monkeypatch.setattr("protoclip.prototypes.nearest.CHUNK_ELEMENTS", {"cpu": 8})
    chunked = kmeans(features, 8, iterations=10, seed=0)
    torch.testing.assert_close(whole.centroids, chunked.centroids)
    assert torch.equal(whole.assignments, chunked.assignments)


@pytest.mark.parametrize("start", ["k-means++", "random"])
def test_equal_seeds_are_equal_and_global_state_untouched(
    start: str, generator: torch.Generator
) -> None:
    """Same seed, same bits; another seed, another start; generators and flags stay."""
    features = torch.randn(4200, 32, generator=generator)

    def state() -> list[object]:
        return [
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            torch.get_float32_matmul_precision(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
        ]

    before = state()
    first, second, other = (
        kmeans(features, 300, iterations=3, restarts=2, seed=seed, init=start) for seed in (5, 5, 6)
    )
    assert torch.equal(first.centroids, second.centroids)
    assert torch.equal(first.assignments, second.assignments)
    assert first.history == second.history
    assert not torch.equal(first.centroids, other.centroids)
    assert state() == before


def test_history_is_the_inertia_of_each_iteration(generator: torch.Generator) -> None:
    """Iteration by iteration it is what fewer iterations end with, and it never rises."""
    features = torch.randn(200, 7, generator=generator, dtype=torch.float64)
    result = kmeans(features, 20, iterations=6, seed=3)
    shorter = [kmeans(features, 20, iterations=i, seed=3).inertia for i in range(7)]
    assert result.history == pytest.approx(shorter, rel=1e-12)
    assert all(later <= earlier for earlier, later in pairwise(shorter))
    assert result.history[-1] == result.inertia


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


def test_empty_clusters_take_the_farthest_members_of_the_largest() -> None:
    """Two empty clusters: the two largest give; coinciding members and lone ones have nothing."""
    features = torch.tensor([[0.0], [0.0], [0.0], [0.0], [10], [11], [13], [20], [22], [30]])
    assignments = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
    centroids = torch.tensor([[0.0], [11.0], [21.5], [31.0], [99.0], [99.0], [99.0]])
    distances = (features - centroids[assignments]).square().sum(1)
    counts = torch.bincount(assignments, minlength=7)
    filled = refill_empty(centroids, counts, features, assignments, distances)
    assert filled.flatten().tolist() == [0.0, 11.0, 21.5, 31.0, 13.0, 20.0, 99.0]


@pytest.mark.parametrize("start", ["k-means++", "random"])
@pytest.mark.parametrize("spherical", [False, True])
def test_fewer_distinct_rows_than_clusters_leaves_clusters_empty(
    start: str, spherical: bool
) -> None:
    """Copies cannot be split: as many clusters as distinct rows are used, and nothing breaks."""
    features = torch.eye(3).repeat(10, 1)
    result = kmeans(features, 5, iterations=10, seed=0, init=start, spherical=spherical)
    assert len(result.assignments.unique()) == 3
    assert torch.isfinite(result.centroids).all()
    assert result.inertia == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("start", ["k-means++", "random"])
@pytest.mark.parametrize("n", [1, 7, 1100])
def test_as_many_clusters_as_rows(n: int, start: str, generator: torch.Generator) -> None:
    """Every row is a cluster of its own, through the bfloat16 search too (1,100 rows)."""
    features = torch.randn(n, 32, generator=generator)
    result = kmeans(features, n, iterations=3, seed=0, init=start)
    assert result.assignments.sort().values.tolist() == list(range(n))
    assert result.inertia == 0
    assert torch.equal(result.centroids[result.assignments], features)


def test_the_spread_start_finds_every_group(generator: torch.Generator) -> None:
    """Groups of unequal size, far apart: a row of each is drawn, which uniform draws do not do."""
    sizes = [2000, 500, 40, 20, 10, 5, 3, 2, 2, 1, 1, 1]
    groups = torch.repeat_interleave(torch.arange(12), torch.tensor(sizes))
    features = 100 * torch.eye(12)[groups] + torch.randn(len(groups), 12, generator=generator)
    spread, uniform = (
        kmeans(features, 12, iterations=0, seed=0, init=start) for start in ("k-means++", "random")
    )
    for group in range(12):
        assert len(spread.assignments[groups == group].unique()) == 1
    assert len(spread.assignments.unique()) == 12
    assert uniform.inertia > 10 * spread.inertia


def test_the_spread_start_draws_distinct_rows_and_knows_the_nearest(
    generator: torch.Generator,
) -> None:
    """Rows differ, and what it says about assignments and distances is so."""
    features = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    centroids, assignments, distances = spread_start(
        features, 64, generator, lambda centroids: nearest(features, centroids)
    )
    assert len(centroids.unique(dim=0)) == 64
    expected = torch.cdist(features, centroids).square()
    assert torch.equal(assignments, expected.argmin(1))
    torch.testing.assert_close(distances, expected.min(1).values, rtol=1e-9, atol=1e-9)


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
        ({"init": "anywhere"}, "init.*anywhere"),
        ({"backend": "superkmeans", "init": torch.zeros(3, 4)}, "superkmeans.*init"),
        ({"backend": "flash-kmeans"}, "flash-kmeans.*GPU"),
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_clustered_in_float32(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    """As if they had been converted before."""
    features = blobs(generator).to(dtype)
    result = kmeans(features, 6, iterations=5, seed=0)
    expected = kmeans(features.float(), 6, iterations=5, seed=0)
    assert result.centroids.dtype == torch.float32
    assert torch.equal(result.centroids, expected.centroids)


def test_inference_tensors_and_rows_with_gradient_are_clustered() -> None:
    """Both give what plain rows give, and no graph is kept."""
    features = torch.randn(64, 5)
    with torch.inference_mode():
        inference = features.clone()
    plain, inferred, tracked = (
        kmeans(rows, 7, iterations=4, seed=0)
        for rows in (features, inference, features.clone().requires_grad_())
    )
    assert torch.equal(plain.centroids, inferred.centroids)
    assert torch.equal(plain.centroids, tracked.centroids)
    assert not tracked.centroids.requires_grad


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize(
    ("backend", "module"), [("faiss", "faiss"), ("superkmeans", "superkmeans")]
)
def test_engines_agree_on_the_inertia(
    backend: str, module: str, spherical: bool, generator: torch.Generator
) -> None:
    """Within 2% of torch; assignments are the nearest of the engine's centroids."""
    pytest.importorskip(module)
    features = torch.nn.functional.normalize(torch.randn(3000, 32, generator=generator), dim=1)
    ours = kmeans(features, 60, iterations=10, seed=0, spherical=spherical)
    theirs = kmeans(features, 60, iterations=10, seed=0, spherical=spherical, backend=backend)
    assert theirs.inertia == pytest.approx(ours.inertia, rel=0.02)
    assert torch.equal(nearest(features, theirs.centroids)[0], theirs.assignments)
    if spherical:
        torch.testing.assert_close(theirs.centroids.norm(dim=1), torch.ones(60))


def test_faiss_from_the_same_start_is_lloyd(generator: torch.Generator) -> None:
    """Equal start and iterations, equal centroids but for rounding."""
    pytest.importorskip("faiss")
    features = blobs(generator, n=1200, k=12)
    ours, theirs = (
        kmeans(features, 12, iterations=4, seed=0, init=features[:12], backend=backend)
        for backend in ("torch", "faiss")
    )
    torch.testing.assert_close(ours.centroids, theirs.centroids, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.assignments, theirs.assignments)


@pytest.mark.parametrize(
    ("backend", "module", "package"),
    [("faiss", "faiss", "faiss-cpu"), ("superkmeans", "superkmeans", "superkmeans")],
)
def test_an_engine_that_is_not_installed_says_how_to_install_it(
    backend: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line with the command."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"^backend='{backend}': .*pip install {package}$"):
        kmeans(torch.randn(10, 4), 2, iterations=1, seed=0, backend=backend)
