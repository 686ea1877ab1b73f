"""Image-text pairs: the interface of every source, and pairs in an Arrow table.

A row gives a `Sample`, or raises `BadSample` if only this row cannot be used; the loader replaces
it and reports it. A fault of the whole source is a `ValueError` when the source is opened.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from protoclip.data.access import (
    digest,
    is_url,
    join,
    read_file,
    read_range,
    reason_of,
    resolve_cell,
)
from protoclip.data.content import FORM, Facts, hash_of, length_parts
from protoclip.data.decode import decode
from protoclip.data.index import index_folder
from protoclip.files import checksum, in_turn, read_sealed, sealed, to_json, write_atomically
from protoclip.terminal import visible, without_secrets

# How the reason of a bad sample ends if more than this sample of its shard is lost, none knows how
# many.
LOST = "of the shard is lost"
NOT_UTF8 = "the {} is not UTF-8"
MAX_IMAGE_PIXELS = 178_956_970  # PIL refuses more than this as an attack
IMAGES = 64  # of each source that are read for its fingerprint
BLOCK = 1 << 14  # rows whose values are Python objects at a time


class BadSample(ValueError):
    """One sample cannot be used; the rest of the source can."""

    def __init__(self, sample_id: str, where: str, reason: str) -> None:
        super().__init__(visible(f"sample '{sample_id}' ({where}): {reason}"))
        self.sample_id, self.where, self.reason = sample_id, without_secrets(where), visible(reason)

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, str, str]]:
        return BadSample, (self.sample_id, self.where, self.reason)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A pair as it is stored."""

    sample_id: str  # Unique in a run; the key of teacher features and skip lists.
    image: bytes  # The encoded image (JPEG, PNG, WebP, ...).
    captions: tuple[str, ...]  # None of them empty; none at all if the source needs none.
    where: str  # The file or archive member it comes from, for messages.


class Pairs:
    """Pairs that can be read in any order.

    For pairs of a new kind write a subclass with a `name` and the first four methods, and return it
    in `sources.open_source`. What can be brought into a table becomes `ImageTextPairs` instead, of
    which pairs can be held out, too.

    Attributes:
        name: What messages call the pairs; sample ids of a mixture begin with it.
        notes: What the user should know, such as which lines were left out.
    """

    name: str
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def sample_id(self, row: int) -> str:
        """The id of a row's sample, which no other one has."""
        raise NotImplementedError

    def sample_captions(self, row: int) -> tuple[str, ...]:
        """The captions of a row; raises `BadSample` if there is none."""
        raise NotImplementedError

    def sample(self, row: int) -> Sample:
        """All of a row; raises `BadSample` if it cannot be used."""
        raise NotImplementedError

    def sample_ids(self) -> Iterator[str]:
        """All ids, in the order of the rows."""
        return map(self.sample_id, range(len(self)))

    def fingerprint(self) -> Facts:
        """Facts by which these pairs are known again; a fact that is not there is not compared."""
        return {}

    @property
    def sources(self) -> Sequence[Any]:
        """The sources of a view or mixture; otherwise these pairs alone."""
        return [self]

    @property
    def parts(self) -> Sequence[tuple[Any, Any]]:
        """The sources, each with the numbers of its rows that are among these pairs."""
        return [(self, range(len(self)))]

    @property
    def left_out(self) -> npt.NDArray[np.int64]:
        """Rows that are left out, as numbered over all rows of the sources."""
        return np.array([], np.int64)


class SampleStream:
    """Pairs that can only be read in order, and have no end.

    They are dealt to `lanes`, which ranks share as `lanes.py` says. A process that loads the lane's
    `state_dict(first, lane)` (JSON values) gets there without reading all that comes before, and
    then has as many lanes as the stream that made it.
    """

    name: str
    notes: Sequence[str] = ()

    @property
    def lanes(self) -> int:
        raise NotImplementedError

    def samples(self, first: int = 0, lane: int = 0) -> Iterator[Sample | BadSample]:
        """A lane from its sample number `first` on; the same on each call."""
        raise NotImplementedError

    def state_dict(self, first: int, lane: int = 0) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def fingerprint(self) -> Facts:
        """Facts by which this stream is known again; a fact that is not there is not compared."""
        return {}

    @property
    def sources(self) -> Sequence[Any]:
        """The sources of a mixture; otherwise this stream alone."""
        return [self]

    @property
    def left_out(self) -> npt.NDArray[np.int64]:
        """None: a stream is not held out."""
        return np.array([], np.int64)


class ImageTextPairs(Pairs):
    """Pairs in an Arrow table.

    Args:
        table: One row per pair; or an object with a memory-mapped `.table`, which another process
            opens again when the pairs are pickled, and whose `check` is called with a row of it
            before that row is used, and without one before a whole column is.
        name: What messages and sample ids call this source.
        root: Folder or URL that relative paths start from, and that all paths must lie below.
        allow_links: Whether a path may be a link that leads out of the root.
        image_column: Encoded images, paths or URLs of stores, or structs of `bytes` and `path`;
            unset, it is `image` or `path`. With columns `offset` and `size`, these bytes of a file.
        caption_columns: Texts (strings or UTF-8 bytes) or lists of texts.
        id_column: Unique ids; a sample is called `<name>/<row>` if there is no such column.
        class_column: Classes, if the pairs have them.
        table_key: Identifies the content of the table, which otherwise is read for `key`.
        notes: What the user should know, such as which lines were left out.
        needs_captions: Whether a row without a caption is a bad sample.

    Raises `ValueError` if a column is missing, or there is no row.
    """

    notes: list[str]
    prefix = ""  # of ids that the table holds
    rows: npt.NDArray[np.int64] | None = None  # of the table, ascending; unset, all are pairs

    def __init__(
        self,
        table: Any,
        *,
        name: str,
        root: str = "",
        allow_links: bool = False,
        image_column: str | None = None,
        caption_columns: Sequence[str] = ("caption",),
        id_column: str | None = "sample_id",
        class_column: str | None = None,
        table_key: str = "",
        notes: Sequence[str] = (),
        needs_captions: bool = True,
    ) -> None:
        self.name, self.root, self.allow_links = name, root, allow_links
        self.table_key, self.notes, self._source = table_key, list(notes), table
        self._open()
        usual = "path" if "path" in self._arrays and "image" not in self._arrays else "image"
        self.image_column = image_column or usual
        self.caption_columns = tuple(caption_columns)
        self.id_column = id_column if id_column in self._arrays else None
        self.class_column, self.needs_captions = class_column, needs_captions
        self.in_ranges = self._has_ranges()
        for column in (self.image_column, *self.caption_columns):
            self._require(column)
        if self.table.num_rows == 0:
            raise ValueError(f"{name}: holds no sample")

    def _open(self) -> None:
        source = self._source
        self.table: pa.Table = source if isinstance(source, pa.Table) else source.table
        self._check: Callable[..., None] | None = getattr(source, "check", None)
        # Looking a column up costs more than reading a value from it.
        self._arrays = {name: self.table.column(name) for name in set(self.table.column_names)}

    @property
    def bad_lines(self) -> Sequence[Mapping[str, Any]]:
        """For each text file with bad lines, by fault: how many of how many, and a way out."""
        facts = getattr(self._source, "facts", {})
        return [*facts.get("bad_lines", ())]

    def _has_ranges(self) -> bool:
        """Whether images are ranges of the files that their column names, as in tar shards."""
        if not {"offset", "size", self.image_column} <= self._arrays.keys():
            return False
        names = self._arrays[self.image_column].type
        names = names.value_type if pa.types.is_dictionary(names) else names
        numbers = (self._arrays[column].type for column in ("offset", "size"))
        return str(names) in ("string", "large_string") and all(map(pa.types.is_integer, numbers))

    @property
    def checked(self) -> pa.Table:
        """The table, to use whole columns of; raises `ValueError` if it is damaged."""
        if self._check is not None:
            self._check()
        return self.table

    def __getstate__(self) -> dict[str, Any]:
        opened = ("table", "_arrays", "_check", "key", "rows_key", "class_labels")
        return {k: v for k, v in self.__dict__.items() if k not in opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def in_mixture(self) -> "ImageTextPairs":
        """The same pairs; their ids begin with the name of this source."""
        mixed = copy.copy(self)
        mixed.prefix = f"{self.name}/"
        return mixed

    def subset(self, rows: npt.NDArray[np.int64]) -> "ImageTextPairs":
        """Some of these pairs, in the same order and with the same ids; `rows` ascend."""
        some = copy.copy(self)
        for key in ("key", "rows_key"):
            some.__dict__.pop(key, None)
        some.rows = rows if self.rows is None else self.rows[rows]
        return some

    @cached_property
    def rows_key(self) -> str:
        """Changes with the rows: the table, the columns in use, and where images are. At once, but
        for a table without a `table_key`, which is read."""
        columns = (self.image_column, self.id_column, *self.caption_columns)
        facts = (self.table_key, columns, self.root)
        key = hashlib.blake2b(repr(facts).encode(), digest_size=16)
        for batch in self.checked.to_batches() if not self.table_key else ():
            key.update(batch.serialize())
        if self.rows is not None:
            key.update(self.rows.tobytes())
        return key.hexdigest()

    @cached_property
    def key(self) -> str:
        """Changes with the pairs, for caches of what is made of them.

        Besides the rows it depends on size and time of every local image file, which takes a few
        seconds for a million files. What is behind URLs is taken to stay.
        """
        if (names := self.image_names()) is None:
            return self.rows_key
        key = hashlib.blake2b(self.rows_key.encode(), digest_size=16)
        for path in local_files(names, self.root):
            key.update(file_status(path).encode() if path else b"")
        return key.hexdigest()

    def fingerprint(self, *, images: bool = True) -> Facts:
        """Facts by which these pairs are known wherever they lie, as JSON values.

        Ids, captions and images' names or sizes are hashed whole, in the order of the rows, which
        decides what a step sees: once for a table, since that takes seconds at ten million rows.

        Args:
            images: Whether to read some images, too. What is behind URLs is taken to stay.
        """
        facts = self._hash_rows_once()
        if images:
            rows = evenly_spaced(len(self), min(IMAGES, len(self)), seed=0)
            facts = {**facts, "sample": [self._hash_image(row) for row in rows]}
        return facts

    def _hash_rows_once(self) -> Facts:
        """The facts of all rows; those of a table that has a key are kept beside its index."""
        if not self.table_key:
            return self._hash_rows()
        named = "" if self.id_column else self.name  # of which ids are made that no column has
        key = {"content": FORM, "rows": self.rows_key, "name": named, "class": self.class_column}
        path = index_folder() / f"{digest(key)}.json"
        with suppress(OSError, ValueError):
            return read_sealed(path)
        facts = self._hash_rows()
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with in_turn(path):
                for left in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
                    left.unlink(missing_ok=True)
                write_atomically(path, to_json(sealed(facts)))
        return facts

    def _hash_rows(self) -> Facts:
        def hash_columns(*names: str) -> str:
            return hash_of([self.kept(self.checked.column(name)) for name in names])

        encoded, names = image_fields(self.checked.column(self.image_column))
        if self.in_ranges:
            hashed = hash_columns("size")  # shards may lie anywhere
        elif encoded is None:
            hashed = hash_of([self.kept(names)])
        else:  # none is read, so their numbers of bytes stand for them
            lengths = lengths_of(encoded)
            if names is not None:
                lengths = pc.coalesce(lengths, lengths_of(names))
            hashed = hash_of([self.kept(lengths)], length_parts)
        facts = {
            "rows": len(self),
            "ids": hash_columns(self.id_column) if self.id_column else f"{self.name}/row",
            "captions": hash_columns(*self.caption_columns),
            "images": hashed,
        }
        if self.class_column is not None:
            facts["classes"] = hash_columns(self.class_column)
        return facts

    def _hash_image(self, row: int) -> str:
        """A hash of the image as stored; empty if it is behind a URL, or cannot be read now."""
        try:
            return "" if is_url(self.where(row)) else checksum(self.encoded(row))
        except BadSample:
            return ""

    def __len__(self) -> int:
        return int(self.table.num_rows) if self.rows is None else len(self.rows)

    def kept(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """From a value for each row of the table, those of the rows that are pairs."""
        if self.rows is None:
            return column
        pieces, start = [], 0
        for chunk in column.iterchunks():
            first, end = np.searchsorted(self.rows, [start, start + len(chunk)])
            pieces.append(chunk.take(pa.array(self.rows[first:end] - start)))
            start += len(chunk)
        return pa.chunked_array(pieces, column.type)

    def in_blocks(self) -> Iterator["ImageTextPairs"]:
        """The same pairs in parts, of which columns can be used, but no single rows."""
        table = self.checked
        for start in range(0, table.num_rows, BLOCK):
            part = copy.copy(self)
            part.table, part._check = table.slice(start, BLOCK), None
            if self.rows is not None:
                first, end = np.searchsorted(self.rows, [start, start + BLOCK])
                part.rows = self.rows[first:end] - start
            yield part

    def sample_id(self, row: int) -> str:
        if self.id_column is None:
            return f"{self.name}/{self._table_row(row)}"
        return f"{self.prefix}{self.value(self.id_column, row)}"

    def sample_ids(self) -> Iterator[str]:
        if self.id_column is None:
            yield from (f"{self.name}/{self._table_row(row)}" for row in range(len(self)))
            return
        for part in self.in_blocks():
            ids = part.kept(part.table.column(self.id_column)).to_pylist()
            yield from (f"{self.prefix}{sample_id}" for sample_id in ids)

    def sample_captions(self, row: int) -> tuple[str, ...]:
        """The captions without empty ones; raises `BadSample` if one is needed and none left."""
        texts: list[Any] = []
        try:
            for column in self.caption_columns:
                cell = self.value(column, row)
                texts += cell if isinstance(cell, list) else [cell]
        except UnicodeDecodeError:
            raise self._bad(row, NOT_UTF8.format("caption")) from None
        try:
            return clean_captions(texts, needed=self.needs_captions)
        except ValueError as error:
            raise self._bad(row, str(error)) from None

    def most_captions(self, share: float = 1.0) -> int:
        """How many captions this share of the pairs has at most, empty texts included."""
        counts = np.zeros(len(self), np.int64)
        for name in self.caption_columns:
            cells = self.kept(self.checked.column(name))
            is_list = "list" in str(cells.type).partition("<")[0]
            numbers = pc.list_value_length(cells) if is_list else pc.is_valid(cells)
            counts += pc.fill_null(numbers.cast(pa.int64()), 0).to_numpy()
        return max(1, int(np.quantile(counts, share, method="lower")))

    @cached_property
    def class_labels(self) -> list[str]:
        """The names of a column of `ClassLabel`s, by number; empty for other columns."""
        facts = json.loads((self.table.schema.metadata or {}).get(b"huggingface", b"{}"))
        features = facts.get("info", {}).get("features", {})
        return list(features.get(self.class_column, {}).get("names") or ())

    def class_of(self, row: int) -> str:
        """The class by its name; empty where there is none."""
        if self.class_column is None:
            return ""
        value, names = legible(self._cell(self.class_column, row)), self.class_labels
        if names and isinstance(value, int) and value < len(names):
            return names[value] if value >= 0 else ""  # -1 is a `ClassLabel` that is not known
        return "" if value is None else str(value).strip() and str(value)

    def encoded(self, row: int, part: slice | None = None) -> bytes:
        """The encoded image, or only a part of it; raises `BadSample` if it cannot be read."""
        try:
            image = self._image(row, part, errors="strict")
        except UnicodeDecodeError:
            raise self._bad(row, NOT_UTF8.format("image's name")) from None
        if isinstance(image, bytes):
            return image
        if image is None or (self.in_ranges and self.value("offset", row) is None):
            raise self._bad(row, "no image")
        links = self.allow_links
        try:
            if self.in_ranges:
                path = resolve_cell(self.root, image, allow_links=links) if self.root else image
                size = self.value("size", row)
                first, end, _ = (part or slice(None)).indices(size)
                return read_range(path, self.value("offset", row) + first, end - first)
            path = resolve_cell(self.root, image, allow_links=links)
            if part is not None and not is_url(path):
                return read_range(path, part.start, part.stop - part.start)
            return read_file(path)[part or slice(None)]
        except MemoryError:
            raise
        except Exception as error:  # the clients of stores have exceptions of their own
            reason = reason_of(error)
            missing = isinstance(error, FileNotFoundError)
            if missing and "\\" in image:  # as Windows writes paths
                reason += "; its path has backslashes, write /"
            raise self._bad(row, reason if missing else f"cannot be read ({reason})") from None

    def image_names(self) -> pa.ChunkedArray | None:
        """The file or URL of each image, as bytes; null where the table holds the image itself.
        None if it holds all, or they are in shards."""
        names = None if self.in_ranges else names_of_files(self.checked.column(self.image_column))
        return None if names is None else self.kept(names)

    def image_sizes(self) -> npt.NDArray[np.int32]:
        """Bytes of each image as stored; -1 where that is unknown without reading it (URLs)."""

        def as_array(column: pa.ChunkedArray) -> npt.NDArray[np.int32]:
            numbers = pc.fill_null(self.kept(column).cast(pa.int32(), safe=False), -1)
            return np.array(numbers.to_numpy())  # a copy, to be written to

        if self.in_ranges:
            return as_array(self.checked.column("size"))
        encoded, _ = image_fields(self.checked.column(self.image_column))
        sizes = np.full(len(self), -1, np.int32)
        if encoded is not None:
            sizes = as_array(lengths_of(encoded))
        if (names := self.image_names()) is not None:
            sizes[names.is_valid().to_numpy()] = -1
            is_file = pc.invert(pc.match_substring(names, "://")).fill_null(False)
            paths = local_files(names.filter(is_file), self.root)
            for row, path in zip(np.flatnonzero(is_file), paths, strict=True):
                if path is not None:
                    with suppress(OSError, ValueError):  # a path may hold a zero byte
                        sizes[row] = min(os.stat(path).st_size, 2**31 - 1)  # noqa: PTH116 (of millions)
        return sizes

    def image_name(self, row: int) -> str | None:
        """The path or URL of a row's image as the data name it; None for one in the data."""
        image = None if self.in_ranges else self._image(row, slice(0, 0))  # bytes stay unread
        return image if isinstance(image, str) else None

    def image_file(self, row: int) -> str | None:
        """The path or URL of the file that is the image of a row; None for one in the data."""
        name = self.image_name(row)
        return None if name is None else join(self.root, name)

    def image_key(self, row: int) -> str:
        """Names the image of a row, also among other rows of the table: its file with size and
        time, or its row in the table."""
        path = self.image_file(row)
        if path is not None:
            return f"{file_status(path)}{path if is_url(path) else os.path.abspath(path)}"  # noqa: PTH100
        return f"{self.table_key or self.rows_key} {self.image_column} {self._table_row(row)}"

    def where(self, row: int) -> str:
        """The file that holds the image of a row."""
        image = self._image(row)
        return join(self.root, image) if isinstance(image, str) else self.name

    def sample(self, row: int) -> Sample:
        return Sample(
            sample_id=self.sample_id(row),
            image=self.encoded(row),
            captions=self.sample_captions(row),
            where=self.where(row),
        )

    def image(self, row: int) -> Image.Image:
        """The decoded image, upright and as RGB; raises `BadSample`."""
        encoded = self.encoded(row)
        try:
            return Image.fromarray(decode(encoded, max_pixels=MAX_IMAGE_PIXELS))
        except ValueError as error:
            raise self._bad(row, str(error)) from error

    def column(self, name: str) -> npt.NDArray[np.object_]:
        """Any column, such as `label`, as an array of length `len(self)`."""
        self._require(name)
        return np.asarray(cells_of(self.kept(self.checked.column(name))), dtype=object)

    def _require(self, column: str) -> None:
        if column not in self._arrays:
            present = ", ".join(self.table.column_names)
            raise ValueError(f"{self.name}: no column '{column}'; it has {present}")

    def _table_row(self, row: int) -> int:
        """The row of the table."""
        return row if self.rows is None else int(self.rows[row])

    def value(self, column: str, row: int) -> Any:
        """What a column of the table holds in a row; raises `UnicodeDecodeError` for a text that is
        not UTF-8, which Parquet files may hold."""
        return self._cell(column, row).as_py()

    def _cell(self, column: str, row: int) -> pa.Scalar:
        row = self._table_row(row)
        if self._check is not None:
            self._check(row)
        return self._arrays[column][row]

    def _image(
        self, row: int, part: slice | None = None, *, errors: str = "replace"
    ) -> bytes | str | None:
        """The encoded image itself, or a part of it, or the name of its file.

        Which of them counts is what `names_of_files` says; `errors` is of names not in UTF-8.
        """
        cell = self._cell(self.image_column, row)
        if isinstance(cell, pa.StructScalar):
            cells = [cell[name] for name in ("bytes", "path") if name in cell]
            cells = [value for value in cells if hasattr(value, "as_buffer")]  # bytes or a text
            cell = next((value for value in cells if value.as_buffer()), pa.scalar(None))
        if part is not None and "binary" in str(cell.type) and cell.is_valid:
            return bytes(memoryview(cell.as_buffer())[part])  # the rest stays on the disk
        image: bytes | str | None = legible(cell, errors)
        return None if image == "" else image

    def _bad(self, row: int, reason: str) -> BadSample:
        return BadSample(self.sample_id(row), self.where(row), reason)


def evenly_spaced(total: int, number: int, seed: int) -> list[int]:
    """`number` different row numbers below `total`, one from each of equal parts."""
    if not number:
        return []
    bounds = np.arange(number + 1, dtype=np.int64) * total // number
    chosen: list[int] = np.random.default_rng(seed).integers(bounds[:-1], bounds[1:]).tolist()
    return chosen


def image_fields(
    images: pa.ChunkedArray,
) -> tuple[pa.ChunkedArray | None, pa.ChunkedArray | None]:
    """The encoded images in a column, and the names of files and URLs; None for what it lacks."""
    if pa.types.is_struct(images.type):
        fields = {field.name for field in images.type}
        encoded, names = (
            pc.struct_field(images, name) if name in fields else None for name in ("bytes", "path")
        )
        return encoded, names
    return (None, images) if "string" in str(images.type) else (images, None)


def names_of_files(images: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """The files and URLs in a column of images, as bytes, since a string may be no UTF-8.

    A name counts where the image itself is not there, or empty; elsewhere it is null. None if the
    column has no names.
    """
    encoded, names = image_fields(images)
    if names is None or pa.types.is_null(names.type):
        return None
    names = names.cast(pa.large_binary())
    if encoded is None:
        return names
    is_there = pc.greater(pc.fill_null(lengths_of(encoded), 0), 0)
    return pc.if_else(is_there, pa.scalar(None, names.type), names)


def lengths_of(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """The number of bytes of each value, null for null. The bytes stay on the disk, unless the
    column holds views."""
    lengths = [pc.binary_length(chunk.cast(pa.large_binary())) for chunk in values.iterchunks()]
    return pa.chunked_array(lengths, pa.int64())


def local_files(names: pa.ChunkedArray, root: str) -> Iterator[str | None]:
    """The path of each name in bytes; None where there is none, and for a URL."""
    for chunk in names.iterchunks():
        for name in chunk.to_pylist():
            path = join(root, name.decode("utf-8", "replace")) if name else ""
            yield path if path and not is_url(path) else None


def legible(cell: pa.Scalar, errors: str = "replace") -> Any:
    """The content of a cell; `errors` says how to treat a text that is not UTF-8."""
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        if isinstance(cell, pa.ListScalar):
            return [legible(item, errors) for item in cell]
        text = cell.value if isinstance(cell, pa.DictionaryScalar) else cell
        return str(text.as_buffer(), "utf-8", errors)


def cells_of(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The contents of a column's cells, read as by `legible`."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [legible(cell) for cell in column]


def file_status(path: str) -> str:
    """Size and time of a file; nothing if there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116 (of millions)
    except (OSError, ValueError):
        return ""
    return f"{status.st_size} {status.st_mtime_ns} "


def clean_captions(texts: Iterable[str | bytes | None], *, needed: bool = True) -> tuple[str, ...]:
    """The captions stripped, without empty ones.

    Raises `ValueError` if none is left, but one is `needed`; or one is not UTF-8 or holds a zero
    byte.
    """
    try:
        decoded = [t.decode("utf-8-sig") if isinstance(t, bytes) else t for t in texts]
    except UnicodeDecodeError:
        raise ValueError(NOT_UTF8.format("caption")) from None
    if any(text and "\0" in text for text in decoded):
        raise ValueError("the caption holds a zero byte")
    captions = tuple(text.strip() for text in decoded if text and text.strip())
    if needed and not captions:
        raise ValueError("empty caption")
    return captions
