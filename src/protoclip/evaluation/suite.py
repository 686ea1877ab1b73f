"""The evaluation suite: every metric of one model on one data set."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from protoclip.distributed.collectives import (
    all_gather,
    all_gather_object,
    raise_on_all_ranks,
    rank,
    world_size,
)
from protoclip.evaluation import datasets
from protoclip.evaluation.clustering import clustering
from protoclip.evaluation.datasets import EvaluationData, distinct_captions, positions
from protoclip.evaluation.geometry import modality_gap
from protoclip.evaluation.knn import knn_predict
from protoclip.evaluation.linear_probe import best_linear_probe
from protoclip.evaluation.retrieval import best_relevant_rank
from protoclip.evaluation.samples import IMAGE_COLUMNS, MEANS, TEXT_COLUMNS, SampleResults
from protoclip.evaluation.zero_shot import class_features, zero_shot_ranks
from protoclip.models.protoclip import ProtoCLIP
from protoclip.progress import Progress

# Metrics that one stage of `measure` computes as a whole, beside the means over samples.
SCORES = {
    "clustering": ("ami", "ari"),
    "modality_gap": ("gap", "alignment", "uniformity_image", "uniformity_text"),
}

Item = TypeVar("Item")
Report = Callable[[str, int, int], None]  # a stage, how much of it is done, and its total
Transform = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]


def metric_names(data: str) -> list[str]:
    """The keys of `evaluate` on a data set of that name, in their order."""
    scores = [f"{stage}/{name}" for stage, names in SCORES.items() for name in names]
    return [f"eval/{data}/{metric}" for metric in (*MEANS, *scores)]


def evaluate(
    model: ProtoCLIP,
    transform: Transform,
    tokenizer: Tokenizer,
    *,
    split: Literal["validation", "test"],
    show: bool = True,
    samples_to: Path | None = None,
) -> dict[str, float]:
    """Measure a model on the bundled data's held-out concepts.

    | key after `eval/emoji/` | what |
    |---|---|
    | `zero_shot/acc{1,5}` | an image's concept among the concept names of the split |
    | `zero_shot_subgroup/acc{1,5}` | its class among the class names of the data set |
    | `retrieval/{image_to_text,text_to_image}@{1,5,10}` | among the split's distinct captions |
    | `linear_probe/acc1`, `knn/acc1` | its class, learnt from the image features of `train` |
    | `clustering/{ami,ari}` | K-means of the image features against the classes |
    | `modality_gap/{gap,alignment,uniformity_image,uniformity_text}` | geometry of the pairs |

    Prompts are the bare names. Accuracies are fractions from 0 to 1. All ranks call this with the
    same arguments, share the work, and return the same bits that one process would.

    Args:
        model: Runs on its own device, in evaluation mode; each module's mode is restored.
        transform: The evaluation transform: a PIL image to `(3, h, w)`.
        tokenizer: Captions to tokens `(b, c)`.
        split: `test`, with the linear probe's strength chosen on `validation`; or `validation` for
            tuning, where the probe is optimistic.
        show: Show progress.
        samples_to: Folder for the results of each sample; only a warning if it cannot be written.

    Raises:
        ValueError: The model's features are not finite; on every rank.
    """
    data = datasets.emoji()
    bars: dict[str, Progress] = {}

    def report(stage: str, done: int, total: int) -> None:
        if show and rank() == 0:
            bars.setdefault(stage, Progress(f"evaluate: {stage}", total)).update(done)

    features = extract(model, transform, tokenizer, data, split=split, report=report)
    metrics, samples = measure(features, data, split=split, report=report)
    if samples_to is not None and rank() == 0:
        path = samples_to / f"{data.name}-{split}.parquet"
        try:
            samples.write(path)
        except OSError as error:
            print(f"warning: {path}: not written ({error})", file=sys.stderr)
    return metrics


@dataclass(frozen=True, kw_only=True)
class SuiteFeatures:
    """Unit-norm features on the CPU, from which all metrics are computed."""

    images: Mapping[str, Float[Tensor, "_ d"]]  # by split: train, validation, the measured one
    captions: Float[Tensor, "t d"]  # distinct captions of the measured split
    names: Float[Tensor, "c d"]  # class features of its concept names
    classes: Float[Tensor, "k d"]  # class features of the data set's class names


def extract(
    model: ProtoCLIP,
    transform: Transform,
    tokenizer: Tokenizer,
    data: EvaluationData,
    *,
    split: str,
    batch_size: int = 256,
    report: Report,
) -> SuiteFeatures:
    """Encode the images, captions and names that `measure` needs."""
    device = next(model.parameters()).device
    encode_items = partial(encode, batch_size=batch_size, device=device, report=report)

    def encode_images(part: str) -> Float[Tensor, "n d"]:
        pairs = data.split(part)
        return encode_items(
            partial(model.encode_image, normalize=True),
            lambda rows: torch.stack([transform(pairs.image(row)) for row in rows]),
            range(len(pairs)),
            stage=f"{data.name} images: {part}",
        )

    def encode_texts(texts: list[str]) -> Float[Tensor, "n d"]:
        return encode_items(
            partial(model.encode_text, normalize=True),
            lambda batch: tokenizer(list(batch)),
            texts,
            stage=f"{data.name} texts",
        )

    names = sorted(set(data.split(split).column("label")))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return SuiteFeatures(
            images={p: encode_images(p) for p in dict.fromkeys(("train", "validation", split))},
            captions=encode_texts(distinct_captions(data.split(split))[0]),
            names=class_features(encode_texts, [[name] for name in names]),
            classes=class_features(encode_texts, [[c.replace("-", " ")] for c in data.classes()]),
        )
    finally:
        # One by one: a locked tower stays in evaluation mode inside a model that trains.
        for module, training in modes:
            module.training = training


def encode(
    forward: Callable[[Tensor], Tensor],
    inputs: Callable[[Sequence[Item]], Tensor],
    items: Sequence[Item],
    *,
    stage: str,
    batch_size: int,
    device: torch.device | str,
    report: Report,
) -> Float[Tensor, "n d"]:
    """Features of all items in float32 on the CPU; the ranks take turns at the batches.

    A batch has the same rows, and so its features the same bits, for any number of ranks. A sharded
    forward is collective, so a rank without a batch of its own encodes the first item and drops it.
    """
    starts = range(0, len(items), batch_size)
    rows: list[Tensor] = []
    for done in range(0, len(starts), world_size()):
        own = starts[done + rank() : done + rank() + 1]
        batch = items[own[0] : own[0] + batch_size] if own else items[:1]
        ready = raise_on_all_ranks(partial(inputs, batch)).to(device)
        with torch.inference_mode():
            features = raise_on_all_ranks(partial(forward, ready)).float()
        rows.append(all_gather(features if own else features[:0]).cpu())
        report(stage, min((done + world_size()) * batch_size, len(items)), len(items))
    encoded = torch.cat(rows or [torch.zeros(0, 0)])

    def require_finite() -> None:
        if not bool(torch.isfinite(encoded).all()):
            raise ValueError(f"{stage}: the model's features are not finite; it has diverged")

    raise_on_all_ranks(require_finite)
    return encoded


def measure(
    features: SuiteFeatures, data: EvaluationData, *, split: str, report: Report
) -> tuple[dict[str, float], SampleResults]:
    """The metrics of `evaluate`, and the results of each sample. The ranks share the stages."""
    pairs = data.split(split)
    images, train, validation = (features.images[part] for part in (split, "train", "validation"))
    labels, train_labels = data.labels(split), data.labels("train")
    names, concepts = (pairs.column(column) for column in ("label", "concept"))
    own_name = positions(names, sorted(set(names)))
    captions, caption_concepts, caption_of_row = distinct_captions(pairs)
    groups = positions(concepts, sorted(set(concepts)))
    caption_groups = positions(caption_concepts, sorted(set(concepts)))

    def probe() -> Tensor:
        given = train, train_labels, validation, data.labels("validation")
        return best_linear_probe(*given).predict(images) == labels

    texts = features.captions
    stages: list[Callable[[], dict[str, Any]]] = [
        lambda: {"zero_shot_rank": zero_shot_ranks(images, features.names, own_name)},
        lambda: {"zero_shot_subgroup_rank": zero_shot_ranks(images, features.classes, labels)},
        lambda: {
            "image_to_text_rank": best_relevant_rank(images, texts, groups, caption_groups),
            "text_to_image_rank": best_relevant_rank(texts, images, caption_groups, groups),
        },
        lambda: {"linear_probe_correct": probe()},
        lambda: {"knn_correct": knn_predict(train, train_labels, images) == labels},
        lambda: {"class": labels, **clustering(images, labels)},
        lambda: {**modality_gap(images, texts[torch.tensor(caption_of_row)])},
    ]

    def measure_share() -> dict[str, Any]:
        share: dict[str, Any] = {}
        for number in range(rank(), len(stages), world_size()):
            share |= stages[number]()
            report(f"{data.name} metrics", min(number + world_size(), len(stages)), len(stages))
        return share

    found: dict[str, Any] = {}
    for share in all_gather_object(raise_on_all_ranks(measure_share)):
        found |= share
    text_ids = [f"{of}: {text}" for text, of in zip(captions, caption_concepts, strict=True)]
    ids = (np.array([*of], dtype=object) for of in (pairs.sample_ids(), text_ids))
    image_results, text_results = (
        {"sample_id": own, **{name: found[name].numpy() for name in columns}}
        for own, columns in zip(ids, (IMAGE_COLUMNS, TEXT_COLUMNS), strict=True)
    )
    samples = SampleResults(images=image_results, texts=text_results)
    values = [float(samples.values(metric).mean()) for metric in MEANS]
    values += [found[name] for names in SCORES.values() for name in names]
    return dict(zip(metric_names(data.name), values, strict=True)), samples
