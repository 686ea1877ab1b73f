"""Zero-shot classification: images against the encoded names of classes (Radford et al. 2021)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.evaluation.retrieval import best_relevant_rank


def class_features(
    encode: Callable[[list[str]], Float[Tensor, "p d"]], prompts: Sequence[Sequence[str]]
) -> Float[Tensor, "k d"]:
    """One unit-norm feature a class: the mean over its prompts, of which it has at least one."""
    encoded = encode([prompt for of_class in prompts for prompt in of_class])
    by_class = torch.split(encoded, [len(of_class) for of_class in prompts])
    return F.normalize(torch.stack([features.mean(dim=0) for features in by_class]), dim=1)


def zero_shot_ranks(
    images: Float[Tensor, "n d"], classes: Float[Tensor, "k d"], labels: Int[Tensor, " n"]
) -> Int[Tensor, " n"]:
    """How many wrong classes are at least as similar to each image as its own, in [0, k)."""
    return best_relevant_rank(images, classes, labels, torch.arange(len(classes)))
