"""How images and texts are grouped: pure functions of the two modalities' representations.

The paper starts from the grouping that InfoNCE causes (arXiv 2206.10996): it aligns the image and
the text of a pair, and groups similar images only through their texts, and similar texts through
their images.
"""

from collections.abc import Hashable, Sequence
from statistics import mean

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor

from protoclip.evaluation import retrieval
from protoclip.evaluation.geometry import effective_rank, modality_gap
from protoclip.prototypes.kmeans import kmeans

MODALITIES = ("image", "text")
NEIGHBOURS = 10
ITERATIONS = 20  # of K-means
# Another seed of K-means moves the agreement of the modalities by one or two points, so it is
# the mean over this many clusterings.
CLUSTERINGS = 5

Assignments = dict[str, Int[Tensor, "s n"]]  # by modality, for each clustering


def agreement(one: Int[Tensor, " n"], other: Int[Tensor, " n"]) -> float:
    """Adjusted mutual information of two groupings: 1 if they are equal, 0 by chance.

    Vinh et al. 2010, arithmetic mean.
    """
    return float(adjusted_mutual_info_score(one.numpy(), other.numpy()))


def nearest_others(
    features: Float[Tensor, "n d"], neighbours: int = NEIGHBOURS
) -> Int[Tensor, "n k"]:
    """The most similar other rows of each row, by cosine."""
    rows, nearest = F.normalize(features.float(), dim=1), []
    size = max(1, retrieval.CHUNK // len(rows))
    for start in range(0, len(rows), size):
        similarity = rows[start : start + size] @ rows.T
        similarity.diagonal(offset=start).fill_(float("-inf"))  # a row is not its own neighbour
        nearest.append(similarity.topk(min(neighbours, len(rows) - 1)).indices)
    return torch.cat(nearest)


def neighbours_in_group(nearest: Int[Tensor, "n k"], groups: Int[Tensor, " n"]) -> float:
    """Share of each row's `nearest_others` that are in the row's group; in [0, 1].

    With the texts' groups and the images' neighbours: how often are the texts of an image and of
    its neighbour in one group?
    """
    return float((groups[nearest] == groups[:, None]).float().mean(dim=1).mean())


def same_group_by_chance(groups: Int[Tensor, " n"]) -> float:
    """Probability that two different rows are in one group: `neighbours_in_group` by chance."""
    sizes = torch.bincount(groups).double()
    return float((sizes * (sizes - 1)).sum() / (len(groups) * (len(groups) - 1)))


def spread(features: Float[Tensor, "n d"]) -> float:
    """Variance of unit-norm rows, 1 - |mean|^2: 0 if all are equal, near 1 if in all directions."""
    return 1 - float(features.double().mean(dim=0).square().sum())


def group_sizes(groups: Int[Tensor, " n"], number: int) -> dict[str, float]:
    """Sizes of `number` groups, and how many of them are `dead`: without a member."""
    sizes = torch.bincount(groups, minlength=number).double()
    return {
        "number": float(number),
        "dead": float((sizes == 0).sum()),
        "smallest": float(sizes.min()),
        "median": float(sizes.quantile(0.5)),
        "largest": float(sizes.max()),
    }


def measure(
    images: Float[Tensor, "n d"],
    texts: Float[Tensor, "n d"],
    *,
    num_groups: int,
    captions: Sequence[str],
    concepts: Sequence[int] | None = None,
    content: Sequence[Hashable] | None = None,
    classes: Int[Tensor, " n"] | None = None,
    previous: Assignments | None = None,
    seed: int = 0,
) -> tuple[dict[str, float], Assignments]:
    """Group each modality by K-means; measure the groups and the space they lie in.

    Args:
        images, texts: Unit-norm rows of pairs.
        num_groups: Groups of each modality.
        captions, concepts, content: One of each a pair. With the last two as `groups` and `content`
            of `retrieval.captions_of`, `recall@10` equals that of `evaluate`.
        classes: Adds `classes/...`, the agreement of the groups with them.
        previous: Groups of an earlier checkpoint; adds `stability/...`, the agreement with them.

    Returns:
        Measures by name, as docs/grouping.md lists them; those of groups are means over five
        clusterings. And the group of each row, by modality and clustering.
    """
    spaces, partner = {"image": images, "text": texts}, {"image": "text", "text": "image"}
    seeds = range(seed, seed + CLUSTERINGS)
    groups = {
        modality: torch.stack(
            [kmeans(rows, num_groups, iterations=ITERATIONS, seed=s).assignments for s in seeds]
        )
        for modality, rows in spaces.items()
    }
    measures = {"agreement": mean(map(agreement, groups["image"], groups["text"]))}

    for modality, other in partner.items():
        rows, clusterings, others = spaces[modality], groups[modality], groups[other]
        nearest = nearest_others(rows)
        values = {
            "neighbours": mean(neighbours_in_group(nearest, group) for group in others),
            "neighbours_by_chance": mean(map(same_group_by_chance, others)),
            "effective_rank": effective_rank(rows),
            "spread": spread(rows),
        }
        if classes is not None:
            values["classes"] = mean(agreement(group, classes) for group in clusterings)
        if previous is not None:
            values["stability"] = mean(map(agreement, clusterings, previous[modality]))
        sizes = [group_sizes(group, num_groups) for group in clusterings]
        values |= {f"groups/{name}": mean(size[name] for size in sizes) for name in sizes[0]}
        measures |= {f"{name}/{modality}": value for name, value in values.items()}
    pairs = retrieval.captions_of(
        [(caption,) for caption in captions], [""] * len(captions), concepts, content
    )
    row_of = {caption: row for row, caption in enumerate(captions)}
    text_rows = texts[[row_of[caption] for caption in pairs.texts]]
    both_ranks = retrieval.retrieval_ranks(images[pairs.rows], text_rows, pairs)
    for modality, ranks in zip(MODALITIES, both_ranks, strict=True):
        recall = retrieval.recall_at(ranks, 10)
        measures[f"recall@10/{modality}_to_{partner[modality]}"] = recall
    measures |= modality_gap(images, texts)
    return measures, groups
