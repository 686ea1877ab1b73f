"""Image-text pairs: the contract every source keeps, and pairs in an Arrow table.

A source that is read in any order answers, for a row, with a `Sample`: its stable id, its encoded
picture, its captions. What cannot be read raises `BadSample`, which a loader skips and reports;
anything else that is wrong with a source is a `ValueError` when it is opened.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from protoclip.data.decode import decode
from protoclip.data.index import ArrowIndex
from protoclip.data.locations import (
    NOTHING_MORE,
    Access,
    in_table,
    join,
    open_local,
    read_file,
    reason_of,
    visible,
)

# Larger pictures are taken for a mistake or an attack: the size at which PIL itself refuses.
MAX_IMAGE_PIXELS = 178_956_970


class BadSample(ValueError):
    """One sample cannot be used; the rest of the source can."""

    def __init__(self, sample_id: str, where: str, reason: str) -> None:
        super().__init__(visible(f"sample '{sample_id}' ({where}): {reason}"))
        self.sample_id, self.where, self.reason = sample_id, where, visible(reason)

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, str, str]]:
        return BadSample, (self.sample_id, self.where, self.reason)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A pair as it is stored.

    Attributes:
        sample_id: Stable name, the key of teacher features and skip lists; unique in a run.
        image: The encoded picture (JPEG, PNG, WebP, ...).
        captions: One or more, none of them empty; a visit draws one.
        where: The file or archive member it comes from, for messages.
    """

    sample_id: str
    image: bytes
    captions: tuple[str, ...]
    where: str


@runtime_checkable
class Pairs(Protocol):
    """A source of pairs that are read in any order."""

    @property
    def name(self) -> str: ...

    @property
    def has_ids(self) -> bool:
        """Whether samples have ids of their own; else they are named `<name>/<row>`."""
        ...

    def __len__(self) -> int: ...

    def sample(self, row: int) -> Sample:
        """The pair of a row; raises `BadSample`."""
        ...

    def sample_id(self, row: int) -> str:
        """The id of a row, without reading its picture."""
        ...

    def sample_captions(self, row: int) -> tuple[str, ...]:
        """The captions of a row, without reading its picture; raises `BadSample`."""
        ...

    def sample_ids(self) -> Iterator[str]:
        """The id of every row, in order."""
        ...


@runtime_checkable
class SampleStream(Protocol):
    """A source of pairs that is read in one order, without end.

    `samples(first)` is the stream from sample number `first` on, the same on every call. A process
    that loads `state_dict(first)`, JSON values, gets there without reading what comes before.
    """

    @property
    def name(self) -> str: ...

    def samples(self, first: int = 0) -> Iterator[Sample | BadSample]: ...

    def state_dict(self, first: int) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ImageTextPairs:
    """Pairs in an Arrow table, in memory or memory-mapped.

    Columns: `caption` (a string or UTF-8 bytes, or a list of them), `sample_id` (optional, unique;
    without it a sample is named `<name>/<row>`), and where the picture is, as one of

    * `image`: the encoded bytes;
    * `path`: a file below `root`, or a URL; see `locations.in_table`;
    * `shard`, `offset`, `size`: a range of bytes in a file, the name relative to `root`.

    Args:
        table: One row a pair.
        name: What messages and derived sample ids call this source.
        root: Folder or URL that relative names start from, and paths have to lie below.
        access: What the user allows beyond that.

    Raises:
        ValueError: A column is missing, or there is no row.
    """

    def __init__(
        self,
        table: pa.Table | ArrowIndex,
        *,
        name: str,
        root: str = "",
        access: Access = NOTHING_MORE,
    ) -> None:
        self.index = table if isinstance(table, ArrowIndex) else None
        self.table: pa.Table = table.table if isinstance(table, ArrowIndex) else table
        present = self.table.column_names
        pictures = next((c for c in ("image", "path", "shard") if c in present), None)
        if pictures is None or "caption" not in present:
            missing = "caption" if pictures else "image"
            raise ValueError(f"{name}: no column '{missing}'; it has {', '.join(present)}")
        if self.table.num_rows == 0:
            raise ValueError(f"{name}: holds no sample")
        self._name, self.root, self.access = name, root, access
        self._pictures = pictures

    def __getstate__(self) -> dict[str, Any]:
        # A memory-mapped table is opened again in a worker process, not copied to it.
        state = dict(self.__dict__)
        if self.index is not None:
            del state["table"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.index is not None:
            self.table = self.index.table

    @property
    def name(self) -> str:
        return self._name

    @property
    def has_ids(self) -> bool:
        return "sample_id" in self.table.column_names

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def sample_id(self, row: int) -> str:
        """The stable name of a sample, the key of teacher features and skip lists."""
        if self.has_ids:
            return str(self._value("sample_id", row))
        return f"{self._name}/{row}"

    def sample_ids(self) -> Iterator[str]:
        if not self.has_ids:
            yield from (f"{self._name}/{row}" for row in range(len(self)))
            return
        for chunk in self.table.column("sample_id").iterchunks():
            yield from map(str, chunk.to_pylist())
            if self.index is not None:
                self.index.release()

    def caption(self, row: int) -> str:
        """The caption, or the first of several."""
        return self.sample_captions(row)[0]

    def sample_captions(self, row: int) -> tuple[str, ...]:
        """The captions of a row, without empty ones.

        Raises:
            BadSample: None is left, or the text is not UTF-8.
        """
        found = self._value("caption", row)
        try:
            return clean_captions(found if isinstance(found, list) else [found])
        except ValueError as error:
            raise self._bad(row, str(error)) from None

    def encoded(self, row: int) -> bytes:
        """The encoded picture.

        Raises:
            BadSample: The file is missing or cannot be read.
        """
        if self._pictures == "image":
            data = self._value("image", row)
            if data is None:
                raise self._bad(row, "no image")
            return bytes(data)
        try:
            if self._pictures == "shard":
                offset, size = self._value("offset", row), self._value("size", row)
                if offset is None:
                    raise self._bad(row, "no image")
                return read_range(self.where(row), offset, size)
            if (cell := self._value("path", row)) is None:
                raise self._bad(row, "no image")
            return read_file(in_table(self.root, cell, self.access), self.access)
        except (BadSample, MemoryError):
            raise
        except FileNotFoundError:
            raise self._bad(row, "no such file") from None
        except Exception as error:  # stores and their clients have errors of their own
            raise self._bad(row, f"cannot be read ({reason_of(error)})") from None

    def where(self, row: int) -> str:
        """The file that holds the picture of a row."""
        file = None if self._pictures == "image" else self._value(self._pictures, row)
        return self._name if file is None else join(self.root, file)

    def sample(self, row: int) -> Sample:
        """The pair of a row; raises `BadSample`."""
        return Sample(
            sample_id=self.sample_id(row),
            image=self.encoded(row),
            captions=self.sample_captions(row),
            where=self.where(row),
        )

    def image(self, row: int) -> Image.Image:
        """The picture, upright and as RGB.

        Raises:
            BadSample: It cannot be read.
        """
        try:
            return Image.fromarray(decode(self.encoded(row), max_pixels=MAX_IMAGE_PIXELS))
        except BadSample:
            raise
        except ValueError as error:
            raise self._bad(row, str(error)) from error

    def column(self, name: str) -> npt.NDArray[np.object_]:
        """One further column, such as `label` or `subgroup`, as an array of length `len(self)`."""
        if name not in self.table.column_names:
            raise ValueError(
                f"{self._name}: no column '{name}'; it has {', '.join(self.table.column_names)}"
            )
        return np.asarray(self.table.column(name).to_pylist(), dtype=object)

    def _value(self, column: str, row: int) -> Any:
        if self.index is not None:
            return self.index.value(column, row)
        return self.table.column(column)[row].as_py()

    def _bad(self, row: int, reason: str) -> BadSample:
        return BadSample(self.sample_id(row), self.where(row), reason)


def clean_captions(texts: Iterable[str | bytes | None]) -> tuple[str, ...]:
    """Captions without blanks around them, and without empty ones.

    Raises:
        ValueError: None is left, or one is not UTF-8 or holds a zero byte.
    """
    try:
        decoded = [text.decode() if isinstance(text, bytes) else text for text in texts]
    except UnicodeDecodeError:
        raise ValueError("the caption is not UTF-8") from None
    if any(text and "\0" in text for text in decoded):
        raise ValueError("the caption holds a zero byte")
    captions = tuple(text.strip() for text in decoded if text and text.strip())
    if not captions:
        raise ValueError("empty caption")
    return captions


def read_range(path: str, offset: int, size: int) -> bytes:
    with open_local(path) as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise ValueError(f"ends after {len(data)} of {size} bytes")
    return data
