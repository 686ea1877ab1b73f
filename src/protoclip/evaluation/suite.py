"""Evaluate any model on any data: the tasks that the data can serve, and a record of each.

A file for each task scores features. A new task goes into `SCORES` here, and what it needs and its
metrics into `metrics.py`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F

from protoclip.config import DataConfig, build, shown
from protoclip.distributed.collectives import raise_on_all_ranks, rank, rank0_first, share
from protoclip.encode.features import Encoder, Model, Tokenizer, Transform
from protoclip.evaluation import datasets, geometry, probes, retrieval, zero_shot
from protoclip.evaluation.datasets import EvaluationData
from protoclip.evaluation.features import Features, make_part
from protoclip.evaluation.metrics import (
    METRICS,
    MULTILABEL,
    NEEDS,
    TASKS,
    Floats,
    SampleResults,
    compute_influences,
    interval,
    rests_on_few,
)
from protoclip.evaluation.readers import check_templates, read_templates
from protoclip.evaluation.validation import open_data, warn_trained
from protoclip.progress import Progress
from protoclip.terminal import say

Data = str | Path | Mapping[str, Any] | EvaluationData
SCORES: dict[str, Callable[[Features], SampleResults]] = {
    "zero_shot": zero_shot.score,
    "retrieval": retrieval.score,
    "linear_probe": probes.score_linear_probe,
    "knn": probes.score_knn,
    "clustering": geometry.score_clusters,
    "geometry": geometry.score,
}
# Tasks that are cheap enough to be done often: they encode no training images and fit nothing.
QUICK = ("zero_shot", "retrieval")
# The default tasks; the others learn something, mostly from `train`.
DEFAULT = (*QUICK, "geometry")
# CLIP_benchmark's names of tasks, where they differ from ours.
RECORD_TASKS = {"zero_shot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One task of one model on one data set."""

    record: dict[str, Any]  # as `evaluate` returns it
    #: The influence of each group of samples on each metric that has an interval.
    influences: Mapping[str, Floats] = field(repr=False)
    #: The measured samples. Two results with equal ids have the same groups.
    ids: Sequence[str] = field(repr=False)
    without: Collection[str] = ()  # metrics without an interval; a difference may have one


def evaluate(
    model: Model,
    image_transform: Transform,
    tokenizer: Tokenizer,
    data: Data | Sequence[Data],
    tasks: str | Sequence[str] | None = None,
    *,
    split: str = "test",
    templates: str | Sequence[str] | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    cache: Path | None = None,
    model_name: str = "model",
    pretrained: str = "none",
    show: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate a model on data: one record for each data set and task.

    | task | metrics in the record |
    |---|---|
    | `zero_shot` | `acc1 acc5 mean_per_class_recall`; multilabel: `mean_average_precision` |
    | `retrieval` | `image_retrieval_recall@k text_retrieval_recall@k`, k = 1, 5, 10 |
    | `linear_probe` | `lp_acc1 lp_acc5 lp_mean_per_class_recall` |
    | `knn` | `acc1` by the 20 nearest images of `train` |
    | `clustering` | `ami ari` of K-means against the classes |
    | `geometry` | `gap alignment uniformity_{image,text} effective_rank_{image,text}` |

    Accuracies are fractions from 0 to 1. All ranks call this with the same arguments, share the
    work, and return the same bits that one process would.

    Args:
        model: A module with `encode_image` and `encode_text`, on the device where it shall run.
        image_transform: A PIL image to `(3, h, w)`.
        tokenizer: Texts to tokens `(b, c)`.
        data: Data sets, or references to them as `datasets.open_data` takes, or paths, or `[data]`
            sections as mappings, whose `train` is a reference.
        tasks: One or several; unset, those of `zero_shot`, `retrieval` and `geometry` that the data
            can serve. The others encode `train` or fit something.
        split: The split to measure.
        templates: Prompts in place of the data's own: `openai`, `simple`, a text file, or a list.
        batch_size: Images or texts encoded at once.
        workers: Threads that read images; unset, one a core.
        cache: Folder for features; unset, they are not stored.
        model_name: The name of the model in records.
        pretrained: The name of its weights in records.
        show: Show progress.

    Returns:
        Records in CLIP_benchmark's schema: `dataset model pretrained task metrics language`. They
        also have `split`, `samples`, `bad_share` (the share of images that cannot be used),
        `intervals` (95%, by metric) and, for zero-shot classification, `templates`; of a
        run, if known, `trained_on`: the number of `pairs`, and on how many `images` it was trained,
        with a warning. Captions of several columns are measured together, and each column alone,
        with its `column`.

    Raises:
        ValueError: No data set can serve a task, data are faulty, features are not finite, or a
            reference stands for the model; `protoclip.load` opens it.
    """
    if isinstance(model, str | Path):
        raise ValueError(
            "model: evaluate takes a model, its transform and tokenizer: "
            f"protoclip.evaluate(*protoclip.load({shown(str(model))}), data)"
        )
    encoder = Encoder(
        model=model,
        transform=image_transform,
        tokenizer=tokenizer,
        batch_size=batch_size,
        workers=workers,
        cache=cache,
        show=show,
    )
    references: Any = data if isinstance(data, list | tuple) else [data]
    counts = dict[str, dict[str, int]]()
    loaded_from: Any = getattr(model, "loaded_from", None)

    def open_all() -> tuple[list[EvaluationData], list[list[str]], Sequence[str] | None]:
        data_sets = list[EvaluationData]()
        for given in references:
            section = {"train": str(given)} if isinstance(given, str | Path) else given
            if isinstance(section, EvaluationData):
                data_sets.append(section)
            elif isinstance(section, Mapping):
                config = build(DataConfig, section, "data.")
                opened = open_data(config.train, split=split, config=config)
                data_sets += (parts := datasets.split_columns(opened, split))
                for part in parts if loaded_from and rank() == 0 else ():
                    count = warn_trained(loaded_from, config.train, part, split, config)
                    counts[part.name] = count
            else:
                raise ValueError(
                    f"data: {shown(given)} is no data set; give a file, or a [data] section as a "
                    "dictionary"
                )
        prompts = read_templates(templates) if isinstance(templates, str) else templates
        if prompts is not None:
            check_templates(prompts, "templates")
        names = [tasks] if isinstance(tasks, str) else tasks
        return data_sets, choose_tasks(data_sets, split, names), prompts

    data_sets, chosen, prompts = raise_on_all_ranks(open_all)
    results = compute_results(
        encoder,
        data_sets,
        chosen,
        split=split,
        templates=prompts,
        model_name=model_name,
        pretrained=pretrained,
        trained_on=rank0_first(lambda: counts),
    )
    return [result.record for result in results]


def choose_tasks(
    data: Sequence[EvaluationData],
    split: str,
    tasks: Sequence[str] | None = None,
    *,
    default: Collection[str] = DEFAULT,
) -> list[list[str]]:
    """The tasks of each data set: the requested ones that it can serve, or else the default ones.

    Opens, and perhaps downloads, the train splits that tasks need.

    Raises:
        ValueError: There is no such task or split, no data set can serve a task, or two data sets
            have one name, which records need to tell them apart.
    """
    if unknown := [task for task in tasks or () if task not in TASKS]:
        raise ValueError(f"tasks: no task '{unknown[0]}'; choose from {', '.join(TASKS)}")
    names = [data_set.name for data_set in data]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"data: two data sets are called '{repeated[0]}'; evaluate them one after the other"
        )
    for data_set in data:
        if split not in data_set.splits:
            splits = ", ".join(data_set.splits)
            raise ValueError(f"{data_set.name}: no split '{split}'; it has {splits}")
    missing = {
        task: [find_missing(task, data_set, split) for data_set in data]
        for task in tasks or default
    }
    unserved = {task: reasons[0] for task, reasons in missing.items() if all(reasons)}
    if unserved and (tasks or len(unserved) == len(missing)):
        why = "; ".join(f"{task} needs {reason}" for task, reason in unserved.items())
        raise ValueError(f"{', '.join(names)}: {why}; choose other data or --tasks")
    return [[task for task in missing if not missing[task][n]] for n in range(len(data))]


def find_missing(task: str, data: EvaluationData, split: str) -> str:
    """What the data lack for a task; empty if nothing. Opens `train` for tasks that learn from it.

    Raises:
        ValueError: A sample has no caption, or a label is not the number of a class.
    """
    part, number = data.splits[split], len(data.class_names)
    labels = part.labels
    if "captions" in NEEDS[task]:
        for row, captions in enumerate(part.captions or ()):
            if not captions:
                sample = part.images.sample_id(row)
                raise ValueError(f"{data.name}: sample '{sample}' has no caption")
        return "" if part.captions is not None else "captions"
    if task == "zero_shot" and part.names is not None:
        return ""
    if labels is None:
        return "labels"
    if task == "zero_shot" and not number:
        return "class names"
    if task == "zero_shot":
        if labels.ndim == 1 and bool((wrong := (labels < 0) | (labels >= number)).any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"{data.name}: sample '{part.images.sample_id(row)}' has class "
                f"{int(labels[row])}, but there are names for classes 0 to {number - 1}"
            )
        return ""
    if labels.ndim == 2:
        return "one class an image, and these are multilabel data"
    if task == "clustering":
        return "" if len(set(labels.tolist())) > 1 else "images of two classes or more"
    train = data.splits.get("train")
    if train is None or train.labels is None or split == "train":
        return "a labelled train split beside the one that is measured"
    return "" if len(set(train.labels.tolist())) > 1 else "a train split of two classes or more"


def compute_results(
    encoder: Encoder,
    data: Sequence[EvaluationData],
    tasks: Sequence[Sequence[str]],
    *,
    split: str = "test",
    templates: Sequence[str] | None = None,
    model_name: str = "model",
    pretrained: str = "none",
    trained_on: Mapping[str, Mapping[str, int]] | None = None,
) -> list[Result]:
    """`evaluate`, with the influences of samples that comparing two models needs.

    Args:
        tasks: Those of each data set, by `choose_tasks`.
        trained_on: What `validation.warn_trained` counted, by data set, for the records.
    """
    results = []
    for data_set, own_tasks in zip(data, tasks, strict=True):
        if not own_tasks:
            continue
        features = encode_data(encoder, data_set, own_tasks, split=split, templates=templates)
        samples, part = measure(features, show=encoder.show), features.part
        by_metric, crowded = compute_influences(samples)
        for task in features.tasks:
            keys = {n: METRICS[n].key for n in samples.metrics if METRICS[n].task == task}
            values = {key: samples.metrics[name] for name, key in keys.items()}
            by_key = {key: by_metric[name] for name, key in keys.items() if name in by_metric}
            without = {key for name, key in keys.items() if name in crowded}
            ends = {k: interval(values[k], by_key[k]) for k in by_key if k not in without}
            record: dict[str, Any] = {
                "dataset": data_set.name,
                "model": model_name,
                "pretrained": pretrained,
                "task": RECORD_TASKS.get(task, task),
                "metrics": values,
                "language": data_set.language,
                "split": split,
                "samples": len(part.ids),
                "bad_share": len(part.bad) / part.total,
                "intervals": ends,
                "wide": [key for key in ends if rests_on_few(by_key[key])],
            }
            if task == "zero_shot":
                record["templates"] = list(templates or data_set.templates)
            if part.captions is not None:
                record["captions"] = len(part.captions.texts)
            if data_set.column:
                record["column"] = data_set.column
            if counted := (trained_on or {}).get(data_set.name):
                record["trained_on"] = counted
            results.append(Result(record=record, influences=by_key, ids=part.ids, without=without))
    return results


def encode_data(
    encoder: Encoder,
    data: EvaluationData,
    tasks: Collection[str],
    *,
    split: str,
    templates: Sequence[str] | None = None,
) -> Features:
    """Encode what the tasks need, and no other images and texts.

    A linear probe whose usable images are of one class is left out; rank 0 warns of it.
    """
    needs, parts = {need for task in tasks for need in NEEDS[task]}, {}
    splits = ["train"] * ("train" in needs)
    if "validation" in needs and split != "validation":
        validation = data.splits.get("validation")
        splits += ["validation"] * (validation is not None and validation.labels is not None)
    for name in [*splits, split]:
        stage = f"{data.name} images: {name}"
        encoded = encoder.encode_images(data.splits[name].images, stage=stage)
        parts[name] = make_part(data, name, encoded)
    texts, part = {}, parts[split]
    if part.captions is not None and "captions" in needs:
        captions = encoder.encode_texts(part.captions.texts, stage=f"{data.name} captions")
        texts["captions"] = F.normalize(captions, dim=1)
    if "classes" in needs:
        texts |= zero_shot.encode_classes(encoder, data, part, templates)
    labels = [parts[name].labels for name in splits]
    classes = {number for some in labels if some is not None for number in some.tolist()}
    if "linear_probe" in tasks and len(classes) < 2:
        tasks = [task for task in tasks if task != "linear_probe"]
        if rank() == 0:
            say(
                f"warning: {data.name}: linear_probe is left out: the images of 'train' that can "
                "be used are of one class"
            )
    return Features(
        data=data,
        split=split,
        tasks=[*tasks],
        parts=parts,
        part=part,
        texts=texts,
        device=encoder.device,
    )


def measure(features: Features, *, show: bool = False) -> SampleResults:
    """The metrics of the tasks, which ranks share, and the results of each sample."""
    data, part, tasks = features.data, features.part, features.tasks
    progress = Progress(f"evaluate: {data.name} metrics", len(tasks)) if show else None

    def score(task: str) -> SampleResults:
        result = SCORES[task](features)
        if progress and rank() == 0:
            progress.update(tasks.index(task) + 1)
        return result

    results = share(score, tasks)
    if progress and rank() == 0:
        progress.update(len(tasks))
    images: dict[str, npt.NDArray[Any]] = {
        "sample_id": np.array(part.ids, object),
        "group": np.array(part.sample_groups[0], object),
        "content": np.array(part.content, np.int64),
    }
    if part.labels is not None and part.labels.ndim == 1:
        # Class numbers depend on the other classes, so names are better, if there are any.
        class_names = dict(enumerate(data.class_names))
        labels = [class_names.get(number, str(number)) for number in part.labels.tolist()]
        images["class_name"] = np.array(labels, object)
    texts, values, parts = dict(SampleResults().texts), dict[str, float](), dict[str, Floats]()
    for result in results:
        images |= result.images
        texts |= result.texts
        values |= result.metrics
        parts |= result.parts
    if len(texts) > 1 and part.captions is not None:
        texts["sample_id"] = np.array(part.captions.ids, object)
        texts["group"] = np.array(part.sample_groups[1], object)
    samples = SampleResults(images=images, texts=texts)
    values = {**samples.means, **values}
    names = [n for n in METRICS if n in values and is_defined(n, data, features.split)]
    return replace(samples, metrics={name: values[name] for name in names}, parts=parts)


# The evaluation of a run


def evaluate_run(
    encoder: Encoder,
    *,
    split: Literal["validation", "test"],
    data: EvaluationData | None = None,
    quick: bool = False,
    samples_to: Path | None = None,
    candidates: dict[str, int] | None = None,
) -> dict[str, float]:
    """A run's own evaluation, on the bundled emoji if no other data are given.

    Args:
        encoder: Encoder of the run's model, which is in evaluation mode meanwhile.
        split: The split to measure.
        quick: Zero-shot and retrieval alone, which encode only the measured images.
        samples_to: Folder for the results of each sample; a warning if it cannot be written.
        candidates: Gets among how many each recall is, by its name without `@k`.

    Returns:
        Metrics of the tasks that the data can serve, such as `eval/emoji/zero_shot/acc1`;
        docs/metrics.md explains them. Accuracies are fractions from 0 to 1.
    """
    data = data or datasets.emoji()
    default = QUICK if quick else TASKS
    (tasks,) = raise_on_all_ranks(lambda: choose_tasks([data], split, default=default))
    samples = measure(encode_data(encoder, data, tasks, split=split), show=encoder.show)
    if candidates is not None and len(samples.texts["sample_id"]):
        recalls = f"eval/{data.name}/retrieval"
        candidates[f"{recalls}/image_to_text"] = len(samples.texts["sample_id"])
        candidates[f"{recalls}/text_to_image"] = len(samples.images["sample_id"])
    if samples_to is not None and rank() == 0:
        path = samples_to / f"{data.name}-{split}.parquet"
        try:
            samples.write(path)
        except OSError as error:
            say(f"warning: {path}: not written ({error})")
    return {
        f"eval/{data.name}/{name}": value
        for name, value in samples.metrics.items()
        if METRICS[name].in_runs
    }


def list_metrics(
    data: EvaluationData, split: str = "validation", *, quick: bool = False
) -> list[str]:
    """The keys of a run's evaluation on a data set, in the order of `METRICS`."""
    (tasks,) = choose_tasks([data], split, default=QUICK if quick else TASKS)
    return [
        f"eval/{data.name}/{name}"
        for name, metric in METRICS.items()
        if metric.task in tasks and metric.in_runs and is_defined(name, data, split)
    ]


def is_defined(metric: str, data: EvaluationData, split: str) -> bool:
    """Whether data that can serve a metric's task have the metric: acc5 needs five classes."""
    labels, names = data.splits[split].labels, data.splits[split].names
    if metric.startswith("zero_shot_subgroup") and names is None:
        return False
    if metric.startswith("zero_shot/"):
        is_multilabel = labels is not None and labels.ndim == 2
        if is_multilabel != (metric == MULTILABEL):
            return False
    if not metric.endswith("acc5"):
        return True
    if METRICS[metric].task == "linear_probe":  # it predicts the classes of `train`
        labels = data.splits["train"].labels
        return labels is not None and len(set(labels.tolist())) >= 5
    if names is not None:
        return len(set(names)) >= 5
    return labels is None or len(data.class_names or set(labels.tolist())) >= 5
