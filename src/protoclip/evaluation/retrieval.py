"""Retrieval: ranks among candidates, and recall at k, with any number of captions an image."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 4_000_000  # similarities held in memory at once
CROWD = 20  # candidates of a cluster that may stand before a match together; more are rare


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


def crowding(
    queries: Float[Tensor, "n d"],
    candidates: Float[Tensor, "m d"],
    ranks: Int[Tensor, " n"],
    query_clusters: Int[Tensor, " n"],
    candidate_clusters: Int[Tensor, " m"],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[int, Float[Tensor, " m"]]:
    """By `k`, what each candidate takes from recall at k by standing before others' matches.

    That is less what is to be expected, so its sum is 0. Some candidates are near to many queries
    (Radovanovic et al. 2010), and whether a test set has them moves its recall. What the candidates
    of a cluster take is the share of queries that would be right without them. Each share has noise
    of its own, which is in the recall of the queries already; so shares are shrunk towards their
    mean by the part of their variance that is not noise.

    Args:
        ranks: As `best_relevant_rank` gives them.
        query_clusters, candidate_clusters: Numbers of what is drawn together, from 0.
    """
    sizes = torch.bincount(candidate_clusters).double()
    number = len(sizes)
    most = min(max(ks) + min(int(sizes.max()), CROWD), len(candidates))
    near = ((ranks >= min(ks)) & (ranks < most)).nonzero().squeeze(1)
    right_without: dict[int, list[Tensor]] = {k: [torch.zeros(0, dtype=torch.long)] for k in ks}
    for rows in near.split(max(1, CHUNK // max(len(candidates), most**2))):
        similarity = queries[rows].float() @ candidates.float().T
        # The best relevant candidate stands behind as many as the rank says.
        nearest, own = similarity.topk(most).indices, query_clusters[rows].unsqueeze(1)
        cluster, rank = candidate_clusters[nearest], ranks[rows].unsqueeze(1)
        before = (torch.arange(most) <= rank) & (cluster != own)
        same = (cluster.unsqueeze(2) == cluster.unsqueeze(1)) & before.unsqueeze(1)
        is_first = before & ~same.tril(-1).any(dim=2)
        for k in ks:
            alone = is_first & (rank >= k) & (rank - same.sum(dim=2) < k)
            right_without[k].append((own * number + cluster)[alone])
    found = {}
    for k, pairs in right_without.items():
        pair, count = torch.unique(torch.cat(pairs), return_counts=True)
        share = torch.bincount(pair % number, count.double(), minlength=number) / len(queries)
        taken = share[sizes > 0].mean() - share
        noise = float((count.double() / len(queries)).square().sum())
        variance = float(taken[sizes > 0].square().sum())
        taken *= max(0.0, 1 - noise / variance) if variance else 0.0
        found[k] = (taken / sizes)[candidate_clusters]
    return found
