"""What a trained model is worth: on held-out pairs of its own data, and by transfer.

Every metric is an array: its value, then the influences of groups of samples on it (see
`protoclip.evaluation.metrics`), of the same groups for every metric and model. So means and
differences of metrics are means and differences of arrays. Influences are NaN where there are none.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protoclip.config import Config
from protoclip.data import sources
from protoclip.data.access import cache_folder, digest
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.sources import PairsView
from protoclip.encode.features import Encoder
from protoclip.encode.store import hash_ids
from protoclip.evaluation import datasets
from protoclip.evaluation.datasets import EvaluationData, Split
from protoclip.evaluation.geometry import clustering
from protoclip.evaluation.metrics import METRICS, RECALLS, TASKS, compute_influences, sum_by_group
from protoclip.evaluation.probes import REGULARISATIONS, count_votes, fit_linear_probes
from protoclip.evaluation.suite import choose_tasks, encode_data, measure
from protoclip.evaluation.validation import split_validation
from protoclip.evaluation.zero_shot import zero_shot_ranks
from protoclip.files import replacing
from protoclip.models import loading

Metrics = dict[str, npt.NDArray[np.float64]]
Measured = tuple[Sequence[str], Metrics]  # the names of the groups, and the metrics of one data set

FOLDER = "judged-by-group"  # in the run's folder; `judged` has the draws of an earlier version
HELD_OUT = "held-out"  # what the pairs that were held out of pretraining are called
# What their metrics are kept as; `test-held-out` has those of pairs like some of validation.
KEPT = {"validation": HELD_OUT, "test": f"{HELD_OUT}-apart"}
FOLDS = 5
# What a transfer set is for; the others are for held-out pairs.
TRANSFER = ("linear_probe", "knn", "clustering")
# The numbers that decide, each the mean over data sets.
LINEAR, KNN, AMI, RETRIEVAL, ZERO_SHOT, ALL, WITH_INTERVALS = (
    *("transfer linear probe", "transfer kNN", "transfer AMI"),
    *("held-out retrieval", "zero-shot", "mean of these", "mean without AMI"),
)
DECIDING = (LINEAR, KNN, AMI, RETRIEVAL, ZERO_SHOT, ALL, WITH_INTERVALS)


def measure_run(folder: Path, config: Config, transfer: Sequence[str], split: str) -> Metrics:
    """The metrics of a finished run on the `validation` or `test` split of everything.

    Each data set's metrics are kept in the run's folder, so that they are measured once.

    Args:
        transfer: References as `datasets.open_data` takes them; `emoji` is evaluated by folds.
        split: `validation` is for choices, `test` for what was chosen.
    """
    encoders: list[Encoder] = []

    def encoder() -> Encoder:
        if not encoders:
            model, transform, tokenizer = loading.load(folder)
            given: dict[str, Any] = {"transform": transform, "tokenizer": tokenizer}
            # What frozen encoders make of transfer sets is the same whatever joins them.
            given["cache"] = cache_folder() / "features" if model.joins_encoders else None
            encoders.append(Encoder(model=model, **given))
        return encoders[0]

    def on_held_out() -> Measured:
        return measured(encoder(), held_out(config, split), ("retrieval", "zero_shot"), split)

    def on_transfer(reference: str) -> Measured:
        if reference == "emoji":
            return on_concepts(encoder(), datasets.emoji(), split)
        data = datasets.open_data(reference, split=split)
        if split == "validation":
            return on_classes(encoder(), data)
        return measured(encoder(), data, (*TRANSFER, "zero_shot"), split)

    found = kept(folder / FOLDER / f"{split}-{KEPT[split]}.npz", on_held_out)
    by_name = {HELD_OUT: found}
    for reference in transfer:
        name = digest({"reference": reference, "folds": FOLDS})[:8]
        path = folder / FOLDER / f"{split}-transfer-{name}.npz"
        by_name[reference.rstrip("/").rpartition("/")[2]] = kept(
            path, lambda reference=reference: on_transfer(reference)
        )
    by_data = side_by_side(by_name)
    return deciding(by_data) | {
        f"{data}: {metric}": values
        for data, metrics in by_data.items()
        for metric, values in metrics.items()
    }


def kept(path: Path, compute: Callable[[], Measured]) -> Measured:
    """Groups and metrics from a file, or computed and kept there."""
    if path.is_file():
        with np.load(path) as found:
            metrics = dict(found)
            return metrics.pop("groups").tolist(), metrics
    groups, metrics = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, groups=np.array(groups), **metrics)  # type: ignore[arg-type]
    return groups, metrics


def side_by_side(by_data: Mapping[str, Measured]) -> dict[str, Metrics]:
    """The metrics of each data set with the influences of all groups of all data sets."""
    names = dict.fromkeys(name for groups, _ in by_data.values() for name in groups)
    column = {name: number for number, name in enumerate(names, start=1)}

    def spread(values: npt.NDArray[np.float64], groups: Sequence[str]) -> npt.NDArray[np.float64]:
        found = np.zeros(1 + len(column))
        found[[0, *(column[name] for name in groups)]] = values
        return found

    return {
        data: {metric: spread(values, groups) for metric, values in metrics.items()}
        for data, (groups, metrics) in by_data.items()
    }


def deciding(by_data: Mapping[str, Metrics]) -> Metrics:
    """The numbers that decide. Zero-shot is that of the held-out pairs, if these have names.

    AMI has no interval, so neither has a mean with it.
    """
    transfer = [metrics for data, metrics in by_data.items() if data != HELD_OUT]
    own = by_data[HELD_OUT]

    def mean(several: Sequence[Metrics], *metrics: str) -> Metrics:
        found = [values[metric] for values in several for metric in metrics if metric in values]
        return {"mean": np.mean(found, axis=0)} if found else {}

    named = [own] if "zero_shot/acc1" in own else transfer
    parts = {
        LINEAR: mean(transfer, "linear_probe/acc1"),
        KNN: mean(transfer, "knn/acc1"),
        AMI: mean(transfer, "clustering/ami"),
        RETRIEVAL: mean([own], *RECALLS),
        ZERO_SHOT: mean(named, "zero_shot/acc1"),
    }
    found = {name: part["mean"] for name, part in parts.items() if part}
    without = [values for name, values in found.items() if name != AMI]
    means = {ALL: np.mean([*found.values()], axis=0), WITH_INTERVALS: np.mean(without, axis=0)}
    return {**found, **means}


def measured(encoder: Encoder, data: EvaluationData, tasks: Sequence[str], split: str) -> Measured:
    """The metrics of those tasks that the data can serve."""
    (chosen,) = choose_tasks([data], split, default=TASKS)
    own = [task for task in tasks if task in chosen]
    features = encode_data(encoder, data, own, split=split)
    found = measure(features)
    groups = np.unique([*found.images["group"], *found.texts.get("group", ())])
    by_metric, _ = compute_influences(found)
    shown = [
        name
        for name, metric in METRICS.items()
        if metric.in_runs and name in (*by_metric, "clustering/ami")
    ]
    none = np.full(len(groups), np.nan)
    return [f"{data.name}: {name}" for name in groups], {
        name: np.concatenate([[found.metrics[name]], by_metric.get(name, none)])
        for name in shown
        if name in found.metrics
    }


def held_out(config: Config, split: str) -> EvaluationData:
    """The pairs that a run did not train on: half of them for choices, half for the test.

    The test has none that shares a caption or the bytes of its image with a pair for choices. The
    emoji have splits of their own.
    """
    if config.data.is_emoji:
        return datasets.emoji()
    data = split_validation(config, sources.open_samples(config)).data[0]
    whole = data.splits["validation"]
    images = whole.images
    assert isinstance(images, PairsView)
    ((source, numbers),) = images.parts  # a study has one source
    assert whole.captions is not None
    ids = [images.sample_id(row) for row in range(len(images))]
    is_test = hash_ids(ids) % 2 == 1
    rows = np.flatnonzero(is_test if split == "test" else ~is_test).tolist()
    if split == "test":
        contents = [
            content_of(source, numbers[row], captions)
            for row, captions in enumerate(whole.captions)
        ]
        trained = set().union(*(contents[row] for row in np.flatnonzero(~is_test)))
        rows = [row for row in rows if contents[row].isdisjoint(trained)]
    own = Split(
        images=PairsView([(source, [numbers[row] for row in rows])]),
        captions=[whole.captions[row] for row in rows],
    )
    return EvaluationData(name=HELD_OUT, splits={split: own})


def content_of(source: ImageTextPairs, number: int, captions: Sequence[str]) -> set[str]:
    """What tells a pair's captions, whatever their case and spaces, and the bytes of its image."""
    texts = {"caption: " + " ".join(caption.casefold().split()) for caption in captions}
    image = source._hash_image(number)
    return texts | ({"image: " + image} if image else set())


def on_concepts(encoder: Encoder, data: EvaluationData, split: str) -> Measured:
    """Classes of the emoji, learned from some of a split's concepts and tested on the others.

    Pretraining has seen none of them.
    """
    features = encode_data(encoder, data, ["clustering"], split=split)
    part = features.parts[split]
    assert part.labels is not None
    right = by_folds(part.features, part.labels, part.groups)
    ami = clustering(part.features, part.labels)["ami"]
    groups = part.sample_groups[0]
    return grouped_means(right, groups, data.name, ami=ami)


def on_classes(encoder: Encoder, data: EvaluationData) -> Measured:
    """Classes of images, learned from some of train and validation and tested on the others.

    Choices are made by this. The validation split alone is too small to tell arms apart.
    """
    features = encode_data(encoder, data, ["linear_probe", "zero_shot"], split="validation")
    parts = [features.parts[split] for split in ("train", "validation")]
    images = torch.cat([part.features for part in parts])
    labels = torch.cat([part.labels for part in parts if part.labels is not None])
    rows = torch.arange(len(labels))
    ranks = zero_shot_ranks(images, features.texts["classes"], labels)
    right = {**by_folds(images, labels, rows), "zero_shot/acc1": ranks == 0}
    ids = [f"{number}: {name}" for number, part in enumerate(parts) for name in part.ids]
    return grouped_means(right, ids, data.name, ami=clustering(images, labels)["ami"])


def by_folds(
    features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], groups: Int[Tensor, " n"]
) -> dict[str, Bool[Tensor, " n"]]:
    """Whether linear probe and kNN are right on each row, fitted on four fifths of other groups.

    The probe's strength is the best on the next fifth, after a fit to the remaining three.
    """
    _, group = torch.unique(groups, return_inverse=True)
    order = torch.randperm(int(group.max()) + 1, generator=torch.Generator().manual_seed(0))
    fold = (order % FOLDS)[group]
    linear = torch.zeros(len(labels), dtype=torch.bool)
    neighbours = linear.clone()
    for number in range(FOLDS):
        tested, choosing = fold == number, fold == (number + 1) % FOLDS
        fitted = ~tested & ~choosing
        probes = fit_linear_probes(features[fitted], labels[fitted])
        scores = [probe.accuracy(features[choosing], labels[choosing]) for probe in probes]
        strengths = REGULARISATIONS[: scores.index(max(scores)) + 1]
        probe = fit_linear_probes(features[~tested], labels[~tested], strengths)[-1]
        linear[tested] = probe.predict(features[tested]) == labels[tested]
        found = count_votes(features[~tested], labels[~tested], features[tested]).argmax(1)
        neighbours[tested] = found == labels[tested]
    return {"linear_probe/acc1": linear, "knn/acc1": neighbours}


def grouped_means(
    values: Mapping[str, Bool[Tensor, " n"]], groups: Sequence[str], data: str, *, ami: float
) -> Measured:
    """Means of values with their influences, and AMI without."""
    names, group = np.unique(groups, return_inverse=True)
    found = {"clustering/ami": np.concatenate([[ami], np.full(len(names), np.nan)])}
    for name, of_samples in values.items():
        right = of_samples.double().numpy()
        parts = (right - right.mean()) / len(right)
        found[name] = np.concatenate([[right.mean()], sum_by_group(parts, group, len(names))])
    return [f"{data}: {name}" for name in names], found
