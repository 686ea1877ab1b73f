"""Geometry of the joint space: modality gap, alignment, uniformity and effective rank.

The loss on neighbourhoods is in `losses/geometry.py`, and measures of groups are in `grouping.py`.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.evaluation import retrieval


def modality_gap(
    image_features: Float[Tensor, "n d"],
    text_features: Float[Tensor, "m d"],
    image_of_text: Int[Tensor, " m"] | None = None,
) -> dict[str, float]:
    """How far apart the modalities lie, and how far each spreads, from rows of unit norm.

    Args:
        image_features: One row an image.
        text_features: One row a pair of an image and a caption.
        image_of_text: The image of each pair; unset, image and text of one row are a pair.

    Returns:
        `gap`: distance between the mean image and the mean text, in [0, 2] (Liang et al. 2022);
        `alignment`: mean squared distance of a pair, in [0, 4] (Wang and Isola 2020);
        `uniformity_image` and `uniformity_text`: see `uniformity`.
    """
    images, texts = image_features.double(), text_features.double()
    paired = images if image_of_text is None else images[image_of_text]
    return {
        "gap": float((images.mean(dim=0) - texts.mean(dim=0)).norm()),
        "alignment": float((paired - texts).square().sum(dim=1).mean()),
        "uniformity_image": uniformity(image_features),
        "uniformity_text": uniformity(text_features),
    }


def effective_rank(features: Float[Tensor, "n d"]) -> float:
    """How many directions the rows use, from 1 to d: the exponential of the entropy of the
    singular values, as shares of their sum (Roy and Vetterli 2007).
    """
    rows = features.double()
    shares = torch.linalg.eigvalsh(rows.T @ rows).clamp(min=0).sqrt()
    shares = shares / shares.sum()
    return float(torch.special.entr(shares).sum().exp())


def uniformity(features: Float[Tensor, "n d"]) -> float:
    """Log of the mean of `exp(-2 |x - x'|^2)` over pairs of different rows (Wang and Isola 2020).

    In [-8, 0] for two unit-norm rows or more: 0 when all coincide, lower when they spread. NaN for
    a single row.
    """
    count, features = len(features), features.float()
    if count < 2:
        return math.nan
    norms = features.square().sum(dim=1)
    rows = max(1, retrieval.CHUNK // count)
    total = 0.0
    for start in range(0, count, rows):
        chunk = features[start : start + rows]
        distances = norms[start : start + rows, None] + norms - 2 * chunk @ features.T
        kernel = (-2 * distances.clamp(min=0)).exp()
        kernel.diagonal(offset=start).zero_()  # leave out each row's pair with itself
        total += float(kernel.sum(dtype=torch.float64))
    return math.log(total / (count * (count - 1)))
