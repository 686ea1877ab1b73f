"""K-means: one function, several engines behind it; README.md here says which is for what."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.clustering.assignment import nearest
from protoclip.clustering.faiss_lloyd import faiss_lloyd
from protoclip.clustering.flash_lloyd import flash_lloyd
from protoclip.clustering.reduced import ReducedRows, is_fast
from protoclip.clustering.segments import segment_mean
from protoclip.clustering.start import Search, random_start, spread_start
from protoclip.clustering.superkmeans_lloyd import superkmeans_lloyd
from protoclip.clustering.torch_lloyd import lloyd

__all__ = ["KMeans", "kmeans", "nearest", "segment_mean"]

ENGINES = {"faiss": faiss_lloyd, "superkmeans": superkmeans_lloyd, "flash-kmeans": flash_lloyd}
BACKENDS = ("auto", "torch", *ENGINES)
STARTS = ("spread", "random")


@dataclass(frozen=True, kw_only=True)
class KMeans:
    """A clustering.

    Attributes:
        centroids: Means of the members, or their directions in a spherical clustering.
        assignments: Nearest centroid of each row.
        inertia: Sum of squared distances of the rows to their centroids.
        history: Inertia of the start and after each iteration, the last of them `inertia`. The
            first may be rounded; engines other than torch report the last alone.
    """

    centroids: Float[Tensor, "k d"]
    assignments: Int[Tensor, " n"]
    inertia: float
    history: tuple[float, ...]


@torch.no_grad()
def kmeans(
    features: Float[Tensor, "n d"],
    num_clusters: int,
    *,
    iterations: int,
    restarts: int = 1,
    seed: int,
    init: Float[Tensor, "k d"] | None = None,
    start: Literal["spread", "random"] = "spread",
    spherical: bool = False,
    backend: Literal["auto", "torch", "faiss", "superkmeans", "flash-kmeans"] = "auto",
) -> KMeans:
    """Cluster rows into `num_clusters` groups of least squared distance.

    Deterministic for an equal seed on CPU; no global random generator is touched.

    Args:
        features: Rows to cluster, `(n, d)`, finite. Computed in float32 or wider; bfloat16
            distances only narrow down, where the hardware is fast at them, which centroids float32
            distances are computed to.
        num_clusters: Number of clusters `k`, at most `n`.
        iterations: Most Lloyd iterations a start; stops early when no assignment changes.
        restarts: Number of starts; the one with the lowest inertia is kept.
        seed: Seed of the starts.
        init: Centroids to start from instead of rows that are drawn; needs `restarts=1`.
        start: How rows to start from are drawn: far from each other, or uniformly.
        spherical: Cluster directions: rows and centroids are brought to unit norm.
        backend: The engine; `auto` is `torch`. The others are optional packages, described in
            README.md here.

    Raises:
        ValueError: More clusters than rows, non-finite rows, a setting out of range, or an engine
            that is not installed or cannot do what is asked.
    """
    if not 1 <= num_clusters <= len(features):
        raise ValueError(
            f"num_clusters={num_clusters}: needs to be between 1 and the {len(features)} rows given"
        )
    if iterations < 0 or restarts < 1:
        raise ValueError(f"iterations={iterations}, restarts={restarts}: need >= 0 and >= 1")
    if init is not None and (restarts != 1 or init.shape != (num_clusters, features.shape[1])):
        raise ValueError("init: needs restarts=1 and the shape (num_clusters, features.shape[1])")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    if start not in STARTS:
        raise ValueError(f"start={start!r}: choose one of {', '.join(STARTS)}")
    if backend == "superkmeans" and init is not None:
        raise ValueError("backend='superkmeans': has a start of its own; leave out init")
    rows = features.detach()
    if rows.device.type == "mps":  # has no float64 and lacks some of the operations
        rows = rows.cpu()
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("features: hold non-finite values, so they cannot be clustered")
    if spherical:
        rows = torch.nn.functional.normalize(rows, dim=1)

    search: Search = partial(nearest, rows)
    roughly = search
    if is_fast(rows, num_clusters):
        reduced = ReducedRows.of(rows)
        search, roughly = reduced.nearest, reduced.scan
    generator = torch.Generator().manual_seed(seed)
    best: KMeans | None = None
    for restart in range(restarts):
        found: tuple[Tensor, Tensor] | None = None
        if init is not None:
            centroids = init.to(rows)
        elif start == "random":
            centroids = random_start(rows, num_clusters, generator)
        else:
            centroids, *nearby = spread_start(rows, num_clusters, generator, roughly)
            found = (nearby[0], nearby[1])
        remaining = iterations
        if backend not in ("auto", "torch") and iterations > 0:
            engine = partial(ENGINES[backend], iterations=iterations, spherical=spherical)
            centroids, found = engine(rows, centroids, seed=seed + restart), None
            remaining = 0
        centroids, assignments, history = lloyd(
            rows,
            centroids,
            search=search,
            found=found,
            iterations=remaining,
            spherical=spherical,
        )
        if best is None or history[-1] < best.inertia:
            best = KMeans(
                centroids=centroids.to(features.device),
                assignments=assignments.to(features.device),
                inertia=history[-1],
                history=tuple(history),
            )
    assert best is not None
    return best
