"""Zero-shot classification: images against the encoded names of classes.

Names and their usual templates come from `datasets.py`, and `task_features.py` encodes them.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protoclip.data.access import reason_of
from protoclip.evaluation.retrieval import best_relevant_rank
from protoclip.files import read_local
from protoclip.terminal import visible


def read_templates(reference: str) -> list[str]:
    """Prompts in which "{c}" stands for the class name.

    Args:
        reference: `openai` (the 80 of ImageNet), `simple` (seven of these), or a text file with a
            prompt a line, where "{}" stands for the class name too.

    Raises:
        ValueError: The file cannot be read, is empty, or a line has no place for the class.
    """
    if reference in ("openai", "simple"):
        import open_clip

        lists = {
            "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
            "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
        }
        return [template("{c}") for template in lists[reference]]
    try:
        text = read_local(reference)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{reference}: no file of prompts ({reason_of(error)}); give openai, simple or a file"
        ) from None
    return parse_templates(text, reference)


def parse_templates(text: str, source: str) -> list[str]:
    """The prompts of a text, one a line; raises `ValueError`, which names the source."""
    templates = [line.strip().replace("{}", "{c}") for line in text.splitlines() if line.strip()]
    if not templates:
        raise ValueError(f"{source}: holds no prompt")
    check_templates(templates, source)
    return templates


def check_templates(templates: Sequence[str], source: str) -> None:
    """Raise `ValueError`, which names the source, if a template has no place for the class."""
    for template in templates:
        if "{c}" not in template:
            shown = visible(template[:60])
            raise ValueError(f"{source}: '{shown}' has no place for the class; write {{c}} there")


def prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
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
    """The average precision of each class, and its value without each of the images.

    Average precision is the sum over thresholds of the precision there times the recall gained, as
    in scikit-learn. It is 0 for a class that no image has, and NaN without the only image.

    Args:
        scores: How well each image fits each class.
        present: Which classes an image shows.
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


def mean_average_precision(scores: Float[Tensor, "n k"], present: Bool[Tensor, "n k"]) -> float:
    """The mean over classes of the average precision, for images that show several classes."""
    return float(average_precisions(scores.double().numpy(), present.numpy())[0].mean())


def mean_average_precision_parts(
    scores: Float[Tensor, "n k"], present: Bool[Tensor, "n k"]
) -> Float[np.ndarray, " n"]:
    """What each image adds to the mean average precision, less its expectation.

    This leaves out one image at a time. A class of one image is compared with the other classes.
    """
    values, reduced = average_precisions(scores.double().numpy(), present.numpy())
    number, alone = len(reduced), np.isnan(reduced)
    means = np.nanmean(np.where(alone.all(axis=0), 0.0, reduced), axis=0)
    parts = np.where(alone, values - values.mean(), (means - reduced) * (number - 1) / number)
    return np.asarray(parts.mean(axis=1))
