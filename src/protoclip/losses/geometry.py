"""Keeping the neighbourhoods of frozen features, as STRUCTURE does (arXiv 2506.16895)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from protoclip.losses import tiles
from protoclip.losses.distil import TEMPERATURE, divergences

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
    targets = F.normalize(frozen.float(), dim=-1).to(rows)
    parts = -(-len(rows) // among)
    found = []
    for part, target in zip(rows.tensor_split(parts), targets.tensor_split(parts), strict=True):
        own = torch.arange(len(part), device=part.device)
        found.append(divergences(part, part, target, target, 1 / TEMPERATURE, numbers=(own, own)))
    return torch.cat(found).mean()
