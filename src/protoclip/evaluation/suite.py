"""The evaluation suite: every metric of one model on one data set."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from protoclip.data.pairs import ImageTextPairs
from protoclip.distributed.collectives import (
    all_gather,
    all_gather_object,
    raise_on_all_ranks,
    rank,
    world_size,
)
from protoclip.evaluation.clustering import agreement, class_clusters
from protoclip.evaluation.datasets import EvaluationData
from protoclip.evaluation.geometry import modality_gap
from protoclip.evaluation.knn import knn_predict
from protoclip.evaluation.linear_probe import best_linear_probe
from protoclip.evaluation.retrieval import best_relevant_rank, share_within
from protoclip.evaluation.samples import SampleResults
from protoclip.evaluation.zero_shot import class_features, zero_shot_ranks

ZERO_SHOT_KS = (1, 5)
RETRIEVAL_KS = (1, 5, 10)

Progress = Callable[[str, int, int], None]
Item = TypeVar("Item")
# The metrics of a stage by name, and what each sample has by column of `SampleResults`.
Measured = tuple[dict[str, float], dict[str, Tensor]]


@runtime_checkable
class ImageTextModel(Protocol):
    """What the suite asks of a model: a module with the two encoders."""

    def encode_image(self, images: Tensor, normalize: bool = ...) -> Tensor: ...
    def encode_text(self, tokens: Tensor, normalize: bool = ...) -> Tensor: ...
    def eval(self) -> Any: ...
    def modules(self) -> Iterator[nn.Module]: ...


@dataclass(frozen=True, kw_only=True)
class SuiteFeatures:
    """All that the metrics need of a model; unit-norm rows on the CPU."""

    images: Mapping[str, Float[Tensor, "_ d"]]
    """By split: `train`, `validation` and the split that is measured."""
    captions: Float[Tensor, "t d"]
    """Of the held-out split's distinct captions."""
    names: Float[Tensor, "c d"]
    """Class features of the held-out split's concept names."""
    classes: Float[Tensor, "k d"]
    """Class features of the data set's class names."""


def evaluate(
    model: ImageTextModel,
    image_transform: Callable[[Image.Image], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    data: EvaluationData,
    *,
    split: str = "test",
    device: torch.device | str,
    batch_size: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """The metrics of `evaluate_samples`, which has the same arguments, without its samples."""
    return evaluate_samples(
        model,
        image_transform,
        tokenizer,
        data,
        split=split,
        device=device,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )[0]


def evaluate_samples(
    model: ImageTextModel,
    image_transform: Callable[[Image.Image], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    data: EvaluationData,
    *,
    split: str = "test",
    device: torch.device | str,
    batch_size: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[dict[str, float], SampleResults]:
    """Measure a model on a held-out split: the metrics, and what was found of each sample.

    | key after `eval/<data>/` | what |
    |---|---|
    | `zero_shot/acc{1,5}` | a picture's concept among the concept names of the split |
    | `zero_shot_subgroup/acc{1,5}` | its class among the class names of the data set |
    | `retrieval/{image_to_text,text_to_image}@{1,5,10}` | among the split's distinct captions |
    | `linear_probe/acc1`, `knn/acc1` | its class, learnt from the image features of `train` |
    | `clustering/{ami,ari}` | K-means of the image features against the classes |
    | `modality_gap/{gap,alignment,uniformity_image,uniformity_text}` | geometry of the pairs |

    Concepts of an equal name are one class. Prompts are the bare names, and class names with
    spaces for hyphens. Fractions are 0-1. Equal inputs give equal results on one machine.

    Collective where several processes train: each holds the same model and calls this with the same
    arguments. They share out the batches and the metrics, and each returns all of them, with the
    bits that one process alone would get.

    Args:
        model: On `device`. It is in evaluation mode meanwhile; the mode of each of its modules is
            restored.
        image_transform: Evaluation view of a picture, `(3, h, w)`.
        tokenizer: Tokens of a list of strings, `(b, c)`.
        data: The data set.
        split: `test`, with the linear probe's strength chosen on `validation`; or `validation` for
            everything, where the probe is optimistic: for tuning only.
        device: Where the towers run, of which each process has its own. The metrics are computed on
            the CPU.
        batch_size: Pictures or texts of a forward pass.
        seed: Seed of the clustering's starts.
        progress: Called with a stage, and how much of how much of it is done; by rank 0 alone,
            whose share stands for all.

    Raises:
        ValueError: A setting out of range, or features that are not finite; in every process.
    """
    if split not in ("validation", "test") or batch_size < 1:
        raise ValueError(
            f"split={split!r}, batch_size={batch_size}: choose 'validation' or 'test', and >= 1"
        )
    shown = progress if rank() == 0 else None
    report = shown or (lambda stage, done, total: None)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        features = extract(
            model,
            image_transform,
            tokenizer,
            data,
            split=split,
            device=device,
            batch_size=batch_size,
            progress=report,
        )
    finally:
        # One by one: a locked tower stays in evaluation mode inside a model that trains.
        for module, training in modes:
            module.training = training
    return measure(features, data, split=split, seed=seed, progress=report)


def extract(
    model: ImageTextModel,
    image_transform: Callable[[Image.Image], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    data: EvaluationData,
    *,
    split: str,
    device: torch.device | str,
    batch_size: int,
    progress: Progress,
) -> SuiteFeatures:
    """Encode the pictures, captions and names of `evaluate`, in the model's present mode."""

    def encode_images(of_split: str) -> Float[Tensor, "n d"]:
        pairs = data.split(of_split)

        def views(rows: Sequence[int]) -> Tensor:
            return torch.stack([image_transform(pairs.image(row)) for row in rows])

        return encode(
            partial(model.encode_image, normalize=True),
            views,
            range(len(pairs)),
            stage=f"{data.name} images: {of_split}",
            batch_size=batch_size,
            device=device,
            progress=progress,
        )

    def encode_texts(texts: list[str]) -> Float[Tensor, "n d"]:
        return encode(
            partial(model.encode_text, normalize=True),
            lambda strings: tokenizer(list(strings)),
            texts,
            stage=f"{data.name} texts",
            batch_size=batch_size,
            device=device,
            progress=progress,
        )

    held_out = data.split(split)
    captions, _, _ = distinct_captions(held_out, data.group_column)
    names = distinct(held_out.column(data.name_column))
    return SuiteFeatures(
        images={
            part: encode_images(part) for part in dict.fromkeys(("train", "validation", split))
        },
        captions=encode_texts(captions),
        names=class_features(encode_texts, [[name] for name in names]),
        classes=class_features(encode_texts, [[c.replace("-", " ")] for c in data.classes()]),
    )


def encode(
    forward: Callable[[Tensor], Tensor],
    inputs: Callable[[Sequence[Item]], Tensor],
    items: Sequence[Item],
    *,
    stage: str,
    batch_size: int,
    device: torch.device | str,
    progress: Progress,
) -> Float[Tensor, "n d"]:
    """Features of all items in float32 on the CPU, a batch at a time.

    Batch `k` is encoded by rank `k % world_size`: whatever the number of processes, a batch has the
    same rows, and so its features the same bits. A sharded model needs all processes in every pass,
    so one without a batch of its own passes the first item, for nothing.

    Args:
        forward: Inputs on the device to features `(b, d)`.
        inputs: Some of the items to what `forward` takes.
        items: What to encode.
        stage: What messages and progress call the items.
        batch_size, device, progress: See `evaluate`.

    Raises:
        ValueError: Features are not finite; in every process.
    """
    starts = range(0, len(items), batch_size)
    rows: list[Tensor] = []
    for done in range(0, len(starts), world_size()):
        mine = starts[done + rank() : done + rank() + 1]
        batch = items[mine[0] : mine[0] + batch_size] if mine else items[:1]
        ready = raise_on_all_ranks(partial(inputs, batch)).to(device)
        with torch.inference_mode():
            features = raise_on_all_ranks(partial(forward, ready)).float()
        rows.append(all_gather(features if mine else features[:0]).cpu())
        progress(stage, min((done + world_size()) * batch_size, len(items)), len(items))
    encoded = torch.cat(rows or [torch.zeros(0, 0)])

    def require_finite() -> None:
        if not bool(torch.isfinite(encoded).all()):
            raise ValueError(f"{stage}: the model's features are not finite; it has diverged")

    raise_on_all_ranks(require_finite)
    return encoded


def measure(
    features: SuiteFeatures,
    data: EvaluationData,
    *,
    split: str,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, float], SampleResults]:
    """The results of `evaluate_samples` from features; stage `i` is computed by rank
    `i % world_size`."""
    held_out = data.split(split)
    images = features.images[split]
    labels = {
        part: indices(data.split(part).column(data.class_column), data.classes())
        for part in features.images
    }
    names = held_out.column(data.name_column)
    concepts = held_out.column(data.group_column)
    captions, caption_groups, caption_of_row = distinct_captions(held_out, data.group_column)
    text_groups = indices(caption_groups, distinct(concepts))
    image_groups = indices(concepts, distinct(concepts))

    def ranks(class_features: Tensor, labels_: Tensor, column: str) -> Measured:
        found = zero_shot_ranks(images, class_features, labels_)
        return {f"acc{k}": share_within(found, k) for k in ZERO_SHOT_KS}, {column: found}

    def retrieval() -> Measured:
        ways = {
            "image_to_text": best_relevant_rank(
                images, features.captions, image_groups, text_groups
            ),
            "text_to_image": best_relevant_rank(
                features.captions, images, text_groups, image_groups
            ),
        }
        recalls = {
            f"{way}@{k}": share_within(found, k)
            for way, found in ways.items()
            for k in RETRIEVAL_KS
        }
        return recalls, {f"{way}_rank": found for way, found in ways.items()}

    def right(predictions: Tensor, column: str) -> Measured:
        correct = predictions == labels[split]
        return {"acc1": float(correct.double().mean())}, {column: correct}

    def probe() -> Measured:
        found = best_linear_probe(
            features.images["train"],
            labels["train"],
            features.images["validation"],
            labels["validation"],
        )
        return right(found.predict(images), "linear_probe_correct")

    def neighbours() -> Measured:
        predictions = knn_predict(features.images["train"], labels["train"], images)
        return right(predictions, "knn_correct")

    def clusters() -> Measured:
        found = class_clusters(images, labels[split], seed=seed)
        return agreement(labels[split].numpy(), found.numpy()), {
            "cluster": found,
            "class": labels[split],
        }

    stages: dict[str, Callable[[], Measured]] = {
        "zero_shot": lambda: ranks(
            features.names, indices(names, distinct(names)), "zero_shot_rank"
        ),
        "zero_shot_subgroup": lambda: ranks(
            features.classes, labels[split], "zero_shot_subgroup_rank"
        ),
        "retrieval": retrieval,
        "linear_probe": probe,
        "knn": neighbours,
        "clustering": clusters,
        "modality_gap": lambda: (
            modality_gap(images, features.captions[torch.tensor(caption_of_row)]),
            {},
        ),
    }

    def measure_share() -> dict[str, Measured]:
        share = {}
        for number in range(rank(), len(stages), world_size()):
            stage = list(stages)[number]
            share[stage] = stages[stage]()
            progress(f"{data.name} metrics", min(number + world_size(), len(stages)), len(stages))
        return share

    shares = all_gather_object(raise_on_all_ranks(measure_share))
    found = {stage: of for share in shares for stage, of in share.items()}
    metrics = {
        f"eval/{data.name}/{stage}/{metric}": value
        for stage in stages
        for metric, value in found[stage][0].items()
    }
    samples = SampleResults(
        image_ids=list(held_out.sample_ids()),
        text_ids=[f"{group}: {text}" for text, group in zip(captions, caption_groups, strict=True)],
        columns={name: rows.numpy() for stage in stages for name, rows in found[stage][1].items()},
    )
    return metrics, samples


def metric_names(data: str) -> list[str]:
    """The keys of `evaluate` on a data set of that name, in their order."""
    metrics = [
        *(f"zero_shot/acc{k}" for k in ZERO_SHOT_KS),
        *(f"zero_shot_subgroup/acc{k}" for k in ZERO_SHOT_KS),
        *(f"retrieval/image_to_text@{k}" for k in RETRIEVAL_KS),
        *(f"retrieval/text_to_image@{k}" for k in RETRIEVAL_KS),
        *("linear_probe/acc1", "knn/acc1", "clustering/ami", "clustering/ari"),
        *("modality_gap/gap", "modality_gap/alignment"),
        *("modality_gap/uniformity_image", "modality_gap/uniformity_text"),
    ]
    return [f"eval/{data}/{metric}" for metric in metrics]


def chance_levels(data: EvaluationData, split: str = "test") -> dict[str, float]:
    """What a model scores whose features say nothing, under the keys of `evaluate`.

    Zero-shot and retrieval: the exact expectation over random rankings, for retrieval
    `1 - C(n - r, k) / C(n, k)` with `r` relevant among `n` candidates. Linear probe and nearest
    neighbours: the share of the class most frequent in `train`, the best answer without looking.
    Clustering: 0, what the adjustment for chance makes of it.
    """
    held_out = data.split(split)
    names = distinct(held_out.column(data.name_column))
    _, caption_groups, _ = distinct_captions(held_out, data.group_column)
    images_of, captions_of = Counter(held_out.column(data.group_column)), Counter(caption_groups)
    frequent, _ = Counter(data.train.column(data.class_column)).most_common(1)[0]
    blind = float((held_out.column(data.class_column) == frequent).mean())

    levels = {}
    for k in ZERO_SHOT_KS:
        levels[f"zero_shot/acc{k}"] = min(1.0, k / len(names))
        levels[f"zero_shot_subgroup/acc{k}"] = min(1.0, k / len(data.classes()))
    for k in RETRIEVAL_KS:
        levels[f"retrieval/image_to_text@{k}"] = chance_recall(images_of, captions_of, k)
        levels[f"retrieval/text_to_image@{k}"] = chance_recall(captions_of, images_of, k)
    levels |= {"linear_probe/acc1": blind, "knn/acc1": blind}
    levels |= {"clustering/ami": 0.0, "clustering/ari": 0.0}
    return {f"eval/{data.name}/{key}": level for key, level in levels.items()}


def chance_recall(queries_of: Counter[str], candidates_of: Counter[str], k: int) -> float:
    """Expected recall at `k` of a random ranking, from the counts of each group."""
    total = candidates_of.total()
    ways = math.comb(total, min(k, total))
    recalled = sum(
        count * (1 - math.comb(total - candidates_of[group], min(k, total)) / ways)
        for group, count in queries_of.items()
    )
    return recalled / queries_of.total()


def distinct(values: Iterable[str]) -> list[str]:
    return sorted(set(values))


def indices(values: Iterable[str], ordered: Sequence[str]) -> Int[Tensor, " n"]:
    """Position of each value among the distinct, ordered ones."""
    position = {value: index for index, value in enumerate(ordered)}
    return torch.tensor([position[value] for value in values])


def distinct_captions(
    pairs: ImageTextPairs, group_column: str
) -> tuple[list[str], list[str], list[int]]:
    """Each caption of a group once: captions, their groups, and which one each row has."""
    position: dict[tuple[str, str], int] = {}
    of_row = [
        position.setdefault((pairs.caption(row), group), len(position))
        for row, group in enumerate(pairs.column(group_column))
    ]
    return [caption for caption, _ in position], [group for _, group in position], of_row
