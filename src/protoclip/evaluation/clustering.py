"""How well K-means clusters of the features agree with the classes.

K-means is in `prototypes/kmeans.py`; `grouping.py` measures how images and texts are grouped.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.prototypes.kmeans import kmeans


def clustering(
    features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], *, restarts: int = 10
) -> dict[str, Any]:
    """Cluster the rows by K-means, with as many clusters as classes, and compare with the classes.

    Starts are random rows, as in published evaluations; the lowest inertia of all restarts wins.

    Returns:
        `cluster`, the cluster of each row; `ami`, the adjusted mutual information (Vinh et al.
        2010, arithmetic mean), and `ari`, the adjusted Rand index (Hubert and Arabie 1985): 1 if
        clusters equal the classes, 0 by chance.
    """
    # Here, since training imports this file, and scikit-learn takes two seconds to import.
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

    k = len(torch.unique(labels))
    clusters = kmeans(features, k, iterations=100, restarts=restarts, init="random", seed=0)
    assignments = clusters.assignments.cpu()
    partitions = labels.numpy(), assignments.numpy()
    return {
        "cluster": assignments,
        "ami": float(adjusted_mutual_info_score(*partitions)),
        "ari": float(adjusted_rand_score(*partitions)),
    }
