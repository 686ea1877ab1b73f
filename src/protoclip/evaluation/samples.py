"""The results of each test sample: kept on disk, and what follows from them for intervals.

A metric has an *influence* of each group of samples: how far the group moves it. The sum of their
squares is the metric's variance over other test sets. Influences of means and differences of
metrics are means and differences of influences, so models are compared group by group.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.special import stdtrit

from protoclip.files import SEAL, checksum, replacing, require_regular, to_json
from protoclip.terminal import say

Columns = Mapping[str, npt.NDArray[Any]]
FEWEST = 5  # groups that an interval of a difference may rest on

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A metric that is a mean over samples.

    A sample is right if `column` is true, or is a rank below `k` (ranks count from zero). With `by`
    the mean is first taken over the samples of each class, which that column has. `crowding` is the
    column of the candidates with what each takes from the mean.
    """

    column: str
    k: int | None = None
    by: str | None = None
    crowding: str | None = None


MEANS: dict[str, Mean] = {
    **{f"zero_shot/acc{k}": Mean(column="zero_shot_rank", k=k) for k in (1, 5)},
    **{f"zero_shot_subgroup/acc{k}": Mean(column="zero_shot_subgroup_rank", k=k) for k in (1, 5)},
    **{
        f"retrieval/{way}@{k}": Mean(column=f"{way}_rank", k=k, crowding=f"{way}_crowding_{k}")
        for way in ("image_to_text", "text_to_image")
        for k in (1, 5, 10)
    },
    "linear_probe/acc1": Mean(column="linear_probe_correct"),
    "knn/acc1": Mean(column="knn_correct"),
    "zero_shot/mean_per_class_recall": Mean(column="zero_shot_rank", k=1, by="zero_shot_class"),
    "linear_probe/acc5": Mean(column="linear_probe_rank", k=5),
    "linear_probe/mean_per_class_recall": Mean(column="linear_probe_correct", by="class"),
}
# Columns of the file beside `sample_id` and `kind`. A task that was not run has none. Samples that
# hang together have one `group`.
TEXT_COLUMNS = (
    *("group", "text_to_image_rank"),
    *(f"image_to_text_crowding_{k}" for k in (1, 5, 10)),
)
IMAGE_COLUMNS = (
    "group",
    *(f"text_to_image_crowding_{k}" for k in (1, 5, 10)),
    *("zero_shot_rank", "zero_shot_subgroup_rank", "image_to_text_rank", "linear_probe_correct"),
    *("linear_probe_rank", "knn_correct", "cluster", "class", "zero_shot_class"),
)


class Groups(NamedTuple):
    """Names of the groups in their order, and the number of each image's and each text's group."""

    names: npt.NDArray[Any]
    images: Ints
    texts: Ints


@dataclass(frozen=True, kw_only=True)
class SampleResults:
    """Results of each image and each caption of a split, by column; both have `sample_id`.

    Images and captions that hang together, such as an image and its captions, have one `group`.
    """

    images: Columns
    texts: Columns = field(default_factory=lambda: {"sample_id": np.array([], dtype=object)})

    def rows(self, metric: str) -> Columns:
        """The results that a metric is computed from."""
        return self.texts if "text_to_image" in metric else self.images

    def means(self) -> list[str]:
        """The metrics in `MEANS` whose columns are there."""
        return [
            name
            for name, mean in MEANS.items()
            if {mean.column, mean.by or mean.column} <= self.rows(name).keys()
        ]

    def groups(self) -> "Groups":
        """The groups of images and texts; without a column of them each sample is a group."""
        columns = [of.get("group", of["sample_id"]) for of in (self.images, self.texts)]
        names, numbers = np.unique(np.concatenate(columns), return_inverse=True)
        return Groups(names, *np.split(numbers, [len(columns[0])]))

    def values(self, metric: str) -> Floats:
        """Whether each sample is right, 0 or 1, for a metric in `MEANS`."""
        mean = MEANS[metric]
        found = self.rows(metric)[mean.column]
        return (found if mean.k is None else found < mean.k).astype(np.float64)

    def mean(self, metric: str) -> float:
        """A metric in `MEANS`."""
        values, by = self.values(metric), MEANS[metric].by
        if by is None:
            return float(values.mean())
        _, classes = np.unique(self.images[by], return_inverse=True)
        return float((np.bincount(classes, values) / np.bincount(classes)).mean())

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
        """Read what `write` wrote; raises a `ValueError` if the file is damaged."""
        try:
            require_regular(path)
            table, parts = pq.read_table(path), []
            # Earlier versions wrote no checksum.
            seal = (table.schema.metadata or {}).get(SEAL.encode())
            if seal is not None and seal.decode(errors="replace") != content_checksum(table):
                raise KeyError("not what was written: its checksum differs")
            for kind, known in (("image", IMAGE_COLUMNS), ("text", TEXT_COLUMNS)):
                rows = table.filter(pc.equal(table["kind"], kind))
                names = [name for name in known if name in rows.column_names]
                rows = rows.select(["sample_id", *names])
                if gaps := [name for name in rows.column_names if rows[name].null_count]:
                    raise KeyError(f"column {gaps[0]} has gaps")
                parts.append({name: rows[name].to_numpy() for name in rows.column_names})
        except (pa.ArrowException, KeyError, OSError, ValueError) as error:
            raise ValueError(
                f"{path}: not the results of an evaluation; delete it to compare without it "
                f"({' '.join(str(error).split())})"
            ) from error
        images, texts = parts
        if "group" not in images:
            say(
                f"note: {path}: an earlier version wrote it and left out which images hang "
                "together, so intervals may be too narrow; `evaluate --compare-to` is right"
            )
            images["group"], of_images = images["sample_id"], {*images["sample_id"]}
            # The id of a text is that of its image, and the text.
            of_image = [(name.partition(": ")[0], name) for name in texts["sample_id"]]
            groups = [image if image in of_images else name for image, name in of_image]
            texts["group"] = np.array(groups, dtype=object)
        return cls(images=images, texts=texts)


def content_checksum(table: pa.Table) -> str:
    """A checksum of a table's columns, by name."""
    columns = {name: table[name].to_pylist() for name in table.column_names}
    return checksum(to_json(columns).encode())


def influences(results: SampleResults) -> dict[str, Floats]:
    """The influence of each group on each metric of `results.means()`, `(groups,)` each.

    With a single group there is none, and no interval.
    """
    groups = results.groups()
    if len(groups.names) < 2:
        return {}
    found = {}
    for metric in results.means():
        rows, values, by = results.rows(metric), results.values(metric), MEANS[metric].by
        group = groups.texts if rows is results.texts else groups.images
        parts = (values - values.mean()) / len(values)
        if by is not None:
            parts = deviations(values, rows[by], group)
        found[metric] = by_group(parts, group, len(groups.names))
        others, of_others = results.images, groups.images
        if rows is others:
            others, of_others = results.texts, groups.texts
        if (crowding := MEANS[metric].crowding) in others:
            taken = others[str(crowding)].astype(np.float64)
            found[metric] += by_group(taken, of_others, len(groups.names))
    return found


def deviations(values: Floats, classes: npt.NDArray[Any], group: Ints) -> Floats:
    """What each sample adds to a mean over classes of their means, less what was to be expected.

    A class within a single group says nothing of its own spread: it is held against the others.
    """
    _, of_class = np.unique(classes, return_inverse=True)
    pairs = np.unique(np.stack([of_class, group]), axis=1)
    sizes, number = np.bincount(of_class), np.bincount(pairs[0])
    means = np.bincount(of_class, values) / sizes
    several = number[of_class] > 1
    correction = np.sqrt(number / np.maximum(number - 1, 1))[of_class]
    within = (values - means[of_class]) * correction
    among = (means - means.mean())[of_class]
    return np.where(several, within, among) / (sizes[of_class] * len(sizes))


def by_group(parts: Floats, group: Ints, number: int) -> Floats:
    """The influence of each of `number` groups on a metric, of what its samples add to that."""
    sums = np.bincount(group, parts, minlength=number).astype(np.float64)
    return sums * math.sqrt(number / (number - 1))


def interval(metric: float, influence: Floats) -> list[float]:
    """The 95% interval of a metric between 0 and 1, by its influences.

    Wilson's interval for a share of as many samples as would leave the same variance; if the metric
    is 0 or 1, of as many as there are groups. It is not symmetric, and holds the truth near 0 and 1
    too.
    """
    number, spread, variance = len(influence), metric * (1 - metric), np.square(influence).sum()
    size = spread / variance if spread > 0 and variance > 0 else number
    z = stdtrit(number - 1, 0.975)
    centre = metric + z**2 / (2 * size)
    half = z * np.sqrt(spread / size + z**2 / (4 * size**2))
    low, high = (float(end / (1 + z**2 / size)) for end in (centre - half, centre + half))
    return [min(low, metric), max(high, metric)]  # rounding


def interval_of_difference(difference: float, influence: Floats) -> list[float] | None:
    """The 95% interval of a difference: Student's t with one degree of freedom less than groups.

    `None` where fewer than `FEWEST` groups make up most of it, as when two models are right on
    nearly everything.
    """
    variance = np.square(influence).sum()
    if variance**2 < FEWEST * np.power(influence, 4).sum():
        return None
    half = stdtrit(len(influence) - 1, 0.975) * np.sqrt(variance)
    return [float(difference - half), float(difference + half)]


def intervals(
    metrics: Mapping[str, float], influence: Mapping[str, Floats]
) -> dict[str, list[float]]:
    """The 95% interval of each metric that has influences."""
    return {
        name: interval(value, influence[name])
        for name, value in metrics.items()
        if name in influence
    }


def beyond(ends: Sequence[float] | None) -> bool:
    """Whether an interval leaves out 0; one of NaN does not."""
    return ends is not None and (ends[0] > 0 or ends[1] < 0)
