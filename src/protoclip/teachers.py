"""External teachers: any frozen model's features, keyed by sample id."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor


class TeacherFeatures:
    """Features of a frozen model for many samples.

    Args:
        name: What messages call this teacher, a file usually.
        sample_ids: One id a row, each once.
        features: Rows `(n, q)`.

    Raises:
        ValueError: Duplicate ids, non-finite rows, or another number of ids than rows; with counts.
    """

    def __init__(
        self, *, name: str, sample_ids: Sequence[str], features: npt.NDArray[np.floating]
    ) -> None:
        if len(sample_ids) != len(features):
            raise ValueError(f"{name}: {len(sample_ids)} sample ids for {len(features)} features")
        self.name = name
        self.features = features
        self._row_of = {sample_id: row for row, sample_id in enumerate(sample_ids)}
        if len(self._row_of) != len(features):
            raise ValueError(f"{name}: {len(features) - len(self._row_of)} duplicate sample ids")
        broken = int((~np.isfinite(features).all(1)).sum())
        if broken:
            raise ValueError(f"{name}: {broken} of {len(features)} features are not finite")

    def __len__(self) -> int:
        return len(self.features)

    def require(self, sample_ids: Sequence[str]) -> None:
        """Check that every sample has features, before a long run starts.

        Raises:
            ValueError: Some have none; says how many, and names one.
        """
        missing = [sample_id for sample_id in sample_ids if sample_id not in self._row_of]
        if missing:
            raise ValueError(
                f"{self.name}: no teacher features for {len(missing)} of {len(sample_ids)} "
                f"training samples, such as '{missing[0]}'; build them for this data set"
            )

    def lookup(self, sample_ids: Sequence[str]) -> Float[Tensor, "m q"]:
        """Features of these samples, in this order, as float32."""
        rows = [self._row_of[sample_id] for sample_id in sample_ids]
        return torch.from_numpy(self.features[rows].astype(np.float32))


def read_teacher(path: str | Path) -> TeacherFeatures:
    """Open a Parquet file with the columns `sample_id` and `features` (a list of `q` floats).

    Raises:
        ValueError: No such file, not Parquet, a column missing, or rows of unequal width.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"teacher.features: {path}: no such file")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from error
    for column in ("sample_id", "features"):
        if column not in table.column_names:
            raise ValueError(f"{path}: no column '{column}'; it has {table.column_names}")
    features = table.column("features").combine_chunks()
    flat = features.flatten().to_numpy(zero_copy_only=False)
    if len(features) == 0 or len(flat) % len(features):
        raise ValueError(f"{path}: features need one width in all rows, and at least one row")
    return TeacherFeatures(
        name=path.name,
        sample_ids=table.column("sample_id").to_pylist(),
        features=flat.reshape(len(features), -1),
    )
