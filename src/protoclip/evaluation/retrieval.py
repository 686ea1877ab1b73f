"""Retrieval: ranks among candidates, and recall at k, with any number of captions an image."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 4_000_000  # similarities held in memory at once


def best_relevant_rank(
    queries: Float[Tensor, "n d"],
    candidates: Float[Tensor, "m d"],
    query_groups: Int[Tensor, " n"],
    candidate_groups: Int[Tensor, " m"],
) -> Int[Tensor, " n"]:
    """How many irrelevant candidates come before each query's best relevant one, in [0, m).

    A candidate is relevant to the queries of its group. Similarity is the inner product. Ties and
    NaN count against the query, so that constant features do not score perfectly. Recall at k is
    the share of ranks below k (Karpathy and Fei-Fei 2015).

    Raises:
        ValueError: A query has no relevant candidate.
    """
    orphans = int((~torch.isin(query_groups, candidate_groups)).sum())
    if orphans:
        raise ValueError(f"{orphans} of {len(queries)} queries have no candidate of their group")
    queries, candidates = queries.float(), candidates.float()
    rows = max(1, CHUNK // len(candidates))
    ranks = []
    for start in range(0, len(queries), rows):
        similarity = queries[start : start + rows] @ candidates.T
        relevant = query_groups[start : start + rows].unsqueeze(1) == candidate_groups
        best = similarity.masked_fill(~relevant, float("-inf")).amax(dim=1, keepdim=True)
        # "not below" and not "at or above": any comparison with NaN is false.
        ranks.append((~(similarity < best) & ~relevant).sum(dim=1))
    return torch.cat(ranks)


def recall_at(ranks: Int[Tensor, " n"], k: int) -> float:
    """Share of queries that find a relevant candidate among their `k` most similar ones."""
    return float((ranks < k).double().mean())
