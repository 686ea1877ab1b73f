"""What a model makes of example pairs: prototypes, retrieval, confusions and maps.

Charts of it are drawn in `figures.py`, and all pairs of a source are shown by `explore/`.
"""

import io
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from sklearn.decomposition import PCA
from torch import Tensor

from protoclip.config import Config
from protoclip.data.decode import decode
from protoclip.data.pairs import MAX_IMAGE_PIXELS
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
    embed,
    embed_with,
    keeping_encoder,
)

PAIRS_PER_PROTOTYPE = 20  # in the gallery, in the mean
FEWEST_MEMBERS = 5  # of a prototype that counts as tight or mixed
ITERATIONS = 20  # of K-means
PICKS = 2  # prototypes of each kind
NEAREST_IMAGES, NEAREST_CAPTIONS = 6, 4
QUERIES, ANSWERS = 3, 4  # right ones and wrong ones each way, and what is shown of each answer
MOST_PROMPTS = 4000  # that a zero-shot classifier is made of
CONFUSED = 8  # classes in the table of confusions
ON_MAP = 300  # pairs
THUMBNAIL = 96  # pixels
KINDS = ("largest", "tightest", "most mixed")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image of the examples, by row, and the caption that it came with."""

    row: int
    caption: str


@dataclass(frozen=True, kw_only=True)
class Prototype:
    """A prototype with what lies nearest to it in both modalities.

    Attributes:
        kind: Each of `KINDS` that is true of it, as `largest, tightest`.
        size: Pairs whose image (or text) is nearest to it.
        tightness: Mean cosine of its members to it.
        together: Largest share of its pairs that share a prototype in the other modality.
    """

    kind: str
    size: int
    tightness: float
    together: float
    images: Sequence[Picture]
    captions: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A query and the nearest answers, best first; `rank` counts from 1.

    The query of image-to-text is `image`, and its answers are captions.
    """

    image: Picture | None
    caption: str
    rank: int
    images: Sequence[tuple[Picture, bool]] = ()
    captions: Sequence[tuple[str, bool]] = ()


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Right and wrong answers of one direction, and the share of right ones."""

    right: Sequence[Answer]
    wrong: Sequence[Answer]
    share: float


@dataclass(frozen=True, kw_only=True)
class Confusions:
    """The classes that are confused most: shares of the images of each row's class."""

    pairs: Sequence[tuple[str, str, int, int]]  # class, taken for, how often, of how many
    classes: Sequence[str]
    sizes: Sequence[int]  # images of each
    shares: Sequence[Sequence[float]]
    accuracy: float
    templates: int  # prompts of each class


@dataclass(frozen=True, kw_only=True)
class Map:
    """Both modalities in two dimensions, `gap` as in `modality_gap`."""

    title: str
    images: Float[np.ndarray, "n 2"]
    texts: Float[np.ndarray, "n 2"]
    explained: float  # share of the variance
    gap: float


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a run's model makes of the examples."""

    state: str  # the step that the model is of, and its alpha if fine-tuning chose one
    space: str  # that the prototypes are of: projections, or features
    number: int  # of prototypes a modality
    prototypes: Mapping[str, Sequence[Prototype]]  # by modality
    retrieval: Mapping[str, Retrieval]  # by direction
    confusions: Confusions | None
    maps: Sequence[Map]
    grouping: Mapping[str, Mapping[str, float]]  # by space


def look(
    examples: Examples,
    config: Config,
    checkpoints: Sequence[Path],
    *,
    seed: int,
    device: torch.device,
    firsts: dict[str, Map],
) -> Look:
    """Embed the examples with a run's model, and show what lies where.

    Args:
        firsts: Maps of these examples before training, for runs that begin alike. It is added to.

    Raises:
        ValueError: There is no checkpoint, it is damaged, or the model has diverged.
    """
    if not checkpoints:
        raise ValueError("it has no checkpoint")
    newest, pairs = saved.find_checkpoint(checkpoints[-1]), examples
    state = f"step {step_of(newest):,}"
    # Fine-tuning chooses weights between its start and its end.
    chosen = saved.find_checkpoint(newest.parents[1])
    if chosen == newest.parents[1]:
        state += f", alpha {read_json(chosen / saved.MODEL).get('alpha', 1):g}"
    model, transform, tokenizer = loading.load(chosen)
    assert isinstance(model, ProtoCLIP)
    project = config.uses_prototypes
    spaces = embed_with(model, transform, tokenizer, pairs, project=project, device=device)
    space = "projections" if "projections" in spaces else "features"
    count = len(pairs.images)
    most = config.prototypes.number or count  # a config.toml that was emptied names none
    number = max(2, min(most, count // PAIRS_PER_PROTOTYPE))
    num_groups = max(2, min(most, count // PAIRS_PER_GROUP))
    classes = pairs.classes
    if classes is not None and classes.ndim != 1:  # several classes an image
        classes = None
    grouping = {
        name: pairs.measure_grouping(rows, num_groups, classes=classes, seed=seed)[0]
        for name, rows in spaces.items()
    }
    features = spaces["features"]
    drawn = np.sort(np.random.default_rng(seed).permutation(count)[:ON_MAP])
    maps = [map_of(features, rows=torch.from_numpy(drawn), title=f"After {state}")]
    before = first_model(config, checkpoints, pairs, rows=drawn, device=device, firsts=firsts)
    return Look(
        state=state,
        space=space,
        number=number,
        prototypes=gallery(**spaces[space], number=number, captions=pairs.captions, seed=seed),
        retrieval=retrieval_examples(
            **features,
            captions=pairs.captions,
            groups=pairs.groups,
            content=pairs.images,
            seed=seed,
        ),
        confusions=confusions(
            keeping_encoder(model, transform, tokenizer), examples, features["images"]
        ),
        maps=[*before, *maps],
        grouping=grouping,
    )


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def first_model(
    config: Config,
    checkpoints: Sequence[Path],
    pairs: Examples,
    *,
    rows: Int[np.ndarray, " m"],
    device: torch.device,
    firsts: dict[str, Map],
) -> list[Map]:
    """The map before training, with the weights that the run's seed gave; else of an early step."""
    title = "Before training"
    if config.align.init == "cca" and any(map(saved.is_aligned, checkpoints[-1:])):
        title = "Random heads, before the closed form"  # from which training starts
    start = repr((config.model, config.run.seed, title))
    if start in firsts:
        return [firsts[start]]
    chosen = Examples(
        name=pairs.name,
        images=[pairs.images[row] for row in rows],
        captions=[pairs.captions[row] for row in rows],
    )
    every = torch.arange(len(rows))
    try:
        model = loading.model(config.model, seed=config.run.seed).eval()
        transform, tokenizer = loading.evaluation_transform(model), loading.tokenizer(config.model)
        spaces = embed_with(model, transform, tokenizer, chosen, project=False, device=device)
        firsts[start] = map_of(spaces["features"], rows=every, title=title)
        return [firsts[start]]
    except (ValueError, OSError):  # what it started from is gone
        if len(checkpoints) < 2:
            return []
    spaces = embed(checkpoints[0], chosen, project=False, device=device)
    title = f"After step {step_of(checkpoints[0]):,}"
    return [map_of(spaces["features"], rows=every, title=title)]


def map_of(
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


def gallery(
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
    spaces, gallery = {"image": images, "text": texts}, dict[str, list[Prototype]]()
    clusters = {
        m: kmeans(rows, number, iterations=ITERATIONS, seed=seed) for m, rows in spaces.items()
    }
    for modality, other in zip(MODALITIES, reversed(MODALITIES), strict=True):
        assigned, partner = clusters[modality].assignments, clusters[other].assignments
        sides = {
            modality: clusters[modality].centroids,
            other: back_translate(assigned, spaces[other], number),
        }
        near = {m: spaces[m] @ F.normalize(sides[m], dim=1).T for m in MODALITIES}
        sizes, tightness, together = describe(assigned, partner, near[modality])
        gallery[modality] = [
            Prototype(
                kind=kind,
                size=int(sizes[index]),
                tightness=float(tightness[index]),
                together=float(together[index]),
                images=[
                    Picture(row=row, caption=captions[row])
                    for row in best_first(near["image"][:, index])[:NEAREST_IMAGES]
                ],
                captions=different(captions, best_first(near["text"][:, index]))[:NEAREST_CAPTIONS],
            )
            for kind, index in chosen(sizes, tightness, together)
        ]
    return gallery


def describe(
    assigned: Int[Tensor, " n"], partner: Int[Tensor, " n"], near: Float[Tensor, "n k"]
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Size, tightness and `together` of each prototype; 0 for an empty one."""
    number = near.shape[1]
    shared = torch.bincount(assigned * number + partner, minlength=number * number).view(
        number, number
    )
    sizes = shared.sum(dim=1).float()
    cosines = near.gather(1, assigned[:, None])[:, 0]
    summed = torch.zeros(number).index_add_(0, assigned, cosines)
    return sizes, summed / sizes.clamp(min=1), shared.amax(dim=1) / sizes.clamp(min=1)


def chosen(
    sizes: Float[Tensor, " k"], tightness: Float[Tensor, " k"], together: Float[Tensor, " k"]
) -> list[tuple[str, int]]:
    """The prototypes to show, each once, with all kinds that are true of it."""
    enough = sizes >= min(FEWEST_MEMBERS, float(sizes.max()))
    never = torch.tensor(float("-inf"))
    scores = {
        "largest": sizes,
        "tightest": torch.where(enough, tightness, never),
        "most mixed": torch.where(enough, -together, never),
    }
    kinds: dict[int, list[str]] = {}
    for kind in KINDS:
        fitting = [
            index
            for index in best_first(scores[kind])
            if float(scores[kind][index]) > float("-inf") and sizes[index] > 0
        ]
        for index in fitting[:PICKS]:
            kinds.setdefault(index, []).append(kind)
    return [(", ".join(of), index) for index, of in kinds.items()]


def best_first(scores: Float[Tensor, " n"]) -> list[int]:
    order: list[int] = scores.argsort(descending=True, stable=True).tolist()
    return order


def different(captions: Sequence[str], rows: Sequence[int]) -> list[str]:
    """The captions of rows in their order, each text once."""
    return list(dict.fromkeys(captions[row] for row in rows))


def retrieval_examples(
    images: Float[Tensor, "n d"],
    texts: Float[Tensor, "n d"],
    *,
    captions: Sequence[str],
    groups: Sequence[int] | None = None,
    content: Sequence[Hashable] | None = None,
    seed: int,
) -> dict[str, Retrieval]:
    """The first right and the first wrong answers of each direction, in an order by `seed` alone.

    Every image is a query, and every different caption. So two models are asked the same questions
    in the same order.

    Args:
        images, texts: Unit-norm rows of pairs.
        captions, groups, content: Of each pair, as those of `captions_of`, by which an answer is
            right or not.
    """
    known = captions_of([(caption,) for caption in captions], [""] * len(captions), groups, content)
    asked = list(dict.fromkeys(known.texts))  # in the order of their numbers
    row_of = {caption: row for row, caption in enumerate(captions)}
    similarity = images[known.rows] @ texts[[row_of[text] for text in asked]].T
    fits = torch.zeros(similarity.shape, dtype=torch.bool)
    fits[known.matches[0], known.matches[1]] = True
    pictures = [Picture(row=row, caption=captions[row]) for row in known.rows]

    def to_text(image: int, rank: int, top: Sequence[int]) -> Answer:
        answers = [(asked[text], bool(fits[image, text])) for text in top]
        query = pictures[image]
        return Answer(image=query, caption=query.caption, rank=rank, captions=answers)

    def to_image(text: int, rank: int, top: Sequence[int]) -> Answer:
        answers = [(pictures[image], bool(fits[image, text])) for image in top]
        return Answer(image=None, caption=asked[text], rank=rank, images=answers)

    by_direction = {}
    for way, answer, scores, right in (
        ("image to text", to_text, similarity, fits),
        ("text to image", to_image, similarity.T, fits.T),
    ):
        best = scores.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
        # Equal similarities count against the model, as in the recalls.
        ranks = ((scores >= best) & ~right).sum(dim=1) + 1
        order = np.random.default_rng(seed).permutation(len(scores)).tolist()
        queries = (
            [query for query in order if ranks[query] == 1][:QUERIES],
            [query for query in order if ranks[query] > 1][:QUERIES],
        )
        right_ones, wrong_ones = (
            [answer(query, int(ranks[query]), best_first(scores[query])[:ANSWERS]) for query in of]
            for of in queries
        )
        share = float((ranks == 1).double().mean())
        by_direction[way] = Retrieval(right=right_ones, wrong=wrong_ones, share=share)
    return by_direction


def confusions(
    encoder: Encoder, examples: Examples, images: Float[Tensor, "n d"]
) -> Confusions | None:
    """Zero-shot classification of the examples; None if they do not have one class each."""
    classes, names = examples.classes, list(examples.class_names)
    if classes is None or classes.ndim != 1 or len(names) < 2:
        return None
    templates = list(examples.templates)[: max(1, MOST_PROMPTS // len(names))]
    texts = encoder.texts(prompts(names, templates), stage="class names")
    classifier = zero_shot_classifier(texts.view(len(names), len(templates), -1))
    return confused(classes, (images @ classifier.T).argmax(dim=1), names, len(templates))


def confused(
    classes: Int[Tensor, " n"], taken_for: Int[Tensor, " n"], names: Sequence[str], templates: int
) -> Confusions:
    """The most frequent confusions, and how all classes in them are taken for each other."""
    sizes = Counter(classes.tolist())
    counts = Counter(zip(classes.tolist(), taken_for.tolist(), strict=True))
    wrong = [pair for pair in counts if pair[0] != pair[1]]
    wrong.sort(key=lambda pair: (-counts[pair], pair))
    most = list(dict.fromkeys(number for pair in wrong for number in pair))[:CONFUSED]
    return Confusions(
        pairs=[
            (names[one], names[other], counts[one, other], sizes[one])
            for one, other in wrong[:CONFUSED]
        ],
        classes=[names[number] for number in most],
        sizes=[sizes[number] for number in most],
        shares=[[counts[one, other] / max(1, sizes[one]) for other in most] for one in most],
        accuracy=float((classes == taken_for).double().mean()),
        templates=templates,
    )


def thumbnail(encoded: bytes) -> bytes:
    """A small WebP of an image, for the page."""
    image = Image.fromarray(decode(encoded, max_pixels=MAX_IMAGE_PIXELS, at_least=THUMBNAIL))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=80)
    return buffer.getvalue()
