"""The results of each test sample: kept on disk, and resampled to compare two models."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from protoclip.files import replacing

Columns = Mapping[str, npt.NDArray[Any]]
Draws = npt.NDArray[np.float64]

# Metrics that are means over samples: the column, and the `k` below which a rank counts as right.
# Ranks count from zero.
MEANS: dict[str, tuple[str, int | None]] = {
    **{f"zero_shot/acc{k}": ("zero_shot_rank", k) for k in (1, 5)},
    **{f"zero_shot_subgroup/acc{k}": ("zero_shot_subgroup_rank", k) for k in (1, 5)},
    **{f"retrieval/image_to_text@{k}": ("image_to_text_rank", k) for k in (1, 5, 10)},
    **{f"retrieval/text_to_image@{k}": ("text_to_image_rank", k) for k in (1, 5, 10)},
    "linear_probe/acc1": ("linear_probe_correct", None),
    "knn/acc1": ("knn_correct", None),
}
# Columns of the file beside `sample_id` and `kind`.
TEXT_COLUMNS = ("text_to_image_rank",)
IMAGE_COLUMNS = tuple(dict.fromkeys(c for c, _ in MEANS.values() if c not in TEXT_COLUMNS))
IMAGE_COLUMNS += ("cluster", "class")


@dataclass(frozen=True, kw_only=True)
class SampleResults:
    """Results of each image and each distinct caption of a split, by column."""

    images: Columns
    texts: Columns

    def rows(self, metric: str) -> Columns:
        """The results that a metric is computed from."""
        return self.texts if "text_to_image" in metric else self.images

    def values(self, metric: str) -> Draws:
        """Whether each sample is right, 0 or 1; their mean is the metric, which is in `MEANS`."""
        column, k = MEANS[metric]
        found = self.rows(metric)[column]
        return (found if k is None else found < k).astype(np.float64)

    def write(self, path: Path) -> None:
        """Write a Parquet file: one row an image, then one row a text."""
        tables = [
            pa.table({"kind": [kind] * len(columns["sample_id"]), **columns})
            for kind, columns in (("image", self.images), ("text", self.texts))
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            pq.write_table(pa.concat_tables(tables, promote_options="default"), temporary)

    @classmethod
    def read(cls, path: Path) -> "SampleResults":
        """Read what `write` wrote; raises a `ValueError` if the file is damaged."""
        try:
            table, parts = pq.read_table(path), []
            for kind, names in (("image", IMAGE_COLUMNS), ("text", TEXT_COLUMNS)):
                rows = table.filter(pc.equal(table["kind"], kind)).select(["sample_id", *names])
                if gaps := [name for name in rows.column_names if rows[name].null_count]:
                    raise KeyError(f"column {gaps[0]} has gaps")
                parts.append({name: rows[name].to_numpy() for name in rows.column_names})
        except (pa.ArrowException, KeyError, OSError) as error:
            raise ValueError(
                f"{path}: not the results of an evaluation; delete it to compare without it "
                f"({' '.join(str(error).split())})"
            ) from error
        return cls(images=parts[0], texts=parts[1])


def resampled(results: SampleResults, *, draws: int, seed: int = 0) -> dict[str, Draws]:
    """Metrics on test sets drawn with replacement from the samples, `(draws,)` each.

    Draw `i` holds the same samples, by id, for every model with the same ids and seed, so that two
    models can be compared draw by draw.
    """
    from protoclip.evaluation.clustering import agreement  # imports torch, which takes a second

    found: dict[str, Draws] = {}
    for number, columns in enumerate((results.images, results.texts)):
        metrics = [metric for metric in MEANS if results.rows(metric) is columns]
        values = np.stack([results.values(metric) for metric in metrics], 1)
        order = np.argsort(columns["sample_id"], kind="stable")
        generator = np.random.default_rng([seed, number])
        rows = [order[generator.integers(len(order), size=len(order))] for _ in range(draws)]
        means = np.stack([values[drawn].mean(0) for drawn in rows], 1)
        found |= dict(zip(metrics, means, strict=True))
        if columns is results.images:
            found |= agreement(columns["class"], columns["cluster"], rows)
    return found
