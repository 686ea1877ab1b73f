"""Where two frozen spaces agree, in closed form: canonical correlation analysis (CCA) with a ridge.

The heads between two halves start from it (`models/aligned.py` sets them). Whitening of one space
alone is in `whiten.py`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.features.halves import HalfRows

BLOCK = 2**12  # images whose features are in memory at once
SAMPLE = 2**16  # images whose features are read: thirty times the width of a wide half


@dataclass(frozen=True, kw_only=True)
class SecondMoments:
    """Sums over samples, in double precision.

    Attributes:
        image: Of the outer products of image features with themselves `(q, q)`.
        text: The same of text features, a mean over the captions of each image `(r, r)`.
        cross: Of image features with the mean text features of the image `(q, r)`.
        sum_of_images: Of the image features themselves `(q,)`.
        sum_of_texts: Of the mean text features of each image `(r,)`.
        samples: How many images they sum over.
    """

    image: Float[Tensor, "q q"]
    text: Float[Tensor, "r r"]
    cross: Float[Tensor, "q r"]
    sum_of_images: Float[Tensor, " q"]
    sum_of_texts: Float[Tensor, " r"]
    samples: int


def second_moments(halves: HalfRows, device: torch.device) -> SecondMoments:
    """Second moments of the plain images and of all their captions, of `SAMPLE` images at most."""
    chosen = np.arange(0, len(halves.images), -(-len(halves.images) // SAMPLE))
    width, text_width = halves.image[0].width, halves.text.width
    image = torch.zeros(width, width, dtype=torch.float64)
    text = torch.zeros(text_width, text_width, dtype=torch.float64)
    cross = torch.zeros(width, text_width, dtype=torch.float64)
    sums = torch.zeros(width, dtype=torch.float64), torch.zeros(text_width, dtype=torch.float64)
    for rows in np.array_split(chosen, -(-len(chosen) // BLOCK)):
        counts = halves.first[rows + 1] - halves.first[rows]
        x = halves.image_rows(rows).to(device).float()
        y = halves.text_rows(halves.all_captions(rows)).to(device).float()
        share = torch.from_numpy(np.repeat(1 / counts, counts)).to(y)[:, None]
        owner = torch.from_numpy(np.repeat(np.arange(len(rows)), counts)).to(device)
        means = torch.zeros(len(rows), text_width, device=device).index_add_(0, owner, share * y)
        image += (x.T @ x).cpu()
        text += (y.T @ (share * y)).cpu()
        cross += (x.T @ means).cpu()
        for total, features in zip(sums, (x, means), strict=True):
            total += features.sum(0).cpu()
    return SecondMoments(
        image=image,
        text=text,
        cross=cross,
        sum_of_images=sums[0],
        sum_of_texts=sums[1],
        samples=len(chosen),
    )


def moments_of_pairs(images: Float[Tensor, "p q"], texts: Float[Tensor, "p r"]) -> SecondMoments:
    """Second moments of features in memory: each pair is a sample with one text."""
    x, y = images.double(), texts.double()
    return SecondMoments(
        image=x.T @ x,
        text=y.T @ y,
        cross=x.T @ y,
        sum_of_images=x.sum(0),
        sum_of_texts=y.sum(0),
        samples=len(x),
    )


def canonical_projections(
    moments: SecondMoments,
) -> tuple[Float[Tensor, "q k"], Float[Tensor, "r k"]]:
    """Linear maps of both spaces into one, where the samples of a pair are near each other.

    With both spaces whitened, the directions of the left and right singular vectors of their cross
    moment are the most correlated ones. Each map takes a space to these directions, times their
    correlation: so the cosine of a pair weighs a direction by its square. Before whitening, each
    space gets the moments of as many more samples as it has dimensions, equally large in all
    directions. Without this ridge the directions fit a few thousand pairs by chance.

    Returns:
        The map of image features, and that of text features, `k = min(q, r)`; columns of the most
        correlated directions come first.
    """
    image = inverse_root(moments.image, moments.sum_of_images, moments.samples)
    text = inverse_root(moments.text, moments.sum_of_texts, moments.samples)
    left, correlations, right = torch.linalg.svd(
        image @ (moments.cross / moments.samples) @ text, full_matrices=False
    )
    return image @ left * correlations, text @ right.T * correlations


def inverse_root(
    moments: Float[Tensor, "q q"], total: Float[Tensor, " q"], samples: int
) -> Float[Tensor, "q q"]:
    """The whitening of a space: the inverse square root of its mean moments and their ridge.

    The ridge is of `q` samples whose mean square in each direction is trace / q. Where what all
    features share is larger than what tells them apart, as in raw states of language models, it
    counts no more than that: it would drown the rest.
    """
    mean = moments / samples
    variance = mean.trace() - (total / samples).square().sum()
    ridge = torch.minimum(mean.trace(), 2 * variance) / samples
    values, vectors = torch.linalg.eigh(mean + ridge * torch.eye(len(mean), dtype=mean.dtype))
    sizes: Tensor = values.clamp(min=torch.finfo(mean.dtype).tiny).rsqrt()
    root: Tensor = vectors * sizes @ vectors.T
    return root
