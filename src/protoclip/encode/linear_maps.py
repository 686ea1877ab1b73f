"""Linear maps of frozen spaces, in closed form: PCA, whitening, and where two spaces agree.

Teachers are whitened before they are clustered: directions in which features vary more count more
in their distances, so K-means divides along these first, and hardly by what only some samples have.
Canonical correlation analysis (CCA) with a ridge is where the projections of `align` start.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial, reduce
from operator import add
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Features = npt.NDArray[np.floating]
LEAST_VARIANCE = 1e-6  # of the largest: directions with less are rounding errors
BLOCK = 2**12  # images whose features are in memory at once
SAMPLE = 2**16  # images whose features are read: thirty times the width of a wide encoder
# Columns are chosen by some of the folds, at most so many partners, the most correlated directions.
CHOOSING_FOLDS, RANKED, DIRECTIONS = 3, 1000, 192
FOLDS = 5  # of pairs that are scored by heads fitted to the others


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """Moves features to mean 0, keeps some directions at equal variance, and scales to unit norm.

    So were features prepared for K-means in DeepCluster (Caron et al. 2018, arXiv 1807.05520).
    """

    mean: Float[Tensor, " q"]
    axes: Float[Tensor, "q w"]

    @classmethod
    def fit(cls, features: Float[Tensor, "n q"], width: int) -> "Whitening":
        """Whitening by the `width` directions in which these rows vary most, or by all there are.

        >>> rows = torch.tensor([[9.0, 1.0], [9.0, -1.0], [-9.0, 1.0], [-9.0, -1.0]])
        >>> (Whitening.fit(rows, 2)(rows) * 2**0.5).round().abs().tolist()[0]
        [1.0, 1.0]
        """
        rows = features.double().numpy()
        mean, axes, _ = fit_pca([rows], min(width, rows.shape[1]))
        variances = ((rows - mean) @ axes.T).var(0)
        kept = variances > LEAST_VARIANCE * variances.max()
        scaled = axes[kept].T / np.sqrt(variances[kept])
        return cls(mean=torch.from_numpy(mean).float(), axes=torch.from_numpy(scaled).float())

    def to(self, device: torch.device) -> "Whitening":
        return Whitening(mean=self.mean.to(device), axes=self.axes.to(device))

    def __call__(self, features: Float[Tensor, "n q"]) -> Float[Tensor, "n w"]:
        """These rows whitened. A row of NaN stays one."""
        return F.normalize((features - self.mean) @ self.axes)


def fit_pca(blocks: Iterable[Features], width: int) -> tuple[Features, Features, float]:
    """Exact PCA in one pass, by sums in float64.

    Returns the mean `(q,)`, the axes `(width, q)` by falling variance (the largest coordinate of
    each is positive), and the share of the variance along them.
    """
    count, total, outer = 0, cast(Any, 0), cast(Any, 0)
    for block in blocks:
        rows = block.astype(np.float64)
        count, total, outer = count + len(rows), total + rows.sum(0), outer + rows.T @ rows
    mean = total / count
    variances, vectors = np.linalg.eigh(outer / count - np.outer(mean, mean))
    axes = vectors.T[::-1][:width]
    axes = axes * np.sign(axes[np.arange(width), np.abs(axes).argmax(1)])[:, None]
    everything = max(float(variances.sum()), np.finfo(np.float64).tiny)
    return mean, axes, float(np.clip(variances[-width:].sum() / everything, 0, 1))


@dataclass(frozen=True, kw_only=True)
class SecondMoments:
    """Sums of outer products and of features, over images with captions, in double precision."""

    image: Float[Tensor, "q q"]  # image features with themselves
    text: Float[Tensor, "r r"]  # text features with themselves, a mean over each image's captions
    cross: Float[Tensor, "q r"]  # image features with the mean text features of the image
    sum_of_images: Float[Tensor, " q"]
    sum_of_texts: Float[Tensor, " r"]  # of the mean text features of each image
    samples: int  # images

    def __add__(self, other: "SecondMoments") -> "SecondMoments":
        """Those of both, whose samples are others."""
        names = [entry.name for entry in fields(self)]
        return SecondMoments(**{n: getattr(self, n) + getattr(other, n) for n in names})

    def __sub__(self, part: "SecondMoments") -> "SecondMoments":
        """Those of the rest, without samples that are among these."""
        names = [entry.name for entry in fields(self)]
        return SecondMoments(**{n: getattr(self, n) - getattr(part, n) for n in names})

    def select(self, image: Int[Tensor, " i"], text: Int[Tensor, " t"]) -> "SecondMoments":
        """Those of some columns of the image features, and of the text features."""
        return SecondMoments(
            image=self.image[image][:, image],
            text=self.text[text][:, text],
            cross=self.cross[image][:, text],
            sum_of_images=self.sum_of_images[image],
            sum_of_texts=self.sum_of_texts[text],
            samples=self.samples,
        )


Fit = Callable[[SecondMoments], tuple[Tensor, Tensor]]


def moments_of_images(
    images: Float[Tensor, "n q"], captions: Float[Tensor, "c r"], counts: Int[Tensor, " n"]
) -> SecondMoments:
    """Second moments of images and of their captions, image after image, `counts` of each."""
    x, y = images.double(), captions.double()  # a large common offset leaves float32 no digits
    share = (1 / counts.double()).repeat_interleave(counts).to(y)[:, None]
    owner = torch.arange(len(x)).repeat_interleave(counts).to(y.device)
    means = y.new_zeros(len(x), y.shape[1]).index_add_(0, owner, share * y)
    return SecondMoments(
        image=(x.T @ x).cpu(),
        text=(y.T @ (share * y)).cpu(),
        cross=(x.T @ means).cpu(),
        sum_of_images=x.sum(0).cpu(),
        sum_of_texts=means.sum(0).cpu(),
        samples=len(x),
    )


def out_of_fold(
    images: Float[Tensor, "p q"],
    captions: Float[Tensor, "c r"],
    counts: Int[Tensor, " p"],
    groups: Int[Tensor, " p"],
    *,
    seed: int = 0,
) -> Iterator[tuple[Int[Tensor, " f"], Float[Tensor, "q k"], Float[Tensor, "r k"]]]:
    """Maps into a joint space for pairs that they have not seen: a fold's, by the other folds'
    closed form.

    Moments are sums, so those of the other folds are the total without this fold's. At most
    `SAMPLE` pairs are fitted to.

    Args:
        images: Features of each pair's image, of any norm.
        captions, counts: Features of all captions, pair after pair, and how many each pair has.
        groups: Equal for pairs that stay in one of the five folds; two or more.
        seed: Of the deal.

    Returns:
        Of each fold the numbers of its pairs, and the linear maps of images and of captions into
        the space of the other folds, `k = min(q, r)`.
    """
    for rows, others in moments_of_others(images, captions, counts, groups, seed):
        image, text = (linear.float() for linear in canonical_projections(others))
        yield rows, image, text


def moments_of_others(
    images: Float[Tensor, "p q"],
    captions: Float[Tensor, "c r"],
    counts: Int[Tensor, " p"],
    groups: Int[Tensor, " p"],
    seed: int,
) -> list[tuple[Int[Tensor, " f"], SecondMoments]]:
    """The numbers of each fold's pairs, and the moments of the others; as `out_of_fold`."""
    folds = [rows for rows in deal(groups, seed) if len(rows)]
    assert len(folds) > 1, "one group"
    first, step = counts.cumsum(0) - counts, -(-len(groups) // SAMPLE)
    parts: list[SecondMoments] = []
    for fold in folds:
        moments = []
        for rows in torch.split(fold[::step], BLOCK):
            many = counts[rows]
            shift = (first[rows] - (many.cumsum(0) - many)).repeat_interleave(many)
            of_rows = captions[shift + torch.arange(len(shift))]
            moments.append(moments_of_images(images[rows], of_rows, many))
        parts.append(reduce(add, moments))
    total = reduce(add, parts)
    return [(rows, total - part) for rows, part in zip(folds, parts, strict=True)]


def choose_columns(
    images: Float[Tensor, "p q"],
    captions: Float[Tensor, "c r"],
    counts: Int[Tensor, " p"],
    options: tuple[Sequence[Int[Tensor, " i"]], Sequence[Int[Tensor, " t"]]],
    fit: Fit | None = None,
) -> tuple[tuple[int, int], dict[tuple[int, int], float]]:
    """Which columns of both spaces find partners best, by pairs that the closed form has not seen.

    First those of images are chosen, beside the first option of captions, then those of captions.

    Args:
        images, captions, counts: As for `out_of_fold`.
        options: For each space, columns to choose among; of equally good ones the first is taken.
        fit: Finds the maps by moments of the other folds; unset, their closed form, fast.

    Returns:
        The numbers of both options, and of each pair of options that was tried the geometric mean
        of the partners' ranks, from 1, among at most 1,000 out of one fold, both ways.
    """
    folds = moments_of_others(images, captions, counts, torch.arange(len(images)), seed=0)
    folds = [(rows[:RANKED], others) for rows, others in folds[:CHOOSING_FOLDS]]
    first, ranks = counts.cumsum(0) - counts, dict[tuple[int, int], float]()
    fit = fit or partial(canonical_projections, directions=DIRECTIONS)

    def mean_rank(option: tuple[int, int]) -> float:
        if option not in ranks:
            image, text = options[0][option[0]], options[1][option[1]]
            logs = [
                log_ranks(
                    fit(others.select(image, text)),
                    images[rows][:, image],
                    captions[first[rows]][:, text],
                )
                for rows, others in folds
            ]
            ranks[option] = float(torch.cat(logs).mean().exp())
        return ranks[option]

    image = min(range(len(options[0])), key=lambda number: mean_rank((number, 0)))
    text = min(range(len(options[1])), key=lambda number: mean_rank((image, number)))
    return (image, text), ranks


def log_ranks(
    maps: tuple[Tensor, Tensor], images: Float[Tensor, "f q"], texts: Float[Tensor, "f r"]
) -> Float[Tensor, " g"]:
    """The logarithm of each partner's rank, from images to texts and back."""
    led = [F.normalize(x.float() @ m.float()) for x, m in zip((images, texts), maps, strict=True)]
    scores = led[0] @ led[1].T
    own = scores.diagonal()
    return torch.cat([(scores >= own).sum(0), (own <= scores.T).sum(0)]).log()


def deal(groups: Int[Tensor, " p"], seed: int) -> list[Int[Tensor, " f"]]:
    """The rows of each fold, of about equal size; a group is in one fold."""
    _, group, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))
    before = torch.zeros(len(sizes), dtype=torch.long)
    before[order] = sizes[order].cumsum(0) - sizes[order]
    fold = (before * FOLDS // len(groups))[group]
    return [(fold == number).nonzero()[:, 0] for number in range(FOLDS)]


def canonical_projections(
    moments: SecondMoments, directions: int | None = None
) -> tuple[Float[Tensor, "q k"], Float[Tensor, "r k"]]:
    """Linear maps of both spaces into one, where the samples of a pair are near each other.

    With both spaces whitened, the directions of the left and right singular vectors of their cross
    moment are the most correlated ones. Each map takes a space to these directions, times their
    correlation: so the cosine of a pair weighs a direction by its square.

    Args:
        directions: How many to find, about and fast; unset, all of them, exactly.

    Returns:
        The map of image features, and that of text features, `k = min(q, r)`; columns of the most
        correlated directions come first.
    """
    image = factor(moments.image, moments.sum_of_images, moments.samples)
    text = factor(moments.text, moments.sum_of_texts, moments.samples)
    cross = moments.cross / moments.samples
    if directions is not None:  # the ridge leaves enough digits
        image, text, cross = image.float(), text.float(), cross.float()
    solve = partial(torch.linalg.solve_triangular, upper=False)
    cross = solve(text, solve(image, cross).T).T
    if directions is None or directions >= min(cross.shape):
        left, correlations, right = torch.linalg.svd(cross, full_matrices=False)
    else:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            left, correlations, right = torch.svd_lowrank(cross, directions)
        right = right.T
    unsolve = partial(torch.linalg.solve_triangular, upper=True)
    return unsolve(image.T, left) * correlations, unsolve(text.T, right.T) * correlations


def fit_joint_space(
    images: Float[Tensor, "p q"], texts: Float[Tensor, "p r"]
) -> tuple[tuple[Float[Tensor, "q k"], Float[Tensor, "r k"]], float, int]:
    """Maps of both spaces into one by `canonical_projections`, the geometric mean of the ranks,
    from 1, at which pairs a fit has not seen find their partner, and the number of candidates."""
    counts = torch.ones(len(images), dtype=torch.long)
    whole = [torch.arange(images.shape[1])], [torch.arange(texts.shape[1])]
    _, ranks = choose_columns(images, texts, counts, whole)
    parts = (torch.split(rows, BLOCK) for rows in (images, texts, counts))
    image, text = canonical_projections(reduce(add, map(moments_of_images, *parts)))
    # Laid out as a checkpoint returns them, so that a run that goes on computes the same bits.
    maps = (image.float().contiguous(), text.float().contiguous())
    return maps, ranks[0, 0], min(RANKED, len(images) // FOLDS)


def factor(
    moments: Float[Tensor, "q q"], total: Float[Tensor, " q"], samples: int
) -> Float[Tensor, "q q"]:
    """The Cholesky factor of the mean moments of a space and their ridge, whose inverse whitens.

    The ridge is of `q` samples whose mean square in each direction is trace / q; without it
    directions would fit a few thousand pairs by chance. Where what all features share is larger
    than what tells them apart, as in raw states of language models, it counts no more than that.
    """
    mean = moments / samples
    variance = mean.trace() - (total / samples).square().sum()
    # Equal features have no variance, and rounding may make it negative.
    least = torch.finfo(mean.dtype).eps * len(mean) * mean.trace()
    ridge = (torch.minimum(mean.trace(), 2 * variance) / samples).clamp(min=least)
    ridge = ridge.clamp(min=torch.finfo(mean.dtype).tiny)
    factors: Tensor = torch.linalg.cholesky(mean + ridge * torch.eye(len(mean), dtype=mean.dtype))
    return factors
