"""Cross-modal retrieval: recall at k between images and texts."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def best_relevant_rank(
    queries: Float[Tensor, "n d"],
    candidates: Float[Tensor, "m d"],
    query_groups: Int[Tensor, " n"],
    candidate_groups: Int[Tensor, " m"],
    *,
    chunk_elements: int = 4_000_000,
) -> Int[Tensor, " n"]:
    """How many irrelevant candidates come before each query's best relevant one.

    Ties count against the query, and so does a score that is not a number: a model whose features
    are constant ranks every irrelevant candidate first instead of scoring perfectly.

    Args:
        queries: One row a query; similarity is the inner product, so unit norm gives the cosine.
        candidates: One row a candidate.
        query_groups: A candidate is relevant to a query when their groups are equal.
        candidate_groups: Group of each candidate.
        chunk_elements: Most similarities held at once.

    Returns:
        Zero-based ranks, in [0, m).

    Raises:
        ValueError: A query has no relevant candidate, so no rank exists.
    """
    orphans = int((~torch.isin(query_groups, candidate_groups)).sum())
    if orphans:
        raise ValueError(
            f"{orphans} of {len(queries)} queries have no candidate of their group or class; "
            "leave them out"
        )
    queries, candidates = queries.float(), candidates.float()
    rows = max(1, chunk_elements // max(1, len(candidates)))
    ranks = [query_groups.new_empty(0, dtype=torch.int64)]
    for start in range(0, len(queries), rows):
        similarity = queries[start : start + rows] @ candidates.T
        relevant = query_groups[start : start + rows].unsqueeze(1) == candidate_groups
        best = similarity.masked_fill(~relevant, float("-inf")).amax(dim=1, keepdim=True)
        # "not below" rather than "at or above": a comparison with NaN is false either way.
        ahead = ~(similarity < best) & ~relevant
        ranks.append(ahead.sum(dim=1))
    return torch.cat(ranks)


def share_within(ranks: Int[Tensor, " n"], k: int) -> float:
    """Share of zero-based ranks below k."""
    return float((ranks < k).double().mean())


def retrieval_recall(
    image_features: Float[Tensor, "n d"],
    text_features: Float[Tensor, "m d"],
    image_groups: Int[Tensor, " n"],
    text_groups: Int[Tensor, " m"],
    ks: Sequence[int] = (1, 5, 10),
    *,
    chunk_elements: int = 4_000_000,
) -> dict[str, float]:
    """Share of queries with at least one relevant candidate among the k most similar.

    The R@K of image-text retrieval (Karpathy and Fei-Fei 2015). An image and a text are relevant to
    each other when their groups are equal: several texts an image and several images a text are
    exact. Ties are broken against the query, see `best_relevant_rank`.

    Args:
        image_features: Unit-norm image features.
        text_features: Unit-norm text features, without repeated texts in a group.
        image_groups: Group of each image.
        text_groups: Group of each text.
        ks: Numbers of retrieved candidates. A k of at least the number of candidates gives 1.
        chunk_elements: Most similarities held at once.

    Returns:
        `image_to_text@<k>` and `text_to_image@<k>` for each k, fractions in [0, 1].

    Raises:
        ValueError: A query has no relevant candidate, there is no query, or a k is below 1.
    """
    if len(image_features) == 0 or len(text_features) == 0 or min(ks, default=1) < 1:
        raise ValueError("retrieval needs an image, a text, and every k to be at least 1")
    images, texts = (image_features, image_groups), (text_features, text_groups)
    recalls: dict[str, float] = {}
    for name, queries, candidates in (
        ("image_to_text", images, texts),
        ("text_to_image", texts, images),
    ):
        ranks = best_relevant_rank(
            queries[0], candidates[0], queries[1], candidates[1], chunk_elements=chunk_elements
        )
        recalls |= {f"{name}@{k}": share_within(ranks, k) for k in ks}
    return recalls
