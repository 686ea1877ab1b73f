"""Lloyd's K-means in torch, on any device."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.prototypes.init import Search
from protoclip.prototypes.segments import segment_mean
from protoclip.prototypes.shard import ALONE, Shard


def refill_empty(
    centroids: Float[Tensor, "k d"],
    counts: Int[Tensor, " k"],
    features: Float[Tensor, "n d"],
    assignments: Int[Tensor, " n"],
    distances: Float[Tensor, " n"],
    shard: Shard = ALONE,
) -> Float[Tensor, "k d"]:
    """Give each empty cluster the farthest member of one of the largest clusters.

    Largest first, one member each, so that no donor is emptied. Donors whose members all coincide
    have nothing to give; when only such are left, clusters stay empty (at their old place). Of
    equally far members the first gives, of rows that are shared out the one of least position.
    """
    empty = torch.nonzero(counts == 0).flatten()
    if len(empty) == 0:
        return centroids
    assignments, distances = shard.whole(assignments), shard.whole(distances)
    spread = torch.zeros_like(distances[:1]).repeat(len(centroids))
    spread = spread.scatter_reduce(0, assignments, distances, "amax")
    farthest = torch.nonzero(distances == spread[assignments]).flatten()
    member = torch.full_like(counts, len(assignments))
    member = member.scatter_reduce(0, assignments[farthest], farthest, "amin")
    gives = (counts > 1) & (spread > 0)
    donors = torch.argsort(counts * gives, descending=True, stable=True)[: len(empty)]
    donors = donors[gives[donors]]
    centroids = centroids.clone()
    centroids[empty[: len(donors)]] = shard.rows(features, member[donors])
    return centroids


def lloyd(
    features: Float[Tensor, "n d"],
    centroids: Float[Tensor, "k d"],
    *,
    search: Search,
    found: tuple[Int[Tensor, " n"], Float[Tensor, " n"]] | None = None,
    iterations: int,
    spherical: bool,
    shard: Shard = ALONE,
) -> tuple[Float[Tensor, "k d"], Int[Tensor, " n"], list[float]]:
    """Lloyd's iterations from the given centroids, until nothing moves or `iterations` are done.

    Args:
        features: Rows to cluster.
        centroids: Where to start.
        search: The nearest of given centroids for each row, and its squared distance.
        found: About what `search(centroids)` would say, if known: saves the first assignment.
        iterations: Most iterations, each a mean over members and an assignment.
        spherical: Bring means to unit norm.
        shard: Which rows of a larger set, to be clustered together, `features` are.

    Returns:
        Centroids, the assignments to exactly these centroids, and the inertia of the start and
        after each iteration.
    """
    assignments, distances = found if found and iterations else search(centroids)
    history = [float(shard.sum(distances.double().sum()))]
    for _ in range(iterations):
        means, counts = segment_mean(features, assignments, len(centroids), sharded=shard.is_part)
        means = torch.where((counts > 0).unsqueeze(1), means, centroids)
        if spherical:
            means = torch.nn.functional.normalize(means, dim=1)
        centroids = refill_empty(means, counts, features, assignments, distances, shard)
        previous = assignments
        assignments, distances = search(centroids)
        facts = torch.stack([distances.double().sum(), (previous != assignments).sum().double()])
        inertia, moved = shard.sum(facts).tolist()
        history.append(inertia)
        if moved == 0:
            break
    return centroids, assignments, history
