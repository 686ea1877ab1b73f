"""Where K-means starts: rows drawn uniformly, or spread out by squared distance."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Centroids -> the nearest of each row, and the squared distance to it.
Search = Callable[[Tensor], tuple[Tensor, Tensor]]

ROUNDS = 10  # few clusters are drawn one at a time
# Weight of a row in a draw: its squared distance to this power. With ten rows a cluster 4 ends
# lower than 1, which is k-means++'s; with a hundred they are equal. See README.md here.
POWER = 4.0


def random_start(
    features: Float[Tensor, "n d"], num_clusters: int, generator: torch.Generator
) -> Float[Tensor, "k d"]:
    """Distinct rows, drawn uniformly."""
    rows = torch.randperm(len(features), generator=generator)[:num_clusters]
    return features[rows.to(features.device)]


def spread_start(
    features: Float[Tensor, "n d"],
    num_clusters: int,
    generator: torch.Generator,
    search: Search,
) -> tuple[Float[Tensor, "k d"], Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Rows drawn in rounds, each far from those drawn before.

    After k-means|| (Bahmani et al. 2012, "Scalable K-Means++"), with two differences. Each round
    draws its share of the centroids without replacement, so that there are `num_clusters` at the
    end and nothing is left to be clustered again. And weights are powers of the squared distance.
    A round searches its own centroids alone: all of them together cost one assignment of all rows.

    Args:
        features: Rows to draw from.
        num_clusters: Number of rows to draw.
        generator: Source of the draws, on the CPU.
        search: About the nearest of given centroids for each row of `features`.

    Returns:
        Centroids, and about the nearest for each row with its squared distance.
    """
    device = features.device
    assignments = torch.zeros(len(features), dtype=torch.long, device=device)
    distances = torch.full_like(features[:, 0], float("inf"))
    log_weights = torch.zeros_like(distances)  # the first round is uniform
    chosen: list[Tensor] = []
    first = 0
    rounds = ROUNDS if num_clusters >= 4 * ROUNDS else num_clusters
    for share in torch.arange(num_clusters).tensor_split(rounds):
        # The shortest exponential waiting times, in logarithms: weighted, without replacement.
        waiting = torch.empty(len(features)).exponential_(generator=generator).to(distances)
        drawn = (log_weights - waiting.log()).topk(len(share)).indices
        index, distance = search(features[drawn])
        closer = distance < distances
        assignments = torch.where(closer, index + first, assignments)
        distances = torch.where(closer, distance, distances)
        assignments[drawn] = torch.arange(first, first + len(share), device=device)
        distances[drawn] = 0.0
        log_weights = POWER * distances.log()
        chosen.append(drawn)
        first += len(share)
    return features[torch.cat(chosen)], assignments, distances
