"""Search for the nearest centroid: block-wise, through bfloat16, and segmented sums."""

import pytest
import torch

from protoclip import kmeans
from protoclip.prototypes.kmeans import nearest, segment_mean
from protoclip.prototypes.nearest import row_argmin
from protoclip.prototypes.reduced import ReducedRows, nearest_candidate


def unit_rows(generator: torch.Generator, n: int, d: int = 24) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)


# Rows of several geometries; centroids are means of some of them.
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
def test_the_bfloat16_search_finds_the_nearest(
    geometry: str, num_clusters: int, generator: torch.Generator
) -> None:
    """In float64 no other centroid is nearer, but for float32's rounding of the difference."""
    features = GEOMETRIES[geometry](generator)
    centroids = features[torch.randperm(700, generator=generator)[:num_clusters]]
    assignments, distances = ReducedRows.of(features).nearest(centroids)
    expected = torch.cdist(
        features.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()
    chosen = expected.gather(1, assignments.unsqueeze(1)).squeeze(1)
    rounding = 1e-6 * expected.max()
    assert (chosen - expected.min(1).values).max() <= rounding
    torch.testing.assert_close(distances.double(), chosen, rtol=1e-4, atol=float(rounding))


def test_ties_go_to_the_lower_index(generator: torch.Generator) -> None:
    """Two equal centroids: the first gets the rows, in either search."""
    features = unit_rows(generator, 600)
    centroids = features[:290].repeat(2, 1)
    for search in (ReducedRows.of(features).nearest, lambda c: nearest(features, c)):
        assert int(search(centroids)[0].max()) < 290


def test_the_error_bound_holds_for_every_pair(generator: torch.Generator) -> None:
    """Products of the rounded factors against distances in float64: within the bound."""
    features = unit_rows(generator, 300) + torch.randn(24, generator=generator)
    centroids = unit_rows(generator, 280)
    rows = ReducedRows.of(features)
    right = rows.centroids(centroids)
    scores = (rows.matrix.double() @ right.matrix.double().T)[:, :280]
    exact = torch.cdist(features.double(), centroids.double()).square() / 2
    centred = (features - rows.origin).double()
    own = rows.matrix[:, -2].double() - centred.square().sum(1) / 2
    error = (scores - exact - own.unsqueeze(1)).abs().max(1).values
    bounds = rows.error_bounds(right).double()
    assert (error <= bounds).all()
    assert (bounds < 20 * error).all()  # and it is not so wide that it says nothing


def test_many_candidates_are_searched_in_float32(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rounding hides all differences, the float32 search decides; elsewhere it has no say."""
    calls = []

    def counted(features: torch.Tensor, centroids: torch.Tensor) -> object:
        calls.append(len(features))
        return nearest(features, centroids)

    monkeypatch.setattr("protoclip.prototypes.reduced.nearest", counted)
    for geometry, expected in (("directions", []), ("tight groups", [700])):
        features = GEOMETRIES[geometry](generator)
        ReducedRows.of(features).nearest(features[:300])
        assert calls == expected


def test_the_scan_is_near(generator: torch.Generator) -> None:
    """Its distances are right to 2% of their mean, and so are those of its assignments."""
    features, centroids = unit_rows(generator, 600), unit_rows(generator, 500)
    assignments, distances = ReducedRows.of(features).scan(centroids)
    expected = torch.cdist(features, centroids).square()
    least = expected.min(1).values
    chosen = expected.gather(1, assignments.unsqueeze(1)).squeeze(1)
    assert (distances - least).abs().max() < 0.02 * least.mean()
    assert (chosen - least).max() < 0.02 * least.mean()


@pytest.mark.parametrize("fast", [True, False])
def test_kmeans_is_the_same_with_and_without_bfloat16(
    fast: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From given centroids, iterations in float32 and float64 end with the same clusters."""
    monkeypatch.setattr(
        "protoclip.prototypes.kmeans.is_fast",
        lambda rows, num_clusters: fast and rows.dtype == torch.float32,
    )
    features = unit_rows(generator, 1500)
    result = kmeans(features, 300, iterations=8, seed=0, init=features[:300])
    expected = kmeans(features.double(), 300, iterations=8, seed=0, init=features[:300].double())
    assert result.inertia == pytest.approx(expected.inertia, rel=1e-5)
    assert (result.assignments == expected.assignments).float().mean() > 0.999


@pytest.mark.parametrize("width", [1, 40, 255, 256, 320, 4096, 4224])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_row_argmin_is_the_first_least_column(
    width: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Values with many ties; one block, several blocks, and widths without blocks."""
    scores = torch.randint(-9, 9, (50, width), generator=generator).to(dtype)
    least, column = row_argmin(scores)
    for row, value, index in zip(scores.tolist(), least.tolist(), column.tolist(), strict=True):
        assert value == min(row)
        assert index == row.index(min(row))


def test_candidates_are_decided_by_float32_distances() -> None:
    """Scores that say nothing leave every centroid a candidate, and the nearest wins."""
    features, centroids = torch.tensor([[0.0], [5.0]]), torch.tensor([[9.0], [4.0], [1.0]])
    scores = torch.ones(2, 3, dtype=torch.bfloat16).view(torch.int16)
    index, distance = nearest_candidate(scores, torch.zeros(2), features, centroids)
    assert index.tolist() == [2, 1]
    assert distance.tolist() == [1.0, 1.0]


def test_segments_are_summed_in_the_order_of_their_rows(generator: torch.Generator) -> None:
    """Bit for bit the float32 sum from the first row on: what makes it deterministic anywhere."""
    features = torch.randn(2000, 16, generator=generator)[:, ::2]
    assignments = torch.randint(0, 12, (2000,), generator=generator)
    assignments[assignments == 7] = 3
    means, counts = segment_mean(features, assignments, 13)
    sums = torch.zeros(13, 8)
    for row, segment in zip(features, assignments.tolist(), strict=True):
        sums[segment] += row
    assert counts.tolist() == [assignments.tolist().count(segment) for segment in range(13)]
    assert torch.equal(means, sums / counts.clamp(min=1).unsqueeze(1))
    assert means[[7, 12]].abs().sum() == 0
