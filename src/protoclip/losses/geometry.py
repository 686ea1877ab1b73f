"""Keeping the neighbourhoods of frozen features, as STRUCTURE does (arXiv 2506.16895).

Features of teachers and of the start are learned in `distil.py`; `evaluation/geometry.py` only
measures.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.losses import tiles
from protoclip.losses.distil import TEMPERATURE, divergences

AMONG = 512  # rows


def geometry_loss(
    features: Float[Tensor, "b d"],
    frozen: Float[Tensor, "b q"],
    *,
    samples: Int[Tensor, " b"] | None = None,
    among: int = AMONG,
) -> Float[Tensor, ""]:
    """How far the neighbours of each row are from what they were in a frozen space.

    For a row, let p be the softmax over the cosine similarities of its frozen features to those of
    the other rows, and q the same of `features`. The loss is the mean of KL(p || q) over rows, at
    least 0.

        >>> rows = torch.eye(3)
        >>> round(geometry_loss(rows, 5 * rows).item(), 4)
        0.0

    Args:
        features: Of unit norm, with gradient.
        frozen: Of the same samples, of any norm, in any precision.
        samples: The number of each row's sample, at least 0; unset, all differ. A row is not
            compared with rows of its own sample.
        among: Each rank cuts its batch into parts of about so many rows, and compares a row with
            those of its part. So the cost grows as the batch does, not as its square.
    """
    (rows,) = tiles.widened(features)
    targets = F.normalize(frozen.float(), dim=-1).to(rows)
    if samples is None:
        samples = torch.arange(len(rows), device=rows.device)
    number = -(-len(rows) // among)
    parts = (tensor.tensor_split(number) for tensor in (rows, targets, samples))
    losses = [
        divergences(part, part, target, target, 1 / TEMPERATURE, numbers=(numbers, numbers))
        for part, target, numbers in zip(*parts, strict=True)
    ]
    return torch.cat(losses).mean()
