"""The sigmoid loss between pairs (SigLIP), tile by tile; ranks pass their texts around.

The loss of one logit does not depend on any other. So a rank never needs all logits, nor the texts
of all ranks at once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from protoclip.distributed import collectives
from protoclip.losses import tiles
from protoclip.losses.tiles import Groups, Positives, groups_of


def sigmoid_loss(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""] | float,
    logit_bias: Float[Tensor, ""] | float,
    groups: Int[Tensor, "b *k"] | None = None,
    *,
    positives: Positives = "shared",
    across_ranks: bool = False,
) -> Float[Tensor, ""]:
    """Sigmoid loss over a batch of pairs (Zhai et al. 2023, arXiv 2303.15343).

    Each image and each text are classified on their own: a pair, or not.

        L = -1/b sum_ij log sigmoid(z_ij (logit_scale x_i . y_j + logit_bias))

    with z_ij = 1 for a pair (i = j) and -1 otherwise. Computed in float32, or wider if the features
    are, also inside autocast.

        >>> images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
        >>> round(sigmoid_loss(images, texts, 1.0, 0.0).item(), 4)
        1.5064

    Args:
        image_features: Of unit norm. Row `i` pairs with text row `i`.
        text_features: Of unit norm.
        logit_scale: Inverse temperature; 10 at the start of training, in the paper.
        logit_bias: Added to every logit; -10 at the start, since few of them are of pairs.
        groups: As for `info_nce`.
        positives: What rows of one group are to each other. `masked`: no negatives, and no
            positives either; their z_ij is left out of the sum. `shared`: positives, with z_ij = 1.
            `pair`: negatives, with z_ij = -1, as without groups.
        across_ranks: Set the local images against the texts of all ranks, each with `b` pairs. The
            means of loss and gradients over ranks, as DDP takes them, are those of the whole batch.
            Every rank must multiply the loss by the same factor before its backward pass.

    Raises:
        ValueError: The groups are no integers, or not as many as the pairs.
    """
    images, texts = tiles.widen(image_features, text_features)
    bias = images.new_zeros(()) + logit_bias
    positive_groups = groups_of(groups, len(images), positives)
    ranks = collectives.world_size() if across_ranks else 1
    loss: Tensor = SigmoidLoss.apply(logit_scale * images, texts, bias, positive_groups, ranks)  # type: ignore[no-untyped-call]
    return loss


class SigmoidLoss(torch.autograd.Function):
    """The loss of the logits `images @ texts.T + bias`, whose gradient is

        b dL / d logits_ij = sigmoid(logits_ij) - [i = j]

    The forward pass computes the gradients too, so that a tile is computed once. A rank's texts
    travel from rank to rank until they are home again, with the gradient that they collect. Their
    groups travel with them: others of an image's group count as pairs if shared, else not at all.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, bias: Tensor, groups: Groups | None, ranks: int
    ) -> Tensor:
        losses = images.new_zeros(len(images))
        slopes = torch.zeros_like(losses)
        to_images = torch.zeros_like(images)
        visitors = torch.stack([texts, torch.zeros_like(texts)])
        with tiles.without_autocast(images):
            for step in range(ranks):
                visiting, to_visiting = visitors
                for i, j in tiles.blocks(images):
                    tile = tiles.scores(images[i], visiting[j]).add_(bias)
                    # The first texts are this rank's own, so some tiles hold pairs.
                    pairs = tile.diagonal(i.start - j.start) if step == 0 else tile[:0]
                    pairs.neg_()  # the logits are -z_ij times those of the formula now
                    signs = None
                    if groups is not None and groups.shared:
                        signs = 1 - 2 * groups.others(i, j).to(tile)
                        tile.mul_(signs)
                    elif groups is not None:
                        groups.hide(tile, i, j)
                    tile.clamp_(min=tiles.LEAST_EXPONENT)
                    losses[i] -= F.logsigmoid(-tile).sum(1)
                    shares = tile.sigmoid_()
                    pairs.neg_()
                    if signs is not None:
                        shares.mul_(signs)
                    slopes[i] += shares.sum(1)
                    to_images[i] += tiles.scores(shares, visiting[j].T)
                    to_visiting[j] += tiles.scores(shares.T, images[i].T)
                if ranks > 1:
                    visitors = collectives.pass_on(visitors)
                    groups = None if groups is None else groups.pass_on()
        ctx.save_for_backward(to_images, visitors[1], slopes.sum())
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        to_images, to_texts, to_bias = ctx.saved_tensors
        scale = gradient / len(to_images)
        return scale * to_images, scale * to_texts, scale * to_bias, None, None
