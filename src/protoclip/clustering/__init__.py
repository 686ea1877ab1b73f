"""K-means: one function, several engines behind it."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.clustering.segments import segment_mean
from protoclip.clustering.torch_lloyd import lloyd, nearest, random_start

__all__ = ["KMeans", "kmeans", "nearest", "segment_mean"]


@dataclass(frozen=True, kw_only=True)
class KMeans:
    """A clustering: `assignments` are the nearest of `centroids`, `inertia` the sum of squares."""

    centroids: Float[Tensor, "k d"]
    assignments: Int[Tensor, " n"]
    inertia: float


def kmeans(
    features: Float[Tensor, "n d"],
    num_clusters: int,
    *,
    iterations: int,
    restarts: int = 1,
    seed: int,
    init: Float[Tensor, "k d"] | None = None,
    spherical: bool = False,
    backend: Literal["auto", "torch"] = "auto",
) -> KMeans:
    """Cluster rows into `num_clusters` groups of least squared distance.

    Deterministic for an equal seed on CPU; no global random generator is touched.

    Args:
        features: Rows to cluster, `(n, d)`, finite. Computed in float32 or wider.
        num_clusters: Number of clusters `k`, at most `n`.
        iterations: Most Lloyd iterations a start; stops early when no assignment changes.
        restarts: Number of random starts; the one with the lowest inertia is kept.
        seed: Seed of the starts.
        init: Centroids to start from instead of random rows; needs `restarts=1`.
        spherical: Cluster directions: rows and centroids are brought to unit norm.
        backend: The engine; `auto` picks for the device.

    Raises:
        ValueError: More clusters than rows, non-finite rows, or a setting out of range.
    """
    if not 1 <= num_clusters <= len(features):
        raise ValueError(
            f"num_clusters={num_clusters}: needs to be between 1 and the {len(features)} rows given"
        )
    if iterations < 0 or restarts < 1:
        raise ValueError(f"iterations={iterations}, restarts={restarts}: need >= 0 and >= 1")
    if init is not None and (restarts != 1 or init.shape != (num_clusters, features.shape[1])):
        raise ValueError("init: needs restarts=1 and the shape (num_clusters, features.shape[1])")
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend={backend!r}: choose 'auto' or 'torch'")
    rows = features.detach()
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("features: hold non-finite values, so they cannot be clustered")
    if spherical:
        rows = torch.nn.functional.normalize(rows, dim=1)

    generator = torch.Generator().manual_seed(seed)
    best: KMeans | None = None
    for _ in range(restarts):
        start = random_start(rows, num_clusters, generator) if init is None else init.to(rows)
        centroids, assignments, inertia = lloyd(
            rows, start, iterations=iterations, spherical=spherical
        )
        if best is None or inertia < best.inertia:
            best = KMeans(centroids=centroids, assignments=assignments, inertia=inertia)
    assert best is not None
    return best
