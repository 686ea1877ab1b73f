"""Judge any model on any data: every task of one model on one or more data sets.

The file reads in the order of a reader's questions: what can be asked (`evaluate`), which tasks the
data can serve, which features they need, what is measured, and how it is written down.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.distributed import collectives
from protoclip.distributed.collectives import raise_on_all_ranks, rank
from protoclip.evaluation import datasets
from protoclip.evaluation.clustering import clustering
from protoclip.evaluation.datasets import EvaluationData, positions
from protoclip.evaluation.features import Bad, Encoded, Encoder, Model, Tokenizer, Transform
from protoclip.evaluation.geometry import effective_rank, modality_gap
from protoclip.evaluation.knn import knn_predict
from protoclip.evaluation.linear_probe import best_linear_probe
from protoclip.evaluation.retrieval import Captions, captions_of, crowding, retrieval_ranks
from protoclip.evaluation.samples import (
    IMAGE_COLUMNS,
    TEXT_COLUMNS,
    Floats,
    SampleResults,
    by_group,
    influences,
    intervals,
)
from protoclip.evaluation.zero_shot import (
    mean_average_precision,
    mean_average_precision_parts,
    prompts,
    zero_shot_classifier,
    zero_shot_ranks,
)
from protoclip.progress import Progress
from protoclip.terminal import say

Data = str | EvaluationData
GEOMETRY = (
    *("gap", "alignment", "uniformity_image", "uniformity_text"),
    *("effective_rank_image", "effective_rank_text"),
)
RECALLS = [f"retrieval/{way}@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
PROBE = ("acc1", "acc5", "mean_per_class_recall")
LARGEST = 10  # images that equal captions make hang together
# The tasks: their names in records and, for each metric there, our own name. Where CLIP_benchmark
# has a name, it is that one.
TASKS: dict[str, tuple[str, dict[str, str]]] = {
    "zero_shot": (
        "zeroshot_classification",
        {
            **{f"acc{k}": f"zero_shot/acc{k}" for k in (1, 5)},
            "mean_per_class_recall": "zero_shot/mean_per_class_recall",
            **{f"subgroup_acc{k}": f"zero_shot_subgroup/acc{k}" for k in (1, 5)},
            "mean_average_precision": "zero_shot/mean_average_precision",
        },
    ),
    "retrieval": (
        "zeroshot_retrieval",
        {
            **{f"image_retrieval_recall@{k}": f"retrieval/text_to_image@{k}" for k in (1, 5, 10)},
            **{f"text_retrieval_recall@{k}": f"retrieval/image_to_text@{k}" for k in (1, 5, 10)},
            "mean_recall": "retrieval/mean_recall",
        },
    ),
    "linear_probe": (
        "linear_probe",
        {f"lp_{name}": f"linear_probe/{name}" for name in PROBE},
    ),
    "knn": ("knn", {"acc1": "knn/acc1"}),
    "clustering": ("clustering", {name: f"clustering/{name}" for name in ("ami", "ari")}),
    "geometry": ("geometry", {name: f"modality_gap/{name}" for name in GEOMETRY}),
}
# Tasks that are cheap enough to be done often: they encode no training images and fit nothing.
QUICK = ("zero_shot", "retrieval")
# Those that are run unless others are asked for; the rest learn, mostly from `train`.
DEFAULT = (*QUICK, "geometry")
# What `protocol="paper"` changes, by task, as records say it.
PAPER = {
    "retrieval": "paper: mean_recall is the mean of recall@1, 5 and 10 both ways",
    "linear_probe": "paper: unnormalised features (but the strength is never chosen on test)",
    "clustering": "paper: K-means of normalised test features, k = classes, best of 5 restarts",
}
# The metrics of a run's own evaluation, in their order.
RUN_METRICS = (
    *(f"zero_shot/acc{k}" for k in (1, 5)),
    *(f"zero_shot_subgroup/acc{k}" for k in (1, 5)),
    *RECALLS,
    *("linear_probe/acc1", "knn/acc1", "clustering/ami", "clustering/ari"),
    *(f"modality_gap/{name}" for name in GEOMETRY[:4]),
)
MULTILABEL = "zero_shot/mean_average_precision"  # in place of the accuracies


@dataclass(frozen=True, kw_only=True)
class Result:
    """One task of one model on one data set.

    Attributes:
        record: As `evaluate` returns it.
        influences: Of each metric that has an interval, the influence of each group of samples.
        ids: The measured samples. Two results with equal ids have the same groups.
    """

    record: dict[str, Any]
    influences: Mapping[str, Floats] = field(repr=False)
    ids: Sequence[str] = field(repr=False)


def evaluate(
    model: Model,
    image_transform: Transform,
    tokenizer: Tokenizer,
    data: Data | Sequence[Data],
    tasks: Sequence[str] | None = None,
    *,
    split: str = "test",
    templates: str | Sequence[str] | None = None,
    protocol: str | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    cache: Path | None = None,
    model_name: str = "model",
    pretrained: str = "none",
    show: bool = False,
) -> list[dict[str, Any]]:
    """Judge a model on data: one record for each data set and task.

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
        image_transform, tokenizer: A PIL image to `(3, h, w)`; texts to tokens `(b, c)`.
        data: Data sets, or references to them as `datasets.open_data` takes.
        tasks: Unset, those of `zero_shot`, `retrieval` and `geometry` that the data can serve. The
            others encode `train` or fit something, and a note says how many images they encode.
        split: The split that is measured.
        templates: Prompts in place of the data's own: `openai`, `simple`, a text file, or a list.
        protocol: `paper` takes the reference code's choices; `PAPER` says which.
        batch_size: Images or texts encoded at once.
        workers: Processes that read images; unset, one a core if there are many images.
        cache: Folder in which features are kept; unset, none are.
        model_name, pretrained: What records call the model.
        show: Show progress.

    Returns:
        Records in CLIP_benchmark's schema: `dataset model pretrained task metrics language`. They
        also have `split`, `samples`, `bad_share` (the share of images that cannot be used),
        `intervals` (95%, by metric) and, where it applies, `templates` and `protocol`.

    Raises:
        ValueError: No data set can serve a task, data are faulty, or features are not finite.
    """
    encoder = Encoder(
        model=model,
        transform=image_transform,
        tokenizer=tokenizer,
        batch_size=batch_size,
        workers=workers,
        cache=cache,
        show=show,
    )
    given = [data] if isinstance(data, str | EvaluationData) else data
    opened = raise_on_all_ranks(
        lambda: [datasets.open_data(of, split=split) if isinstance(of, str) else of for of in given]
    )
    announce(opened, split, tasks)
    found = results(
        encoder,
        opened,
        tasks,
        split=split,
        templates=templates,
        protocol=protocol,
        model_name=model_name,
        pretrained=pretrained,
    )
    return [result.record for result in found]


def results(
    encoder: Encoder,
    data: Sequence[EvaluationData],
    tasks: Sequence[str] | None = None,
    *,
    split: str = "test",
    templates: str | Sequence[str] | None = None,
    protocol: str | None = None,
    model_name: str = "model",
    pretrained: str = "none",
) -> list[Result]:
    """`evaluate`, with the influences of samples, by which two models can be compared."""
    if protocol not in (None, "paper"):
        raise ValueError(f"protocol: no protocol '{protocol}'; choose paper, or leave it out")
    called = [of.name for of in data]
    if repeated := [name for name in called if called.count(name) > 1]:
        raise ValueError(f"data: two data sets are called '{repeated[0]}'; rename one's file")
    # Opens, perhaps downloads, the train splits that tasks need.
    chosen = raise_on_all_ranks(lambda: chosen_tasks(data, split, tasks))
    if isinstance(templates, str):
        read = datasets.read_templates
        templates = raise_on_all_ranks(partial(read, templates))
    paper, found = protocol == "paper", []
    for of, of_tasks in zip(data, chosen, strict=True):
        if not of_tasks:
            continue
        features = extract(encoder, of, of_tasks, split=split, templates=templates)
        measured = measure(features, of, of_tasks, split=split, paper=paper, show=encoder.show)
        influence, part = measured.influences(), features.parts[split]
        for task in of_tasks:
            name, names = TASKS[task]
            known = {key: own for key, own in names.items() if own in measured.metrics}
            metrics = {key: own for key, own in known.items() if says_something(own, of, split)}
            of_task = {key: influence[own] for key, own in metrics.items() if own in influence}
            values = {key: measured.metrics[own] for key, own in metrics.items()}
            record: dict[str, Any] = {
                "dataset": of.name,
                "model": model_name,
                "pretrained": pretrained,
                "task": name,
                "metrics": values,
                "language": of.language,
                "split": split,
                "samples": len(part.ids),
                "bad_share": len(part.bad) / (len(part.ids) + len(part.bad)),
                "intervals": intervals(values, of_task),
            }
            if task == "zero_shot":
                record["templates"] = list(templates or of.templates)
            if paper and task in PAPER:
                record["protocol"] = PAPER[task]
            found.append(Result(record=record, influences=of_task, ids=part.ids))
    return found


def quick_tasks(data: EvaluationData, split: str) -> list[str]:
    """The tasks of `QUICK` that the data can serve; raises `ValueError` if they can serve none."""
    reasons = {task: lacks(data, split, task) for task in QUICK}
    if all(reasons.values()):
        why = "; ".join(f"{task} needs {reason}" for task, reason in reasons.items())
        raise ValueError(f"{data.name}: can serve no quick task ({why})")
    return [task for task in QUICK if not reasons[task]]


def run_tasks(data: EvaluationData, split: str, *, quick: bool) -> list[str]:
    """The tasks of a run's evaluation on a data set."""
    return quick_tasks(data, split) if quick else chosen_tasks([data], split, None, TASKS)[0]


def metric_names(
    data: EvaluationData, split: str = "validation", *, quick: bool = False
) -> list[str]:
    """The keys of a run's evaluation on a data set, in their order."""
    tasks = run_tasks(data, split, quick=quick)
    known = {own for task in tasks for own in TASKS[task][1].values()}
    if split not in data.image_names:
        known -= {f"zero_shot_subgroup/acc{k}" for k in (1, 5)}
    labels = data.splits[split].labels
    several = labels is not None and labels.ndim == 2
    known -= {f"zero_shot/acc{k}" for k in (1, 5)} if several else {MULTILABEL}
    return [f"eval/{data.name}/{name}" for name in run_metrics(known, data, split)]


def run_metrics(known: Collection[str], data: EvaluationData, split: str) -> list[str]:
    """Those of these metrics that a run's evaluation gives, in their order."""
    names = [name for name in (*RUN_METRICS, MULTILABEL) if name in known]
    return [name for name in names if says_something(name, data, split)]


def says_something(metric: str, data: EvaluationData, split: str) -> bool:
    """Whether a metric is defined: the best five of fewer classes are not."""
    return not metric.endswith("acc5") or not 0 < number_of_classes(data, split) < 5


def evaluate_run(
    model: Model,
    transform: Transform,
    tokenizer: Tokenizer,
    *,
    split: Literal["validation", "test"],
    data: EvaluationData | None = None,
    workers: int = 0,
    quick: bool = False,
    show: bool = True,
    samples_to: Path | None = None,
) -> dict[str, float]:
    """A run's own evaluation, on the bundled emoji if no other data are given.

    | key after `eval/<data>/` | what |
    |---|---|
    | `zero_shot/acc{1,5}` | an image's class, or of emoji the concept, among all names |
    | `zero_shot_subgroup/acc{1,5}` | of emoji, its class among the class names |
    | `zero_shot/mean_average_precision` | of images with several classes |
    | `retrieval/{image_to_text,text_to_image}@{1,5,10}` | among the split's captions |
    | `linear_probe/acc1`, `knn/acc1` | its class, learned from the image features of `train` |
    | `clustering/{ami,ari}` | K-means of the image features against the classes |
    | `modality_gap/{gap,alignment,uniformity_image,uniformity_text}` | geometry of the pairs |

    Keys that the data cannot serve are left out. Accuracies are fractions from 0 to 1.

    Args:
        model: Runs on its own device, in evaluation mode; each module's mode is restored.
        transform, tokenizer: A PIL image to `(3, h, w)`; captions to tokens `(b, c)`.
        split: What is measured. The linear probe's strength is chosen on `validation`; if that is
            measured, or missing, on a fifth of `train`.
        workers: Processes that read images; the same metrics with any number.
        quick: Zero-shot and retrieval alone, which encode no image but those measured.
        samples_to: Folder for the results of each sample; only a warning if it cannot be written.
    """
    data = data or datasets.emoji()
    tasks = raise_on_all_ranks(lambda: run_tasks(data, split, quick=quick))
    encoder = Encoder(
        model=model, transform=transform, tokenizer=tokenizer, workers=workers, show=show
    )
    features = extract(encoder, data, tasks, split=split)
    measured = measure(features, data, tasks, split=split, show=show)
    if samples_to is not None and rank() == 0:
        write_samples(measured.samples, samples_to / f"{data.name}-{split}.parquet")
    found = measured.metrics
    return {f"eval/{data.name}/{m}": found[m] for m in run_metrics(found, data, split)}


# Which tasks can the data serve?


def chosen_tasks(
    data: Sequence[EvaluationData],
    split: str,
    tasks: Sequence[str] | None,
    usual: Collection[str] = DEFAULT,
) -> list[list[str]]:
    """The tasks of each data set: those asked for that it can serve; without a wish, the usual.

    Raises:
        ValueError: There is no such task or split, or no data set can serve a task.
    """
    for task in tasks or ():
        if task not in TASKS:
            close = get_close_matches(task, TASKS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose of {', '.join(TASKS)}"
            raise ValueError(f"tasks: no task '{task}'; {hint}")
    for of in data:
        if split not in of.splits:
            raise ValueError(f"{of.name}: no split '{split}'; it has {', '.join(of.splits)}")
        if not len(of.splits[split].images):
            raise ValueError(f"{of.name}: its split '{split}' holds no image")
    lacking = {task: [lacks(of, split, task) for of in data] for task in tasks or usual}
    names = ", ".join(of.name for of in data)
    for task, reasons in lacking.items():
        if tasks and all(reasons):
            raise ValueError(f"{names}: {task} needs {reasons[0]}; choose other data or --tasks")
    if all(all(reasons) for reasons in lacking.values()):
        why = "; ".join(f"{task} needs {reasons[0]}" for task, reasons in lacking.items())
        others = "" if tasks or {*usual} >= TASKS.keys() else "; --tasks names others"
        raise ValueError(f"{names}: can serve no task ({why}{others})")
    return [[task for task in lacking if not lacking[task][number]] for number in range(len(data))]


def announce(
    data: Sequence[EvaluationData], split: str, tasks: Sequence[str] | None
) -> list[list[str]]:
    """`chosen_tasks`; a note says how many images are encoded for those that are asked for."""
    chosen = raise_on_all_ranks(lambda: chosen_tasks(data, split, tasks))
    for of, of_tasks in zip(data, chosen, strict=True):
        learning = [task for task in of_tasks if task not in DEFAULT]
        if learning and rank() == 0:
            wanted = splits_of(of, of_tasks, split)
            numbers = ", ".join(f"{len(of.splits[name].images):,} of {name}" for name in wanted)
            say(f"note: {of.name}: {', '.join(learning)}: images to encode: {numbers}")
    return chosen


def splits_of(data: EvaluationData, tasks: Sequence[str], split: str) -> list[str]:
    """The splits whose images the tasks need; opens no other."""
    wanted = ["train"] * bool({"linear_probe", "knn"} & {*tasks})
    if "linear_probe" in tasks and split != "validation":
        validation = data.splits.get("validation")
        wanted += ["validation"] * (validation is not None and validation.labels is not None)
    return [*wanted, split]


def lacks(data: EvaluationData, split: str, task: str) -> str:
    """What a task needs and the data do not have; empty if they have everything.

    Raises:
        ValueError: A label is not the number of a class.
    """
    part = data.splits[split]
    labels = part.labels
    if task in ("retrieval", "geometry"):
        for row, captions in enumerate(part.captions or ()):
            if not captions:
                raise ValueError(
                    f"{data.name}: sample '{part.images.sample_id(row)}' has no caption"
                )
        return "" if part.captions is not None else "captions"
    if task == "zero_shot" and split in data.image_names:
        return ""
    if labels is None:
        return "labels"
    if task == "zero_shot":
        check_labels(data, split)
        return "" if data.class_names else "class names"
    if labels.ndim == 2:
        return "one class an image, and these are multilabel data"
    if task == "clustering":
        return "" if len(set(labels.tolist())) > 1 else "images of two classes or more"
    train = data.splits.get("train")  # opens it, which may take long
    if train is None or train.labels is None or split == "train":
        return "a labelled train split beside the one that is measured"
    return "" if len(set(train.labels.tolist())) > 1 else "a train split of two classes or more"


def number_of_classes(data: EvaluationData, split: str) -> int:
    """Of the classes, or of the emoji's concepts, that an image is told from; 0 without labels."""
    labels = data.splits[split].labels
    if split in data.image_names:
        return len(set(data.image_names[split]))
    return 0 if labels is None else len(data.class_names) or len(set(labels.tolist()))


def check_labels(data: EvaluationData, split: str) -> None:
    labels, count = data.splits[split].labels, len(data.class_names)
    if labels is None or not count:
        return
    if labels.ndim == 2 and labels.shape[1] != count:
        raise ValueError(
            f"{data.name}: {count} class names for {labels.shape[1]} columns of labels"
        )
    if labels.ndim == 1 and bool((wrong := (labels < 0) | (labels >= count)).any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{data.name}: sample '{data.splits[split].images.sample_id(row)}' has class "
            f"{int(labels[row])}, but there are names for classes 0 to {count - 1}"
        )


# Which features do they need?


@dataclass(frozen=True, kw_only=True)
class Part:
    """The images of a split that can be used: features of any norm, and what is known of each."""

    features: Float[Tensor, "n d"]
    ids: Sequence[str]
    bad: Sequence[Bad]
    labels: Tensor | None
    groups: Int[Tensor, " n"]
    content: Sequence[int]  # equal for equal images
    captions: Captions | None
    names: Sequence[str] | None

    @property
    def unit(self) -> Float[Tensor, "n d"]:
        return F.normalize(self.features, dim=1)


@dataclass(frozen=True, kw_only=True)
class Features:
    """What `measure` needs: images by split; `captions`, and classifiers of `names`, `classes`.

    They lie on the CPU. What learns from them does it on `device`.
    """

    parts: Mapping[str, Part]
    texts: Mapping[str, Float[Tensor, "_ d"]]
    device: torch.device | str = "cpu"


def extract(
    encoder: Encoder,
    data: EvaluationData,
    tasks: Sequence[str],
    *,
    split: str,
    templates: Sequence[str] | None = None,
) -> Features:
    """The features that the tasks need; images and texts that no task needs are not encoded."""
    parts = {}
    for name in splits_of(data, tasks, split):
        stage = f"{data.name} images: {name}"
        found = encoder.images(data.splits[name].images, stage=stage)
        parts[name] = part_of(data, name, found)
        if rank() == 0:
            say_bad(stage, found.bad, len(data.splits[name].images))
    texts = {}
    part, stage = parts[split], f"{data.name} texts"
    if part.captions is not None and {"retrieval", "geometry"} & {*tasks}:
        texts["captions"] = F.normalize(encoder.texts(part.captions.texts, stage=stage), dim=1)

    def classifier(names: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "k d"]:
        encoded = encoder.texts(prompts(names, templates), stage=stage)
        return zero_shot_classifier(encoded.view(len(names), len(templates), -1))

    if "zero_shot" in tasks:
        if part.names is not None:
            texts["names"] = classifier(sorted(set(part.names)), templates or ["{c}"])
        if part.labels is not None and data.class_names:
            distinct = [*dict.fromkeys(data.class_names)]
            encoded = classifier(distinct, templates or data.templates)
            texts["classes"] = encoded[positions(data.class_names, distinct)]
    return Features(parts=parts, texts=texts, device=encoder.device)


def part_of(data: EvaluationData, split: str, encoded: Encoded) -> Part:
    """A split without its bad rows; of images with captions, those of equal content are one.

    Where the data say which images belong together, as the emoji do, each stays as it is.
    """
    given, left_out = data.splits[split], {row for row, _ in encoded.bad}
    rows = [row for row in range(len(given.images)) if row not in left_out]
    ids, features = [given.images.sample_id(row) for row in rows], encoded.features
    groups = None if given.groups is None else [given.groups[row] for row in rows]
    names, captions = data.image_names.get(split), None
    content = encoded.content.tolist()
    if given.captions is not None:
        of_rows = [given.captions[row] for row in rows]
        captions = captions_of(of_rows, ids, groups, content)
        if len(kept := captions.rows) < len(rows):
            rows, ids = [rows[i] for i in kept], [ids[i] for i in kept]
            content, features = [content[i] for i in kept], features[kept]
    return Part(
        features=features,
        ids=ids,
        bad=encoded.bad,
        labels=None if given.labels is None else given.labels[torch.tensor(rows)],
        groups=torch.tensor(range(len(rows)) if groups is None else groups),
        content=content,
        captions=captions,
        names=None if names is None else [names[row] for row in rows],
    )


def hanging_together(part: Part) -> tuple[list[str], list[str]]:
    """The group of each image and of each text that is to be retrieved, by the id of an image.

    Images of a concept hang together, an image and its captions, equal images, and images with an
    equal caption: rarest first, while no group grows beyond `LARGEST` images and a fiftieth of all.
    """
    group, members = part.groups.tolist(), dict[int, list[int]]()
    for image, number in enumerate(group):
        members.setdefault(number, []).append(image)
    images_of: dict[str | int, list[int]] = {}
    for image, content in enumerate(part.content):
        images_of.setdefault(content, []).append(image)
    first: dict[int, int] = {}
    captions = part.captions
    if captions is not None:
        pairs = zip(captions.image_of_pair.tolist(), captions.text_of_pair.tolist(), strict=True)
        for image, text in pairs:
            images_of.setdefault(captions.texts[text], []).append(image)
            first.setdefault(text, image)
    for images in sorted(images_of.values(), key=len):
        joined = {group[image] for image in images}
        together = [image for number in joined for image in members[number]]
        if len(joined) > 1 and len(together) <= max(LARGEST, len(group) // 50):
            number = min(joined)
            members[number] = together
            for image in together:
                group[image] = number
    of_images = [part.ids[min(members[number])] for number in group]
    return of_images, [of_images[first[text]] for text in range(len(first))]


def say_bad(stage: str, bad: Sequence[Bad], number: int) -> None:
    """Name the first ten images that cannot be used."""
    if bad:
        share = f"{len(bad)} of {number} images cannot be used and are left out"
        say(f"warning: {stage}: {share}:")
    for _, why in bad[:10]:
        say(f"  {why}")


# What is measured?


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Metrics by our own names, and what each sample contributes to them."""

    metrics: dict[str, float]
    samples: SampleResults
    scores: tuple[Tensor, Tensor] | None  # of multilabel data: scores and presence `(n, k)`

    def influences(self) -> dict[str, Floats]:
        """The influence of each group of samples, on those of `metrics` that have an interval."""
        found, groups = influences(self.samples), self.samples.groups()
        if self.scores is not None and len(groups.names) > 1:
            parts = mean_average_precision_parts(*self.scores)
            found[MULTILABEL] = by_group(parts, groups.images, len(groups.names))
        if "retrieval/mean_recall" in self.metrics and found:
            found["retrieval/mean_recall"] = np.mean([found[name] for name in RECALLS], axis=0)
        return {name: of_groups for name, of_groups in found.items() if name in self.metrics}


def measure(
    features: Features,
    data: EvaluationData,
    tasks: Sequence[str],
    *,
    split: str,
    paper: bool = False,
    show: bool = False,
) -> Measured:
    """The metrics of the tasks, and the results of each sample. The ranks share the stages."""
    stages = [
        stage
        for task, of_task in stages_of(features, data, split, paper=paper).items()
        for stage in of_task
        if task in tasks
    ]

    def measure_share() -> dict[str, Any]:
        own = stages[rank() :: collectives.world_size()]
        progress = Progress(f"evaluate: {data.name} metrics", len(own))
        share: dict[str, Any] = {}
        for done, stage in enumerate(own, 1):
            share |= stage()
            if show and rank() == 0:
                progress.update(done)
        return share

    found: dict[str, Any] = {}
    for share in collectives.all_gather_object(raise_on_all_ranks(measure_share)):
        found |= share
    part = features.parts[split]

    def columns(ids: Sequence[str], groups: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
        own = {name: found[name].numpy() for name in names if name in found}
        given = {"sample_id": ids, "group": groups}
        return {name: np.array(of, dtype=object) for name, of in given.items()} | own

    of_images, of_texts = hanging_together(part)
    texts: tuple[Sequence[str], Sequence[str]] = [], []
    if part.captions is not None and "text_to_image_rank" in found:
        texts = part.captions.ids, of_texts
    samples = SampleResults(
        images=columns(part.ids, of_images, IMAGE_COLUMNS),
        texts=columns(*texts, TEXT_COLUMNS),
    )
    metrics = {name: samples.mean(name) for name in samples.means()}
    metrics |= {name: found[name] for name in sorted(found) if isinstance(found[name], float)}
    if paper and "retrieval" in tasks:
        metrics["retrieval/mean_recall"] = float(np.mean([metrics[name] for name in RECALLS]))
    return Measured(metrics=metrics, samples=samples, scores=found.get("scores"))


def stages_of(
    features: Features, data: EvaluationData, split: str, *, paper: bool
) -> dict[str, list[Callable[[], dict[str, Any]]]]:
    """What each task computes, in stages that ranks share: columns of samples, and numbers."""
    part, parts, texts = features.parts[split], features.parts, features.texts
    images, labels, captions = part.unit, part.labels, part.captions
    device = features.device

    def names() -> dict[str, Any]:
        assert part.names is not None
        own = positions(part.names, sorted(set(part.names)))
        return {
            "zero_shot_rank": zero_shot_ranks(images, texts["names"], own),
            "zero_shot_class": own,
        }

    def classes() -> dict[str, Any]:
        assert labels is not None
        if labels.ndim == 2:
            scores = images @ texts["classes"].T
            precision = mean_average_precision(scores, labels)
            return {"scores": (scores, labels), "zero_shot/mean_average_precision": precision}
        ranks = zero_shot_ranks(images, texts["classes"], labels, data.class_names)
        if part.names is not None:
            return {"zero_shot_subgroup_rank": ranks}
        return {"zero_shot_rank": ranks, "zero_shot_class": labels}

    def retrieval() -> dict[str, Any]:
        assert captions is not None
        found = texts["captions"]
        of_images, of_texts = retrieval_ranks(images, found, captions)
        names = hanging_together(part)
        number = {name: place for place, name in enumerate(sorted({*names[0]}))}
        image_groups, text_groups = (torch.tensor([number[name] for name in of]) for of in names)
        of_candidates = {
            "image_to_text": crowding(images, found, of_images, image_groups, text_groups),
            "text_to_image": crowding(found, images, of_texts, text_groups, image_groups),
        }
        return {
            "image_to_text_rank": of_images,
            "text_to_image_rank": of_texts,
            **{
                f"{way}_crowding_{k}": taken
                for way, by_k in of_candidates.items()
                for k, taken in by_k.items()
            },
        }

    def probe() -> dict[str, Any]:
        assert labels is not None
        known = [of for name, of in parts.items() if name != split]
        given = [(p.features if paper else p.unit, cast(Tensor, p.labels)) for p in known]
        found = best_linear_probe(*(of.to(device) for pair in given for of in pair))
        measured = part.features if paper else images
        return {
            "class": labels,
            "linear_probe_correct": found.predict(measured) == labels,
            "linear_probe_rank": found.ranks(measured, labels),
        }

    def neighbours() -> dict[str, Any]:
        train = parts["train"]
        assert train.labels is not None
        given = (of.to(device) for of in (train.unit, train.labels, images))
        return {"knn_correct": knn_predict(*given).cpu() == labels}

    def clusters() -> dict[str, Any]:
        assert labels is not None
        found = clustering(images.to(device), labels, restarts=5 if paper else 10)
        return {
            "class": labels,
            "cluster": found["cluster"],
            **{f"clustering/{name}": found[name] for name in ("ami", "ari")},
        }

    def geometry() -> dict[str, Any]:
        assert captions is not None
        paired = texts["captions"][captions.text_of_pair]
        found = modality_gap(images, paired, captions.image_of_pair)
        found["effective_rank_image"] = effective_rank(images)
        found["effective_rank_text"] = effective_rank(texts["captions"])
        return {f"modality_gap/{name}": value for name, value in found.items()}

    return {
        "zero_shot": [names] * ("names" in texts) + [classes] * ("classes" in texts),
        "retrieval": [retrieval],
        "linear_probe": [probe],
        "knn": [neighbours],
        "clustering": [clusters],
        "geometry": [geometry],
    }


# How is it written down?


def write_samples(samples: SampleResults, path: Path) -> None:
    """Keep the results of samples; only a warning if they cannot be written."""
    try:
        samples.write(path)
    except OSError as error:
        say(f"warning: {path}: not written ({error})")
