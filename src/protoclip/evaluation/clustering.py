"""How well K-means of the features finds the classes again."""

import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from torch import Tensor

from protoclip.prototypes.kmeans import kmeans


def agreement(classes: npt.ArrayLike, clusters: npt.ArrayLike) -> dict[str, float]:
    """How well two partitions of the same samples agree; only equality of entries matters.

    Returns:
        `ami`, the adjusted mutual information (Vinh et al. 2010, arithmetic mean), and `ari`, the
        adjusted Rand index (Hubert and Arabie 1985): 1 for equal partitions, 0 expected by chance.
    """
    return {
        "ami": float(adjusted_mutual_info_score(classes, clusters)),
        "ari": float(adjusted_rand_score(classes, clusters)),
    }


def class_clusters(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    *,
    seed: int = 0,
    iterations: int = 100,
    restarts: int = 10,
) -> Int[Tensor, " n"]:
    """K-means of the rows, with as many clusters as there are classes; on the CPU.

    Of the restarts the clustering with the lowest inertia is taken, which looks at no label.

    Args:
        features: Rows to cluster, finite.
        labels: Class of each row; only their number matters.
        seed: Seed of the starts of K-means.
        iterations: Most Lloyd iterations a start.
        restarts: Number of random starts.

    Raises:
        ValueError: There is no row, or features are not finite.
    """
    if len(features) == 0:
        raise ValueError("clustering needs a sample")
    return kmeans(
        features,
        len(torch.unique(labels)),
        iterations=iterations,
        restarts=restarts,
        init="random",  # restarts differ most, and it is what others evaluate with
        seed=seed,
    ).assignments.cpu()


def clustering_agreement(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    *,
    seed: int = 0,
    iterations: int = 100,
    restarts: int = 10,
) -> dict[str, float]:
    """`agreement` between the classes and `class_clusters`, whose arguments it takes."""
    clusters = class_clusters(features, labels, seed=seed, iterations=iterations, restarts=restarts)
    return agreement(labels.cpu().numpy(), clusters.numpy())
