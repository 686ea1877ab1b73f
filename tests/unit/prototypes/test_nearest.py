"""The search for the nearest centroid, in float32 and by way of bfloat16."""

import pytest
import torch
from torch import Tensor

from protoclip.prototypes.nearest import Bfloat16Search, nearest, row_argmin


def unit_rows(generator: torch.Generator, n: int, d: int = 24) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)


def search_of(features: Tensor) -> Bfloat16Search:
    return Bfloat16Search(features, features.mean(0))


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
    assignments, distances = search_of(features).nearest(centroids)
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
    for search in (search_of(features).nearest, lambda c: nearest(features, c)):
        assert int(search(centroids)[0].max()) < 290


def test_the_error_bound_holds_for_every_pair(generator):
    """Products of the rounded factors against distances in float64."""
    features = unit_rows(generator, 300) + torch.randn(24, generator=generator)
    centroids = unit_rows(generator, 280)
    search = search_of(features)
    right, bounds = search.right(centroids), search.error_bounds(centroids)
    scores = (search.left.double() @ right.double().T)[:, :280]
    exact = torch.cdist(features.double(), centroids.double()).square() / 2
    centred = (features - search.origin).double()
    own = search.left[:, -2].double() - centred.square().sum(1) / 2
    error = (scores - exact - own.unsqueeze(1)).abs().max(1).values
    assert (error <= bounds.double()).all()
    assert (bounds.double() < 20 * error).all()  # nor is it so wide that it says nothing


@pytest.mark.parametrize("width", [1, 40, 255, 256, 320, 4096, 4224])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_row_argmin_is_the_first_least_column(width, dtype, generator):
    """With many ties, in one block, in several, and in widths that blocks do not divide."""
    scores = torch.randint(-9, 9, (50, width), generator=generator).to(dtype)
    least, column = row_argmin(scores)
    for row, value, index in zip(scores.tolist(), least.tolist(), column.tolist(), strict=True):
        assert value == min(row)
        assert index == row.index(min(row))
