"""InfoNCE, the contrastive loss between pairs. For large batches it is computed tile by tile."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from protoclip.distributed import collectives
from protoclip.losses import tiles
from protoclip.losses.tiles import EVERY, Groups, Positives, groups_of

TILED_ABOVE = 2**20  # logits; with fewer, the plain form is as fast, and its memory small


def info_nce(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""] | float,
    groups: Int[Tensor, "b *k"] | None = None,
    *,
    positives: Positives = "shared",
    across_ranks: bool = False,
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
        groups: An integer of each pair, or several in columns: pairs that are equal in a column
            are of one group.
        positives: What rows of one group are to each other. `masked`: no negatives, and no
            positives either; each is left out of the other's softmax. `shared`: positives, by the
            mean of their log-probabilities (SupCon, arXiv 2004.11362); each stays in the softmax,
            and where the rows of a group have equal texts, or equal images, that is the loss
            without groups. `pair`: negatives, as without groups.
        across_ranks: Set the local rows against those of all ranks, each with `b` pairs. The means
            of loss and gradients over ranks, as DDP takes them, are those of the whole batch.

    Raises:
        ValueError: The shapes differ, or the groups are not an integer for each pair.
    """
    images, texts = tiles.widen(image_features, text_features)
    if images.shape != texts.shape:
        raise ValueError(f"text_features: shape {tuple(texts.shape)}, not {tuple(images.shape)}")
    positive_groups = groups_of(groups, len(images), positives)
    if across_ranks:
        return against_all_ranks(images, texts, logit_scale, positive_groups)
    scaled = logit_scale * images
    if by_tiles(scaled, texts):
        loss: Tensor = TiledInfoNCE.apply(scaled, texts, positive_groups)  # type: ignore[no-untyped-call]
        return loss
    logits, labels = scaled @ texts.T, labels_of(positive_groups, len(images), images)
    if positive_groups is not None:
        logits = positive_groups.hide(logits, EVERY, EVERY)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def against_all_ranks(
    images: Float[Tensor, "b d"],
    texts: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""] | float,
    positive_groups: Groups | None,
) -> Float[Tensor, ""]:
    """InfoNCE of the local rows against those of all ranks."""
    all_images, all_texts = map(collectives.all_gather_with_gradient, (images, texts))
    positive_groups = None if positive_groups is None else positive_groups.gather()
    if by_tiles(images, all_texts):
        sums = tiles.log_sum_exp(logit_scale * images, all_texts, positive_groups)
        sums = sums + tiles.log_sum_exp(logit_scale * texts, all_images, positive_groups)
        if positive_groups is None or not positive_groups.shared:
            sums = sums - 2 * logit_scale * (images * texts).sum(1)
        return sums.mean() / 2
    of_images, of_texts = logit_scale * images @ all_texts.T, logit_scale * texts @ all_images.T
    labels = labels_of(positive_groups, len(images), images, collectives.rank() * len(images))
    if positive_groups is not None:
        of_images, of_texts = (
            positive_groups.hide(logits, EVERY, EVERY) for logits in (of_images, of_texts)
        )
    return (F.cross_entropy(of_images, labels) + F.cross_entropy(of_texts, labels)) / 2


def labels_of(
    groups: Groups | None, pairs: int, like: Tensor, first: int = 0
) -> Int[Tensor, " b"] | Float[Tensor, "b n"]:
    """What each row is to predict: the column of its pair, `first` for the first row; or, with
    shared positives, equal shares of all columns that it matches."""
    if groups is not None and groups.shared:
        return groups.targets(EVERY, EVERY, like)
    return torch.arange(first, first + pairs, device=like.device)


def by_tiles(rows: Float[Tensor, "b d"], columns: Float[Tensor, "n d"]) -> bool:
    """Whether there are many logits, or autocast would round those of the plain form."""
    autocast = torch.is_autocast_enabled(rows.device.type)
    return autocast or len(rows) * len(columns) > TILED_ABOVE


class TiledInfoNCE(torch.autograd.Function):
    """InfoNCE of the logits `images @ texts.T`. A tile is computed once for the log-sum-exp of rows
    and columns, and again for the gradient:

        2 b dL / d logits_ij = softmax over row i + softmax over column j - 2 [i = j]

    Where positives are shared, the last term is the share of j in the group of i, and back.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, groups: Groups | None) -> Tensor:
        rows = images.new_full((len(images),), float("-inf"))
        columns = rows.clone()
        shared, agreed = groups is not None and groups.shared, torch.zeros_like(images[:, 0])
        with tiles.without_autocast(images):
            for i, j in tiles.blocks(images):
                tile = tiles.scores(images[i], texts[j])
                if groups is not None:
                    groups.hide(tile, i, j)
                rows[i] = rows[i].logaddexp(tiles.log_sum(tile, dim=1))
                columns[j] = columns[j].logaddexp(tiles.log_sum(tile, dim=0))
                if groups is not None and shared:
                    agreed[i] += groups.both_targets(i, j, tile).mul_(tile).sum(1)
        if not shared:
            agreed = 2 * (images * texts).sum(1)
        ctx.save_for_backward(images, texts, rows, columns)
        ctx.groups = groups
        return (rows + columns - agreed).mean() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (images, texts, rows, columns), groups = ctx.saved_tensors, ctx.groups
        shared = groups is not None and groups.shared
        to_images, to_texts = (-2 * (not shared) * rows for rows in (texts, images))
        with tiles.without_autocast(images):
            for i, j in tiles.blocks(images):
                tile = tiles.scores(images[i], texts[j])
                if groups is not None:
                    groups.hide(tile, i, j)
                shares = tiles.exponential(tile - rows[i].unsqueeze(1))
                shares += tiles.exponential(tile.sub_(columns[j]))
                if groups is not None and shared:
                    shares -= groups.both_targets(i, j, tile)
                to_images[i] += tiles.scores(shares, texts[j].T)
                to_texts[j] += tiles.scores(shares.T, images[i].T)
        scale = gradient / (2 * len(images))
        return to_images.mul_(scale), to_texts.mul_(scale), None
