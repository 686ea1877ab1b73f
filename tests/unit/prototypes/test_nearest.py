"""The search for the nearest centroid, in float32 and by way of bfloat16."""

import pytest
import torch
from torch import Tensor

from protoclip.prototypes.nearest import Bfloat16Search, nearest


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
