"""InfoNCE, the contrastive loss between pairs. For large batches it is computed tile by tile."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from protoclip.distributed import collectives
from protoclip.losses import tiles

TILED_ABOVE = 2**20  # logits; with fewer, the plain form is as fast, and its memory small


def info_nce(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""] | float,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE over a batch of pairs (Radford et al. 2021).

    Computed in float32, or wider if the features are, also inside autocast.

        >>> images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
        >>> round(info_nce(images, texts, 1.0).item(), 4)
        0.8133

    Args:
        image_features: Of unit norm. Row `i` pairs with text row `i`.
        text_features: Of unit norm.
        logit_scale: Inverse temperature, in [1, 100].
    """
    images, texts = tiles.widened(image_features, text_features)
    scaled = logit_scale * images
    if by_tiles(scaled, texts):
        loss: Tensor = TiledInfoNCE.apply(scaled, texts)  # type: ignore[no-untyped-call]
        return loss
    logits = scaled @ texts.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def sharded_info_nce(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""] | float,
) -> Float[Tensor, ""]:
    """`info_nce` of the local rows against the features of all ranks, each with `b` pairs.

    The means of loss and gradients over ranks, as DDP takes them, are those of the whole batch.
    """
    images, texts = tiles.widened(image_features, text_features)
    all_images, all_texts = map(collectives.all_gather_with_gradient, (images, texts))
    if by_tiles(images, all_texts):
        sums = tiles.log_sum_exp(logit_scale * images, all_texts)
        sums = sums + tiles.log_sum_exp(logit_scale * texts, all_images)
        return (sums / 2 - logit_scale * (images * texts).sum(1)).mean()
    first = collectives.rank() * len(images)
    labels = torch.arange(first, first + len(images), device=images.device)
    from_images = F.cross_entropy(logit_scale * images @ all_texts.T, labels)
    from_texts = F.cross_entropy(logit_scale * texts @ all_images.T, labels)
    return (from_images + from_texts) / 2


def by_tiles(rows: Float[Tensor, "b d"], columns: Float[Tensor, "n d"]) -> bool:
    """Whether there are many logits, or autocast would round those of the plain form."""
    autocast = torch.is_autocast_enabled(rows.device.type)
    return autocast or len(rows) * len(columns) > TILED_ABOVE


class TiledInfoNCE(torch.autograd.Function):
    """InfoNCE of the logits `images @ texts.T`. A tile is computed once for the log-sum-exp of rows
    and columns, and again for the gradient:

        2 b dL / d logits_ij = softmax over row i + softmax over column j - 2 [i = j]
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor) -> Tensor:
        rows = images.new_full((len(images),), float("-inf"))
        columns = rows.clone()
        with tiles.without_autocast(images):
            for i, j in tiles.blocks(images):
                tile = tiles.scores(images[i], texts[j])
                rows[i] = rows[i].logaddexp(tiles.log_sum(tile, dim=1))
                columns[j] = columns[j].logaddexp(tiles.log_sum(tile, dim=0))
        ctx.save_for_backward(images, texts, rows, columns)
        return ((rows + columns) / 2 - (images * texts).sum(1)).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        images, texts, rows, columns = ctx.saved_tensors
        to_images, to_texts = -2 * texts, -2 * images
        with tiles.without_autocast(images):
            for i, j in tiles.blocks(images):
                tile = tiles.scores(images[i], texts[j])
                shares = tiles.exponential(tile - rows[i].unsqueeze(1))
                shares += tiles.exponential(tile.sub_(columns[j]))
                to_images[i] += tiles.scores(shares, texts[j].T)
                to_texts[j] += tiles.scores(shares.T, images[i].T)
        scale = gradient / (2 * len(images))
        return to_images.mul_(scale), to_texts.mul_(scale)
