"""How images and texts lie in the joint space, and how they are grouped there.

The paper starts from the grouping that InfoNCE causes (arXiv 2206.10996): it aligns the image and
the text of a pair, and groups similar images only through their texts, and similar texts through
their images. The loss on neighbourhoods is in `losses/geometry.py`.
"""

import math
from collections.abc import Hashable, Sequence
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.evaluation import retrieval
from protoclip.evaluation.datasets import match_captions
from protoclip.evaluation.features import Features
from protoclip.evaluation.metrics import SampleResults
from protoclip.prototypes.kmeans import kmeans

MODALITIES = ("image", "text")
NEIGHBOURS = 10
ITERATIONS = 20  # of K-means
# Another seed of K-means moves the agreement of the modalities by one or two points, so it is
# the mean over this many clusterings.
CLUSTERINGS = 5

Assignments = dict[str, Int[Tensor, "s n"]]  # by modality, for each clustering


def score(features: Features) -> SampleResults:
    """How do images and texts lie in the joint space?"""
    part, texts = features.part, features.texts["captions"]
    assert part.captions is not None
    paired = texts[part.captions.text_of_pair]
    values = modality_gap(part.features, paired, part.captions.image_of_pair)
    values["effective_rank_image"] = effective_rank(part.features)
    values["effective_rank_text"] = effective_rank(texts)
    return SampleResults(metrics={f"modality_gap/{name}": value for name, value in values.items()})


def score_clusters(features: Features) -> SampleResults:
    """Do clusters of the images agree with the classes?"""
    part = features.part
    assert part.labels is not None
    values = clustering(part.features.to(features.device), part.labels)
    return SampleResults(metrics={f"clustering/{name}": values[name] for name in ("ami", "ari")})


def modality_gap(
    image_features: Float[Tensor, "n d"],
    text_features: Float[Tensor, "m d"],
    image_of_text: Int[Tensor, " m"] | None = None,
) -> dict[str, float]:
    """How far apart the modalities lie, and how far each spreads, from rows of unit norm.

    A text is one row a pair; unless `image_of_text` names its image, that is the same row.

    Returns:
        `gap`: distance between the mean image and the mean text, in [0, 2] (Liang et al. 2022);
        `alignment`: mean squared distance of a pair, in [0, 4] (Wang and Isola 2020);
        `uniformity_image` and `uniformity_text`: see `uniformity`.
    """
    images, texts = image_features.double(), text_features.double()
    paired = images if image_of_text is None else images[image_of_text]
    return {
        "gap": float((images.mean(dim=0) - texts.mean(dim=0)).norm()),
        "alignment": float((paired - texts).square().sum(dim=1).mean()),
        "uniformity_image": uniformity(image_features),
        "uniformity_text": uniformity(text_features),
    }


def effective_rank(features: Float[Tensor, "n d"]) -> float:
    """How many directions the rows use, from 1 to d: the exponential of the entropy of the
    singular values, as shares of their sum (Roy and Vetterli 2007)."""
    rows = features.double()
    shares = torch.linalg.eigvalsh(rows.T @ rows).clamp(min=0).sqrt()
    shares = shares / shares.sum()
    return float(torch.special.entr(shares).sum().exp())


def uniformity(features: Float[Tensor, "n d"]) -> float:
    """Log of the mean of `exp(-2 |x - x'|^2)` over pairs of different rows (Wang and Isola 2020).

    In [-8, 0] for two unit-norm rows or more: 0 when all coincide, lower when they spread. NaN for
    a single row.
    """
    count, features = len(features), features.float()
    if count < 2:
        return math.nan
    norms = features.square().sum(dim=1)
    rows = max(1, retrieval.CHUNK // count)
    total = 0.0
    for start in range(0, count, rows):
        chunk = features[start : start + rows]
        distances = norms[start : start + rows, None] + norms - 2 * chunk @ features.T
        kernel = (-2 * distances.clamp(min=0)).exp()
        kernel.diagonal(offset=start).zero_()  # leave out each row's pair with itself
        total += float(kernel.sum(dtype=torch.float64))
    return math.log(total / (count * (count - 1)))


def clustering(
    features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], *, restarts: int = 10
) -> dict[str, Any]:
    """Cluster the rows by K-means, with as many clusters as classes, and compare with the classes.

    Starts are random rows, as in published evaluations; the lowest inertia of all restarts wins.

    Returns:
        `cluster`, the cluster of each row; `ami`, the `agreement` with the classes, and `ari`, the
        adjusted Rand index (Hubert and Arabie 1985): 1 if they are equal, 0 by chance.
    """
    # Here, since training imports this file, and scikit-learn takes two seconds to import.
    from sklearn.metrics import adjusted_rand_score

    k = len(torch.unique(labels))
    clusters = kmeans(features, k, iterations=100, restarts=restarts, init="random", seed=0)
    assignments = clusters.assignments.cpu()
    return {
        "cluster": assignments,
        "ami": agreement(labels, assignments),
        "ari": float(adjusted_rand_score(labels.numpy(), assignments.numpy())),
    }


def agreement(one: Int[Tensor, " n"], other: Int[Tensor, " n"]) -> float:
    """Adjusted mutual information of two groupings (Vinh et al. 2010, arithmetic mean): 1 if they
    are equal, 0 by chance."""
    from sklearn.metrics import adjusted_mutual_info_score

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
            of `match_captions`, `recall@10` equals that of `evaluate`.
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
    pairs = match_captions(
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
