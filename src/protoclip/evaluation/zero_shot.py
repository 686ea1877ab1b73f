"""Zero-shot classification: images against the encoded names of classes."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protoclip.evaluation.retrieval import best_relevant_rank


def prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Each class name in each template, class after class.

    Raises:
        ValueError: A template has no place for the class.
    """
    for template in templates:
        if "{c}" not in template:
            raise ValueError(
                f"templates: '{template[:60]}' has no place for the class; write {{c}} there"
            )
    return [template.replace("{c}", name) for name in class_names for template in templates]


def zero_shot_classifier(prompt_features: Float[Tensor, "k t d"]) -> Float[Tensor, "k d"]:
    """One feature a class: the mean of its prompts' unit-norm features, of unit norm again.

    This is CLIP's prompt ensemble (Radford et al. 2021, section 3.1.4). Prompts may have any norm.
    """
    return F.normalize(F.normalize(prompt_features, dim=-1).mean(dim=1), dim=-1)


def zero_shot_ranks(
    images: Float[Tensor, "n d"], classes: Float[Tensor, "k d"], labels: Int[Tensor, " n"]
) -> Int[Tensor, " n"]:
    """How many wrong classes are at least as similar to each image as its own (Radford et al. 2021)

    Classes are the encoded names of classes; ranks are in [0, k).
    """
    return best_relevant_rank(images, classes, labels, torch.arange(len(classes)))


def accuracy(ranks: Int[Tensor, " n"], k: int = 1) -> float:
    """Share of images whose own class is among the `k` most similar ones."""
    return float((ranks < k).double().mean())


def mean_per_class_recall(correct: Bool[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """The accuracy of each class that has images, in the mean: balanced accuracy."""
    _, classes = torch.unique(labels, return_inverse=True)
    right = torch.bincount(classes, weights=correct.double())
    return float((right / torch.bincount(classes)).mean())


def average_precisions(
    scores: Float[np.ndarray, "n k"],
    present: Bool[np.ndarray, "n k"],
    counts: Iterable[npt.NDArray[np.int64]] | None = None,
) -> Float[np.ndarray, "r k"]:
    """The average precision of each class, for one or more weightings of the images.

    Average precision is the sum over thresholds of the precision there times the recall gained, as
    in scikit-learn. It is 0 for a class that no image has, and NaN for one that only images have
    that do not count.

    Args:
        scores: How well each image fits each class.
        present: Which classes an image shows.
        counts: Weightings `(n,)`: how often each image counts. Unset, each counts once.
    """
    counts = [np.ones(len(scores), np.int64)] if counts is None else counts
    order = np.argsort(-scores, axis=0, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=0)
    relevant = np.take_along_axis(present, order, axis=0)
    # Equal scores share a threshold: the precision there is that after the last of them.
    is_last = np.concatenate([ranked[1:] != ranked[:-1], np.ones((1, ranked.shape[1]), bool)])
    places = np.where(is_last, np.arange(len(ranked))[:, None], len(ranked))
    last = np.minimum.accumulate(places[::-1], axis=0)[::-1]
    found = []
    for count in counts:
        weights = count[order]
        hits = weights * relevant
        found_so_far, seen_so_far = hits.cumsum(axis=0), weights.cumsum(axis=0)
        precision = found_so_far / np.maximum(seen_so_far, 1)
        precision = np.take_along_axis(precision, last, axis=0)
        value = (hits * precision).sum(axis=0) / np.maximum(found_so_far[-1], 1)
        absent = (found_so_far[-1] == 0) & relevant.any(axis=0)
        found.append(np.where(absent, np.nan, value))
    return np.stack(found)


def mean_average_precision(scores: Float[Tensor, "n k"], present: Bool[Tensor, "n k"]) -> float:
    """The mean over classes of the average precision, for images that show several classes."""
    return float(average_precisions(scores.double().numpy(), present.numpy()).mean())
