"""Weighted nearest-neighbour classification of frozen features."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def knn_predict(
    train_features: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    features: Float[Tensor, "m d"],
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk_elements: int = 4_000_000,
) -> Int[Tensor, " m"]:
    """The class with the most votes among the k most similar training rows (Wu et al. 2018).

    A neighbour of cosine similarity `s` casts a vote of `exp(s / temperature)`. Equal votes go to
    the lower class.

    Args:
        train_features: Training rows; any norm but zero.
        train_labels: Class of each training row, at least 0.
        features: Rows to classify.
        k: Number of neighbours; all training rows vote if there are fewer.
        temperature: Sharpness of the vote, above 0.
        chunk_elements: Most similarities held at once.

    Raises:
        ValueError: No training row, a setting out of range, or features that are not finite.
    """
    if len(train_features) == 0 or k < 1 or temperature <= 0:
        raise ValueError(f"k={k}, temperature={temperature}: need k >= 1, > 0, and a training row")
    for given in (train_features, features):
        if not bool(torch.isfinite(given).all()):
            raise ValueError("features hold non-finite values, so they have no nearest neighbours")
    keys = F.normalize(train_features.float(), dim=1)
    num_classes = int(train_labels.max()) + 1
    predictions = [train_labels.new_empty(0)]
    size = max(1, chunk_elements // max(len(keys), num_classes))
    for start in range(0, len(features), size):
        chunk = F.normalize(features[start : start + size].float(), dim=1)
        similarity, rows = (chunk @ keys.T).topk(min(k, len(keys)))
        # Relative to the nearest: the same winner, and no overflow at a low temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(chunk), num_classes)
        votes.scatter_add_(1, train_labels[rows].long(), weights)
        predictions.append(votes.argmax(dim=1).to(train_labels.dtype))
    return torch.cat(predictions)


def knn_accuracy(
    train_features: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    test_features: Float[Tensor, "m d"],
    test_labels: Int[Tensor, " m"],
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk_elements: int = 4_000_000,
) -> dict[str, float]:
    """Share of test rows that `knn_predict` puts in their class.

    A test row whose class no training row has is counted as wrong.

    Returns:
        `acc1`, a fraction in [0, 1].

    Raises:
        ValueError: There is no test row, or as `knn_predict`.
    """
    if len(test_features) == 0:
        raise ValueError("nearest-neighbour classification needs a test row")
    predictions = knn_predict(
        train_features,
        train_labels,
        test_features,
        k=k,
        temperature=temperature,
        chunk_elements=chunk_elements,
    )
    return {"acc1": float((predictions == test_labels).double().mean())}
