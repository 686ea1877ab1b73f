"""Lloyd's K-means in torch, on any device, without the whole distance matrix."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.clustering.segments import segment_mean

# Rows times clusters of one chunk of scores. Near 5 million floats a chunk stays in cache on CPUs
# and still fills the matrix units.
CHUNK_ELEMENTS = 5_000_000


def nearest(
    features: Float[Tensor, "n d"], centroids: Float[Tensor, "k d"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Nearest centroid of each row and the squared distance to it; ties go to the lower index."""
    half_norms = centroids.square().sum(1) / 2
    assignments, distances = [], []
    for chunk in torch.split(features, max(1, CHUNK_ELEMENTS // len(centroids))):
        # |x - c|^2 = |x|^2 + 2 (|c|^2 / 2 - x c): the row's own norm does not move the arg-min.
        score, index = torch.addmm(half_norms, chunk, centroids.T, alpha=-1).min(dim=1)
        assignments.append(index)
        distances.append((chunk.square().sum(1) + 2 * score).clamp(min=0))
    return torch.cat(assignments), torch.cat(distances)


def random_start(
    features: Float[Tensor, "n d"], num_clusters: int, generator: torch.Generator
) -> Float[Tensor, "k d"]:
    """Distinct rows, drawn uniformly."""
    rows = torch.randperm(len(features), generator=generator)[:num_clusters]
    return features[rows.to(features.device)]


def refill_empty(
    centroids: Float[Tensor, "k d"],
    counts: Int[Tensor, " k"],
    features: Float[Tensor, "n d"],
    assignments: Int[Tensor, " n"],
    distances: Float[Tensor, " n"],
) -> Float[Tensor, "k d"]:
    """Give each empty cluster the farthest member of one of the largest clusters.

    Largest first, one member each, so that no donor is emptied. Donors whose members all coincide
    have nothing to give; when only such are left, clusters stay empty (at their old place).
    """
    empty = torch.nonzero(counts == 0).flatten()
    if len(empty) == 0:
        return centroids
    spread = torch.zeros_like(centroids[:, 0]).scatter_reduce(0, assignments, distances, "amax")
    donors = torch.argsort(counts * (spread > 0), descending=True, stable=True)[: len(empty)]
    donors = donors[spread[donors] > 0]
    centroids = centroids.clone()
    for cluster, donor in zip(empty.tolist(), donors.tolist(), strict=False):
        member_distances = torch.where(assignments == donor, distances, -1.0)
        centroids[cluster] = features[int(member_distances.argmax())]
    return centroids


def lloyd(
    features: Float[Tensor, "n d"],
    centroids: Float[Tensor, "k d"],
    *,
    iterations: int,
    spherical: bool,
) -> tuple[Float[Tensor, "k d"], Int[Tensor, " n"], float]:
    """Lloyd's iterations from the given centroids, until nothing moves or `iterations` are done.

    Returns:
        Centroids, the assignments to exactly these centroids, and their inertia.
    """
    assignments, distances = nearest(features, centroids)
    for _ in range(iterations):
        means, counts = segment_mean(features, assignments, len(centroids))
        means = torch.where((counts > 0).unsqueeze(1), means, centroids)
        if spherical:
            means = torch.nn.functional.normalize(means, dim=1)
        centroids = refill_empty(means, counts, features, assignments, distances)
        previous = assignments
        assignments, distances = nearest(features, centroids)
        if torch.equal(previous, assignments):
            break
    return centroids, assignments, float(distances.double().sum())
