"""How images and texts are grouped: pure functions of the two modalities' representations.

The paper starts from the grouping that InfoNCE causes (arXiv 2206.10996): it aligns the image and
the text of a pair, and groups similar images only by way of their texts, and similar texts by way
of their images.
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

Assignments = dict[str, Int[Tensor, "s n"]]  # of each clustering


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

    With the texts' groups and the images' neighbours: how often do the texts of an image and of its
    neighbour fall into one group?
    """
    return float((groups[nearest] == groups[:, None]).float().mean(dim=1).mean())


def same_group_by_chance(groups: Int[Tensor, " n"]) -> float:
    """Probability that two different rows are in one group: `neighbours_in_group` by chance."""
    sizes = torch.bincount(groups).double()
    return float((sizes * (sizes - 1)).sum() / (len(groups) * (len(groups) - 1)))


def spread(features: Float[Tensor, "n d"]) -> float:
    """Variance of unit-norm rows, 1 - |mean|^2: 0 if all are one point, near 1 if all around."""
    return 1 - float(features.double().mean(dim=0).square().sum())


def group_sizes(groups: Int[Tensor, " n"], number: int) -> dict[str, float]:
    """Sizes of `number` groups, and how many of these are `dead`, that is without a member."""
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
        captions, concepts, content: Of each pair; the last two as the `groups` and `content` of
            `retrieval.captions_of`, by which `recall@10` is what `evaluate` gives.
        classes: Adds `classes/...`, the agreement of the groups with them.
        previous: Groups of an earlier checkpoint; adds `stability/...`, the agreement with them.

    Returns:
        Measures by name, as docs/grouping.md lists them: of groups the mean over five clusterings.
        And the group of each row, by modality and clustering.
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
        rows, of_rows, of_partners = spaces[modality], groups[modality], groups[other]
        nearest = nearest_others(rows)
        values = {
            "neighbours": mean(neighbours_in_group(nearest, of) for of in of_partners),
            "neighbours_by_chance": mean(map(same_group_by_chance, of_partners)),
            "effective_rank": effective_rank(rows),
            "spread": spread(rows),
        }
        if classes is not None:
            values["classes"] = mean(agreement(of, classes) for of in of_rows)
        if previous is not None:
            values["stability"] = mean(map(agreement, of_rows, previous[modality]))
        sizes = [group_sizes(of, num_groups) for of in of_rows]
        values |= {f"groups/{name}": mean(of[name] for of in sizes) for name in sizes[0]}
        measures |= {f"{name}/{modality}": value for name, value in values.items()}
    known = retrieval.captions_of(
        [(caption,) for caption in captions], [""] * len(captions), concepts, content
    )
    row_of = {caption: row for row, caption in enumerate(captions)}
    of_texts = texts[[row_of[caption] for caption in known.texts]]
    ranks = retrieval.retrieval_ranks(images[known.rows], of_texts, known)
    for modality, of_modality in zip(MODALITIES, ranks, strict=True):
        measures[f"recall@10/{modality}_to_{partner[modality]}"] = retrieval.recall_at(
            of_modality, 10
        )
    measures |= modality_gap(images, texts)
    return measures, groups
