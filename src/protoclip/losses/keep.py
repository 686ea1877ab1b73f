"""Losses that keep a model close to the frozen model that it started from (distillation).

`relations` keeps how similar the images and texts of a batch are to each other, and leaves the
features free to move together. `features` keeps the features themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from protoclip.distributed import collectives
from protoclip.losses import tiles


@dataclass(frozen=True, kw_only=True)
class StartFeatures:
    """What the frozen start makes of a batch: features of unit norm, and its inverse temperature.

    Nothing here has a gradient.
    """

    image: Float[Tensor, "b d"]
    text: Float[Tensor, "b d"]
    logit_scale: Float[Tensor, ""]


def keep_relations(
    image_features: Float[Tensor, "b d"], text_features: Float[Tensor, "b d"], start: StartFeatures
) -> Float[Tensor, ""]:
    """KL divergence of the model's softmaxes over a batch from those of its start.

    "Contrastive relational distillation" of CLIP-KD (Yang et al. 2024, arXiv 2307.12732): with p_i
    the softmax over texts j of s x0_i . y0_j for the start's image i, and q_i that of s x_i . y_j,

        L = 1/2b sum_i KL(p_i || q_i)  +  the same from texts to images

    Both have the start's inverse temperature s, so that the model's own stays free. Computed in
    float32, or wider if the features are, also inside autocast.

        >>> images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
        >>> start = StartFeatures(image=images, text=images, logit_scale=torch.tensor(1.0))
        >>> round(keep_relations(images, images, start).item(), 4)
        0.0
        >>> round(keep_relations(images, texts, start).item(), 4)
        0.3655

    Args:
        image_features: Of unit norm. Row `i` pairs with text row `i`.
        text_features: Of unit norm.
        start: Of the same pairs, in the same order.
    """
    return relations(image_features, text_features, start, gather=lambda rows: rows)


def sharded_keep_relations(
    image_features: Float[Tensor, "b d"], text_features: Float[Tensor, "b d"], start: StartFeatures
) -> Float[Tensor, ""]:
    """`keep_relations` of the local rows to the features of all ranks, each with `b` pairs.

    The means of loss and gradients over ranks, as DDP takes them, are those of the whole batch.
    """
    gather = collectives.all_gather_with_gradient
    return relations(image_features, text_features, start, gather=gather)


def relations(
    images: Tensor, texts: Tensor, start: StartFeatures, *, gather: Callable[[Tensor], Tensor]
) -> Float[Tensor, ""]:
    rows = tiles.widened(images, texts, start.image, start.text)
    own_images, own_texts, start_images, start_texts = rows
    all_images, all_texts, all_start_images, all_start_texts = map(gather, rows)
    scale = start.logit_scale
    with tiles.without_autocast(own_images):
        to_texts = divergence(own_images, all_texts, start_images, all_start_texts, scale)
        to_images = divergence(own_texts, all_images, start_texts, all_start_images, scale)
        return (to_texts + to_images) / (2 * len(images))


def divergence(
    rows: Tensor, columns: Tensor, start_rows: Tensor, start_columns: Tensor, scale: Tensor
) -> Float[Tensor, ""]:
    """Sum over rows of the KL divergence. Of many rows, only some have their logits at a time."""

    def some(rows: Tensor, columns: Tensor, start_rows: Tensor) -> Tensor:
        kept = F.log_softmax(scale * start_rows @ start_columns.T, dim=1)
        own = F.log_softmax(scale * rows @ columns.T, dim=1)
        return F.kl_div(own, kept, reduction="sum", log_target=True)

    if len(rows) <= tiles.ROWS:
        return some(rows, columns, start_rows)
    total = rows.new_zeros(())
    parts = (torch.split(each, tiles.ROWS) for each in (rows, start_rows))
    for part, start_part in zip(*parts, strict=True):
        # The backward pass computes the logits again.
        total = total + checkpoint(some, part, columns, start_part, use_reentrant=False)
    return total


def keep_features(
    image_features: Float[Tensor, "b d"], text_features: Float[Tensor, "b d"], start: StartFeatures
) -> Float[Tensor, ""]:
    """Mean over images and texts of 1 - cosine between a feature and that of the start, in [0, 2].

    Half the squared distance of unit vectors: "feature distillation" of CLIP-KD (arXiv 2307.12732).
    Over ranks the mean of the local rows' values is that of the whole batch.

        >>> rows = torch.eye(2)
        >>> start = StartFeatures(image=rows, text=-rows, logit_scale=torch.tensor(1.0))
        >>> keep_features(rows, rows, start).item()
        1.0
    """
    images, texts, *start_rows = tiles.widened(
        image_features, text_features, start.image, start.text
    )
    cosines = [(own * kept).sum(1) for own, kept in zip((images, texts), start_rows, strict=True)]
    return 1 - (cosines[0] + cosines[1]).mean() / 2


def keep(
    image_features: Tensor,
    text_features: Tensor,
    start: StartFeatures,
    *,
    by: Literal["relations", "features"],
) -> Float[Tensor, ""]:
    """The loss that `loss.keep_by` names, of the local rows."""
    if by == "features":
        return keep_features(image_features, text_features, start)
    loss_of = keep_relations if collectives.world_size() == 1 else sharded_keep_relations
    return loss_of(image_features, text_features, start)
