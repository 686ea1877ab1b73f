"""Sums and means of rows grouped by cluster."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.distributed import collectives


def segment_sum(
    features: Float[Tensor, "m d"], assignments: Int[Tensor, " m"], num_segments: int
) -> tuple[Float[Tensor, "k d"], Int[Tensor, " k"]]:
    """Sum of the rows that share an assignment, and how many they are.

    Rows are brought into the order of their segments, so that each segment is summed by one worker,
    first row first: the same bits every time, on a GPU too, where adding rows to their segment as
    they come (`index_add_`) is not deterministic.

    Args:
        features: Rows to add up.
        assignments: Segment of each row, in [0, num_segments).
        num_segments: Number of segments `k`.

    Returns:
        Sums `(k, d)`, zero for a segment without rows, and counts `(k,)`.
    """
    counts = torch.bincount(assignments, minlength=num_segments)
    if features.device.type == "mps":  # not every version has embedding_bag there
        zeros = features.new_zeros(num_segments, features.shape[1])
        return zeros.index_add(0, assignments, features), counts
    order = torch.argsort(assignments, stable=True)
    sums = torch.nn.functional.embedding_bag(order, features, counts.cumsum(0) - counts, mode="sum")
    return sums, counts


def segment_mean(
    features: Float[Tensor, "m d"],
    assignments: Int[Tensor, " m"],
    num_segments: int,
    *,
    sharded: bool = False,
) -> tuple[Float[Tensor, "k d"], Int[Tensor, " k"]]:
    """Mean of the rows that share an assignment, and how many they are; see `segment_sum`.

    A segment without rows has mean zero and count zero. With `sharded` the rows are this process's
    share: means and counts are of the rows of all, the same bits in each, without gradient.
    """
    sums, counts = segment_sum(features, assignments, num_segments)
    if sharded:
        sums, counts = collectives.all_reduce(sums), collectives.all_reduce(counts)
    return sums / counts.clamp(min=1).unsqueeze(1), counts
