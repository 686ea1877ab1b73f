"""Nearest centroid of each row: in the precision of the rows, or faster by way of bfloat16.

Neither search holds the whole matrix of distances. Both give the nearest centroid up to float32's
rounding: bfloat16 distances only narrow down which can be it, and float32 distances decide.
"""

import torch
from jaxtyping import Float, Float32, Int, Num
from torch import Tensor

# Most elements and rows of a chunk of scores (rows times clusters). 5 million stay in the cache of
# a CPU; a GPU needs more to be busy.
CHUNK_ELEMENTS = {"cpu": 5_000_000, "cuda": 100_000_000}
CHUNK_ROWS = {"cpu": 4096, "cuda": 2**20}

ROUNDING = 2.0**-8  # relative error of rounding to bfloat16, doubled to be safe
FAR = 3e38  # half the squared distance to the columns that pad the last block
# A row has one or two candidates. With more than this many, searching all centroids is faster.
MOST_CANDIDATES = 8


# Nearest centroid of each row, and the squared distance to it.
Nearest = tuple[Int[Tensor, " n"], Float[Tensor, " n"]]


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
        return concatenated(chunks)

    def nearest(self, centroids: Float32[Tensor, "k d"]) -> Nearest:
        """Nearest centroid of each row and the squared distance to it, as in float32."""
        matrix, bounds = self.right(centroids), self.error_bounds(centroids)
        size = chunk_rows(self.left.device, len(matrix))
        parts = (torch.split(each, size) for each in (self.left, bounds, self.features))
        chunks = [
            nearest_candidate((left @ matrix.T).view(torch.int16), bound, rows, centroids)
            for left, bound, rows in zip(*parts, strict=True)
        ]
        return concatenated(chunks)


def concatenated(chunks: list[tuple[Tensor, Tensor]]) -> Nearest:
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
