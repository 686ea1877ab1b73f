"""Shows a model on example pairs: its retrieval, confusions and maps.

`explore/` shows all pairs of a source, and their prototypes.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.data.access import cache_folder
from protoclip.encode.features import Encoder, load_encoder
from protoclip.evaluation import geometry
from protoclip.evaluation.datasets import match_captions
from protoclip.evaluation.zero_shot import fill_templates, zero_shot_classifier
from protoclip.files import read_json
from protoclip.models import checkpoint, loading
from protoclip.models.protoclip import evaluation_transform
from protoclip.models.start import resolve_start
from protoclip.results.examples import PAIRS_PER_GROUP, Examples, embed_examples, step_of
from protoclip.results.read import RunFolder

QUERIES, ANSWERS = 3, 4  # right queries and wrong ones in each direction; answers to each query
MOST_PROMPTS = 4000  # for a zero-shot classifier
CONFUSED = 8  # classes in the table of confusions
ON_MAP = 300  # pairs


@dataclass(frozen=True, kw_only=True)
class Look:
    """A run's model on the examples."""

    examples: Examples
    state: str  # its step, and its alpha if fine-tuning chose one
    retrieval: "Mapping[str, tuple[Sequence[Answer], float]]"  # as `retrieve`
    confusions: Mapping[str, Any] | None  # as `count_confusions`
    maps: "Sequence[Map]"
    grouping: Mapping[str, Mapping[str, float]]  # measures by space


def look_at(run: RunFolder, examples: Examples, *, seed: int, device: torch.device) -> Look:
    """Embed the examples with a run's model, and find what to show."""
    config = run.config
    if not run.checkpoints:
        raise ValueError("it has no checkpoint")
    newest = checkpoint.find_checkpoint(run.checkpoints[-1])
    state = f"step {step_of(newest):,}"
    # Fine-tuning chooses weights between its start and its end.
    chosen = checkpoint.find_checkpoint(newest.parents[1])
    if chosen == newest.parents[1]:
        state += f", alpha {read_json(chosen / checkpoint.MODEL).get('alpha', 1):g}"
    encoder = load_encoder(chosen, device, workers=0, show=False)
    spaces = embed_examples(encoder, examples, project=config.uses_prototypes)
    features = spaces["features"]
    count = len(examples.images)
    most = config.prototypes.number or count
    num_groups = max(2, min(most, count // PAIRS_PER_GROUP))
    classes, names = examples.classes, list(examples.class_names)
    if classes is not None and classes.ndim != 1:  # several of each image
        classes = None
    confusions = None
    if classes is not None and len(names) > 1:
        templates = list(examples.templates)[: max(1, MOST_PROMPTS // len(names))]
        texts = encoder.encode_texts(fill_templates(names, templates), stage="class names")
        classifier = zero_shot_classifier(texts.view(len(names), len(templates), -1))
        predicted = (features["images"] @ classifier.T).argmax(dim=1)
        confusions = count_confusions(classes, predicted, names) | {"templates": len(templates)}
    pairs: dict[str, Any] = {
        "captions": examples.captions,
        "concepts": examples.groups,
        "content": examples.images,
        "seed": seed,
    }
    drawn = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(count)[:ON_MAP]))
    return Look(
        examples=examples,
        state=state,
        retrieval=retrieve(features["images"], features["texts"], **pairs),
        confusions=confusions,
        maps=[
            *map_before(run, examples, rows=drawn.tolist(), device=device),
            make_map(features, rows=drawn, title=f"After {state}"),
        ],
        grouping={
            name: geometry.measure(
                rows["images"], rows["texts"], **pairs, num_groups=num_groups, classes=classes
            )[0]
            for name, rows in spaces.items()
        },
    )


# Maps


@dataclass(frozen=True, kw_only=True)
class Map:
    """Both modalities in two dimensions, which explain a share of the variance; `gap` as in
    `modality_gap`."""

    title: str
    images: Float[np.ndarray, "n 2"]
    texts: Float[np.ndarray, "n 2"]
    explained: float
    gap: float


def map_before(
    run: RunFolder, examples: Examples, *, rows: Sequence[int], device: torch.device
) -> list[Map]:
    """The map before training, with the weights of the run's seed; none if its start is gone."""
    config, title = run.config, "Before training"
    if checkpoint.is_aligned(run.checkpoints[-1]):  # training starts from the closed form
        title = "Random heads, before the closed form"
    some = Examples(
        name=examples.name,
        images=[examples.images[row] for row in rows],
        captions=[examples.captions[row] for row in rows],
    )
    try:
        start = resolve_start(config.model)
        model = loading.build_model(start, seed=config.run.seed)
        tokenizer = start.tokenizer()
    except (ValueError, OSError):
        return []
    encoder = Encoder(
        model=loading.to_device(model, device).eval(),
        transform=evaluation_transform(model),
        tokenizer=tokenizer,
        workers=0,
        cache=cache_folder() / "features",
    )
    features = embed_examples(encoder, some, project=False)["features"]
    return [make_map(features, rows=torch.arange(len(rows)), title=title)]


def make_map(
    features: Mapping[str, Float[Tensor, "n d"]], *, rows: Int[Tensor, " m"], title: str
) -> Map:
    """The two directions in which images and texts together vary most (PCA)."""
    from sklearn.decomposition import PCA  # scikit-learn takes a second

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
        gap=geometry.modality_gap(images, texts)["gap"],
    )


# Retrieval


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A query, and the nearest answers with whether each is right, best first.

    From image to text the query is the image `row` of the examples, and its answers are captions;
    else `row` is None, and the answers are rows.
    """

    row: int | None
    caption: str  # the query, or that of its image
    rank: int  # of the first right answer, from 1
    answers: Sequence[tuple[Any, bool]]


def retrieve(
    images: Float[Tensor, "n d"],
    texts: Float[Tensor, "n d"],
    *,
    captions: Sequence[str],
    concepts: Sequence[int] | None = None,
    content: Sequence[Hashable] | None = None,
    seed: int,
) -> dict[str, tuple[list[Answer], float]]:
    """The first right and then the first wrong answers of each direction, as `match_captions`
    decides, and the share of right ones among all.

    Queries are all images and all different captions, in an order that depends on `seed` alone, so
    two models are asked the same questions.
    """
    pairs = match_captions(
        [(caption,) for caption in captions], [""] * len(captions), concepts, content
    )
    questions = list(dict.fromkeys(pairs.texts))  # in the order of their numbers
    row_of = {caption: row for row, caption in enumerate(captions)}
    similarity = images[pairs.rows] @ texts[[row_of[text] for text in questions]].T
    fits = torch.zeros(similarity.shape, dtype=torch.bool)
    fits[pairs.matches[0], pairs.matches[1]] = True
    by_direction = {}
    for way, scores, right in (
        ("image to text", similarity, fits),
        ("text to image", similarity.T, fits.T),
    ):
        asks_image = way == "image to text"
        best = scores.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
        # Equal similarities count against the model, as in the recalls.
        ranks = ((scores >= best) & ~right).sum(dim=1) + 1
        order = np.random.default_rng(seed).permutation(len(scores))
        is_right = (ranks == 1).numpy()
        answers = []
        for query in [*order[is_right[order]][:QUERIES], *order[~is_right[order]][:QUERIES]]:
            row = pairs.rows[query] if asks_image else None
            answer = Answer(
                row=row,
                caption=questions[query] if row is None else captions[row],
                rank=int(ranks[query]),
                answers=[
                    (questions[n] if asks_image else pairs.rows[n], bool(right[query, n]))
                    for n in best_first(scores[query])[:ANSWERS]
                ],
            )
            answers.append(answer)
        by_direction[way] = answers, float(is_right.mean())
    return by_direction


def best_first(scores: Float[Tensor, " n"]) -> list[int]:
    order: list[int] = scores.argsort(descending=True, stable=True).tolist()
    return order


# Confusions


def count_confusions(
    classes: Int[Tensor, " n"], predicted: Int[Tensor, " n"], names: Sequence[str]
) -> dict[str, Any]:
    """The classes that are confused most.

    Returns:
        `accuracy`; the most frequent confusions as `pairs`: true class, predicted class, number of
        such images and of all images of the class; and `rows` of the classes in them: class, number
        of its images, and shares of them by predicted class and of any other one.
    """
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
    pairs = [
        (names[one], names[two], counts[one, two], sizes[one]) for one, two in wrong[:CONFUSED]
    ]
    accuracy = float((classes == predicted).double().mean())
    return {"accuracy": accuracy, "pairs": pairs, "rows": rows}
