"""Evaluate any model on any data: the tasks that the data can serve, and a record of each.

`task_features` encodes what they need, and `measured` computes metrics from it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from protoclip.config import DataConfig, build, shown
from protoclip.distributed.collectives import raise_on_all_ranks, rank
from protoclip.evaluation import datasets
from protoclip.evaluation.datasets import EvaluationData
from protoclip.evaluation.encoders import encoder_of
from protoclip.evaluation.features import Encoder, Model, Tokenizer, Transform
from protoclip.evaluation.measured import measure
from protoclip.evaluation.metrics import METRICS, MULTILABEL, TASKS, Floats, intervals, rests_on_few
from protoclip.evaluation.samples import find_crowded
from protoclip.evaluation.task_features import (
    QUICK,
    TaskFeatures,
    lacks,
    quick_tasks,
    splits_of,
    task_features,
)
from protoclip.evaluation.validation import open_data
from protoclip.evaluation.zero_shot import check_templates, read_templates
from protoclip.rules import DATA_OPTIONS
from protoclip.terminal import say

Data = str | Path | Mapping[str, Any] | EvaluationData
# Settings of `[data]` that say how a data set is read; the others are for training.
OF_DATA = ("train", *DATA_OPTIONS, "allow_links")
# The default tasks; the others learn something, mostly from `train`.
DEFAULT = (*QUICK, "geometry")
# CLIP_benchmark's names of tasks, where they differ from ours.
RECORD_TASKS = {"zero_shot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One task of one model on one data set.

    Attributes:
        record: As `evaluate` returns it.
        influences: The influence of each group of samples on each metric that has an interval.
        ids: The measured samples. Two results with equal ids have the same groups.
        without: Metrics that have no interval themselves; a difference may have one.
    """

    record: dict[str, Any]
    influences: Mapping[str, Floats] = field(repr=False)
    ids: Sequence[str] = field(repr=False)
    without: Collection[str] = ()


Parameters = ParamSpec("Parameters")
Value = TypeVar("Value")


def require_model(function: Callable[Parameters, Value]) -> Callable[Parameters, Value]:
    """Refuse the name of a model, which `embed` and `export` take, with the way out.

    Otherwise Python's error on missing arguments would come first, which names no way out.
    """

    @wraps(function)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Value:
        model = kwargs.get("model", args[0] if args else None)
        if isinstance(model, str | Path):
            raise ValueError(
                "model: evaluate takes a model, its transform and tokenizer: "
                f"protoclip.evaluate(*protoclip.load({shown(str(model))}), data)"
            )
        return function(*args, **kwargs)

    return wrapper


@require_model
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
            can serve. The others encode `train` or fit something, and a note says how many images
            they encode.
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
        `intervals` (95%, by metric) and, of a zero-shot classification, `templates`.

    Raises:
        ValueError: No data set can serve a task, data are faulty, features are not finite, or a
            reference stands for the model; `protoclip.load` opens it.
    """
    tasks = [tasks] if isinstance(tasks, str) else tasks
    encoder = encoder_of(
        model,
        image_transform,
        tokenizer,
        batch_size=batch_size,
        workers=workers,
        cache=cache,
        show=show,
    )
    references: Any = data if isinstance(data, list | tuple) else [data]
    data_sets = raise_on_all_ranks(lambda: [open_any(entry, split) for entry in references])
    announce(data_sets, split, tasks)
    results = compute_results(
        encoder,
        data_sets,
        tasks,
        split=split,
        templates=templates,
        model_name=model_name,
        pretrained=pretrained,
    )
    return [result.record for result in results]


def open_any(data: Any, split: str) -> EvaluationData:
    """Open a data set of any kind that `evaluate` takes."""
    if isinstance(data, EvaluationData):
        return data
    if isinstance(data, str | Path):
        return open_data(str(data), split=split)
    if not isinstance(data, Mapping):
        raise ValueError(
            f"data: {shown(data)} is no data set; give a file, or a [data] section as a dictionary"
        )
    settings = build(DataConfig, data, "data.")
    if others := [name for name in data if name not in OF_DATA]:
        raise ValueError(
            f"data.{others[0]}: has no effect on evaluation, which takes {', '.join(OF_DATA)}; "
            "leave it out"
        )
    return open_data(
        settings.train, class_column=settings.class_column, split=split, config=settings
    )


def compute_results(
    encoder: Encoder,
    data: Sequence[EvaluationData],
    tasks: Sequence[str] | None = None,
    *,
    split: str = "test",
    templates: str | Sequence[str] | None = None,
    model_name: str = "model",
    pretrained: str = "none",
) -> list[Result]:
    """`evaluate`, with the influences of samples that comparing two models needs."""
    # Opens, perhaps downloads, the train splits that tasks need.
    chosen = raise_on_all_ranks(lambda: choose_tasks(data, split, tasks))
    if isinstance(templates, str):
        templates = raise_on_all_ranks(partial(read_templates, templates))
    check_templates(templates or (), "templates")  # before anything is encoded
    if templates and not any("zero_shot" in tasks for tasks in chosen):
        raise ValueError(
            "templates: no effect, since zero_shot alone reads them, which runs on no data here; "
            "leave them out"
        )
    results = []
    for data_set, tasks in zip(data, chosen, strict=True):
        if not tasks:
            continue
        features = task_features(encoder, data_set, tasks, split=split, templates=templates)
        tasks = drop_unserved(tasks, features, data_set, split)
        measures = measure(features, data_set, tasks, split=split, show=encoder.show)
        influences, part = measures.influences(), features.parts[split]
        crowded = find_crowded(measures.samples, influences)
        for task in tasks:
            keys = {
                name: METRICS[name].key
                for name in measures.metrics
                if METRICS[name].task == task and is_defined(name, data_set, split)
            }
            values = {key: measures.metrics[name] for name, key in keys.items()}
            by_key = {key: influences[name] for name, key in keys.items() if name in influences}
            without = {key for name, key in keys.items() if name in crowded}
            record: dict[str, Any] = {
                "dataset": data_set.name,
                "model": model_name,
                "pretrained": pretrained,
                "task": RECORD_TASKS.get(task, task),
                "metrics": values,
                "language": data_set.language,
                "split": split,
                "samples": len(part.ids),
                "bad_share": len(part.bad) / len(data_set.splits[split].images),
                "intervals": intervals(values, by_key, without),
            }
            record["wide"] = [key for key in record["intervals"] if rests_on_few(by_key[key])]
            if task == "zero_shot":
                record["templates"] = list(templates or data_set.templates)
            results.append(Result(record=record, influences=by_key, ids=part.ids, without=without))
    if not results:
        raise ValueError(
            f"{', '.join(data_set.name for data_set in data)}: no task can be served by the images "
            "that can be used; mend the others"
        )
    return results


def choose_run_tasks(data: EvaluationData, split: str, *, quick: bool) -> list[str]:
    """The tasks of a run's evaluation on a data set."""
    return quick_tasks(data, split) if quick else choose_tasks([data], split, None, TASKS)[0]


def list_metrics(
    data: EvaluationData, split: str = "validation", *, quick: bool = False
) -> list[str]:
    """The keys of a run's evaluation on a data set, in the order of `METRICS`."""
    tasks = choose_run_tasks(data, split, quick=quick)
    labels = data.splits[split].labels
    missing = {MULTILABEL}
    if labels is not None and labels.ndim == 2:
        missing = {f"zero_shot/acc{k}" for k in (1, 5)}
    if split not in data.image_names:
        missing |= {f"zero_shot_subgroup/acc{k}" for k in (1, 5)}
    names = [name for name, metric in METRICS.items() if metric.task in tasks]
    names = select_run_metrics([name for name in names if name not in missing], data, split)
    return [f"eval/{data.name}/{name}" for name in names]


def select_run_metrics(names: Collection[str], data: EvaluationData, split: str) -> list[str]:
    """The metrics among these that a run's evaluation has, in the order of `METRICS`."""
    return [
        name
        for name, metric in METRICS.items()
        if name in names and metric.in_runs and is_defined(name, data, split)
    ]


def is_defined(metric: str, data: EvaluationData, split: str) -> bool:
    """Whether the data have enough classes for a metric: acc5 needs more than five classes."""
    if not metric.endswith("acc5"):
        return True
    if METRICS[metric].task == "linear_probe":  # it predicts the classes of `train`
        labels = data.splits["train"].labels
        return labels is not None and len(set(labels.tolist())) >= 5
    return not 0 < count_classes(data, split) < 5


def evaluate_run(
    encoder: Encoder,
    *,
    split: Literal["validation", "test"],
    data: EvaluationData | None = None,
    quick: bool = False,
    show: bool = True,
    samples_to: Path | None = None,
) -> dict[str, float]:
    """A run's own evaluation, on the bundled emoji if no other data are given.

    | key after `eval/<data>/` | what |
    |---|---|
    | `zero_shot/acc{1,5}` | an image's class, or an emoji's concept, among all names |
    | `zero_shot_subgroup/acc{1,5}` | an emoji's class among the class names |
    | `zero_shot/mean_average_precision` | for images with several classes |
    | `retrieval/{image_to_text,text_to_image}@{1,5,10}` | among the split's captions |
    | `linear_probe/acc1`, `knn/acc1` | its class, learned from the image features of `train` |
    | `clustering/{ami,ari}` | K-means of the image features against the classes |
    | `modality_gap/{gap,alignment,uniformity_image,uniformity_text}` | geometry of the pairs |

    Keys that the data cannot serve are left out. Accuracies are fractions from 0 to 1.

    Args:
        encoder: Encoder of the run's model, which is in evaluation mode meanwhile.
        split: The split to measure. The linear probe's strength is chosen on `validation`; if that
            is measured, or missing, on a fifth of `train`.
        quick: Zero-shot and retrieval alone, which encode only the measured images.
        samples_to: Folder for the results of each sample; a warning if it cannot be written.
    """
    data = data or datasets.emoji()
    tasks = raise_on_all_ranks(lambda: choose_run_tasks(data, split, quick=quick))
    features = task_features(encoder.showing(show), data, tasks, split=split)
    tasks = drop_unserved(tasks, features, data, split)
    measures = measure(features, data, tasks, split=split, show=show)
    if samples_to is not None and rank() == 0:
        path = samples_to / f"{data.name}-{split}.parquet"
        try:
            measures.samples.write(path)
        except OSError as error:
            say(f"warning: {path}: not written ({error})")
    names = select_run_metrics(measures.metrics, data, split)
    return {f"eval/{data.name}/{name}": measures.metrics[name] for name in names}


# Which tasks can the data serve?


def choose_tasks(
    data: Sequence[EvaluationData],
    split: str,
    tasks: Sequence[str] | None,
    usual: Collection[str] = DEFAULT,
) -> list[list[str]]:
    """The tasks of each data set: the requested ones that it can serve, or else the usual ones.

    Raises:
        ValueError: There is no such task or split, no data set can serve a task, or two data sets
            have one name, which records need to tell them apart.
    """
    for task in tasks or ():
        if task not in TASKS:
            close = get_close_matches(task, TASKS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose of {', '.join(TASKS)}"
            raise ValueError(f"tasks: no task '{task}'; {hint}")
    names = [data_set.name for data_set in data]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"data: two data sets are called '{repeated[0]}'; evaluate them one after the other"
        )
    for data_set in data:
        if split not in data_set.splits:
            splits = ", ".join(data_set.splits)
            raise ValueError(f"{data_set.name}: no split '{split}'; it has {splits}")
        if not len(data_set.splits[split].images):
            raise ValueError(f"{data_set.name}: its split '{split}' holds no image")
    lacking = {task: [lacks(data_set, split, task) for data_set in data] for task in tasks or usual}
    shown = ", ".join(names)
    for task, reasons in lacking.items():
        if tasks and all(reasons):
            raise ValueError(f"{shown}: {task} needs {reasons[0]}; choose other data or --tasks")
    if all(all(reasons) for reasons in lacking.values()):
        why = "; ".join(f"{task} needs {reasons[0]}" for task, reasons in lacking.items())
        others = "" if tasks or {*usual} >= {*TASKS} else "; --tasks names others"
        raise ValueError(f"{shown}: can serve no task ({why}{others})")
    return [[task for task in lacking if not lacking[task][number]] for number in range(len(data))]


def drop_unserved(
    tasks: Sequence[str], features: TaskFeatures, data: EvaluationData, split: str
) -> list[str]:
    """The tasks, without the linear probe if usable images have one class; rank 0 warns of it."""
    columns = [part.labels for name, part in features.parts.items() if name != split]
    classes = {number for labels in columns if labels is not None for number in labels.tolist()}
    if "linear_probe" not in tasks or len(classes) > 1:
        return [*tasks]
    if rank() == 0:
        say(
            f"warning: {data.name}: linear_probe is left out: the images of 'train' that can be "
            "used are of one class"
        )
    return [task for task in tasks if task != "linear_probe"]


def announce(data: Sequence[EvaluationData], split: str, tasks: Sequence[str] | None) -> None:
    """Say how many images are encoded for tasks that do not run by default.

    Raises:
        ValueError: As `choose_tasks`, on every rank.
    """
    chosen = raise_on_all_ranks(lambda: choose_tasks(data, split, tasks))
    for data_set, tasks in zip(data, chosen, strict=True):
        learning = [task for task in tasks if task not in DEFAULT]
        if learning and rank() == 0:
            numbers = ", ".join(
                f"{len(data_set.splits[name].images):,} of {name}"
                for name in splits_of(data_set, tasks, split)
            )
            say(f"note: {data_set.name}: {', '.join(learning)}: images to encode: {numbers}")


def count_classes(data: EvaluationData, split: str) -> int:
    """The number of classes, or of the emoji's concepts, to choose from; 0 without labels."""
    labels = data.splits[split].labels
    if split in data.image_names:
        return len(set(data.image_names[split]))
    return 0 if labels is None else len(data.class_names) or len(set(labels.tolist()))
