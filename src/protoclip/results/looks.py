"""Shows a model on example pairs: its prototypes, retrieval, confusions and maps.

`explore/` shows all pairs of a source.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.decomposition import PCA
from torch import Tensor

from protoclip.config import Config
from protoclip.evaluation.features import Encoder
from protoclip.evaluation.geometry import modality_gap
from protoclip.evaluation.grouping import MODALITIES
from protoclip.evaluation.retrieval import captions_of
from protoclip.evaluation.zero_shot import prompts, zero_shot_classifier
from protoclip.files import read_json
from protoclip.models import loading, saved
from protoclip.models.protoclip import ProtoCLIP
from protoclip.prototypes.kmeans import kmeans
from protoclip.prototypes.targets import back_translate
from protoclip.results.examples import (
    PAIRS_PER_GROUP,
    Examples,
    embed_checkpoint,
    embed_examples,
    make_encoder,
)

PAIRS_PER_PROTOTYPE = 20  # in the gallery, on average
FEWEST_MEMBERS = 5  # of a prototype that counts as tight or mixed
ITERATIONS = 20  # of K-means
PICKS = 2  # prototypes of each kind
NEAREST_IMAGES, NEAREST_CAPTIONS = 6, 4
QUERIES, ANSWERS = 3, 4  # right queries and wrong ones in each direction; answers to each query
MOST_PROMPTS = 4000  # for a zero-shot classifier
CONFUSED = 8  # classes in the table of confusions
ON_MAP = 300  # pairs


@dataclass(frozen=True, kw_only=True)
class Prototype:
    """A prototype with its nearest images and captions.

    Attributes:
        kind: Why it is shown, such as `largest, tightest`.
        size: Pairs whose image (or text) is nearest to it.
        tightness: Mean cosine of its members to it.
        together: Largest share of its pairs that share a prototype in the other modality.
        rows: Examples whose images are shown.
    """

    kind: str
    size: int
    tightness: float
    together: float
    rows: Sequence[int]
    captions: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A query, and the nearest answers with whether each is right, best first.

    Images are rows of the examples. From image to text the query is an image, and its answers are
    captions; else `row` is None.

    Attributes:
        caption: The query, or the caption of its image.
        rank: Rank of the first right answer, from 1.
    """

    row: int | None
    caption: str
    rank: int
    rows: Sequence[tuple[int, bool]] = ()
    captions: Sequence[tuple[str, bool]] = ()


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Right and wrong answers of one direction, and the share of right ones."""

    right: Sequence[Answer]
    wrong: Sequence[Answer]
    share: float


@dataclass(frozen=True, kw_only=True)
class Confusions:
    """The classes that are confused most.

    Attributes:
        pairs: True class, predicted class, number of such images, number of images of the class.
        rows: For each of the classes its name, its number of images, and the shares of them that
            are predicted as each of the classes, and as any other one.
        templates: Number of prompts of each class.
    """

    pairs: Sequence[tuple[str, str, int, int]]
    rows: Sequence[tuple[str, int, Sequence[float]]]
    accuracy: float
    templates: int


@dataclass(frozen=True, kw_only=True)
class Map:
    """Both modalities in two dimensions, which explain a share of the variance; `gap` as in
    `modality_gap`."""

    title: str
    images: Float[np.ndarray, "n 2"]
    texts: Float[np.ndarray, "n 2"]
    explained: float
    gap: float


@dataclass(frozen=True, kw_only=True)
class Look:
    """A run's model on the examples.

    Attributes:
        state: The step of the model, and its alpha if fine-tuning chose one.
        space: Space of the prototypes: projections, or features.
        number: Number of prototypes of each modality.
        prototypes: Those shown, by modality.
        retrieval: Queries and answers, by direction.
        grouping: The measures of `grouping.measure`, by space.
    """

    examples: Examples
    state: str
    space: str
    number: int
    prototypes: Mapping[str, Sequence[Prototype]]
    retrieval: Mapping[str, Retrieval]
    confusions: Confusions | None
    maps: Sequence[Map]
    grouping: Mapping[str, Mapping[str, float]]


def look_at(
    examples: Examples,
    config: Config,
    checkpoints: Sequence[Path],
    *,
    seed: int,
    device: torch.device,
    firsts: dict[str, Map],
) -> Look:
    """Embed the examples with a run's model, and find what to show.

    Args:
        firsts: Maps of these examples before training, which runs of one start share. A new one is
            added.

    Raises:
        ValueError: There is no checkpoint, it is damaged, or the model has diverged.
    """
    if not checkpoints:
        raise ValueError("it has no checkpoint")
    newest = saved.find_checkpoint(checkpoints[-1])
    state = f"step {step_of(newest):,}"
    # Fine-tuning chooses weights between its start and its end.
    chosen = saved.find_checkpoint(newest.parents[1])
    if chosen == newest.parents[1]:
        state += f", alpha {read_json(chosen / saved.MODEL).get('alpha', 1):g}"
    model, transform, tokenizer = loading.load(chosen)
    assert isinstance(model, ProtoCLIP)
    project = config.uses_prototypes
    spaces = embed_examples(model, transform, tokenizer, examples, project=project, device=device)
    features, space = spaces["features"], "projections" if "projections" in spaces else "features"
    count = len(examples.images)
    most = config.prototypes.number or count  # an edited config.toml may lack the number
    number = max(2, min(most, count // PAIRS_PER_PROTOTYPE))
    num_groups = max(2, min(most, count // PAIRS_PER_GROUP))
    several = examples.classes is not None and examples.classes.ndim != 1  # of each image
    classes = None if several else examples.classes
    encoder, captions = make_encoder(model, transform, tokenizer), examples.captions
    drawn = np.sort(np.random.default_rng(seed).permutation(count)[:ON_MAP])
    end = make_map(features, rows=torch.from_numpy(drawn), title=f"After {state}")
    return Look(
        examples=examples,
        state=state,
        space=space,
        number=number,
        prototypes=find_prototypes(**spaces[space], number=number, captions=captions, seed=seed),
        retrieval=retrieve(
            **features,
            captions=captions,
            groups=examples.groups,
            content=examples.images,
            seed=seed,
        ),
        confusions=classify(encoder, examples, features["images"]),
        maps=[
            *map_before(config, checkpoints, examples, rows=drawn, device=device, firsts=firsts),
            end,
        ],
        grouping={
            name: examples.measure_grouping(rows, num_groups, classes=classes, seed=seed)[0]
            for name, rows in spaces.items()
        },
    )


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


# Maps


def map_before(
    config: Config,
    checkpoints: Sequence[Path],
    examples: Examples,
    *,
    rows: Int[np.ndarray, " m"],
    device: torch.device,
    firsts: dict[str, Map],
) -> list[Map]:
    """The map before training, with the weights of the run's seed; else that of an early step."""
    title = "Before training"
    if any(map(saved.is_aligned, checkpoints[-1:])):
        title = "Random heads, before the closed form"  # training starts from the closed form
    start = repr((config.model, config.run.seed, title))
    if start in firsts:
        return [firsts[start]]
    some = Examples(
        name=examples.name,
        images=[examples.images[row] for row in rows],
        captions=[examples.captions[row] for row in rows],
    )
    every = torch.arange(len(rows))
    try:
        model = loading.model(config.model, seed=config.run.seed).eval()
        transform, tokenizer = loading.evaluation_transform(model), loading.tokenizer(config.model)
        spaces = embed_examples(model, transform, tokenizer, some, project=False, device=device)
        firsts[start] = make_map(spaces["features"], rows=every, title=title)
        return [firsts[start]]
    except (ValueError, OSError):  # its start is gone
        if len(checkpoints) < 2:
            return []
    spaces = embed_checkpoint(checkpoints[0], some, project=False, device=device)
    title = f"After step {step_of(checkpoints[0]):,}"
    return [make_map(spaces["features"], rows=every, title=title)]


def make_map(
    features: Mapping[str, Float[Tensor, "n d"]], *, rows: Int[Tensor, " m"], title: str
) -> Map:
    """The two directions in which images and texts together vary most (PCA)."""
    images, texts = features["images"][rows], features["texts"][rows]
    pca = PCA(n_components=2, random_state=0)
    points = pca.fit_transform(torch.cat([images, texts]).double().numpy())
    if points[: len(images), 0].mean() > 0:  # the sign of a component is free: images to the left
        points[:, 0] *= -1
    return Map(
        title=title,
        images=points[: len(images)],
        texts=points[len(images) :],
        explained=float(np.nan_to_num(pca.explained_variance_ratio_.sum())),
        gap=modality_gap(images, texts)["gap"],
    )


# Prototypes


def find_prototypes(
    images: Float[Tensor, "n p"],
    texts: Float[Tensor, "n p"],
    *,
    number: int,
    captions: Sequence[str],
    seed: int,
) -> dict[str, list[Prototype]]:
    """Prototypes of each modality by K-means: the largest, the tightest, and the most mixed.

    The other modality's side of a prototype is the mean over its pairs, as in back-translation.
    """
    spaces, chosen = {"image": images, "text": texts}, dict[str, list[Prototype]]()
    clusters = {
        m: kmeans(rows, number, iterations=ITERATIONS, seed=seed) for m, rows in spaces.items()
    }
    for modality, other in zip(MODALITIES, reversed(MODALITIES), strict=True):
        assignments, partner = clusters[modality].assignments, clusters[other].assignments
        sides = {
            modality: clusters[modality].centroids,
            other: back_translate(assignments, spaces[other], number),
        }
        near = {m: spaces[m] @ F.normalize(sides[m], dim=1).T for m in MODALITIES}
        sizes, tightness, together = describe_groups(assignments, partner, near[modality])
        chosen[modality] = []
        for index, kinds in choose_prototypes(sizes, tightness, together).items():
            nearest = [captions[row] for row in best_first(near["text"][:, index])]
            prototype = Prototype(
                kind=", ".join(kinds),
                size=int(sizes[index]),
                tightness=float(tightness[index]),
                together=float(together[index]),
                rows=best_first(near["image"][:, index])[:NEAREST_IMAGES],
                captions=list(dict.fromkeys(nearest))[:NEAREST_CAPTIONS],
            )
            chosen[modality].append(prototype)
    return chosen


def describe_groups(
    assignments: Int[Tensor, " n"], partner: Int[Tensor, " n"], near: Float[Tensor, "n k"]
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Size, tightness and `together` of each prototype; 0 for an empty one."""
    number = near.shape[1]
    shared = torch.bincount(assignments * number + partner, minlength=number * number).view(
        number, number
    )
    sizes = shared.sum(dim=1).float()
    cosines = near.gather(1, assignments[:, None])[:, 0]
    summed = torch.zeros(number).index_add_(0, assignments, cosines)
    return sizes, summed / sizes.clamp(min=1), shared.amax(dim=1) / sizes.clamp(min=1)


def choose_prototypes(
    sizes: Float[Tensor, " k"], tightness: Float[Tensor, " k"], together: Float[Tensor, " k"]
) -> dict[int, list[str]]:
    """The prototypes to show, each with all reasons to show it."""
    enough, never = sizes >= min(FEWEST_MEMBERS, float(sizes.max())), float("-inf")
    scores = {
        "largest": sizes.masked_fill(sizes == 0, never),
        "tightest": tightness.masked_fill(~enough | (sizes == 0), never),
        "most mixed": (-together).masked_fill(~enough | (sizes == 0), never),
    }
    chosen: dict[int, list[str]] = {}
    for kind, values in scores.items():
        for index in best_first(values)[:PICKS]:
            if values[index] > never:
                chosen.setdefault(index, []).append(kind)
    return chosen


def best_first(scores: Float[Tensor, " n"]) -> list[int]:
    order: list[int] = scores.argsort(descending=True, stable=True).tolist()
    return order


# Retrieval


def retrieve(
    images: Float[Tensor, "n d"],
    texts: Float[Tensor, "n d"],
    *,
    captions: Sequence[str],
    groups: Sequence[int] | None = None,
    content: Sequence[Hashable] | None = None,
    seed: int,
) -> dict[str, Retrieval]:
    """The first right and the first wrong answers of each direction.

    Queries are all images and all different captions, in an order that depends on `seed` alone, so
    two models are asked the same questions.

    Args:
        images, texts: Unit-norm rows of pairs.
        captions, groups, content: One of each a pair; `captions_of` finds the right answers by
            them.
    """
    pairs = captions_of([(caption,) for caption in captions], [""] * len(captions), groups, content)
    questions = list(dict.fromkeys(pairs.texts))  # in the order of their numbers
    row_of = {caption: row for row, caption in enumerate(captions)}
    similarity = images[pairs.rows] @ texts[[row_of[text] for text in questions]].T
    fits = torch.zeros(similarity.shape, dtype=torch.bool)
    fits[pairs.matches[0], pairs.matches[1]] = True

    def answer_with_texts(image: int, rank: int, top: Sequence[int]) -> Answer:
        row = pairs.rows[image]
        answers = [(questions[text], bool(fits[image, text])) for text in top]
        return Answer(row=row, caption=captions[row], rank=rank, captions=answers)

    def answer_with_images(text: int, rank: int, top: Sequence[int]) -> Answer:
        answers = [(pairs.rows[image], bool(fits[image, text])) for image in top]
        return Answer(row=None, caption=questions[text], rank=rank, rows=answers)

    by_direction = {}
    for way, answer, scores, right in (
        ("image to text", answer_with_texts, similarity, fits),
        ("text to image", answer_with_images, similarity.T, fits.T),
    ):
        best = scores.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
        # Equal similarities count against the model, as in the recalls.
        ranks = ((scores >= best) & ~right).sum(dim=1) + 1
        order = np.random.default_rng(seed).permutation(len(scores)).tolist()
        right_ones, wrong_ones = (
            [
                answer(query, int(ranks[query]), best_first(scores[query])[:ANSWERS])
                for query in [query for query in order if (ranks[query] == 1) == is_right][:QUERIES]
            ]
            for is_right in (True, False)
        )
        share = float((ranks == 1).double().mean())
        by_direction[way] = Retrieval(right=right_ones, wrong=wrong_ones, share=share)
    return by_direction


# Confusions


def classify(
    encoder: Encoder, examples: Examples, images: Float[Tensor, "n d"]
) -> Confusions | None:
    """Zero-shot classification of the examples; None unless each has one class."""
    classes, names = examples.classes, list(examples.class_names)
    if classes is None or classes.ndim != 1 or len(names) < 2:
        return None
    templates = list(examples.templates)[: max(1, MOST_PROMPTS // len(names))]
    texts = encoder.texts(prompts(names, templates), stage="class names")
    classifier = zero_shot_classifier(texts.view(len(names), len(templates), -1))
    return count_confusions(classes, (images @ classifier.T).argmax(dim=1), names, len(templates))


def count_confusions(
    classes: Int[Tensor, " n"], predicted: Int[Tensor, " n"], names: Sequence[str], templates: int
) -> Confusions:
    """The most frequent confusions, and the confusion matrix of the classes in them."""
    sizes = Counter(classes.tolist())
    counts = Counter(zip(classes.tolist(), predicted.tolist(), strict=True))
    wrong = [pair for pair in counts if pair[0] != pair[1]]
    wrong.sort(key=lambda pair: (-counts[pair], pair))
    most = list(dict.fromkeys(number for pair in wrong for number in pair))[:CONFUSED]
    rows = []
    for one in most:
        shares = [counts[one, other] / max(1, sizes[one]) for other in most]
        others = max(0.0, 1 - sum(shares)) if sizes[one] else 0.0
        rows.append((names[one], sizes[one], [*shares, others]))
    return Confusions(
        pairs=[
            (names[one], names[other], counts[one, other], sizes[one])
            for one, other in wrong[:CONFUSED]
        ],
        rows=rows,
        accuracy=float((classes == predicted).double().mean()),
        templates=templates,
    )
