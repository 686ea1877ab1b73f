"""Retrieval: which image and which text belong together, ranks among candidates, recall at k.

One definition for evaluation, validation and `analyze`. Which texts are right for an image is
decided by `datasets.match_captions`.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protoclip.evaluation.datasets import Captions
from protoclip.evaluation.features import Features
from protoclip.evaluation.metrics import KS, SampleResults

CHUNK = 4_000_000  # similarities held in memory at once
CROWD = 20  # candidates of a cluster that may rank before a match together; more are rare


def score(features: Features) -> SampleResults:
    """Which captions fit an image, and which images a caption?"""
    part, texts = features.part, features.texts["captions"]
    assert part.captions is not None
    image_ranks, text_ranks = retrieval_ranks(part.features, texts, part.captions)
    image_names, text_names = part.sample_groups
    _, numbers = np.unique([*image_names, *text_names], return_inverse=True)
    image_groups, text_groups = torch.from_numpy(numbers).tensor_split([len(image_names)])
    texts_take = crowding(part.features, texts, image_ranks, image_groups, text_groups)
    images_take = crowding(texts, part.features, text_ranks, text_groups, image_groups)
    return SampleResults(
        images={
            "image_to_text_rank": image_ranks.numpy(),
            **{f"text_to_image_crowding_{k}": taken.numpy() for k, taken in images_take.items()},
        },
        texts={
            "text_to_image_rank": text_ranks.numpy(),
            **{f"image_to_text_crowding_{k}": taken.numpy() for k, taken in texts_take.items()},
        },
    )


def retrieval_ranks(
    images: Float[Tensor, "n d"], texts: Float[Tensor, "t d"], captions: Captions
) -> tuple[Int[Tensor, " n"], Int[Tensor, " t"]]:
    """`best_relevant_rank` of each image among the texts, and of each text among the images."""
    numbers, matches = torch.arange(len(images)), captions.matches
    return (
        best_relevant_rank(images, texts, numbers, captions.numbers, matches),
        best_relevant_rank(texts, images, captions.numbers, numbers, matches.flip(0)),
    )


def best_relevant_rank(
    queries: Float[Tensor, "n d"],
    candidates: Float[Tensor, "m d"],
    query_groups: Int[Tensor, " n"],
    candidate_groups: Int[Tensor, " m"],
    matches: Int[Tensor, "2 p"] | None = None,
) -> Int[Tensor, " n"]:
    """How many irrelevant candidates come before each query's best relevant one, in [0, m).

    A candidate is relevant to the queries of its group; with `matches`, to queries of the groups
    that match its group. Similarity is the inner product. Ties and NaN count against the query, so
    that constant features do not score perfectly. Recall at k is the share of ranks below k
    (Karpathy and Fei-Fei 2015).

    Raises:
        ValueError: A query has no relevant candidate.
    """
    if matches is None:
        has_one = torch.isin(query_groups, candidate_groups)

        def relevant_to(rows: slice) -> Bool[Tensor, "r m"]:
            return query_groups[rows].unsqueeze(1) == candidate_groups
    else:
        from scipy.sparse import csr_array  # here, since training imports this file

        groups, partners = query_groups.numpy(), candidate_groups.numpy()
        first, second = matches.numpy()
        shape = (max(groups.max(), first.max()) + 1, max(partners.max(), second.max()) + 1)
        table = csr_array((np.ones(len(first), np.int8), (first, second)), shape)
        present = np.isin(np.arange(shape[1]), partners).astype(np.int64)
        has_one = torch.from_numpy((table @ present)[groups] > 0)

        def relevant_to(rows: slice) -> Bool[Tensor, "r m"]:
            return torch.from_numpy(table[groups[rows]].toarray()[:, partners] > 0)

    if orphans := int((~has_one).sum()):
        raise ValueError(f"{orphans} of {len(queries)} queries have no candidate of their group")
    queries, candidates = queries.float(), candidates.float()
    size = max(1, CHUNK // len(candidates))
    ranks = []
    for start in range(0, len(queries), size):
        rows = slice(start, start + size)
        similarity, relevant = queries[rows] @ candidates.T, relevant_to(rows)
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
) -> dict[int, Float[Tensor, " m"]]:
    """For each `k`, what each candidate takes from recall at k by ranking before others' matches.

    Values are centred, so their sum is 0. Some candidates are near to many queries (Radovanovic et
    al. 2010), and a test set with them has a lower recall. The candidates of a cluster take the
    share of queries that would be right without them. The noise of each share is in the recall of
    the queries already, so shares are shrunk towards their mean, in proportion to the part of their
    variance that is not noise.

    Args:
        ranks: As `best_relevant_rank` returns them.
        query_clusters, candidate_clusters: Numbers from 0; a cluster is drawn as a whole.
    """
    sizes = torch.bincount(candidate_clusters).double()
    number = len(sizes)
    most = min(max(KS) + min(int(sizes.max()), CROWD), len(candidates))
    near = ((ranks >= min(KS)) & (ranks < most)).nonzero().squeeze(1)
    right_without: dict[int, list[Tensor]] = {k: [torch.zeros(0, dtype=torch.long)] for k in KS}
    for rows in torch.split(near, max(1, CHUNK // max(len(candidates), most**2))):
        similarity = queries[rows].float() @ candidates.float().T
        # The best relevant candidate comes right after `rank` others.
        nearest, cluster_of_query = similarity.topk(most).indices, query_clusters[rows].unsqueeze(1)
        cluster, rank = candidate_clusters[nearest], ranks[rows].unsqueeze(1)
        before = (torch.arange(most) <= rank) & (cluster != cluster_of_query)
        same = (cluster.unsqueeze(2) == cluster.unsqueeze(1)) & before.unsqueeze(1)
        is_first = before & ~same.tril(-1).any(dim=2)
        for k in KS:
            alone = is_first & (rank >= k) & (rank - same.sum(dim=2) < k)
            right_without[k].append((cluster_of_query * number + cluster)[alone])
    by_k = {}
    for k, pairs in right_without.items():
        pair, count = torch.unique(torch.cat(pairs), return_counts=True)
        share = torch.bincount(pair % number, count.double(), minlength=number) / len(queries)
        loss = share[sizes > 0].mean() - share
        noise = float((count.double() / len(queries)).square().sum())
        variance = float(loss[sizes > 0].square().sum())
        loss *= max(0.0, 1 - noise / variance) if variance else 0.0
        by_k[k] = (loss / sizes)[candidate_clusters]
    return by_k
