"""What an evaluation found of each sample: kept, so that two models can be compared later.

A metric that is a mean over samples can be resampled from these; so can the agreement of clusters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

# Columns of the file, beside `sample_id`. Ranks are zero-based; clusters and classes are names.
IMAGE_COLUMNS = {
    "zero_shot_rank": pa.int32(),
    "zero_shot_subgroup_rank": pa.int32(),
    "image_to_text_rank": pa.int32(),
    "linear_probe_correct": pa.bool_(),
    "knn_correct": pa.bool_(),
    "cluster": pa.int32(),
    "class": pa.int32(),
}
TEXT_COLUMNS = {"text_to_image_rank": pa.int32()}
# The column that each metric is computed from: the share of ranks below k, or the mean.
RANKS = {
    "zero_shot/acc": "zero_shot_rank",
    "zero_shot_subgroup/acc": "zero_shot_subgroup_rank",
    "retrieval/image_to_text@": "image_to_text_rank",
    "retrieval/text_to_image@": "text_to_image_rank",
}
MEANS = {"linear_probe/acc1": "linear_probe_correct", "knn/acc1": "knn_correct"}

Column = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class SampleResults:
    """Results of each image and each text of a split.

    Attributes:
        image_ids: `(n,)` ids of the images.
        text_ids: `(t,)` what names each distinct caption.
        columns: By the names above: `(n,)`, or `(t,)` for those of texts.
    """

    image_ids: list[str]
    text_ids: list[str]
    columns: Mapping[str, Column]

    def values(self, metric: str) -> tuple[list[str], npt.NDArray[np.float64]] | None:
        """Ids and values whose mean the metric is, such as `knn/acc1`; None if it is no mean."""
        if metric in MEANS:
            return self.image_ids, self.columns[MEANS[metric]].astype(np.float64)
        name = metric.rstrip("0123456789")
        k = metric.removeprefix(name)
        if name not in RANKS or not 0 < len(k) < 10:
            return None
        column = RANKS[name]
        ids = self.text_ids if column in TEXT_COLUMNS else self.image_ids
        return ids, (self.columns[column] < int(k)).astype(np.float64)

    def write(self, path: Path) -> None:
        """A Parquet file with a row an image, then a row a text; it appears whole or not at all."""
        number, texts = len(self.image_ids), len(self.text_ids)
        columns = {"sample_id": pa.array([*self.image_ids, *self.text_ids], pa.string())}
        columns["kind"] = pa.array(["image"] * number + ["text"] * texts)
        for name, kind in IMAGE_COLUMNS.items():
            found = pa.array(self.columns[name], kind)
            columns[name] = pa.concat_arrays([found, pa.nulls(texts, kind)])
        for name, kind in TEXT_COLUMNS.items():
            found = pa.array(self.columns[name], kind)
            columns[name] = pa.concat_arrays([pa.nulls(number, kind), found])
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.tmp")
        pq.write_table(pa.table(columns), scratch, compression="zstd")
        scratch.replace(path)

    @classmethod
    def read(cls, path: Path) -> "SampleResults":
        """What `write` wrote.

        Raises:
            ValueError: The file is something else, or damaged.
        """
        try:
            table = pq.read_table(path)
            text = np.asarray(table["kind"].to_pylist()) == "text"
            ids = table["sample_id"].cast(pa.string())
            parts = {False: table.filter(pa.array(~text)), True: table.filter(pa.array(text))}
            columns = {}
            for names, is_text in ((IMAGE_COLUMNS, False), (TEXT_COLUMNS, True)):
                for name, kind in names.items():
                    column = parts[is_text][name].cast(kind)
                    if column.null_count:
                        raise ValueError(f"column {name} has gaps")
                    columns[name] = column.to_numpy()
            return cls(
                image_ids=ids.filter(pa.array(~text)).to_pylist(),
                text_ids=ids.filter(pa.array(text)).to_pylist(),
                columns=columns,
            )
        except (pa.ArrowException, KeyError, ValueError, OSError) as error:
            raise ValueError(
                f"{path}: not the results of an evaluation; remove it to do without "
                f"({' '.join(str(error).split())})"
            ) from error
