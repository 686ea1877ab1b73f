"""Geometry of the joint space: modality gap, alignment and uniformity."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.evaluation import retrieval


def modality_gap(
    image_features: Float[Tensor, "n d"], text_features: Float[Tensor, "n d"]
) -> dict[str, float]:
    """How far apart the modalities lie, and how far each spreads, from unit-norm pairs of rows.

    Returns:
        `gap`: distance between the mean image and the mean text, in [0, 2] (Liang et al. 2022);
        `alignment`: mean squared distance of a pair, in [0, 4] (Wang and Isola 2020);
        `uniformity_image` and `uniformity_text`: see `uniformity`.
    """
    images, texts = image_features.double(), text_features.double()
    return {
        "gap": float((images.mean(dim=0) - texts.mean(dim=0)).norm()),
        "alignment": float((images - texts).square().sum(dim=1).mean()),
        "uniformity_image": uniformity(image_features),
        "uniformity_text": uniformity(text_features),
    }


def uniformity(features: Float[Tensor, "n d"]) -> float:
    """Log of the mean of `exp(-2 |x - x'|^2)` over pairs of different rows (Wang and Isola 2020).

    In [-8, 0] for two unit-norm rows or more: 0 when all coincide, lower when they spread.
    """
    count, features = len(features), features.float()
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
