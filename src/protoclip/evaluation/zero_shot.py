"""Zero-shot classification: images against the encoded names of classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protoclip.encode.features import Encoder
from protoclip.evaluation.datasets import EvaluationData, find_positions
from protoclip.evaluation.features import Features, Part
from protoclip.evaluation.metrics import MULTILABEL, SampleResults
from protoclip.evaluation.readers import check_templates
from protoclip.evaluation.retrieval import best_relevant_rank


def encode_classes(
    encoder: Encoder, data: EvaluationData, part: Part, templates: Sequence[str] | None
) -> dict[str, Float[Tensor, "_ d"]]:
    """A feature for each of the `names` of images, and for each of the `classes`.

    Args:
        templates: Prompts in place of the data's own.
    """

    def encode(names: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "k d"]:
        texts = fill_templates(names, templates)
        features = encoder.encode_texts(texts, stage=f"{data.name} class names")
        return zero_shot_classifier(features.view(len(names), len(templates), -1))

    texts = {}
    if part.names is not None:
        texts["names"] = encode(sorted(set(part.names)), templates or ["{c}"])
    if data.class_names:
        distinct = [*dict.fromkeys(data.class_names)]
        classes = encode(distinct, templates or data.templates)
        texts["classes"] = classes[find_positions(data.class_names, distinct)]
    return texts


def score(features: Features) -> SampleResults:
    """Which of all names, such as the emoji's concepts, and which class belongs to an image?"""
    part, texts, class_names = features.part, features.texts, features.data.class_names
    images: dict[str, Any] = {}
    if part.names is not None:
        names = find_positions(part.names, sorted(set(part.names)))
        ranks = zero_shot_ranks(part.features, texts["names"], names)
        images = {"zero_shot_rank": ranks.numpy(), "zero_shot_class": names.numpy()}
    if "classes" not in texts:
        return SampleResults(images=images)
    assert part.labels is not None
    if part.labels.ndim == 2:
        precision, parts = mean_average_precision(part.features @ texts["classes"].T, part.labels)
        return SampleResults(metrics={MULTILABEL: precision}, parts={MULTILABEL: parts})
    own = zero_shot_ranks(part.features, texts["classes"], part.labels, class_names).numpy()
    if part.names is not None:
        return SampleResults(images={**images, "zero_shot_subgroup_rank": own})
    return SampleResults(images={"zero_shot_rank": own, "zero_shot_class": part.labels.numpy()})


def fill_templates(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Each class name in each template, class after class; raises as `check_templates`."""
    check_templates(templates, "templates")
    return [template.replace("{c}", name) for name in class_names for template in templates]


def zero_shot_classifier(prompt_features: Float[Tensor, "k t d"]) -> Float[Tensor, "k d"]:
    """One feature a class: the mean of its prompts' unit-norm features, of unit norm again.

    This is CLIP's prompt ensemble (Radford et al. 2021, section 3.1.4). Prompts may have any norm.
    """
    return F.normalize(F.normalize(prompt_features, dim=-1).mean(dim=1), dim=-1)


def zero_shot_ranks(
    images: Float[Tensor, "n d"],
    classes: Float[Tensor, "k d"],
    labels: Int[Tensor, " n"],
    names: Sequence[str] | None = None,
) -> Int[Tensor, " n"]:
    """How many wrong classes are at least as similar to each image as its own (Radford et al. 2021)

    Classes are the encoded names of classes; ranks are in [0, k). If several classes have one name,
    the first of them wins, so images of the others are wrong at 1 and may be right at 5. So `topk`
    orders equal similarities in CLIP's code, and on average in open_clip's and CLIP_benchmark's.
    CLIP's own list calls two classes of ImageNet missile, and two sunglasses.
    """
    by_name: dict[str, list[int]] = {}
    for index, name in enumerate(range(len(classes)) if names is None else names):
        by_name.setdefault(str(name), []).append(index)
    first, before = torch.zeros(2, len(classes), dtype=torch.long)
    for alike in by_name.values():
        first[alike], before[alike] = alike[0], torch.arange(len(alike))
    ranks: Tensor = best_relevant_rank(images, classes, first[labels], first) + before[labels]
    return ranks


def average_precisions(
    scores: Float[np.ndarray, "n k"], present: Bool[np.ndarray, "n k"]
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "n k"]]:
    """The average precision of each class, and its value without each of the images, by how well
    each image fits each class and which classes it shows.

    Average precision is the sum over thresholds of the precision there times the recall gained, as
    in scikit-learn. It is 0 for a class that no image has, and NaN without the only image.
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=0)
    relevant = np.take_along_axis(present, order, axis=0).astype(np.float64)
    # Equal scores share a threshold: its precision is counted after the last of them.
    rows, edge = np.arange(len(ranked))[:, None], np.ones((1, ranked.shape[1]), bool)
    steps = ranked[1:] != ranked[:-1]
    first = np.maximum.accumulate(np.where(np.concatenate([edge, steps]), rows, 0))
    last = np.where(np.concatenate([steps, edge]), rows, len(ranked))
    last = np.minimum.accumulate(last[::-1])[::-1]
    hits = np.take_along_axis(relevant.cumsum(axis=0), last, axis=0)
    total = relevant.sum(axis=0)
    values = (relevant * hits / (last + 1)).sum(axis=0) / np.maximum(total, 1)

    # Leaving out an image changes only the precision at its own threshold and lower ones.
    def sum_above(terms: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
        sums = np.concatenate([np.zeros((1, terms.shape[1])), terms.cumsum(axis=0)])
        return np.take_along_axis(sums, first, axis=0)

    fewer = np.maximum(last, 1)
    above, parts, ones = (relevant * a for a in (hits / (last + 1), hits / fewer, 1 / fewer))
    own_part = relevant * (hits - 1) / fewer
    below = parts.sum(axis=0) - sum_above(parts) - relevant * (ones.sum(axis=0) - sum_above(ones))
    rest = total - relevant
    reduced = (sum_above(above) + below - own_part) / np.maximum(rest, 1)
    reduced = np.where((rest == 0) & (total > 0), np.nan, reduced)
    by_image = np.empty_like(reduced)
    np.put_along_axis(by_image, order, reduced, axis=0)
    return values, by_image


def mean_average_precision(
    scores: Float[Tensor, "n k"], present: Bool[Tensor, "n k"]
) -> tuple[float, Float[np.ndarray, " n"]]:
    """The mean over classes of the average precision, for images that show several classes; and
    what each image adds to it, less its expectation.

    This leaves out one image at a time. A class of one image is compared with the other classes.
    """
    values, reduced = average_precisions(scores.double().numpy(), present.numpy())
    number, alone = len(reduced), np.isnan(reduced)
    means = np.nanmean(np.where(alone.all(axis=0), 0.0, reduced), axis=0)
    parts = np.where(alone, values - values.mean(), (means - reduced) * (number - 1) / number)
    return float(values.mean()), np.asarray(parts.mean(axis=1))
