"""The metrics: a table of their names and columns, the results of each test sample, and intervals.

An *influence* is how far a group of samples moves a metric; the sum of their squares is the
metric's variance over other test sets. Influences of means and differences of metrics are means and
differences of influences, so models are compared group by group.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from protoclip.files import SEAL, checksum, replacing, require_regular, to_json

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Columns = Mapping[str, npt.NDArray[Any]]
LEVEL = 0.05  # of intervals, and of the test for clear differences
FEWEST = 5  # groups that an interval may rest on
KS = (1, 5, 10)  # of recall@k of retrieval


@dataclass(frozen=True)
class Metric:
    """One metric. Means over samples and the mean average precision have intervals."""

    task: str  # of `evaluate`
    name: str  # after `eval/<data set>/`
    key: str  # in records of the task: CLIP_benchmark's name if there is one
    label: str  # for people
    _: KW_ONLY
    emoji_label: str = ""  # on the emoji, if that differs
    in_runs: bool = True  # whether a run's own evaluation has it
    #: Of a mean over samples: the column of their results, which is true or a rank below `k`, from
    #: 0, for a sample that is right.
    column: str | None = None
    k: int | None = None
    by: str | None = None  # the column of classes over which the mean is taken first
    crowding: str | None = None  # the column of what each candidate takes from the mean
    has_text_samples: bool = False  # or else images


MULTILABEL = "zero_shot/mean_average_precision"  # instead of the accuracies
#: In the order in which they are shown.
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        *(
            Metric(
                *("zero_shot", f"zero_shot/acc{k}", f"acc{k}", f"zero-shot, acc{k}"),
                emoji_label=f"zero-shot, unseen concepts, acc{k}",
                column="zero_shot_rank",
                k=k,
            )
            for k in (1, 5)
        ),
        Metric(
            *("zero_shot", "zero_shot/mean_per_class_recall", "mean_per_class_recall"),
            "zero-shot, mean recall of classes",
            column="zero_shot_rank",
            k=1,
            by="zero_shot_class",
            in_runs=False,
        ),
        *(
            Metric(
                *("zero_shot", f"zero_shot_subgroup/acc{k}", f"subgroup_acc{k}"),
                f"zero-shot, subgroups, acc{k}",
                column="zero_shot_subgroup_rank",
                k=k,
            )
            for k in (1, 5)
        ),
        Metric(
            *("zero_shot", MULTILABEL, "mean_average_precision"),
            "zero-shot, mean average precision",
        ),
        *(
            Metric(
                *("retrieval", f"retrieval/{way}@{k}", f"{answer}_retrieval_recall@{k}"),
                f"{way.replace('_', '-')} recall@{k}",
                column=f"{way}_rank",
                k=k,
                crowding=f"{way}_crowding_{k}",
                has_text_samples=way == "text_to_image",
            )
            for way, answer in (("image_to_text", "text"), ("text_to_image", "image"))
            for k in KS
        ),
        Metric(
            *("linear_probe", "linear_probe/acc1", "lp_acc1", "linear probe"),
            column="linear_probe_correct",
        ),
        Metric(
            *("linear_probe", "linear_probe/acc5", "lp_acc5", "linear probe, acc5"),
            column="linear_probe_rank",
            k=5,
            in_runs=False,
        ),
        Metric(
            *("linear_probe", "linear_probe/mean_per_class_recall", "lp_mean_per_class_recall"),
            "linear probe, mean recall of classes",
            column="linear_probe_correct",
            by="class",
            in_runs=False,
        ),
        Metric("knn", "knn/acc1", "acc1", "kNN", column="knn_correct"),
        Metric("clustering", "clustering/ami", "ami", "K-means AMI"),
        Metric("clustering", "clustering/ari", "ari", "K-means ARI"),
        *(
            Metric(
                *("geometry", f"modality_gap/{key}", key, key.replace("_", " ")),
                in_runs=not key.startswith("effective_rank"),
            )
            for key in (
                *("gap", "alignment", "uniformity_image", "uniformity_text"),
                *("effective_rank_image", "effective_rank_text"),
            )
        ),
    )
}
#: Columns that identify an image besides its id, which another image may have in another table.
SHOWN = ("content", "class_name")
RECALLS = [name for name, metric in METRICS.items() if metric.task == "retrieval"]
#: The tasks, and what each needs to be encoded besides the measured images: splits, or texts.
NEEDS = {
    "zero_shot": ("classes",),
    "retrieval": ("captions",),
    "linear_probe": ("train", "validation"),
    "knn": ("train",),
    "clustering": (),
    "geometry": ("captions",),
}
TASKS = tuple(NEEDS)


def list_columns(*, texts: bool) -> list[str]:
    """The columns of results of images, or of texts: their identity, and what metrics need."""
    columns = dict.fromkeys(["group"] if texts else ["group", *SHOWN])
    for metric in METRICS.values():
        is_side = metric.has_text_samples == texts
        names = [metric.column, metric.by] if is_side else [metric.crowding]
        columns |= dict.fromkeys(filter(None, names))
    return list(columns)


def label(name: str, data: str) -> str:
    """A metric's name for people on a data set; the key itself for metrics of other versions."""
    if name not in METRICS:
        return name.replace("_", " ")
    metric = METRICS[name]
    return (metric.emoji_label if data == "emoji" else "") or metric.label


def is_share(name: str) -> bool:
    """Whether a metric of this version is at most 1, shown in percent and better if higher."""
    return name in METRICS and METRICS[name].task != "geometry"


# Results of samples


@dataclass(frozen=True, kw_only=True)
class SampleResults:
    """Results of each image and each caption of a split, by column, and metrics, by `METRICS`.

    Both sides have `sample_id` when all tasks are together. Images and captions that belong
    together, such as an image and its captions, have one `group`. Images also have the columns
    `SHOWN`; files of version 1.0.0 lack them.
    """

    images: Columns = field(default_factory=dict)
    texts: Columns = field(default_factory=partial(dict, sample_id=np.array([], dtype=object)))
    # Of a task those that are no means over samples, in the end all. No file has them.
    metrics: Mapping[str, float] = field(default_factory=dict)
    # What each image adds to such a metric, less its expectation `(n,)`.
    parts: Mapping[str, Floats] = field(default_factory=dict)

    def rows(self, metric: str) -> Columns:
        """The results that a metric is computed from."""
        return self.texts if METRICS[metric].has_text_samples else self.images

    def values(self, metric: str) -> Floats:
        """Whether each sample is right, 0 or 1, for one of `means`."""
        column, k = self.rows(metric)[METRICS[metric].column or ""], METRICS[metric].k
        return (column if k is None else column < k).astype(np.float64)

    @cached_property
    def means(self) -> dict[str, float]:
        """The metrics that are means over samples and whose columns exist."""
        means = dict[str, float]()
        for name, metric in METRICS.items():
            column, by = metric.column, metric.by
            if column is None or not {column, by or column} <= self.rows(name).keys():
                continue
            values = self.values(name)
            if by is not None:
                _, classes = np.unique(self.images[by], return_inverse=True)
                values = np.bincount(classes, values) / np.bincount(classes)
            means[name] = float(values.mean())
        return means

    def write(self, path: Path) -> None:
        """Write a Parquet file: one row an image, then one row a text."""
        tables = [
            pa.table({"kind": [kind] * len(columns["sample_id"]), **columns})
            for kind, columns in (("image", self.images), ("text", self.texts))
            if len(columns["sample_id"])
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.concat_tables(tables, promote_options="default")
        table = table.replace_schema_metadata({SEAL: content_checksum(table)})
        with replacing(path) as temporary:
            pq.write_table(table, temporary)

    @classmethod
    def read(cls, path: Path) -> "SampleResults":
        """Read a file of `write`; raises a `ValueError` if it is damaged."""
        try:
            require_regular(path)
            table, sides = pq.read_table(path), []
            seal = (table.schema.metadata or {}).get(SEAL.encode(), b"")
            if seal.decode(errors="replace") != content_checksum(table):
                raise ValueError("not what this version wrote: its checksum differs")
            for kind, texts in (("image", False), ("text", True)):
                rows = table.filter(pc.equal(table["kind"], kind))
                names = [name for name in list_columns(texts=texts) if name in rows.column_names]
                sides.append({n: rows[n].to_numpy() for n in ("sample_id", *names)})
        except (pa.ArrowException, KeyError, OSError, ValueError) as error:
            raise ValueError(
                f"{path}: not the results of an evaluation; delete it to compare without it "
                f"({' '.join(str(error).split())})"
            ) from error
        return cls(images=sides[0], texts=sides[1])


def content_checksum(table: pa.Table) -> str:
    """A checksum of a table's columns, by name."""
    columns = {name: table[name].to_pylist() for name in table.column_names}
    return checksum(to_json(columns).encode())


def compute_influences(results: SampleResults) -> tuple[dict[str, Floats], set[str]]:
    """The influence of each group on each metric that has an interval, `(groups,)` each.

    Candidates are crowded where the variance of a recall comes mostly from what they take from it.
    Such a recall depends on a few candidates that are near to very many queries, and its variance
    cannot be seen in a test set that happens to lack them. Two models share most of it.

    Without a `group` column, as in files of version 1.0.0, each sample is a group. With a single
    group there is no influence, and no interval.

    Returns:
        The influences by metric, and the metrics whose candidates are crowded.
    """
    sides = results.images, results.texts
    columns = [side.get("group", side["sample_id"]) for side in sides]
    names, numbers = np.unique(np.concatenate(columns), return_inverse=True)
    groups, number = np.split(numbers, [len(columns[0])]), len(names)
    if number < 2:
        return {}, set()
    by_metric = {m: sum_by_group(p, groups[0], number) for m, p in results.parts.items()}
    crowded = set[str]()
    for name, mean in results.means.items():
        metric, values = METRICS[name], results.values(name)
        side = int(metric.has_text_samples)
        parts = (values - mean) / len(values)
        if metric.by is not None:
            parts = deviations(values, sides[side][metric.by], groups[side])
        by_metric[name] = sum_by_group(parts, groups[side], number)
        candidates, their_groups = sides[1 - side], groups[1 - side]
        if (crowding_name := str(metric.crowding)) in candidates:
            taken = candidates[crowding_name].astype(np.float64)
            crowding = sum_by_group(taken, their_groups, number)
            by_metric[name] += crowding
            if 2 * np.square(crowding).sum() > np.square(by_metric[name]).sum():
                crowded.add(name)
    return by_metric, crowded


def deviations(values: Floats, classes: npt.NDArray[Any], group: Ints) -> Floats:
    """What each sample adds to a mean of class means, less its expectation.

    A class within a single group tells nothing of its spread, so it is compared with others.
    """
    _, numbers = np.unique(classes, return_inverse=True)
    pairs = np.unique(np.stack([numbers, group]), axis=1)
    sizes, number = np.bincount(numbers), np.bincount(pairs[0])
    means = np.bincount(numbers, values) / sizes
    several = number[numbers] > 1
    correction = np.sqrt(number / np.maximum(number - 1, 1))[numbers]
    within = (values - means[numbers]) * correction
    among = (means - means.mean())[numbers]
    return np.where(several, within, among) / (sizes[numbers] * len(sizes))


def sum_by_group(parts: Floats, group: Ints, number: int) -> Floats:
    """The influence of each of `number` groups on a metric, from what its samples add to it."""
    sums = np.bincount(group, parts, minlength=number).astype(np.float64)
    return sums * math.sqrt(number / (number - 1))


# Intervals


def interval(metric: float | Sequence[float], influence: Floats) -> list[float]:
    """The 95% interval of a metric between 0 and 1, or of its mean over seeds, by its influences.

    This is Wilson's interval for the number of samples that would give the same variance. If the
    variance `rests_on_few`, that number is at most the number of groups, so the interval is rather
    too wide. It is not symmetric, and covers the true value near 0 and 1 too.

    Args:
        metric, influence: One of a model, or one of each of its seeds.
    """
    values, influences = np.atleast_1d(metric).tolist(), np.atleast_2d(influence)
    mean, number = float(np.mean(values)), influences.shape[1]
    z = quantile_of_t(number - 1)
    spread, variance = mean * (1 - mean), (half_width(values, influences) / z) ** 2
    size = spread / variance if spread > 0 and variance > 0 else number
    if rests_on_few(influences.mean(axis=0)):
        size = min(size, number)
    centre = mean + z**2 / (2 * size)
    half = z * np.sqrt(spread / size + z**2 / (4 * size**2))
    low, high = (float(end / (1 + z**2 / size)) for end in (centre - half, centre + half))
    return [min(low, mean), max(high, mean)]  # rounding


def rests_on_few(parts: Floats) -> bool:
    """Whether fewer than `FEWEST` groups make up most of a sum of squares, or it is 0.

    For influences the sum is the variance, which is unknown then.
    """
    squares = float(np.square(parts).sum())
    # With k equal parts the ratio of both sides is k; rounding must not make 5 less.
    return squares**2 <= (FEWEST - 1e-6) * float(np.power(parts, 4).sum())


def difference(gains: Sequence[float], influence: Floats | None = None) -> dict[str, Any]:
    """How much higher a metric of one model is than that of another, by the arguments of
    `interval_of_difference`.

    Returns:
        `mean`; `interval`, its 95% interval, or None; `p`, the level at which the interval would
        end at 0, at least 1e-15, 1 for NaN and None without an interval; `beyond` of `mark_clear`.
    """
    mean, ends, p = float(np.mean(gains)), interval_of_difference(gains, influence), None

    def holds_0(number: int) -> bool:
        return not half_width(gains, influence, 10 ** (-number / 1000)) < abs(mean)

    if ends is not None:
        p = float(10 ** (-max(0, bisect_left(range(15_000), True, key=holds_0) - 1) / 1000))
    return {"mean": mean, "interval": ends, "p": p, "beyond": False}


def mark_clear(differences: Iterable[dict[str, Any]]) -> None:
    """Decide by Holm's test which of all compared differences are `beyond` chance.

    If the models are equally good, it finds any difference in at most 5 of 100 comparisons, for any
    number of models and metrics.
    """
    tests = sorted((d for d in differences if d["p"] is not None), key=lambda d: d["p"])
    for number, test in enumerate(tests):
        if test["p"] * (len(tests) - number) > LEVEL:
            break
        test["beyond"] = True


def interval_of_difference(
    gains: Sequence[float], influence: Floats | None = None
) -> list[float] | None:
    """The 95% interval of the mean of some gains: over their seeds, over samples, or over both.

    Both half-widths add like those of independent errors. `benchmarks/intervals.py` counts how
    often the intervals cover the true value.

    Args:
        gains: The difference of each pair of runs of equal seed; one tells nothing of others.
        influence: The difference of each group's influence `(pairs, groups)`, or `(groups,)` for a
            single pair, if all runs were measured on the same samples.

    Returns:
        None if neither seeds nor samples are known, or if fewer than `FEWEST` groups make up most
        of the difference, as when two models are right on nearly everything, or are the same.
    """
    if len(gains) == 1 and influence is None:
        return None
    mean = float(np.mean(gains))
    if influence is not None:
        moved = np.atleast_2d(influence).mean(axis=0)
        # Influences are centred, which hides that most groups do not differ. With the mean added
        # back, each is what a group adds to the difference: about 0 if both models are equally
        # right, and exactly 0 if all groups weigh the same.
        added = moved * np.sqrt((len(moved) - 1) / len(moved)) + mean / len(moved)
        if rests_on_few(moved) or rests_on_few(added):
            return None
    half = half_width(gains, influence)
    return [mean - half, mean + half]


def half_width(
    gains: Sequence[float], influence: Floats | None = None, level: float = LEVEL
) -> float:
    """Half of an interval over seeds, if there are several gains, and over samples, if known.

    Over seeds it is Student's t interval of the mean of independent gains; over samples Student's t
    with one degree of freedom less than groups, without the variation between seeds.
    """
    seeds = len(gains)
    half_widths = [0.0]
    if seeds > 1:
        spread = np.asarray(gains, dtype=np.float64).std(ddof=1)
        half_widths.append(quantile_of_t(seeds - 1, level) * spread / np.sqrt(seeds))
    if influence is not None:
        pairs = np.atleast_2d(influence)
        number, groups = pairs.shape
        mean = pairs.mean(axis=0)
        variance = np.square(mean).sum()
        if number > 1:
            variance -= np.square(pairs - mean).sum() / (number - 1) / number
        half_widths.append(quantile_of_t(groups - 1, level) * np.sqrt(np.maximum(variance, 0)))
    return float(np.hypot.reduce(half_widths))


def quantile_of_t(degrees: int, level: float = LEVEL) -> float:
    """The value that Student's t exceeds in magnitude with probability `level`."""
    from scipy.special import stdtrit  # here, since training imports this file

    return float(stdtrit(degrees, 1 - level / 2))
