"""InfoNCE, the contrastive loss between pairs. For large batches it is computed tile by tile."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from protoclip.distributed import collectives
from protoclip.losses import tiles
from protoclip.losses.positives import Groups, Positives, groups_of

TILED_ABOVE = 2**20  # logits; with fewer, the plain form is as fast, and its memory small


def info_nce(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""] | float,
    groups: Int[Tensor, "b *k"] | None = None,
    *,
    positives: Positives = "shared",
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE over a batch of pairs (Radford et al. 2021).

    Computed in float32, or wider if the features are, also inside autocast.

        >>> images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
        >>> round(info_nce(images, texts, 1.0).item(), 4)
        0.8133
        >>> round(info_nce(images, texts, 1.0, torch.tensor([7, 7]), positives="masked").item(), 4)
        0.0

    Args:
        image_features: Of unit norm. Row `i` pairs with text row `i`.
        text_features: Of unit norm.
        logit_scale: Inverse temperature, in [1, 100].
        groups: Of each pair an integer, or several: pairs that have one of them in common, at the
            same place, are no negatives of each other.
        positives: What others of a pair's group are: `shared`, positives, by the mean of their
            log-probabilities (SupCon, arXiv 2004.11362); `masked`, left out of the softmax; or
            `pair`, negatives all the same.

    Raises:
        ValueError: The groups are no integers, or not as many as the pairs.
    """
    images, texts = tiles.widened(image_features, text_features)
    scaled = logit_scale * images
    known = groups_of(groups, len(images))
    masked = known if positives == "masked" else None
    loss: Tensor
    if by_tiles(scaled, texts):
        loss = TiledInfoNCE.apply(scaled, texts, masked)  # type: ignore[no-untyped-call]
    else:
        logits = scaled @ texts.T
        if masked is not None:
            logits = masked.hide(logits)
        labels = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    if known is not None and positives == "shared":
        loss = loss + logit_scale * sharing(images, texts, images, texts, known)
    return loss


def sharded_info_nce(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""] | float,
    groups: Int[Tensor, "b *k"] | None = None,
    *,
    positives: Positives = "shared",
) -> Float[Tensor, ""]:
    """`info_nce` of the local rows against the features of all ranks, each with `b` pairs.

    The means of loss and gradients over ranks, as DDP takes them, are those of the whole batch.
    """
    images, texts = tiles.widened(image_features, text_features)
    all_images, all_texts = map(collectives.all_gather_with_gradient, (images, texts))
    first = collectives.rank() * len(images)
    known = groups_of(groups, len(images))
    known = known.gathered() if known is not None and positives != "pair" else None
    masked = known if positives == "masked" else None
    if by_tiles(images, all_texts):
        sums = tiles.log_sum_exp(logit_scale * images, all_texts, masked)
        sums = sums + tiles.log_sum_exp(logit_scale * texts, all_images, masked)
        loss = (sums / 2 - logit_scale * (images * texts).sum(1)).mean()
    else:
        of_images = logit_scale * images @ all_texts.T
        of_texts = logit_scale * texts @ all_images.T
        if masked is not None:
            of_images, of_texts = masked.hide(of_images), masked.hide(of_texts)
        labels = torch.arange(first, first + len(images), device=images.device)
        loss = (F.cross_entropy(of_images, labels) + F.cross_entropy(of_texts, labels)) / 2
    if known is not None and positives == "shared":
        loss = loss + logit_scale * sharing(images, texts, all_images, all_texts, known)
    return loss


def sharing(
    images: Float[Tensor, "b d"],
    texts: Float[Tensor, "b d"],
    all_images: Float[Tensor, "n d"],
    all_texts: Float[Tensor, "n d"],
    groups: Groups,
) -> Float[Tensor, ""]:
    """What shared positives add to InfoNCE at scale 1: they leave its softmaxes as they are, and
    put the mean of a group's logits, which is the logit of its mean, in the place of the pair's."""
    sums, counts = groups.sums(torch.cat([all_images, all_texts], dim=1))
    mean_images, mean_texts = (sums / counts.unsqueeze(1)).chunk(2, dim=1)
    shared = (images * mean_texts + mean_images * texts).sum(1) / 2
    return ((images * texts).sum(1) - shared).mean()


def by_tiles(rows: Float[Tensor, "b d"], columns: Float[Tensor, "n d"]) -> bool:
    """Whether there are many logits, or autocast would round those of the plain form."""
    autocast = torch.is_autocast_enabled(rows.device.type)
    return autocast or len(rows) * len(columns) > TILED_ABOVE


class TiledInfoNCE(torch.autograd.Function):
    """InfoNCE of the logits `images @ texts.T`. A tile is computed once for the log-sum-exp of rows
    and columns, and again for the gradient:

        2 b dL / d logits_ij = softmax over row i + softmax over column j - 2 [i = j]

    Others of a pair's group are left out, if `masked` has the groups.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, masked: Groups | None) -> Tensor:
        rows = images.new_full((len(images),), float("-inf"))
        columns = rows.clone()
        with tiles.without_autocast(images):
            for i, j in tiles.blocks(images):
                tile = tiles.scores(images[i], texts[j])
                if masked is not None:
                    masked.hide(tile, i.start, j.start)
                rows[i] = rows[i].logaddexp(tiles.log_sum(tile, dim=1))
                columns[j] = columns[j].logaddexp(tiles.log_sum(tile, dim=0))
        ctx.save_for_backward(images, texts, rows, columns)
        ctx.masked = masked
        return ((rows + columns) / 2 - (images * texts).sum(1)).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        images, texts, rows, columns = ctx.saved_tensors
        masked = ctx.masked
        to_images, to_texts = -2 * texts, -2 * images
        with tiles.without_autocast(images):
            for i, j in tiles.blocks(images):
                tile = tiles.scores(images[i], texts[j])
                if masked is not None:
                    masked.hide(tile, i.start, j.start)
                shares = tiles.exponential(tile - rows[i].unsqueeze(1))
                shares += tiles.exponential(tile.sub_(columns[j]))
                to_images[i] += tiles.scores(shares, texts[j].T)
                to_texts[j] += tiles.scores(shares.T, images[i].T)
        scale = gradient / (2 * len(images))
        return to_images.mul_(scale), to_texts.mul_(scale), None
