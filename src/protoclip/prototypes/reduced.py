"""Nearest centroids by way of distances in bfloat16.

Half the squared distance, |x|^2 / 2 - x c + |c|^2 / 2, is one product of matrices with four more
columns. Computed in bfloat16 it takes a fraction of float32's time on hardware that multiplies
bfloat16, and comes out in 16 bits. Positive bfloat16 numbers have the order of their bits, so
minima are taken over 16-bit integers, several times faster than over floats.

Rows are centred first, which changes no distance and makes rounding smaller.
"""

from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float, Float32, Int
from torch import Tensor

from protoclip.prototypes.nearest import (
    block_size,
    chunk_rows,
    nearest,
    pad_to_blocks,
    row_argmin,
)
from protoclip.prototypes.shard import ALONE, Shard

ROUNDING = 2.0**-8  # of a number rounded to bfloat16 and back, relative; twice the bound
FAR = 3e38  # half the squared distance of the columns that fill the last block
# Rows have one or two candidates each; with more than this, looking at all centroids is faster.
MOST_CANDIDATES = 8


def is_fast(features: Float[Tensor, "n d"], num_clusters: int, num_rows: int | None = None) -> bool:
    """Whether bfloat16 distances pay: float32 rows, enough work, and hardware that has them.

    `num_rows` is that of all processes, where `features` are a share.
    """
    work = (len(features) if num_rows is None else num_rows) * num_clusters
    if features.dtype != torch.float32 or features.shape[1] < 32 or work < 2**20:
        return False
    if features.device.type == "cpu":
        supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return bool(supported and supported())
    return features.device.type == "cuda" and torch.cuda.is_bf16_supported(False)


@dataclass(frozen=True, kw_only=True)
class ReducedCentroids:
    matrix: BFloat16[Tensor, "l w"]
    largest_norm: Float32[Tensor, ""]
    largest_error: Float32[Tensor, ""]


@dataclass(frozen=True, kw_only=True)
class ReducedRows:
    """Rows prepared for distances in bfloat16.

    Attributes:
        features: The rows as they are.
        origin: Their mean, over all processes, which is taken away before rounding.
        matrix: Left factor of the distances, one row each.
        norms: Norm of each centred and rounded row.
        errors: Norm of what rounding took from each row.
    """

    features: Float32[Tensor, "n d"]
    origin: Float32[Tensor, " d"]
    matrix: BFloat16[Tensor, "n w"]
    norms: Float32[Tensor, " n"]
    errors: Float32[Tensor, " n"]

    @classmethod
    def of(cls, features: Float32[Tensor, "n d"], shard: Shard = ALONE) -> "ReducedRows":
        origin = shard.mean(features)
        centred = features - origin
        rounded = centred.bfloat16()
        ones = torch.ones_like(rounded[:, :1])
        half_norms = (centred.square().sum(1, keepdim=True) / 2).bfloat16()
        kept = rounded.float()
        return cls(
            features=features,
            origin=origin,
            matrix=torch.cat([-rounded, ones, ones, half_norms, 0 * ones], dim=1),
            norms=kept.norm(dim=1),
            errors=centred.sub_(kept).norm(dim=1),
        )

    def centroids(self, centroids: Float32[Tensor, "k d"]) -> ReducedCentroids:
        """Right factor of the distances; the half norm is in two columns, for 16 bits of it."""
        centred = centroids - self.origin
        rounded = centred.bfloat16()
        half_norms = centred.square().sum(1, keepdim=True) / 2
        high = half_norms.bfloat16()
        low = (half_norms - high.float()).bfloat16()
        ones = torch.ones_like(high)
        matrix = pad_to_blocks(torch.cat([rounded, high, low, ones, 0 * ones], dim=1), value=0.0)
        matrix[len(centroids) :, -4] = FAR
        return ReducedCentroids(
            matrix=matrix,
            largest_norm=centred.norm(dim=1).max(),
            largest_error=(centred - rounded.float()).norm(dim=1).max(),
        )

    def error_bounds(self, right: ReducedCentroids) -> Float32[Tensor, " n"]:
        """Most that half a squared distance is off before it is itself rounded to 16 bits.

        |x c - x' c'| <= |x - x'| |c| + |x'| |c - c'|, plus what is left of the half norms and of
        sums in float32. The row's own half norm is off by the same amount in all its distances.
        """
        products = self.errors * right.largest_norm + self.norms * right.largest_error
        norms = (self.norms + self.errors).square() + right.largest_norm.square()
        return products + ROUNDING**2 * norms

    def scan(
        self, centroids: Float32[Tensor, "k d"]
    ) -> tuple[Int[Tensor, " n"], Float32[Tensor, " n"]]:
        """About the nearest centroid of each row, and about its squared distance."""
        right = self.centroids(centroids)
        assignments, distances = [], []
        for chunk in torch.split(self.matrix, chunk_rows(self.matrix.device, len(right.matrix))):
            bits, index = row_argmin((chunk @ right.matrix.T).view(torch.int16))
            assignments.append(index)
            distances.append(2 * bits.view(torch.bfloat16).float().clamp(min=0))
        return torch.cat(assignments), torch.cat(distances)

    def nearest(
        self, centroids: Float32[Tensor, "k d"]
    ) -> tuple[Int[Tensor, " n"], Float32[Tensor, " n"]]:
        """Nearest centroid of each row and the squared distance, as in float32.

        Distances in bfloat16 leave those centroids of each row that can be the nearest in view of
        the bound on the error; their distances are then computed in float32.
        """
        right = self.centroids(centroids)
        bounds = self.error_bounds(right)
        size = chunk_rows(self.matrix.device, len(right.matrix))
        assignments, distances = [], []
        for start in range(0, len(self.matrix), size):
            part = slice(start, start + size)
            scores = (self.matrix[part] @ right.matrix.T).view(torch.int16)
            index, distance = nearest_candidate(
                scores, bounds[part], self.features[part], centroids
            )
            assignments.append(index)
            distances.append(distance)
        return torch.cat(assignments), torch.cat(distances)


def nearest_candidate(
    scores: Int[Tensor, "n l"],
    bounds: Float32[Tensor, " n"],
    features: Float32[Tensor, "n d"],
    centroids: Float32[Tensor, "k d"],
) -> tuple[Int[Tensor, " n"], Float32[Tensor, " n"]]:
    """Nearest in float32 of the centroids whose score is within the error of the row's least."""
    rows, width = scores.shape
    block = block_size(width)
    minima = scores.view(rows, -1, block).amin(2)
    least = minima.amin(1).view(torch.bfloat16).float().clamp(min=0)
    limit = ((1 + ROUNDING) * least + 2 * bounds) * (1 + ROUNDING)
    bits = limit.bfloat16().view(torch.int16)
    row, place = (minima <= bits.unsqueeze(1)).nonzero(as_tuple=True)
    if len(row) > MOST_CANDIDATES * rows:
        return nearest(features, centroids)
    inside = scores.view(-1, block).index_select(0, row * minima.shape[1] + place)
    near = inside <= bits.index_select(0, row).unsqueeze(1)
    if int(near.sum()) > MOST_CANDIDATES * rows:
        return nearest(features, centroids)
    pair, column = near.nonzero(as_tuple=True)
    row, cluster = row[pair], place[pair] * block + column
    difference = features.index_select(0, row).sub_(centroids.index_select(0, cluster))
    distance = torch.linalg.vecdot(difference, difference)
    least = distance.new_full((rows,), float("inf")).scatter_reduce(0, row, distance, "amin")
    ties = distance == least.index_select(0, row)
    index = cluster.new_full((rows,), len(centroids))
    return index.scatter_reduce(0, row[ties], cluster[ties], "amin"), least
