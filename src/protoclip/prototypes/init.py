"""Where K-means starts: rows drawn uniformly, or spread out by squared distance."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.prototypes.shard import ALONE, Shard

# Centroids -> the nearest of each row, and the squared distance to it.
Search = Callable[[Tensor], tuple[Tensor, Tensor]]

ROUNDS = 10  # few clusters are drawn one at a time
# Weight of a row in a draw: its squared distance to this power. With ten rows a cluster 4 ends
# lower than 1, which is k-means++'s; with a hundred they are equal. See README.md here.
POWER = 4.0


def random_start(
    features: Float[Tensor, "n d"],
    num_clusters: int,
    generator: torch.Generator,
    shard: Shard = ALONE,
) -> Float[Tensor, "k d"]:
    """Distinct rows, drawn uniformly; of all processes if the rows are a share."""
    drawn = torch.randperm(shard.total(features), generator=generator)[:num_clusters]
    return shard.rows(features, drawn.to(features.device))


def spread_start(
    features: Float[Tensor, "n d"],
    num_clusters: int,
    generator: torch.Generator,
    search: Search,
    shard: Shard = ALONE,
) -> tuple[Float[Tensor, "k d"], Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Rows drawn in rounds, each far from those drawn before.

    After k-means|| (Bahmani et al. 2012, "Scalable K-Means++"), with two differences. Each round
    draws its share of the centroids without replacement, so that there are `num_clusters` at the
    end and nothing is left to be clustered again. And weights are powers of the squared distance.
    A round searches its own centroids alone: all of them together cost one assignment of all rows.

    Of rows that are shared out, every process draws the waiting times of all, and the one number a
    row that decides the draw is gathered: the draw is that of one process that has all rows.

    Args:
        features: Rows to draw from.
        num_clusters: Number of rows to draw.
        generator: Source of the draws, on the CPU.
        search: About the nearest of given centroids for each row of `features`.
        shard: Which rows of a larger set `features` are.

    Returns:
        Centroids, and about the nearest for each row with its squared distance.
    """
    device = features.device
    assignments = torch.zeros(len(features), dtype=torch.long, device=device)
    distances = torch.full_like(features[:, 0], float("inf"))
    log_weights = torch.zeros_like(distances)  # the first round is uniform
    centroids: list[Tensor] = []
    first = 0
    rounds = ROUNDS if num_clusters >= 4 * ROUNDS else num_clusters
    for share in torch.arange(num_clusters).tensor_split(rounds):
        # The shortest exponential waiting times, in logarithms: weighted, without replacement.
        waiting = torch.empty(shard.total(features)).exponential_(generator=generator)
        scores = log_weights - shard.own(waiting).to(distances).log()
        drawn = shard.whole(scores).topk(len(share)).indices
        rows = shard.rows(features, drawn)
        index, distance = search(rows)
        closer = distance < distances
        assignments = torch.where(closer, index + first, assignments)
        distances = torch.where(closer, distance, distances)
        asked, places = shard.find(drawn)
        assignments[places] = asked + first
        distances[places] = 0.0
        log_weights = POWER * distances.log()
        centroids.append(rows)
        first += len(share)
    return torch.cat(centroids), assignments, distances
