"""The results of each test sample: stored on disk, and the influence of each group on each metric.

An *influence* is how far a group of samples moves a metric; the sum of their squares is the
metric's variance over other test sets. Influences of means and differences of metrics are means and
differences of influences, so models are compared group by group.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from protoclip.evaluation.metrics import METRICS, Floats, list_columns
from protoclip.files import SEAL, checksum, replacing, require_regular, to_json

Columns = Mapping[str, npt.NDArray[Any]]
Ints = npt.NDArray[np.int64]


class Groups(NamedTuple):
    """Names of the groups in their order, and the number of each image's and each text's group."""

    names: npt.NDArray[Any]
    images: Ints
    texts: Ints


@dataclass(frozen=True, kw_only=True)
class SampleResults:
    """Results of each image and each caption of a split, by column; both have `sample_id`.

    Images and captions that belong together, such as an image and its captions, have one `group`.
    Images also have the columns `metrics.SHOWN`; files of versions up to 1.0.0 lack them.
    """

    images: Columns
    texts: Columns = field(default_factory=lambda: {"sample_id": np.array([], dtype=object)})

    def rows(self, metric: str) -> Columns:
        """The results that a metric is computed from."""
        return self.texts if METRICS[metric].has_text_samples else self.images

    def means(self) -> list[str]:
        """The metrics that are means over samples and whose columns exist."""
        return [
            name
            for name, metric in METRICS.items()
            if metric.column is not None
            and {metric.column, metric.by or metric.column} <= self.rows(name).keys()
        ]

    def groups(self) -> "Groups":
        """The groups of images and texts; without a `group` column each sample is a group."""
        columns = [side.get("group", side["sample_id"]) for side in (self.images, self.texts)]
        names, numbers = np.unique(np.concatenate(columns), return_inverse=True)
        return Groups(names, *np.split(numbers, [len(columns[0])]))

    def values(self, metric: str) -> Floats:
        """Whether each sample is right, 0 or 1, for one of `means`."""
        column, k = self.rows(metric)[METRICS[metric].column or ""], METRICS[metric].k
        return (column if k is None else column < k).astype(np.float64)

    def mean(self, metric: str) -> float:
        """One of `means`."""
        values, by = self.values(metric), METRICS[metric].by
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
        """Read a file of `write`; raises a `ValueError` if it is damaged."""
        try:
            require_regular(path)
            table, parts = pq.read_table(path), []
            seal = (table.schema.metadata or {}).get(SEAL.encode(), b"")
            if seal.decode(errors="replace") != content_checksum(table):
                raise KeyError("not what this version wrote: its checksum differs")
            for kind, texts in (("image", False), ("text", True)):
                rows = table.filter(pc.equal(table["kind"], kind))
                names = [name for name in list_columns(texts=texts) if name in rows.column_names]
                rows = rows.select(["sample_id", *names])
                if gaps := [name for name in rows.column_names if rows[name].null_count]:
                    raise KeyError(f"column {gaps[0]} has gaps")
                parts.append({name: rows[name].to_numpy() for name in rows.column_names})
        except (pa.ArrowException, KeyError, OSError, ValueError) as error:
            raise ValueError(
                f"{path}: not the results of an evaluation; delete it to compare without it "
                f"({' '.join(str(error).split())})"
            ) from error
        return cls(images=parts[0], texts=parts[1])


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
    by_metric = {}
    for metric in results.means():
        rows, values, by = results.rows(metric), results.values(metric), METRICS[metric].by
        group = groups.texts if rows is results.texts else groups.images
        parts = (values - values.mean()) / len(values)
        if by is not None:
            parts = deviations(values, rows[by], group)
        by_metric[metric] = sum_by_group(parts, group, len(groups.names))
        by_metric[metric] += sum_crowding(results, metric, groups)
    return by_metric


def sum_crowding(results: SampleResults, metric: str, groups: Groups) -> Floats:
    """What the candidates of each group take from a recall; zeros for other metrics."""
    candidates, group = results.texts, groups.texts
    if METRICS[metric].has_text_samples:
        candidates, group = results.images, groups.images
    if (crowding := METRICS[metric].crowding) not in candidates:
        return np.zeros(len(groups.names))
    return sum_by_group(candidates[str(crowding)].astype(np.float64), group, len(groups.names))


def find_crowded(results: SampleResults, influence: Mapping[str, Floats]) -> set[str]:
    """The metrics whose variance comes mostly from candidates, by their `influences`.

    Such a recall depends on a few candidates that are near to very many queries, and its variance
    cannot be seen in a test set that happens to lack them. Two models share most of it.
    """
    groups = results.groups()
    return {
        metric
        for metric in results.means()
        if metric in influence
        and 2 * np.square(sum_crowding(results, metric, groups)).sum()
        > np.square(influence[metric]).sum()
    }


def deviations(values: Floats, classes: npt.NDArray[Any], group: Ints) -> Floats:
    """What each sample adds to a mean of class means, less its expectation.

    A class within a single group tells nothing about its spread, so it is compared with the other
    classes.
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
