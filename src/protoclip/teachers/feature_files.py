"""Features that a user brings: a NumPy file with its ids, or a Parquet file."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

# Sample ids, and one row of features for each.
Block = tuple[list[str], npt.NDArray[np.floating]]
# Rows read at once.
BLOCK_ROWS = 65_536
SUFFIXES = (".npy", ".parquet")


@dataclass(frozen=True, kw_only=True)
class FeatureFile:
    """Rows of features with their sample ids, read block by block, as often as needed."""

    num_rows: int
    width: int
    blocks: Callable[[], Iterator[Block]]


def open_feature_file(
    path: Path, *, sample_ids: Callable[[], Iterable[str]] | None = None
) -> FeatureFile:
    """Open a file of features.

    Args:
        path: `NAME.npy`, an array `(n, q)`, with its sample ids in `NAME.ids.txt`, one a line; or
            a Parquet file with the columns `sample_id` and `features` (lists of `q` numbers).
        sample_ids: The ids of an array that has no such text file beside it.

    Raises:
        ValueError: Not of that form: a column missing, rows of unequal width, or another number
            of ids than rows.
    """
    return open_array(path, sample_ids) if path.suffix == ".npy" else open_parquet(path)


def ids_file(path: Path) -> Path:
    """Where the sample ids of an array are."""
    return path.with_suffix(".ids.txt")


def open_array(path: Path, sample_ids: Callable[[], Iterable[str]] | None) -> FeatureFile:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a NumPy array ({str(error).splitlines()[0]})") from None
    if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.number):
        raise ValueError(
            f"{path}: features must be numbers of shape (samples, width), "
            f"not {array.dtype} of shape {array.shape}"
        )
    text = ids_file(path)
    if text.is_file():

        def sample_ids() -> Iterator[str]:
            with text.open(encoding="utf-8") as lines:
                yield from (line.rstrip("\r\n") for line in lines)

    elif sample_ids is None:
        raise ValueError(f"{path}: needs its sample ids, one a line, in {text}")
    ids_of = sample_ids
    count = sum(1 for _ in ids_of())
    if count != len(array):
        source = text if text.is_file() else "the data, where no such file is beside it"
        raise ValueError(f"{path}: {len(array)} features for {count} sample ids in {source}")

    def blocks() -> Iterator[Block]:
        ids = iter(ids_of())
        for first in range(0, len(array), BLOCK_ROWS):
            rows = np.asarray(array[first : first + BLOCK_ROWS])
            yield list(islice(ids, len(rows))), as_floats(rows)

    return FeatureFile(num_rows=len(array), width=array.shape[1], blocks=blocks)


def open_parquet(path: Path) -> FeatureFile:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
    names = file.schema_arrow.names
    for column in ("sample_id", "features"):
        if column not in names:
            raise ValueError(f"{path}: no column '{column}'; it has {names}")
    total = file.metadata.num_rows
    if total == 0:
        raise ValueError(f"{path}: holds no features")

    def lists() -> Iterator[tuple[list[str], pa.Array]]:
        for batch in file.iter_batches(BLOCK_ROWS, columns=["sample_id", "features"]):
            yield batch.column("sample_id").cast(pa.string()).to_pylist(), batch.column("features")

    try:
        lengths = [pc.list_value_length(features) for _, features in lists()]
    except pa.ArrowNotImplementedError:
        raise ValueError(f"{path}: 'features' is no column of lists of numbers") from None
    width = max(int(pc.max(part).as_py() or 0) for part in lengths)
    wrong = total - sum(int(pc.sum(pc.equal(part, width)).as_py() or 0) for part in lengths)
    if not width:
        raise ValueError(f"{path}: its features are empty lists")
    if wrong:
        raise ValueError(f"{path}: {wrong} of {total} rows are not of width {width}, as others are")

    def blocks() -> Iterator[Block]:
        for ids, features in lists():
            flat = features.flatten().to_numpy(zero_copy_only=False)
            if not np.issubdtype(flat.dtype, np.number):
                raise ValueError(f"{path}: 'features' is no column of lists of numbers")
            yield ids, as_floats(flat.reshape(len(ids), width))

    return FeatureFile(num_rows=total, width=width, blocks=blocks)


def as_floats(rows: npt.NDArray[Any]) -> npt.NDArray[np.floating]:
    """Whole numbers as floats; floats as they are."""
    return rows if np.issubdtype(rows.dtype, np.floating) else rows.astype(np.float32)
