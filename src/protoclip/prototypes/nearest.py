"""Nearest centroid of each row, without the whole distance matrix."""

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

# Rows times clusters of one chunk of scores, and most rows. Near 5 million a chunk stays in a CPU's
# cache; a GPU needs more to be busy.
CHUNK_ELEMENTS = {"cpu": 5_000_000, "cuda": 100_000_000}
CHUNK_ROWS = {"cpu": 4096, "cuda": 2**20}


def chunk_rows(device: torch.device, num_clusters: int) -> int:
    """Rows of one chunk of scores against so many clusters."""
    kind = device.type if device.type in CHUNK_ROWS else "cpu"
    return max(1, min(CHUNK_ROWS[kind], CHUNK_ELEMENTS[kind] // num_clusters))


def block_size(width: int) -> int:
    """Columns of scores that are reduced to their minimum before its place is looked for."""
    if width < 256:
        return width
    return 64 if width < 4096 else 128


def row_argmin(scores: Num[Tensor, "n w"]) -> tuple[Num[Tensor, " n"], Int[Tensor, " n"]]:
    """Least value of each row and its column; the first of equal ones.

    A minimum alone runs at the speed of memory, one with its place ten times slower: blocks of
    columns are reduced to their minimum first; the place is looked for among the blocks, and then
    in one of them.
    """
    rows, width = scores.shape
    size = block_size(width)
    if scores.dtype == torch.int16 and size == width:
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


def pad_to_blocks(rows: Num[Tensor, "k *d"], *, value: float) -> Num[Tensor, "l *d"]:
    """Rows of `value` at the end, up to a whole number of blocks."""
    missing = -len(rows) % block_size(len(rows))
    return torch.cat([rows, rows.new_full((missing, *rows.shape[1:]), value)])


def squared_distance(
    features: Float[Tensor, "n d"], centroids: Float[Tensor, "k d"], assignments: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Squared distance of each row to the centroid it is assigned to."""
    size = chunk_rows(features.device, features.shape[1])
    parts = zip(torch.split(features, size), torch.split(assignments, size), strict=True)
    return torch.cat([(rows - centroids[index]).square().sum(1) for rows, index in parts])


def nearest(
    features: Float[Tensor, "n d"], centroids: Float[Tensor, "k d"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Nearest centroid of each row and the squared distance to it; ties go to the lower index.

    In the precision of the rows, which is float32 or float64.
    """
    # |x - c|^2 = |x|^2 + 2 (|c|^2 / 2 - x c): the row's own norm does not move the arg-min.
    half_norms = pad_to_blocks(centroids.square().sum(1) / 2, value=float("inf"))
    columns = pad_to_blocks(centroids, value=0.0).T
    assignments = torch.cat(
        [
            row_argmin(torch.addmm(half_norms, chunk, columns, alpha=-1))[1]
            for chunk in torch.split(features, chunk_rows(features.device, len(half_norms)))
        ]
    )
    return assignments, squared_distance(features, centroids, assignments)
