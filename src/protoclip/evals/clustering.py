"""How well K-means of the features finds the classes again."""

import torch
from jaxtyping import Float, Int
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from torch import Tensor

from protoclip.clustering import kmeans


def clustering_agreement(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    *,
    seed: int = 0,
    iterations: int = 100,
    restarts: int = 10,
) -> dict[str, float]:
    """Agreement between the classes and as many clusters as there are classes present.

    Of the restarts the clustering with the lowest inertia is scored, which looks at no label.

    Args:
        features: Rows to cluster, finite.
        labels: Class of each row; only equality matters.
        seed: Seed of the starts of K-means.
        iterations: Most Lloyd iterations a start.
        restarts: Number of random starts.

    Returns:
        `ami`, the adjusted mutual information (Vinh et al. 2010, arithmetic mean), and `ari`, the
        adjusted Rand index (Hubert and Arabie 1985): 1 for equal partitions, 0 expected by chance.

    Raises:
        ValueError: There is no row, or features are not finite.
    """
    if len(features) == 0:
        raise ValueError("clustering needs a sample")
    clusters = kmeans(
        features,
        len(torch.unique(labels)),
        iterations=iterations,
        restarts=restarts,
        start="random",  # restarts differ most, and it is what others evaluate with
        seed=seed,
    ).assignments.cpu()
    classes = labels.cpu()
    return {
        "ami": float(adjusted_mutual_info_score(classes.numpy(), clusters.numpy())),
        "ari": float(adjusted_rand_score(classes.numpy(), clusters.numpy())),
    }
