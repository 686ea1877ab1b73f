"""K-means by SuperKMeans, on the CPU."""

import torch
from jaxtyping import Float
from torch import Tensor


def superkmeans_lloyd(
    features: Float[Tensor, "n d"],
    centroids: Float[Tensor, "k d"],
    *,
    iterations: int,
    spherical: bool,
    seed: int,
) -> Float[Tensor, "k d"]:
    """Centroids after SuperKMeans' iterations over all rows, in float32.

    It starts from rows that it draws itself; of `centroids` only the number counts. It skips
    dimensions of centroids that cannot be the nearest, and may leave clusters empty.

    Raises:
        ValueError: SuperKMeans is not installed.
    """
    try:
        from superkmeans import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
            SuperKMeans,
        )
    except ImportError as error:
        raise ValueError("backend='superkmeans': not installed; pip install superkmeans") from error
    engine = SuperKMeans(
        len(centroids),
        features.shape[1],
        hierarchical=False,
        iters=iterations,
        sampling_fraction=1.0,
        max_points_per_cluster=len(features),
        n_threads=torch.get_num_threads(),
        seed=seed % 2**32,
        angular=spherical,
        early_termination=False,
    )
    return torch.from_numpy(engine.train(features.float().cpu().contiguous().numpy())).to(features)
