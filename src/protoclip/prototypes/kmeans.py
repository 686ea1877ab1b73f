"""K-means: one function, several engines behind it; README.md here says which is for what."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.distributed import collectives
from protoclip.prototypes.init import Search, random_start, spread_start
from protoclip.prototypes.lloyd import lloyd
from protoclip.prototypes.nearest import nearest
from protoclip.prototypes.reduced import ReducedRows, is_fast
from protoclip.prototypes.segments import segment_mean
from protoclip.prototypes.shard import ALONE, Shard

__all__ = ["KMeans", "kmeans", "nearest", "segment_mean"]

INITS = ("k-means++", "random")


@dataclass(frozen=True, kw_only=True)
class KMeans:
    """A clustering.

    Attributes:
        centroids: Means of the members, or their directions in a spherical clustering.
        assignments: Nearest centroid of each row given.
        inertia: Sum of squared distances of the rows to their centroids.
        history: Inertia of the start and after each iteration, the last of them `inertia`. The
            first may be rounded; engines other than torch report the last alone.
    """

    centroids: Float[Tensor, "k d"]
    assignments: Int[Tensor, " n"]
    inertia: float
    history: tuple[float, ...]


def checked_rows(
    features: Float[Tensor, "n d"],
    num_clusters: int,
    *,
    num_rows: int,
    iterations: int,
    restarts: int,
    init: Float[Tensor, "k d"] | str,
    positions: Int[Tensor, " p"] | None,
) -> Float[Tensor, "n d"]:
    """The rows in a precision to cluster in.

    Raises:
        ValueError: As `kmeans` says, of what can be seen without other processes.
    """
    if not 1 <= num_clusters <= num_rows:
        raise ValueError(
            f"num_clusters={num_clusters}: needs to be between 1 and the {num_rows} rows given"
        )
    if iterations < 0 or restarts < 1:
        raise ValueError(f"iterations={iterations}, restarts={restarts}: need >= 0 and >= 1")
    if isinstance(init, Tensor) and (
        restarts != 1 or init.shape != (num_clusters, features.shape[1])
    ):
        raise ValueError("init: needs restarts=1 and the shape (num_clusters, features.shape[1])")
    if isinstance(init, str) and init not in INITS:
        raise ValueError(f"init={init!r}: choose one of {', '.join(INITS)}, or give centroids")
    if positions is not None and len(positions) != len(features):
        raise ValueError(f"positions: are {len(positions)} for {len(features)} rows")
    rows = features.detach()
    if rows.device.type == "mps":  # has no float64 and lacks some of the operations
        rows = rows.cpu()
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("features: hold non-finite values, so they cannot be clustered")
    return rows


@torch.no_grad()
def kmeans(
    features: Float[Tensor, "n d"],
    num_clusters: int,
    *,
    iterations: int,
    restarts: int = 1,
    seed: int,
    init: Float[Tensor, "k d"] | Literal["k-means++", "random"] | None = None,
    spherical: bool = False,
    positions: Int[Tensor, " p"] | None = None,
) -> KMeans:
    """Cluster rows into `num_clusters` groups of least squared distance.

    Deterministic for an equal seed on CPU; no global random generator is touched.

    With `positions`, the rows given are this process's share of a set that all processes of the
    group cluster together, each calling this with equal settings. What comes out is, but for
    rounding, what one process that has all rows in the order of positions gets: centroids, inertia
    and history the same bits in each process, assignments of the rows given. Rows stay in their
    process, but for those that become centroids.

    Args:
        features: Rows to cluster, `(n, d)`, finite. Computed in float32 or wider; bfloat16
            distances only narrow down, where the hardware is fast at them, which centroids float32
            distances are computed to.
        num_clusters: Number of clusters `k`, at most `n`.
        iterations: Most Lloyd iterations a start; stops early when no assignment changes.
        restarts: Number of starts; the one with the lowest inertia is kept.
        seed: Seed of the starts.
        init: Where to start: from rows far from each other (`k-means++`, the default), from rows
            drawn uniformly (`random`), or from these centroids, which needs `restarts=1`.
        spherical: Cluster directions: rows and centroids are brought to unit norm.
        positions: Number of each row given among the rows of all processes, of which each has a
            share, maybe none. Any distinct integers; their order alone counts.

    Raises:
        ValueError: More clusters than rows, non-finite rows, a setting out of range, or an engine
            that is not installed or cannot do what is asked. With `positions` also numbers that are
            there twice, and settings that differ; what one process refuses, all refuse.
    """
    init = "k-means++" if init is None else init
    together = positions is not None
    num_rows, alike = len(features), True
    if together:
        # What has to be the same everywhere, so that all processes take the same steps.
        drawn = init if isinstance(init, str) else None
        settings = (num_clusters, iterations, restarts, seed, drawn, spherical)
        kind = (features.shape[1], features.dtype)
        shares = collectives.all_gather_object((num_rows, settings, kind))
        num_rows = sum(count for count, *_ in shares)
        alike = all(share[1:] == (settings, kind) for share in shares)

    def check() -> Float[Tensor, "n d"]:
        if not alike:
            raise ValueError("positions: processes differ in settings, or in the width of rows")
        return checked_rows(
            features,
            num_clusters,
            num_rows=num_rows,
            iterations=iterations,
            restarts=restarts,
            init=init,
            positions=positions,
        )

    rows = collectives.raise_on_all_ranks(check) if together else check()
    if spherical:
        rows = torch.nn.functional.normalize(rows, dim=1)
    shard, ascending = ALONE, None
    if positions is not None:
        ascending = positions.to(rows.device).argsort()
        rows = rows[ascending]
        shard = Shard.of(positions.to(rows.device)[ascending])

    search: Search = partial(nearest, rows)
    roughly = search
    if fast(rows, num_clusters, shard):
        reduced = ReducedRows.of(rows, shard)
        if len(rows):
            search, roughly = reduced.nearest, reduced.scan
    generator = torch.Generator().manual_seed(seed)
    best: KMeans | None = None
    for _ in range(restarts):
        found: tuple[Tensor, Tensor] | None = None
        if isinstance(init, Tensor):
            centroids = init.to(rows)
        elif init == "random":
            centroids = random_start(rows, num_clusters, generator, shard)
        else:
            centroids, *nearby = spread_start(rows, num_clusters, generator, roughly, shard)
            found = (nearby[0], nearby[1])
        centroids, assignments, history = lloyd(
            rows,
            centroids,
            search=search,
            found=found,
            iterations=iterations,
            spherical=spherical,
            shard=shard,
        )
        if best is None or history[-1] < best.inertia:
            best = KMeans(
                centroids=centroids.to(features.device),
                assignments=assignments.to(features.device),
                inertia=history[-1],
                history=tuple(history),
            )
    assert best is not None
    if ascending is None:
        return best
    return replace(best, assignments=best.assignments[ascending.to(features.device).argsort()])


def fast(rows: Float[Tensor, "n d"], num_clusters: int, shard: Shard) -> bool:
    """Whether to search in bfloat16: of rows that are shared out, everywhere or nowhere."""
    if not shard.is_part:
        return is_fast(rows, num_clusters)
    return not collectives.any_rank([not is_fast(rows, num_clusters, shard.total(rows))])[0]
