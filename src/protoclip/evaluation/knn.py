"""Weighted nearest-neighbour classification of frozen features.

`prototypes/nearest.py` finds nearest centroids, and `explore/explorer.py` neighbours to look at.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.evaluation import retrieval


def knn_predict(
    train_features: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    features: Float[Tensor, "m d"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Int[Tensor, " m"]:
    """The class with the most votes among the k most similar training rows (Wu et al. 2018).

    A neighbour of cosine similarity `s` casts a vote of `exp(s / temperature)`. Equal votes go to
    the lower class. If there are fewer than k training rows, all vote.
    """
    keys = F.normalize(train_features.float(), dim=1)
    num_classes = int(train_labels.max()) + 1
    size, predictions = max(1, retrieval.CHUNK // max(len(keys), num_classes)), []
    for chunk in torch.split(features, size):
        queries = F.normalize(chunk.float(), dim=1)
        similarity, rows = (queries @ keys.T).topk(min(k, len(keys)))
        # Relative to the nearest: the same winner, and no overflow at a low temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(chunk), num_classes)
        predictions.append(votes.scatter_add_(1, train_labels[rows], weights).argmax(dim=1))
    return torch.cat(predictions)
