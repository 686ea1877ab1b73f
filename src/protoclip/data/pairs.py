"""Image-text pairs in a Parquet file, behind the contract every source keeps.

A source answers, for a row: its stable `sample_id`, its caption, and its picture.
"""

import copy
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


class ImageTextPairs:
    """Pairs held in an Arrow table with the columns `image` (encoded bytes) and `caption`.

    Args:
        table: One row a pair. A `sample_id` column names the samples; without one, a sample is
            named `<name>/<row>`.
        name: What messages and derived sample ids call this source.
        cache_images: Keep decoded pictures in memory. Worth it for small sets only: three bytes a
            pixel, for every picture that was read once.

    Raises:
        ValueError: A column is missing, or there is no row.
    """

    def __init__(self, table: pa.Table, *, name: str, cache_images: bool = False) -> None:
        for column in ("image", "caption"):
            if column not in table.column_names:
                raise ValueError(
                    f"{name}: no column '{column}'; it has {', '.join(table.column_names)}"
                )
        if table.num_rows == 0:
            raise ValueError(f"{name}: holds no sample")
        self.name = name
        self.table = table
        self._images = table.column("image")
        self._captions: list[str] = table.column("caption").to_pylist()
        if "sample_id" in table.column_names:
            self.sample_ids = np.asarray(table.column("sample_id").to_pylist(), dtype=object)
        else:
            self.sample_ids = np.asarray(
                [f"{name}/{row}" for row in range(table.num_rows)], dtype=object
            )
        self._cache: dict[int, Image.Image] | None = {} if cache_images else None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def sample_id(self, row: int) -> str:
        """The stable name of a sample, the key of teacher features and skip lists."""
        return str(self.sample_ids[row])

    def caption(self, row: int) -> str:
        return self._captions[row]

    def image(self, row: int) -> Image.Image:
        """The picture as RGB.

        Raises:
            ValueError: The bytes are not a picture that can be read.
        """
        if self._cache is not None and row in self._cache:
            return self._cache[row]
        try:
            image = Image.open(io.BytesIO(self._images[row].as_py())).convert("RGB")
        except (OSError, TypeError) as error:
            raise ValueError(
                f"{self.name}: the image of sample '{self.sample_id(row)}' cannot be read ({error})"
            ) from error
        if self._cache is not None:
            self._cache[row] = image
        return image

    def with_captions(self, captions: list[str]) -> "ImageTextPairs":
        """The same pictures with other captions."""
        other = copy.copy(self)
        other._captions = captions
        return other

    def column(self, name: str) -> npt.NDArray[np.object_]:
        """One further column, such as `label` or `subgroup`, as an array of length `len(self)`."""
        if name not in self.table.column_names:
            raise ValueError(
                f"{self.name}: no column '{name}'; it has {', '.join(self.table.column_names)}"
            )
        return np.asarray(self.table.column(name).to_pylist(), dtype=object)


def read_parquet(path: str | Path, *, cache_images: bool = False) -> ImageTextPairs:
    """Open a Parquet file of pairs.

    Raises:
        ValueError: No such file, or not a Parquet file with the columns `image` and `caption`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from error
    return ImageTextPairs(table, name=path.name, cache_images=cache_images)
