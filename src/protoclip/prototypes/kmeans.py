"""K-means, also of rows on several ranks.

Rows stay on their rank: sums, one number per row, and the rows that become centroids travel.

No search for the nearest centroids holds the whole matrix of distances. The one by way of bfloat16
gives the same up to float32's rounding: it only narrows down which can be the nearest.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, Num, Shaped
from torch import Tensor

from protoclip.distributed import collectives

# Nearest centroid of each row, and the squared distance to it.
Nearest = tuple[Int[Tensor, " n"], Float[Tensor, " n"]]
Search = Callable[[Tensor], Nearest]  # of these centroids

INITS = ("k-means++", "random")
ROUNDS = 10  # of k-means++; one draw per round if there are few clusters
# Rows are drawn in proportion to the squared distance to this power, which is 1 in k-means++. With
# ten rows per cluster 4 ends at a lower inertia, with a hundred at the same; see docs/kmeans.md.
POWER = 4.0

# Most elements and rows of a chunk of scores (rows times clusters). 5 million stay in the cache of
# a CPU; a GPU needs more to be busy.
CHUNK_ELEMENTS = {"cpu": 5_000_000, "cuda": 100_000_000}
CHUNK_ROWS = {"cpu": 4096, "cuda": 2**20}

ROUNDING = 2.0**-8  # relative error of rounding to bfloat16, doubled to be safe
FAR = 3e38  # half the squared distance to the columns that pad the last block
# A row has one or two candidates. With more than this many, searching all centroids is faster.
MOST_CANDIDATES = 8


@dataclass(frozen=True, kw_only=True)
class KMeans:
    """A clustering: the prototypes of one modality or teacher, and the prototype of each sample.

    Attributes:
        centroids: Means of the members; unit-norm directions if the clustering is spherical.
        assignments: Nearest centroid of each row; -1 marks a sample without features.
        inertia: Sum of squared distances of the rows to their centroids.
        history: Inertia at the start (approximate) and after each iteration, ending in `inertia`.
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
    init: Float[Tensor, "k d"] | Literal["k-means++", "random"] | None = None,
    spherical: bool = False,
    positions: Int[Tensor, " p"] | None = None,
) -> KMeans:
    """Cluster rows into `num_clusters` groups of least squared distance.

    Equal seeds give equal bits on a CPU. Global random generators stay untouched.

    With `positions`, all ranks cluster their rows together. Up to rounding, the result is that of
    one process with all rows in the order of their positions. A rank gets the assignments of its
    rows; all else is the same bits on every rank.

        >>> features = torch.tensor([[0.0, 0.0], [0.0, 2.0], [9.0, 0.0], [9.0, 2.0]])
        >>> kmeans(features, 2, iterations=5, seed=0).inertia
        4.0

    Args:
        features: Finite rows. Computed in float32, or in float64 if they are.
        num_clusters: At most the number of rows.
        iterations: Most iterations per start. Stops early when no assignment changes.
        restarts: Number of starts. The one with the lowest inertia is returned.
        seed: Seed of the starts.
        init: How to draw the rows to start from: far from each other (`"k-means++"`, the default)
            or uniformly (`"random"`). Or the centroids to start from, which needs `restarts=1`.
        spherical: Cluster by direction: rows and centroids are scaled to unit norm.
        positions: Distinct integers that order the rows of all ranks. A rank may have no rows.

    Raises:
        ValueError: More clusters than rows, non-finite rows, or a setting out of range. With
            `positions` also settings that differ; then every rank raises.
    """
    init = "k-means++" if init is None else init
    shared = positions is not None
    num_rows, same = len(features), True
    if shared:
        # Ranks with different settings would take different steps and wait for each other forever.
        numbers = (num_clusters, iterations, restarts, seed, features.shape[1])
        settings = (numbers, spherical, init if isinstance(init, str) else None, features.dtype)
        everyones = collectives.all_gather_object((num_rows, settings))
        num_rows = sum(rows for rows, _ in everyones)
        same = all(other == settings for _, other in everyones)

    def check() -> None:
        if not same:
            raise ValueError("positions: ranks differ in their settings or in the width of rows")
        if not 1 <= num_clusters <= num_rows:
            raise ValueError(f"{num_clusters=}: must be from 1 to the {num_rows} rows")
        if iterations < 0 or restarts < 1:
            raise ValueError(f"{iterations=}, {restarts=}: need >= 0 and >= 1")
        if positions is not None and len(positions) != len(features):
            raise ValueError(f"positions: {len(positions)} for {len(features)} rows")
        if not features.isfinite().all():
            raise ValueError("features: non-finite values cannot be clustered")
        shape = (num_clusters, features.shape[1])
        if isinstance(init, Tensor) and (restarts != 1 or init.shape != shape):
            raise ValueError(f"init: needs restarts=1 and shape {shape}")
        if isinstance(init, str) and init not in INITS:
            raise ValueError(f"{init=}: choose one of {', '.join(INITS)}, or give centroids")

    if shared:
        collectives.raise_on_all_ranks(check)
    else:
        check()
    values = features.detach().to(torch.promote_types(features.dtype, torch.float32))
    if values.device.type == "mps":  # lacks some of the operations
        values = values.cpu()
    if spherical:
        values = F.normalize(values, dim=1)
    if positions is None:
        by_position = torch.arange(len(values), device=values.device)
        rows = Rows(values=values, number=by_position, numbers_of_all=by_position, shared=False)
    else:
        positions = positions.to(values.device).long()
        by_position = positions.argsort()
        positions_of_all = collectives.all_gather(positions[by_position])
        ascending = positions_of_all.sort().values
        rows = Rows(
            values=values[by_position],
            number=torch.searchsorted(ascending, positions[by_position]),
            numbers_of_all=torch.searchsorted(ascending, positions_of_all),
            shared=True,
        )
    exact, rough = searches(rows, num_clusters)
    generator = torch.Generator().manual_seed(seed)
    results = []
    for _ in range(restarts):
        assigned: Nearest | None = None
        if isinstance(init, Tensor):
            centroids = init.to(values)
        elif init == "random":
            drawn = torch.randperm(num_rows, generator=generator)[:num_clusters]
            centroids = rows.select(drawn.to(values.device))
        else:
            centroids, assigned = k_means_plus_plus(rows, num_clusters, generator, rough)
        results.append(lloyd(rows, centroids, exact, assigned, iterations, spherical=spherical))
    best = min(results, key=lambda result: result.inertia)
    assignments = torch.empty_like(by_position).index_copy_(0, by_position, best.assignments)
    device = features.device
    return replace(best, centroids=best.centroids.to(device), assignments=assignments.to(device))


def searches(rows: "Rows", num_clusters: int) -> tuple[Search, Search]:
    """The search for the nearest centroids, and one whose distances may be rough, to draw by."""
    exact: Search = partial(nearest, rows.values)
    number = len(rows.numbers_of_all)
    pays = bfloat16_pays(rows.values, num_clusters, number)
    if rows.shared:  # on every rank or on none
        pays = not collectives.any_rank([not pays])[0]
    if not pays:
        return exact, exact
    mean = rows.sum(rows.values.sum(0)) / number
    if not len(rows.values):
        return exact, exact
    search = Bfloat16Search(rows.values, mean)
    return search.nearest, search.rough


def lloyd(
    rows: "Rows",
    centroids: Tensor,
    search: Search,
    assigned: Nearest | None,
    iterations: int,
    *,
    spherical: bool,
) -> KMeans:
    """Lloyd's iterations. `assigned`, if known, replaces the first `search(centroids)`."""
    assignments, distances = assigned if assigned and iterations else search(centroids)
    history = [float(rows.sum(distances.double().sum()))]
    for _ in range(iterations):
        means, counts = segment_mean(rows.values, assignments, len(centroids), shared=rows.shared)
        means = torch.where((counts > 0).unsqueeze(1), means, centroids)
        if spherical:
            means = F.normalize(means, dim=1)
        centroids = refill_empty(means, counts, rows, assignments, distances)
        previous = assignments
        assignments, distances = search(centroids)
        sums = torch.stack([distances.double().sum(), (previous != assignments).sum().double()])
        inertia, moved = rows.sum(sums).tolist()
        history.append(inertia)
        if moved == 0:
            break
    return KMeans(
        centroids=centroids, assignments=assignments, inertia=history[-1], history=tuple(history)
    )


def refill_empty(
    centroids: Tensor, counts: Tensor, rows: "Rows", assignments: Tensor, distances: Tensor
) -> Float[Tensor, "k d"]:
    """Move each empty cluster to the farthest member of one of the largest clusters.

    Each gives one member, the largest first, unless its members coincide. Clusters stay empty if
    no other has any to give.
    """
    empty = torch.nonzero(counts == 0).flatten()
    if len(empty) == 0:
        return centroids
    assignments, distances = rows.gather(assignments), rows.gather(distances)
    radius = torch.zeros_like(distances[:1]).repeat(len(centroids))
    radius = radius.scatter_reduce(0, assignments, distances, "amax")
    farthest = torch.nonzero(distances == radius[assignments]).flatten()
    # Of several members at the radius, the first row.
    member = torch.full_like(counts, len(assignments))
    member = member.scatter_reduce(0, assignments[farthest], farthest, "amin")
    gives = (counts > 1) & (radius > 0)
    donors = torch.argsort(counts * gives, descending=True, stable=True)[: len(empty)]
    donors = donors[gives[donors]]
    centroids = centroids.clone()
    centroids[empty[: len(donors)]] = rows.select(member[donors])
    return centroids


def k_means_plus_plus(
    rows: "Rows", num_clusters: int, generator: torch.Generator, search: Search
) -> tuple[Float[Tensor, "k d"], Nearest]:
    """Draw rows far from each other; also return the nearest of them and the squared distance.

    As k-means|| (Bahmani et al. 2012), but each round draws its share without replacement, by
    powers of the squared distance. A round searches only what it drew, so all rounds together cost
    one search. Every rank makes the same draw from the gathered weights of all rows.
    """
    assignments = torch.zeros_like(rows.number)
    distances = torch.full_like(rows.values[:, 0], float("inf"))
    log_weights = torch.zeros_like(distances)  # the first round is uniform
    centroids: list[Tensor] = []
    first, num_rows = 0, len(rows.numbers_of_all)
    rounds = ROUNDS if num_clusters >= 4 * ROUNDS else num_clusters
    for share in torch.arange(num_clusters).tensor_split(rounds):
        # The shortest exponential waiting times (in logarithms) are a weighted draw without
        # replacement.
        waiting = torch.empty(num_rows).exponential_(generator=generator).to(distances)
        drawn = rows.gather(log_weights - waiting[rows.number].log()).topk(len(share)).indices
        new = rows.select(drawn)
        index, distance = search(new)
        closer = distance < distances
        assignments = torch.where(closer, index + first, assignments)
        distances = torch.where(closer, distance, distances)
        which, local = rows.find(drawn)
        assignments[local] = which + first
        distances[local] = 0.0
        log_weights = POWER * distances.log()
        centroids.append(new)
        first += len(share)
    return torch.cat(centroids), (assignments, distances)


def segment_mean(
    features: Float[Tensor, "m d"],
    assignments: Int[Tensor, " m"],
    num_segments: int,
    *,
    shared: bool = False,
) -> tuple[Float[Tensor, "k d"], Int[Tensor, " k"]]:
    """Mean and number of the rows with each assignment, 0 if there are none.

    With `shared`, they are over the rows of all ranks, without gradient.
    """
    counts = torch.bincount(assignments, minlength=num_segments)
    if features.device.type == "mps":  # not every version has embedding_bag there
        zeros = features.new_zeros(num_segments, features.shape[1])
        sums = zeros.index_add(0, assignments, features)
    else:
        # Sorted by segment, each segment is summed by one thread, first row first: the same bits
        # every time. `index_add_` is not deterministic on a GPU.
        order = torch.argsort(assignments, stable=True)
        sums = F.embedding_bag(order, features, counts.cumsum(0) - counts, mode="sum")
    if shared:
        sums, counts = collectives.all_reduce(sums), collectives.all_reduce(counts)
    return sums / counts.clamp(min=1).unsqueeze(1), counts


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows on this rank. If `shared`, other ranks have more, and all but `find` is collective."""

    values: Float[Tensor, "n d"]
    number: Int[Tensor, " n"]  # number of each local row among all rows
    numbers_of_all: Int[Tensor, " m"]  # the `number` of all ranks, rank after rank
    shared: bool

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over ranks."""
        return collectives.all_reduce(values) if self.shared else values

    def gather(self, values: Shaped[Tensor, " n"]) -> Shaped[Tensor, " m"]:
        """One value per row: those of all rows, in order."""
        if not self.shared:
            return values
        everyones = collectives.all_gather(values)
        return torch.empty_like(everyones).index_copy_(0, self.numbers_of_all, everyones)

    def find(self, numbers: Int[Tensor, " k"]) -> tuple[Int[Tensor, " j"], Int[Tensor, " j"]]:
        """Which of these rows are here: their indices in `numbers`, and their local row numbers."""
        local = torch.full_like(self.numbers_of_all, -1)
        local[self.number] = torch.arange(len(self.number), device=local.device)
        rows = local[numbers]
        which = torch.nonzero(rows >= 0).flatten()
        return which, rows[which]

    def select(self, numbers: Int[Tensor, " k"]) -> Float[Tensor, "k d"]:
        """The rows with these numbers, wherever they are."""
        which, local = self.find(numbers)
        selected = self.values.new_zeros(len(numbers), self.values.shape[1])
        selected[which] = self.values[local]
        return self.sum(selected)


def nearest(features: Float[Tensor, "n d"], centroids: Float[Tensor, "k d"]) -> Nearest:
    """Computed in the precision of the rows, float32 or float64; ties go to the lower index."""
    # |x - c|^2 = |x|^2 + 2 (|c|^2 / 2 - x c), and |x|^2 does not change which c is nearest.
    half_norms = pad_to_blocks(centroids.square().sum(1) / 2, value=float("inf"))
    columns = pad_to_blocks(centroids, value=0.0).T
    size = chunk_rows(features.device, len(half_norms))
    scores = (torch.addmm(half_norms, x, columns, alpha=-1) for x in torch.split(features, size))
    assignments = torch.cat([row_argmin(chunk)[1] for chunk in scores])
    size = chunk_rows(features.device, features.shape[1])
    chunks = zip(torch.split(features, size), torch.split(assignments, size), strict=True)
    distances = [(rows - centroids[index]).square().sum(1) for rows, index in chunks]
    return assignments, torch.cat(distances)


def chunk_rows(device: torch.device, num_columns: int) -> int:
    """Rows in one chunk of a matrix with that many columns."""
    kind = device.type if device.type in CHUNK_ROWS else "cpu"
    return max(1, min(CHUNK_ROWS[kind], CHUNK_ELEMENTS[kind] // num_columns))


def block_size(width: int) -> int:
    """Columns in a block of `row_argmin`."""
    if width < 256:
        return width
    return 64 if width < 4096 else 128


def pad_to_blocks(rows: Num[Tensor, "k *d"], *, value: float) -> Num[Tensor, "l *d"]:
    """Append rows of `value` until their number is a multiple of the block size."""
    missing = -len(rows) % block_size(len(rows))
    return torch.cat([rows, rows.new_full((missing, *rows.shape[1:]), value)])


def row_argmin(scores: Num[Tensor, "n w"]) -> tuple[Num[Tensor, " n"], Int[Tensor, " n"]]:
    """Least value of each row and the first column that has it.

    `min(dim)`, which returns the column too, is ten times slower than `amin`. So it runs on the
    minima of blocks, and then on the least block.
    """
    rows, width = scores.shape
    size = block_size(width)
    if scores.dtype == torch.int16 and size == width:
        # Value and column fit into one int32, and `amin` of those is fast.
        columns = torch.arange(width, dtype=torch.int32, device=scores.device)
        packed = scores.int().mul_(2**16).add_(columns).amin(1)
        return (packed >> 16).short(), (packed & 0xFFFF).long()
    if size == width or width % size:
        least, column = scores.min(dim=1)
        return least, column
    blocks = width // size
    least, block = scores.view(rows, blocks, size).amin(2).min(dim=1)
    first = torch.arange(0, rows * blocks, blocks, device=scores.device)
    column = scores.view(-1, size).index_select(0, first + block).min(dim=1).indices
    return least, block * size + column


def bfloat16_pays(features: Float[Tensor, "n d"], num_clusters: int, num_rows: int) -> bool:
    """Whether to use `Bfloat16Search`; `num_rows` counts the rows of all ranks."""
    work = num_rows * num_clusters
    if features.dtype != torch.float32 or features.shape[1] < 32 or work < 2**20:
        return False
    if features.device.type == "cpu":
        supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return bool(supported and supported())
    return features.device.type == "cuda" and torch.cuda.is_bf16_supported(False)


class Bfloat16Search:
    """Nearest centroids of fixed rows by way of distances in bfloat16.

    Half the squared distance, |x|^2 / 2 - x c + |c|^2 / 2, is one matrix product with four extra
    columns, and far faster in bfloat16. Positive bfloat16 numbers sort like their bits, so minima
    are taken over 16-bit integers. Subtracting `origin`, the mean, keeps rounding errors small.
    """

    def __init__(self, features: Float32[Tensor, "n d"], origin: Float32[Tensor, " d"]) -> None:
        self.features, self.origin = features, origin
        centred = features - origin
        rounded = centred.bfloat16()
        ones = torch.ones_like(rounded[:, :1])
        half_norms = (centred.square().sum(1, keepdim=True) / 2).bfloat16()
        rounded_features = rounded.float()
        self.left = torch.cat([-rounded, ones, ones, half_norms, 0 * ones], dim=1)
        self.norms = rounded_features.norm(dim=1)
        self.errors = centred.sub_(rounded_features).norm(dim=1)

    def right(self, centroids: Float32[Tensor, "k d"]) -> Tensor:
        """Right factor of the distances."""
        centred = centroids - self.origin
        rounded = centred.bfloat16()
        half_norms = centred.square().sum(1, keepdim=True) / 2
        # Two columns hold the half norm, for 16 bits of it.
        high = half_norms.bfloat16()
        low = (half_norms - high.float()).bfloat16()
        ones = torch.ones_like(high)
        matrix = pad_to_blocks(torch.cat([rounded, high, low, ones, 0 * ones], dim=1), value=0.0)
        matrix[len(centroids) :, -4] = FAR
        return matrix

    def error_bounds(self, centroids: Float32[Tensor, "k d"]) -> Float32[Tensor, " n"]:
        """For each row, a bound on the error of half its squared distances in bfloat16.

        |x c - x' c'| <= |x - x'| |c| + |x'| |c - c'|, plus the rounding of half norms and of sums.
        A row's own half norm is off by the same amount in all its distances.
        """
        centred = centroids - self.origin
        largest_norm = centred.norm(dim=1).max()
        largest_error = (centred - centred.bfloat16().float()).norm(dim=1).max()
        products = self.errors * largest_norm + self.norms * largest_error
        norms = (self.norms + self.errors).square() + largest_norm.square()
        bound: Tensor = products + ROUNDING**2 * norms
        return bound

    def rough(self, centroids: Float32[Tensor, "k d"]) -> Nearest:
        """Approximately the nearest centroid of each row and the squared distance to it."""
        matrix = self.right(centroids)
        chunks = []
        for left in torch.split(self.left, chunk_rows(self.left.device, len(matrix))):
            bits, index = row_argmin((left @ matrix.T).view(torch.int16))
            chunks.append((index, 2 * bits.view(torch.bfloat16).float().clamp(min=0)))
        return concatenate(chunks)

    def nearest(self, centroids: Float32[Tensor, "k d"]) -> Nearest:
        """Nearest centroid of each row and the squared distance to it, as in float32."""
        matrix, bounds = self.right(centroids), self.error_bounds(centroids)
        size = chunk_rows(self.left.device, len(matrix))
        parts = (torch.split(values, size) for values in (self.left, bounds, self.features))
        chunks = [
            nearest_candidate((left @ matrix.T).view(torch.int16), bound, rows, centroids)
            for left, bound, rows in zip(*parts, strict=True)
        ]
        return concatenate(chunks)


def concatenate(chunks: list[tuple[Tensor, Tensor]]) -> Nearest:
    indices, distances = zip(*chunks, strict=True)
    return torch.cat(indices), torch.cat(distances)


def nearest_candidate(
    scores: Tensor, bounds: Tensor, features: Tensor, centroids: Tensor
) -> Nearest:
    """Nearest, in float32, of the centroids whose score is within the error bound of the least."""
    rows, width = scores.shape
    size = block_size(width)
    minima = scores.view(rows, -1, size).amin(2)
    least = minima.amin(1).view(torch.bfloat16).float().clamp(min=0)
    limit = ((1 + ROUNDING) * least + 2 * bounds) * (1 + ROUNDING)
    bits = limit.bfloat16().view(torch.int16)
    row, block = (minima <= bits.unsqueeze(1)).nonzero(as_tuple=True)
    if len(row) > MOST_CANDIDATES * rows:
        return nearest(features, centroids)
    inside = scores.view(-1, size).index_select(0, row * minima.shape[1] + block)
    near = inside <= bits.index_select(0, row).unsqueeze(1)
    if int(near.sum()) > MOST_CANDIDATES * rows:
        return nearest(features, centroids)
    pair, column = near.nonzero(as_tuple=True)
    row, cluster = row[pair], block[pair] * size + column
    difference = features.index_select(0, row).sub_(centroids.index_select(0, cluster))
    distance = torch.linalg.vecdot(difference, difference)
    least = distance.new_full((rows,), float("inf")).scatter_reduce(0, row, distance, "amin")
    ties = distance == least.index_select(0, row)
    index = cluster.new_full((rows,), len(centroids))
    return index.scatter_reduce(0, row[ties], cluster[ties], "amin"), least
