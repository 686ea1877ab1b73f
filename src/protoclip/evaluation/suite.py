"""The evaluation suite: every metric of one model on one data set."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
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
from protoclip.evaluation.retrieval import best_relevant_rank, zero_shot_ranks
from protoclip.evaluation.samples import IMAGE_COLUMNS, MEANS, TEXT_COLUMNS, SampleResults
from protoclip.models.protoclip import TowerPair
from protoclip.progress import Progress

# Metrics that one stage of `measure` computes as a whole, beside the means over samples.
SCORES = {
    "clustering": ("ami", "ari"),
    "modality_gap": ("gap", "alignment", "uniformity_image", "uniformity_text"),
}

Transform = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]


def metric_names(data: str) -> list[str]:
    """The keys of `evaluate` on a data set of that name, in their order."""
    scores = [f"{stage}/{name}" for stage, names in SCORES.items() for name in names]
    return [f"eval/{data}/{metric}" for metric in (*MEANS, *scores)]


def evaluate(
    model: TowerPair,
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
    | `linear_probe/acc1`, `knn/acc1` | its class, learned from the image features of `train` |
    | `clustering/{ami,ari}` | K-means of the image features against the classes |
    | `modality_gap/{gap,alignment,uniformity_image,uniformity_text}` | geometry of the pairs |

    Prompts are the bare names. Accuracies are fractions from 0 to 1. All ranks call this with the
    same arguments, share the work, and return the same bits that one process would.

    Args:
        model: Runs on its own device, in evaluation mode; each module's mode is restored.
        transform, tokenizer: A PIL image to `(3, h, w)`; captions to tokens `(b, c)`.
        split: `test`, with the linear probe's strength chosen on `validation`; or `validation` for
            tuning, where the probe is optimistic.
        show: Show progress.
        samples_to: Folder for the results of each sample; only a warning if it cannot be written.

    Raises:
        ValueError: The model's features are not finite; on every rank.
    """
    data = datasets.emoji()
    features = extract(model, transform, tokenizer, data, split=split, show=show)
    metrics, samples = measure(features, data, split=split, show=show)
    if samples_to is not None and rank() == 0:
        path = samples_to / f"{data.name}-{split}.parquet"
        try:
            samples.write(path)
        except OSError as error:
            print(f"warning: {path}: not written ({error})", file=sys.stderr)
    return metrics


def extract(
    model: TowerPair,
    transform: Transform,
    tokenizer: Tokenizer,
    data: EvaluationData,
    *,
    split: str,
    batch_size: int = 256,
    show: bool = False,
) -> dict[str, Float[Tensor, "_ d"]]:
    """The unit-norm features that `measure` needs, on the CPU: images by split (`train`,
    `validation` and the measured one), and the texts `captions`, `names` and `classes`.
    """
    device = next(model.parameters()).device
    encode_all = partial(encode, batch_size=batch_size, device=device, show=show)

    def encode_images(part: str) -> Float[Tensor, "n d"]:
        pairs = data.split(part)
        forward = partial(model.encode_image, normalize=True)
        return encode_all(
            forward,
            lambda rows: torch.stack([transform(pairs.image(row)) for row in rows]),
            range(len(pairs)),
            stage=f"{data.name} images: {part}",
        )

    def encode_texts(texts: list[str]) -> Float[Tensor, "n d"]:
        forward = partial(model.encode_text, normalize=True)
        return encode_all(forward, tokenizer, texts, stage=f"{data.name} texts")

    names = sorted(set(data.split(split).column("label")))
    classes = [name.replace("-", " ") for name in data.classes()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return {
            **{part: encode_images(part) for part in dict.fromkeys(("train", "validation", split))},
            "captions": encode_texts(distinct_captions(data.split(split))[0]),
            "names": F.normalize(encode_texts(names), dim=1),
            "classes": F.normalize(encode_texts(classes), dim=1),
        }
    finally:
        # One by one: a locked tower stays in evaluation mode inside a model that trains.
        for module, training in modes:
            module.training = training


def encode(
    forward: Callable[[Tensor], Tensor],
    inputs: Callable[[Any], Tensor],
    items: Sequence[Any],
    *,
    stage: str,
    batch_size: int,
    device: torch.device | str,
    show: bool = False,
) -> Float[Tensor, "n d"]:
    """Features of all items in float32 on the CPU; the ranks take turns at the batches.

    A batch has the same rows, and so its features the same bits, for any number of ranks. A sharded
    forward is collective, so a rank without a batch of its own encodes the first item and drops it.
    """
    progress = Progress(f"evaluate: {stage}", len(items)) if show and rank() == 0 else None
    starts = range(0, len(items), batch_size)
    rows: list[Tensor] = []
    for done in range(0, len(starts), world_size()):
        own = starts[done + rank() : done + rank() + 1]
        batch = items[own[0] : own[0] + batch_size] if own else items[:1]
        ready = raise_on_all_ranks(partial(inputs, batch)).to(device)
        with torch.inference_mode():
            features = raise_on_all_ranks(partial(forward, ready)).float()
        rows.append(all_gather(features if own else features[:0]).cpu())
        if progress:
            progress.update(min((done + world_size()) * batch_size, len(items)))
    encoded = torch.cat(rows or [torch.zeros(0, 0)])
    if not bool(torch.isfinite(encoded).all()):  # the same bits on every rank
        raise ValueError(f"{stage}: the model's features are not finite; it has diverged")
    return encoded


def measure(
    features: Mapping[str, Float[Tensor, "_ d"]],
    data: EvaluationData,
    *,
    split: str,
    show: bool = False,
) -> tuple[dict[str, float], SampleResults]:
    """The metrics of `evaluate`, and the results of each sample. The ranks share the stages."""
    pairs = data.split(split)
    images, train, validation = (features[part] for part in (split, "train", "validation"))
    texts = features["captions"]
    labels, train_labels = data.labels(split), data.labels("train")
    names, concepts = (pairs.column(column) for column in ("label", "concept"))
    own_name = positions(names, sorted(set(names)))
    captions, caption_concepts, caption_of_row = distinct_captions(pairs)
    groups = positions(concepts, sorted(set(concepts)))
    caption_groups = positions(caption_concepts, sorted(set(concepts)))
    to_fit = train, train_labels, validation, data.labels("validation")
    stages: list[Callable[[], dict[str, Any]]] = [
        lambda: {"zero_shot_rank": zero_shot_ranks(images, features["names"], own_name)},
        lambda: {"zero_shot_subgroup_rank": zero_shot_ranks(images, features["classes"], labels)},
        lambda: {
            "image_to_text_rank": best_relevant_rank(images, texts, groups, caption_groups),
            "text_to_image_rank": best_relevant_rank(texts, images, caption_groups, groups),
        },
        lambda: {"linear_probe_correct": best_linear_probe(*to_fit).predict(images) == labels},
        lambda: {"knn_correct": knn_predict(train, train_labels, images) == labels},
        lambda: {"class": labels, **clustering(images, labels)},
        lambda: dict[str, Any](modality_gap(images, texts[torch.tensor(caption_of_row)])),
    ]

    def measure_share() -> dict[str, Any]:
        own = stages[rank() :: world_size()]
        progress = Progress(f"evaluate: {data.name} metrics", len(own))
        share: dict[str, Any] = {}
        for done, stage in enumerate(own, 1):
            share |= stage()
            if show and rank() == 0:
                progress.update(done)
        return share

    found: dict[str, Any] = {}
    for share in all_gather_object(raise_on_all_ranks(measure_share)):
        found |= share
    text_ids = [f"{of}: {text}" for text, of in zip(captions, caption_concepts, strict=True)]

    def columns(ids: Iterable[str], names: Sequence[str]) -> dict[str, Any]:
        found_ids = {"sample_id": np.array([*ids], dtype=object)}
        return found_ids | {name: found[name].numpy() for name in names}

    samples = SampleResults(
        images=columns(pairs.sample_ids(), IMAGE_COLUMNS), texts=columns(text_ids, TEXT_COLUMNS)
    )
    values = [float(samples.values(metric).mean()) for metric in MEANS]
    values += [found[name] for names in SCORES.values() for name in names]
    return dict(zip(metric_names(data.name), values, strict=True)), samples
