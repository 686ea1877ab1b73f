"""K-means by faiss, on the CPU."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def faiss_lloyd(
    features: Float[Tensor, "n d"],
    centroids: Float[Tensor, "k d"],
    *,
    iterations: int,
    spherical: bool,
    seed: int,
) -> Float[Tensor, "k d"]:
    """Centroids after faiss' iterations from the given ones, over all rows, in float32.

    Raises:
        ValueError: faiss is not installed.
    """
    try:
        import faiss  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise ValueError("backend='faiss': not installed; pip install faiss-cpu") from error
    engine: Any = faiss.Kmeans(
        features.shape[1],
        len(centroids),
        niter=iterations,
        spherical=spherical,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(features),
    )
    start = centroids.float().cpu().contiguous().numpy()
    engine.train(features.float().cpu().contiguous().numpy(), init_centroids=start)
    return torch.from_numpy(engine.centroids).to(features)
