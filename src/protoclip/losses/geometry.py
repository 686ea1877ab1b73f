"""Keeping the neighbourhoods of frozen features, as STRUCTURE does (arXiv 2506.16895)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from protoclip.losses import tiles

TEMPERATURE = 0.1  # of both softmaxes over neighbours
AMONG = 512  # rows


def geometry_loss(
    features: Float[Tensor, "b d"], frozen: Float[Tensor, "b q"], *, among: int = AMONG
) -> Float[Tensor, ""]:
    """How far the neighbours of each row are from what they were in a frozen space.

    Of each row the Kullback-Leibler divergence from the softmax over the cosine similarities of its
    frozen features to those of other rows, to the same of `features`; the mean over rows, at least
    0.

        >>> rows = torch.eye(3)
        >>> round(geometry_loss(rows, 5 * rows).item(), 4)
        0.0

    Args:
        features: Of unit norm, with gradient.
        frozen: Of the same samples, of any norm, in any precision.
        among: A row is compared with others of about so many that follow each other, of its own
            rank, so that the cost grows as the batch does.
    """
    (rows,) = tiles.widened(features)
    parts = -(-len(rows) // among)
    both = zip(rows.tensor_split(parts), frozen.tensor_split(parts), strict=True)
    return torch.stack([divergence(*part) * len(part[0]) for part in both]).sum() / len(rows)


def divergence(rows: Float[Tensor, "n d"], frozen: Float[Tensor, "n q"]) -> Float[Tensor, ""]:
    """`geometry_loss` of rows that are all compared with each other."""
    with torch.no_grad():
        targets = F.normalize(frozen.float(), dim=-1).to(rows)
        expected = F.log_softmax(without_diagonal(targets @ targets.T) / TEMPERATURE, dim=1)
    given = F.log_softmax(without_diagonal(rows @ rows.T) / TEMPERATURE, dim=1)
    return F.kl_div(given, expected, log_target=True, reduction="batchmean")


def without_diagonal(square: Float[Tensor, "b b"]) -> Float[Tensor, "b _"]:
    """A square matrix without the entries of each row with itself."""
    size = len(square)
    return square.flatten()[1:].view(size - 1, size + 1)[:, :-1].reshape(size, size - 1)
