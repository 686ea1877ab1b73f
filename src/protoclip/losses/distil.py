"""Losses that keep a model close to frozen ones: its start, teachers, or the encoders of `align`.

They compare relations, how similar the rows of a batch are to each other, and so leave the features
free to move together.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from protoclip.distributed import collectives
from protoclip.losses import tiles
from protoclip.losses.prototypical import mean_of_known

TEMPERATURE = 0.1  # of both softmaxes over the rows of one modality
PAIR_SCALE = 20.0  # inverse temperature of the softmaxes from one modality to the other
AMONG = 512  # rows of a batch that `geometry_loss` compares with each other
FAR = -1e9  # the logit of what a softmax leaves out; infinity less infinity would be no number


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

    As in CLIP-KD (Yang et al. 2024, arXiv 2307.12732): with p_i the softmax over texts j of
    s x0_i . y0_j for the start's image i, and q_i that of s x_i . y_j,

        L = 1/2b sum_i KL(p_i || q_i)  +  the same from texts to images

    Both have the start's inverse temperature s; the model's stays free. Computed in float32, or
    wider if the features are, also inside autocast. With several ranks, each with `b` pairs, the
    softmaxes run over the features of all; the means of value and gradients over ranks, as DDP
    takes them, are those of the whole batch.

        >>> images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
        >>> start = StartFeatures(image=images, text=images, logit_scale=torch.tensor(1.0))
        >>> round(keep_relations(images, images, start).item(), 4)
        0.0
        >>> round(keep_relations(images, texts, start).item(), 4)
        0.2311

    Args:
        image_features, text_features: Of unit norm, pair by pair, as in `start`.
    """
    rows = tiles.widen(image_features, text_features, start.image, start.text)
    images, texts, start_images, start_texts = rows
    all_rows = map(collectives.all_gather_with_gradient, rows)
    all_images, all_texts, all_start_images, all_start_texts = all_rows
    scale = start.logit_scale
    with tiles.without_autocast(images):
        to_texts = divergences(images, all_texts, start_images, all_start_texts, scale)
        to_images = divergences(texts, all_images, start_texts, all_start_images, scale)
        return (to_texts.mean() + to_images.mean()) / 2


def keep_pairs(
    images: Float[Tensor, "b d"],
    texts: Float[Tensor, "b d"],
    teachers: tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]],
) -> Float[Tensor, ""]:
    """KL divergence of the softmaxes of images over texts, and back, from those of two teachers.

    It is `keep_relations` with one teacher of images and one of texts, whose features are in one
    space, at an inverse temperature of 20, whatever the model's is. A pair that either teacher does
    not know takes no part, as a row or as a column; without any other pair the loss is 0.

        >>> rows = torch.eye(3)
        >>> keep_pairs(5 * rows, rows, (rows, rows)).item()
        0.0

    Args:
        images, texts: What the towers make of them, pair by pair, of any norm.
        teachers: Features of the images and of the texts, of any norm; a row of NaN is one that the
            teacher does not know.
    """
    is_known = torch.isfinite(teachers[0]).all(1) & torch.isfinite(teachers[1]).all(1)
    frozen = (torch.where(is_known[:, None], features, 0) for features in teachers)
    with tiles.without_autocast(images):
        rows = [F.normalize(part, dim=-1) for part in tiles.widen(images, texts, *frozen)]
        numbers = torch.where(is_known, 1, -1)
        gathered = map(collectives.all_gather_with_gradient, (*rows, numbers))
        (x, y, a, b), (all_x, all_y, all_a, all_b, all_numbers) = rows, gathered
        columns = torch.zeros_like(numbers), all_numbers  # of all that are known, its partner too
        to_texts = divergences(x, all_y, a, all_b, PAIR_SCALE, numbers=columns)
        to_images = divergences(y, all_x, b, all_a, PAIR_SCALE, numbers=columns)
        return mean_of_known((to_texts + to_images) / 2, is_known, shared=True)


def divergences(
    rows: Float[Tensor, "b d"],
    columns: Float[Tensor, "n d"],
    frozen_rows: Float[Tensor, "b q"],
    frozen_columns: Float[Tensor, "n q"],
    scale: Tensor | float,
    *,
    numbers: tuple[Int[Tensor, " b"], Int[Tensor, " n"]] | None = None,
) -> Float[Tensor, " b"]:
    """KL(p || q) of each row, with q its softmax over the columns, and p the frozen one.

    A row ignores the column of its own of `numbers`, and columns numbered -1.
    """
    row_numbers, column_numbers = numbers or (None, None)

    def some(rows: Tensor, frozen_rows: Tensor, row_numbers: Tensor | None) -> Tensor:
        frozen, logits = scale * frozen_rows @ frozen_columns.T, scale * rows @ columns.T
        if row_numbers is not None and column_numbers is not None:
            left_out = (row_numbers[:, None] == column_numbers) | (column_numbers < 0)
            frozen, logits = frozen.masked_fill(left_out, FAR), logits.masked_fill(left_out, FAR)
        frozen, logits = F.log_softmax(frozen, dim=1), F.log_softmax(logits, dim=1)
        return F.kl_div(logits, frozen, reduction="none", log_target=True).sum(1)

    if len(rows) <= tiles.ROWS:
        return some(rows, frozen_rows, row_numbers)
    parts = [slice(start, start + tiles.ROWS) for start in range(0, len(rows), tiles.ROWS)]
    return torch.cat(
        [  # The backward pass computes the logits again.
            checkpoint(
                some,
                rows[part],
                frozen_rows[part],
                None if row_numbers is None else row_numbers[part],
                use_reentrant=False,
            )
            for part in parts
        ]
    )


def distil(
    outputs: Float[Tensor, "b _"],
    features: Float[Tensor, "b q"],
    *,
    samples: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, ""]:
    """The distance of a tower's relations in a batch from a teacher's.

    It is the mean of KL(p || q) over rows, with q the softmax over a row's cosines to the other
    rows of the batch, at temperature 0.1, and p that of the teacher, which knows one modality. That
    needs no common space. The teacher's features are those that are stored, not whitened: whitening
    is for clusters, and blows up directions in which features hardly differ.

    Rows that the teacher does not know take no part; without any other row the loss is 0. With
    several ranks of `b` rows each, the means over ranks are those of the whole batch.

        >>> outputs, unknown = torch.eye(3), float("nan")
        >>> teacher = torch.tensor([[1.0, 0.0], [0.9, 0.1], [unknown, unknown]])
        >>> distil(outputs, teacher).item()
        0.0

    Args:
        outputs: What the tower makes of them, of any norm.
        features: The teacher's, of any norm, in any precision; NaN where it knows none.
        samples: The number of each row's sample, at least 0; unset, all differ. The softmax leaves
            out rows of the same sample: their features are equal, so they would take most of the
            softmax and teach nothing. Other samples with equal features stay (docs/results.md).
    """
    has_features = torch.isfinite(features).all(1)
    (outputs,) = tiles.widen(outputs)
    features = torch.where(has_features[:, None], features, 0).to(outputs)
    with tiles.without_autocast(outputs):
        rows, frozen = F.normalize(outputs, dim=-1), F.normalize(features, dim=-1)
        if samples is None:
            first = collectives.rank() * len(rows)
            samples = torch.arange(first, first + len(rows), device=rows.device)
        numbers = torch.where(has_features, samples, -1)
        gathered = map(collectives.all_gather_with_gradient, (rows, frozen, numbers))
        all_rows, all_frozen, all_numbers = gathered
        values = divergences(
            rows, all_rows, frozen, all_frozen, 1 / TEMPERATURE, numbers=(numbers, all_numbers)
        )
        return mean_of_known(values, has_features, shared=True)


def geometry_loss(
    features: Float[Tensor, "b d"],
    frozen: Float[Tensor, "b q"],
    *,
    samples: Int[Tensor, " b"] | None = None,
    among: int = AMONG,
) -> Float[Tensor, ""]:
    """How far the neighbours of each row are from what they were in a frozen space.

    For a row, let p be the softmax over the cosine similarities of its frozen features to those of
    the other rows, and q the same of `features`. The loss is the mean of KL(p || q) over rows.

        >>> rows = torch.eye(3)
        >>> round(geometry_loss(rows, 5 * rows).item(), 4)
        0.0

    Args:
        features: Of unit norm, with gradient.
        frozen: Of the same samples, of any norm, in any precision.
        samples: The number of each row's sample, at least 0; unset, all differ. A row is not
            compared with rows of its own sample.
        among: Each rank cuts its batch into parts of about so many rows, and compares a row with
            those of its part. So the cost grows as the batch does, not as its square.
    """
    (rows,) = tiles.widen(features)
    targets = F.normalize(frozen.float(), dim=-1).to(rows)
    if samples is None:
        samples = torch.arange(len(rows), device=rows.device)
    number = -(-len(rows) // among)
    parts = (tensor.tensor_split(number) for tensor in (rows, targets, samples))
    losses = [
        divergences(part, part, target, target, 1 / TEMPERATURE, numbers=(numbers, numbers))
        for part, target, numbers in zip(*parts, strict=True)
    ]
    return torch.cat(losses).mean()
