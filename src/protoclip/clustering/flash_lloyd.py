"""K-means by flash-kmeans (Triton), on CUDA."""

from jaxtyping import Float
from torch import Tensor


def flash_lloyd(
    features: Float[Tensor, "n d"],
    centroids: Float[Tensor, "k d"],
    *,
    iterations: int,
    spherical: bool,
    seed: int,
) -> Float[Tensor, "k d"]:
    """Centroids after flash-kmeans' iterations from the given ones.

    Given its starting centroids it draws nothing: no generator is touched, and `seed` is unused.

    Raises:
        ValueError: flash-kmeans is not installed, or the rows are not on a GPU.
    """
    if features.device.type != "cuda":
        raise ValueError("backend='flash-kmeans': needs features on a GPU; choose another backend")
    try:
        from flash_kmeans import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
            batch_kmeans_Cosine,
            batch_kmeans_Euclid,
        )
    except ImportError as error:
        raise ValueError(
            "backend='flash-kmeans': not installed; pip install flash-kmeans"
        ) from error
    run = batch_kmeans_Cosine if spherical else batch_kmeans_Euclid
    _, found, _ = run(
        features.unsqueeze(0).contiguous(),
        len(centroids),
        max_iters=iterations,
        init_centroids=centroids.unsqueeze(0).contiguous(),
    )
    result: Tensor = found.squeeze(0).to(features)
    return result
