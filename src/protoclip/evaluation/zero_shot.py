"""Zero-shot classification: images against the encoded names of classes."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.evaluation.retrieval import best_relevant_rank, share_within


def class_features(
    encode: Callable[[list[str]], Float[Tensor, "p d"]], prompts: Sequence[Sequence[str]]
) -> Float[Tensor, "k d"]:
    """One unit-norm feature a class: the mean over its prompts (Radford et al. 2021, 3.1.4).

    Args:
        encode: Gives the unit-norm text features of a list of strings.
        prompts: The prompts of each class, one or more.

    Returns:
        Class features `(k, d)`, in the order of `prompts`.

    Raises:
        ValueError: There is no class, or a class without a prompt.
    """
    counts = [len(of_class) for of_class in prompts]
    if min(counts, default=0) == 0:
        raise ValueError("zero-shot classification needs a class, and a prompt for every class")
    encoded = encode([prompt for of_class in prompts for prompt in of_class])
    means = torch.stack([features.mean(dim=0) for features in torch.split(encoded, counts)])
    return F.normalize(means, dim=1)


def zero_shot_ranks(
    image_features: Float[Tensor, "n d"],
    class_features: Float[Tensor, "k d"],
    labels: Int[Tensor, " n"],
    *,
    chunk_elements: int = 4_000_000,
) -> Int[Tensor, " n"]:
    """How many wrong classes are at least as similar to each image as its own, in [0, k).

    The arguments are as in `zero_shot_accuracy`.

    Raises:
        ValueError: A label is not a row of `class_features`.
    """
    classes = torch.arange(len(class_features), device=labels.device)
    return best_relevant_rank(
        image_features, class_features, labels, classes, chunk_elements=chunk_elements
    )


def zero_shot_accuracy(
    image_features: Float[Tensor, "n d"],
    class_features: Float[Tensor, "k d"],
    labels: Int[Tensor, " n"],
    ks: Sequence[int] = (1, 5),
    *,
    chunk_elements: int = 4_000_000,
) -> dict[str, float]:
    """Share of images whose class is among the k most similar (Radford et al. 2021).

    Ties count against the image: a model that gives every class the same similarity scores 0.

    Args:
        image_features: Unit-norm image features.
        class_features: Unit-norm class features.
        labels: Class of each image, the row of `class_features`.
        ks: Numbers of guesses. A k of at least the number of classes gives 1.
        chunk_elements: Most similarities held at once.

    Returns:
        `acc<k>` for each k, fractions in [0, 1].

    Raises:
        ValueError: There is no image, a label is not a row of `class_features`, or a k is below 1.
    """
    if len(image_features) == 0 or min(ks, default=1) < 1:
        raise ValueError("zero-shot classification needs an image, and every k to be at least 1")
    ranks = zero_shot_ranks(image_features, class_features, labels, chunk_elements=chunk_elements)
    return {f"acc{k}": share_within(ranks, k) for k in ks}
