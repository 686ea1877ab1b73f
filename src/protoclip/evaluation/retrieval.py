"""Retrieval: which image and which text belong together, ranks among candidates, recall at k.

One definition for evaluation, validation and `analyze`. Rows of equal content are one image, with
the captions of all its copies, each as often as one copy has it. A text is right for an image that
has an equal caption.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protoclip.evaluation.metrics import KS

CHUNK = 4_000_000  # similarities held in memory at once
CROWD = 20  # candidates of a cluster that may rank before a match together; more are rare


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Images and the texts to retrieve.

    `rows` holds a row for each image. A text has the `groups` of its images. An image and a text of
    `image_of_pair` and `text_of_pair` are a pair. Equal texts have equal `numbers`, from 0 in the
    order of the texts, and `matches` holds images and the numbers that are right for them.
    """

    rows: list[int]
    texts: list[str]
    ids: list[str]
    groups: Int[Tensor, " t"]
    image_of_pair: Int[Tensor, " p"]
    text_of_pair: Int[Tensor, " p"]
    numbers: Int[Tensor, " t"]
    matches: Int[Tensor, "2 m"]


def captions_of(
    captions: Sequence[Sequence[str]],
    ids: Sequence[str],
    groups: Sequence[int] | None = None,
    content: Sequence[Hashable] | None = None,
) -> Captions:
    """The images in rows, and their texts: the captions of each image, or each group's once.

    Args:
        captions, ids: One of each a row.
        groups: Images of one group share their captions; then each row is one image.
            Unset, rows of equal content are one image, with the captions of all of them.
        content: Identifies the image of a row. Unset, all rows differ.
    """
    keys = range(len(ids)) if content is None else content
    # 1. Rows to images; an image has the row of its first appearance.
    image_by: dict[Hashable, int] = {}
    rows: list[int] = []
    image_of: list[int] = []
    for row, key in enumerate(keys):
        identity = key if groups is None else row
        if identity not in image_by:
            image_by[identity] = len(rows)
            rows.append(row)
        image_of.append(image_by[identity])
    # 2. Each group's texts. CLIP_benchmark counts a caption as often as an image has it; copies of
    # the image add none.
    group_of = image_of if groups is None else groups
    number_of: dict[str, int] = {}
    position: dict[tuple[int, str, int], int] = {}  # by group, text, and its earlier occurrences
    text_ids: list[str] = []
    pairs: dict[tuple[int, int], None] = {}
    for image, group, texts in zip(image_of, group_of, captions, strict=True):
        before = Counter[str]()
        for text in texts:
            number_of.setdefault(text, len(number_of))
            candidate = (group, text, before[text] if groups is None else 0)
            if candidate not in position:
                position[candidate] = len(position)
                text_ids.append(f"{ids[rows[image]]}: {text}")
            pairs[image, position[candidate]] = None
            before[text] += 1
    # 3. Matches. Images of equal content in several groups have the captions of all of them.
    numbers_of: dict[int, dict[int, None]] = {}
    for group, text, _ in position:
        numbers_of.setdefault(group, {})[number_of[text]] = None
    groups_of: dict[Hashable, dict[int, None]] = {}
    for key, group in zip(keys, group_of, strict=True):
        groups_of.setdefault(key, {})[group] = None
    matches = [
        (image, number)
        for image, row in enumerate(rows)
        for group in groups_of[keys[row]]
        for number in numbers_of[group]
    ]
    image_of_pair, text_of_pair = torch.tensor([*pairs]).T
    return Captions(
        rows=rows,
        texts=[text for _, text, _ in position],
        ids=text_ids,
        groups=torch.tensor([group for group, *_ in position]),
        image_of_pair=image_of_pair,
        text_of_pair=text_of_pair,
        numbers=torch.tensor([number_of[text] for _, text, _ in position]),
        matches=torch.tensor(matches).T,
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
