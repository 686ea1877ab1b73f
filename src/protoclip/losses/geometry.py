"""Keeping the neighbourhoods of frozen features, as STRUCTURE does (arXiv 2506.16895)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from protoclip.losses import tiles

TEMPERATURE = 0.1  # of both softmaxes over neighbours


def geometry_loss(
    features: Float[Tensor, "b d"], frozen: Float[Tensor, "b q"]
) -> Float[Tensor, ""]:
    """How far the neighbours of each row in a batch are from what they were in a frozen space.

    Of each row the Kullback-Leibler divergence from the softmax over the cosine similarities of its
    frozen features to those of the other rows, to the same of `features`; the mean over rows, at
    least 0.

        >>> rows = torch.eye(3)
        >>> round(geometry_loss(rows, 5 * rows).item(), 4)
        0.0

    Args:
        features: Of unit norm, with gradient.
        frozen: Of the same samples, of any norm, in any precision.
    """
    (rows,) = tiles.widened(features)
    with torch.no_grad():
        targets = F.normalize(frozen.float(), dim=-1).to(rows)
        expected = F.log_softmax(without_diagonal(targets @ targets.T) / TEMPERATURE, dim=1)
    given = F.log_softmax(without_diagonal(rows @ rows.T) / TEMPERATURE, dim=1)
    return F.kl_div(given, expected, log_target=True, reduction="batchmean")


def without_diagonal(square: Float[Tensor, "b b"]) -> Float[Tensor, "b _"]:
    """A square matrix without the entries of each row with itself."""
    size = len(square)
    return square.flatten()[1:].view(size - 1, size + 1)[:, :-1].reshape(size, size - 1)
