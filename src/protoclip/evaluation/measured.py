"""Measures the tasks on features: the metrics, and the results of each sample.

The ranks share the stages of the work. `suite` says which tasks data can serve, and writes records.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from protoclip.distributed import collectives
from protoclip.distributed.collectives import raise_on_all_ranks, rank
from protoclip.evaluation.clustering import clustering
from protoclip.evaluation.datasets import EvaluationData, find_positions
from protoclip.evaluation.geometry import effective_rank, modality_gap
from protoclip.evaluation.knn import knn_predict
from protoclip.evaluation.linear_probe import best_linear_probe
from protoclip.evaluation.metrics import METRICS, MULTILABEL, Floats
from protoclip.evaluation.retrieval import crowding, retrieval_ranks
from protoclip.evaluation.samples import SampleResults, influences, sum_by_group
from protoclip.evaluation.task_features import Part, TaskFeatures
from protoclip.evaluation.zero_shot import (
    mean_average_precision,
    mean_average_precision_parts,
    zero_shot_ranks,
)
from protoclip.progress import Progress

# For multilabel data, how well each image fits each class, and which classes it shows.
Scores = tuple[Float[Tensor, "n k"], Bool[Tensor, "n k"]]


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """Results of a stage: columns with a value an image or text, and metrics that are no means.

    Names are those of `metrics.METRICS`.
    """

    images: Mapping[str, Tensor] = field(default_factory=dict)
    texts: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    scores: Scores | None = None


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Metrics by our own names, and the results of each sample."""

    metrics: Mapping[str, float]
    samples: SampleResults
    scores: Scores | None

    def influences(self) -> dict[str, Floats]:
        """The influence of each group of samples on each metric that has an interval."""
        by_metric, groups = influences(self.samples), self.samples.groups()
        if self.scores is not None and len(groups.names) > 1:
            parts = mean_average_precision_parts(*self.scores)
            by_metric[MULTILABEL] = sum_by_group(parts, groups.images, len(groups.names))
        return {name: values for name, values in by_metric.items() if name in self.metrics}


def measure(
    features: TaskFeatures,
    data: EvaluationData,
    tasks: Sequence[str],
    *,
    split: str,
    show: bool = False,
) -> Measurements:
    """The metrics of the tasks, and the results of each sample."""
    stages = list_stages(features, data, tasks, split)

    def measure_share() -> list[StageResult]:
        share = stages[rank() :: collectives.world_size()]
        progress = Progress(f"evaluate: {data.name} metrics", len(share))
        results = []
        for done, stage in enumerate(share, 1):
            results.append(stage())
            if show and rank() == 0:
                progress.update(done)
        return results

    by_rank = collectives.all_gather_object(raise_on_all_ranks(measure_share))
    results = [result for share in by_rank for result in share]
    part = features.parts[split]
    images: dict[str, npt.NDArray[Any]] = {"sample_id": to_array(part.ids)}
    images["group"] = to_array(part.sample_groups.images)
    images["content"] = np.array(part.content, dtype=np.int64)
    if part.labels is not None and part.labels.ndim == 1:
        # Class numbers depend on the other classes, so names are better, if there are any.
        class_names = dict(enumerate(data.class_names))
        images["class_name"] = to_array([class_names.get(n, str(n)) for n in part.labels.tolist()])
    texts: dict[str, npt.NDArray[Any]] = {}
    for result in results:
        images |= {name: column.numpy() for name, column in result.images.items()}
        texts |= {name: column.numpy() for name, column in result.texts.items()}
    if texts and part.captions is not None:
        texts["sample_id"] = to_array(part.captions.ids)
        texts["group"] = to_array(part.sample_groups.texts)
    samples = SampleResults(images=images, texts=texts) if texts else SampleResults(images=images)
    values = {name: samples.mean(name) for name in samples.means()}
    for result in results:
        values |= result.metrics
    return Measurements(
        metrics={name: values[name] for name in METRICS if name in values},
        samples=samples,
        scores=next((result.scores for result in results if result.scores is not None), None),
    )


def to_array(texts: Sequence[str]) -> npt.NDArray[Any]:
    return np.array(texts, dtype=object)


def list_stages(
    features: TaskFeatures, data: EvaluationData, tasks: Sequence[str], split: str
) -> list[Callable[[], StageResult]]:
    """The work of the tasks, in stages that ranks share."""
    part, texts, device = features.parts[split], features.texts, features.device
    stages: list[Callable[[], StageResult]] = []
    if "zero_shot" in tasks and "names" in texts:
        stages.append(partial(classify_by_name, part, texts["names"]))
    if "zero_shot" in tasks and "classes" in texts:
        stages.append(partial(classify_by_class, part, texts["classes"], data.class_names))
    if "retrieval" in tasks:
        stages.append(partial(measure_retrieval, part, texts["captions"]))
    if "linear_probe" in tasks:
        others = [other for name, other in features.parts.items() if name != split]
        stages.append(partial(measure_linear_probe, part, others, device))
    if "knn" in tasks:
        stages.append(partial(measure_knn, part, features.parts["train"], device))
    if "clustering" in tasks:
        stages.append(partial(measure_clusters, part, device))
    if "geometry" in tasks:
        stages.append(partial(measure_geometry, part, texts["captions"]))
    return stages


def classify_by_name(part: Part, classifier: Float[Tensor, "k d"]) -> StageResult:
    """Which of all names belongs to an image, such as the emoji's concepts?"""
    assert part.names is not None
    labels = find_positions(part.names, sorted(set(part.names)))
    ranks = zero_shot_ranks(part.unit, classifier, labels)
    return StageResult(images={"zero_shot_rank": ranks, "zero_shot_class": labels})


def classify_by_class(
    part: Part, classifier: Float[Tensor, "k d"], class_names: Sequence[str]
) -> StageResult:
    """Which class does an image show, or which classes?"""
    assert part.labels is not None
    if part.labels.ndim == 2:
        scores = part.unit @ classifier.T
        precision = mean_average_precision(scores, part.labels)
        return StageResult(metrics={MULTILABEL: precision}, scores=(scores, part.labels))
    ranks = zero_shot_ranks(part.unit, classifier, part.labels, class_names)
    if part.names is not None:
        return StageResult(images={"zero_shot_subgroup_rank": ranks})
    return StageResult(images={"zero_shot_rank": ranks, "zero_shot_class": part.labels})


def measure_retrieval(part: Part, texts: Float[Tensor, "t d"]) -> StageResult:
    """Which captions fit an image, and which images a caption?"""
    assert part.captions is not None
    image_ranks, text_ranks = retrieval_ranks(part.unit, texts, part.captions)
    names = sorted({*part.sample_groups.images})
    image_groups, text_groups = (find_positions(side, names) for side in part.sample_groups)
    texts_take = crowding(part.unit, texts, image_ranks, image_groups, text_groups)
    images_take = crowding(texts, part.unit, text_ranks, text_groups, image_groups)
    return StageResult(
        images={
            "image_to_text_rank": image_ranks,
            **{f"text_to_image_crowding_{k}": taken for k, taken in images_take.items()},
        },
        texts={
            "text_to_image_rank": text_ranks,
            **{f"image_to_text_crowding_{k}": taken for k, taken in texts_take.items()},
        },
    )


def measure_linear_probe(
    part: Part, others: Sequence[Part], device: torch.device | str
) -> StageResult:
    """Does a linear classifier fitted to `train`, and `validation`, find the class?"""
    assert part.labels is not None
    rows = [(other.unit, other.labels) for other in others if other.labels is not None]
    probe = best_linear_probe(*(tensor.to(device) for pair in rows for tensor in pair))
    return StageResult(
        images={
            "class": part.labels,
            "linear_probe_correct": probe.predict(part.unit) == part.labels,
            "linear_probe_rank": probe.ranks(part.unit, part.labels),
        }
    )


def measure_knn(part: Part, train: Part, device: torch.device | str) -> StageResult:
    """Do the most similar images of `train` have the class?"""
    assert part.labels is not None
    assert train.labels is not None
    tensors = (train.unit, train.labels, part.unit)
    predicted = knn_predict(*(tensor.to(device) for tensor in tensors))
    return StageResult(images={"knn_correct": predicted.cpu() == part.labels})


def measure_clusters(part: Part, device: torch.device | str) -> StageResult:
    """Do clusters of the images agree with the classes?"""
    assert part.labels is not None
    agreement = clustering(part.unit.to(device), part.labels)
    return StageResult(metrics={f"clustering/{name}": agreement[name] for name in ("ami", "ari")})


def measure_geometry(part: Part, texts: Float[Tensor, "t d"]) -> StageResult:
    """How do images and texts lie in the joint space?"""
    assert part.captions is not None
    paired = texts[part.captions.text_of_pair]
    values = modality_gap(part.unit, paired, part.captions.image_of_pair)
    values["effective_rank_image"] = effective_rank(part.unit)
    values["effective_rank_text"] = effective_rank(texts)
    return StageResult(metrics={f"modality_gap/{name}": value for name, value in values.items()})
