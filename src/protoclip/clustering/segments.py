"""Sums and means of rows grouped by cluster."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def segment_mean(
    features: Float[Tensor, "m d"], assignments: Int[Tensor, " m"], num_segments: int
) -> tuple[Float[Tensor, "k d"], Int[Tensor, " k"]]:
    """Mean of the rows that share an assignment, and how many they are.

    One segmented sum over all rows; a segment without rows has mean zero and count zero.

    Args:
        features: Rows to average.
        assignments: Segment of each row, in [0, num_segments).
        num_segments: Number of segments `k`.

    Returns:
        Means `(k, d)` and counts `(k,)`.
    """
    sums = features.new_zeros(num_segments, features.shape[1])
    sums.index_add_(0, assignments, features)
    counts = torch.bincount(assignments, minlength=num_segments)
    return sums / counts.clamp(min=1).unsqueeze(1), counts
