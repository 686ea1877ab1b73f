"""The results of each test sample: kept on disk, and resampled for intervals and differences."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from protoclip.files import SEAL, checksum, replacing, to_json

Columns = Mapping[str, npt.NDArray[Any]]
Draws = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int32]

DRAWS = 1000  # of the bootstrap


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A metric that is a mean over samples.

    A sample is right if `column` is true, or is a rank below `k` (ranks count from zero). With `by`
    the mean is first taken over the samples of each class, which that column has.
    """

    column: str
    k: int | None = None
    by: str | None = None


MEANS: dict[str, Mean] = {
    **{f"zero_shot/acc{k}": Mean(column="zero_shot_rank", k=k) for k in (1, 5)},
    **{f"zero_shot_subgroup/acc{k}": Mean(column="zero_shot_subgroup_rank", k=k) for k in (1, 5)},
    **{f"retrieval/image_to_text@{k}": Mean(column="image_to_text_rank", k=k) for k in (1, 5, 10)},
    **{f"retrieval/text_to_image@{k}": Mean(column="text_to_image_rank", k=k) for k in (1, 5, 10)},
    "linear_probe/acc1": Mean(column="linear_probe_correct"),
    "knn/acc1": Mean(column="knn_correct"),
    "zero_shot/mean_per_class_recall": Mean(column="zero_shot_rank", k=1, by="zero_shot_class"),
    "linear_probe/acc5": Mean(column="linear_probe_rank", k=5),
    "linear_probe/mean_per_class_recall": Mean(column="linear_probe_correct", by="class"),
}
# Columns of the file beside `sample_id` and `kind`. A task that was not run has none.
TEXT_COLUMNS = ("text_to_image_rank",)
IMAGE_COLUMNS = (
    *("zero_shot_rank", "zero_shot_subgroup_rank", "image_to_text_rank", "linear_probe_correct"),
    *("linear_probe_rank", "knn_correct", "cluster", "class", "zero_shot_class"),
)


@dataclass(frozen=True, kw_only=True)
class SampleResults:
    """Results of each image and each caption of a split, by column; both have `sample_id`."""

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

    def values(self, metric: str) -> Draws:
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
        return cls(images=parts[0], texts=parts[1])


def content_checksum(table: pa.Table) -> str:
    """A checksum of a table's columns, by name."""
    columns = {name: table[name].to_pylist() for name in table.column_names}
    return checksum(to_json(columns).encode())


def drawn(ids: npt.NDArray[Any], *, draws: int = DRAWS, seed: int, kind: int) -> list[Rows]:
    """Rows drawn with replacement, as many as there are, `draws` times.

    Draw `i` holds the same samples, by id, for every model with the same ids and seed, so that two
    models can be compared draw by draw. Images are kind 0, texts kind 1.
    """
    order = np.argsort(ids, kind="stable").astype(np.int32)
    generator = np.random.default_rng([seed, kind])
    return [order[generator.integers(len(order), size=len(order))] for _ in range(draws)]


def counted(rows: Sequence[Rows]) -> Iterator[npt.NDArray[np.int64]]:
    """How often each draw holds each row."""
    for of_draw in rows:
        yield np.bincount(of_draw, minlength=len(of_draw))


def resampled(results: SampleResults, *, draws: int = DRAWS, seed: int = 0) -> dict[str, Draws]:
    """All metrics that the results allow, on test sets drawn with replacement, `(draws,)` each."""
    from protoclip.evaluation.clustering import agreement  # imports torch, which takes a second

    found: dict[str, Draws] = {}
    for kind, columns in enumerate((results.images, results.texts)):
        metrics = [metric for metric in results.means() if results.rows(metric) is columns]
        if not metrics and "cluster" not in columns:
            continue
        rows = drawn(columns["sample_id"], draws=draws, seed=seed, kind=kind)
        plain = [metric for metric in metrics if MEANS[metric].by is None]
        by_class = [metric for metric in metrics if MEANS[metric].by is not None]
        values = {metric: results.values(metric) for metric in metrics}
        table = np.stack([values[metric] for metric in plain], axis=1) if plain else None
        class_of = {metric: columns[str(MEANS[metric].by)] for metric in by_class}
        classes = {m: np.unique(of, return_inverse=True)[1] for m, of in class_of.items()}
        means: dict[str, list[Any]] = {metric: [] for metric in metrics}
        for count in counted(rows):
            if table is not None:
                for metric, value in zip(plain, count @ table / len(count), strict=True):
                    means[metric].append(value)
            for metric in by_class:
                sizes = np.bincount(classes[metric], count)
                right = np.bincount(classes[metric], count * values[metric])
                means[metric].append((right[sizes > 0] / sizes[sizes > 0]).mean())
        found |= {metric: np.array(of_metric) for metric, of_metric in means.items()}
        if {"cluster", "class"} <= columns.keys():
            found |= agreement(columns["class"], columns["cluster"], rows)
    return found


def intervals(task: str, draws: Mapping[str, Draws]) -> dict[str, list[float]]:
    """The 95% interval of each metric of a task.

    AMI and ARI have none: the copies in a draw lie in one cluster, which raises both. Differences
    of two models are not affected, since both have the same copies.
    """
    if task == "clustering":
        return {}
    return {metric: interval(values) for metric, values in draws.items()}


def interval(draws: Draws) -> list[float]:
    """The 95% interval: the quantiles 2.5% and 97.5% of the draws."""
    return [float(end) for end in np.quantile(draws, [0.025, 0.975])]
