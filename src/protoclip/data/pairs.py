"""Image-text pairs: the interface of every source, pairs in an Arrow table, and fingerprints.

A row gives a `Sample`, or raises `BadSample` if only this row cannot be used; the loader replaces
it and reports it. A fault of the whole source is a `ValueError` when the source is opened. A run
that goes on compares fingerprints with those of the sources that it began with.
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
    describe_error,
    digest,
    index_folder,
    is_url,
    join,
    read_file,
    read_range,
    resolve_cell,
)
from protoclip.data.decode import decode
from protoclip.files import checksum, read_sealed, seal, to_json, write_atomically
from protoclip.terminal import visible, without_secrets

Rows = npt.NDArray[np.int64]
Facts = dict[str, Any]
# How the reason of a bad sample ends if more of its shard is lost, none knows how much.
LOST = "of the shard is lost"
IMAGES = 64  # of each source that are read for its fingerprint
BLOCK = 1 << 14  # rows whose values are Python objects at a time
FORM = 1  # changes when rows are hashed in another way
# What each fact is called in messages, the most telling first. `sample` is one image each.
WORDS = {
    "name": "name",
    "rows": "number of rows",
    "names": "shards",  # by file name, wherever they lie
    "shards": "shards",
    "ids": "sample ids, or their order",
    "captions": "captions",
    "images": "images",
    "classes": "classes",
    "sample": "images",
    "held_out": "pairs that are held out, as by another run.guard or run.evaluate_every",
    "encoded": "pairs whose images can be read",
    "features": "features",
    "weights": "weights",
}


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


class Source:
    """What pairs and streams have in common."""

    name: str  # in messages; sample ids of a mixture begin with it
    notes: Sequence[str] = ()  # what the user should know, such as which lines were left out
    bad_lines: Sequence[Mapping[str, Any]] = ()  # see `ImageTextPairs`

    def most_captions(self, share: float = 1.0) -> int | None:
        """How many captions this share of the pairs has at most; None if that is not known."""
        return None

    def fingerprint(self) -> Facts:
        """Facts by which these pairs are known again; a fact that is not there is not compared."""
        return {}

    @property
    def sources(self) -> Sequence[Any]:
        """The sources of a view or mixture; otherwise these pairs alone."""
        return [self]

    @property
    def left_out(self) -> Rows:
        """Rows that are left out, as numbered over all rows of the sources."""
        return np.array([], np.int64)


class Pairs(Source):
    """Pairs that can be read in any order.

    A subclass has a `name` and the first four methods. What can be brought into a table becomes
    `ImageTextPairs` instead, of which pairs can be held out, too.
    """

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

    @property
    def parts(self) -> Sequence[tuple[Any, Any]]:
        """The sources, each with the numbers of its rows that are among these pairs."""
        return [(self, range(len(self)))]


class SampleStream(Source):
    """Pairs that can only be read in order, and have no end.

    They are dealt to `lanes`, which ranks share as `sampler.py` says. A process that loads the
    lane's `state_dict(first, lane)` (JSON values) gets there without reading all that comes before.
    """

    @property
    def lanes(self) -> int:
        raise NotImplementedError

    def samples(self, first: int = 0, lane: int = 0) -> Iterator[Sample | BadSample]:
        """A lane of the stream from sample number `first` on; bad samples count."""
        raise NotImplementedError

    def state_dict(self, first: int, lane: int = 0) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises `ValueError` if the state belongs to another stream."""
        raise NotImplementedError


class ImageTextPairs(Pairs):
    """Pairs in an Arrow table.

    Args:
        table: One row per pair; or an object with a memory-mapped `.table`, which another process
            opens again when the pairs are pickled. If it has a `check`, that is called with a row
            before the row is used, and without one before whole columns are.
        name: What messages and sample ids call this source.
        root: Folder or URL that relative paths start from, and that all paths must lie below.
        allow_links: Whether a path may be a link that leads out of the root.
        image_column: Encoded images, paths or URLs of stores, or structs of `bytes` and `path`;
            unset, it is `image` or `path`.
        in_ranges: Whether an image is the range of its file that columns `offset` and `size` say.
        caption_columns: Texts (strings or UTF-8 bytes) or lists of texts.
        caption_names: Of an index: the columns of a file that captions come from, if they are
            several. Column `caption_of` has the number of each caption's.
        id_column: Unique ids; a sample is called `<name>/<row>` if there is no such column.
        class_column: Classes, if the pairs have them.
        table_key: Identifies the content of the table, which otherwise is read for `key`.
        bad_lines: Of the text files with bad lines, by fault: how many of how many, and a way out.
        notes: What the user should know, such as which lines were left out.
        needs_captions: Whether a row without a caption is a bad sample.

    Raises `ValueError` if there is no row.
    """

    notes: list[str]
    prefix = ""  # of ids that the table holds
    rows: Rows | range  # of the table that are pairs, ascending; a range of all

    def __init__(
        self,
        table: Any,
        *,
        name: str,
        root: str = "",
        allow_links: bool = False,
        image_column: str | None = None,
        in_ranges: bool = False,
        caption_columns: Sequence[str] = ("caption",),
        caption_names: Sequence[str] = (),
        id_column: str | None = "sample_id",
        class_column: str | None = None,
        table_key: str = "",
        bad_lines: Sequence[Mapping[str, Any]] = (),
        notes: Sequence[str] = (),
        needs_captions: bool = True,
    ) -> None:
        self.name, self.root, self.allow_links = name, root, allow_links
        self.table_key, self.notes, self._source = table_key, list(notes), table
        self._open()
        usual = "path" if "path" in self._arrays and "image" not in self._arrays else "image"
        self.image_column, self.in_ranges = image_column or usual, in_ranges
        self.caption_columns, self.bad_lines = tuple(caption_columns), bad_lines
        self.caption_names = tuple(caption_names)
        self.id_column = id_column if id_column in self._arrays else None
        self.class_column, self.needs_captions = class_column, needs_captions
        self.rows = range(self.table.num_rows)
        if not self.rows:
            raise ValueError(f"{name}: holds no sample")

    def _open(self) -> None:
        source = self._source
        self.table: pa.Table = source if isinstance(source, pa.Table) else source.table
        self._check: Callable[..., None] | None = getattr(source, "check", None)
        # Looking a column up costs more than reading a value from it.
        self._arrays = {name: self.table.column(name) for name in set(self.table.column_names)}

    def __getstate__(self) -> dict[str, Any]:
        opened = ("table", "_arrays", "_check", "key", "rows_key", "class_labels")
        return {k: v for k, v in self.__dict__.items() if k not in opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.rows)

    def prefix_ids(self) -> "ImageTextPairs":
        """The same pairs, as in a mixture: their ids begin with the name of this source."""
        mixed = copy.copy(self)
        mixed.prefix = f"{self.name}/"
        return mixed

    def subset(self, rows: Rows) -> "ImageTextPairs":
        """Some of these pairs, in the same order and with the same ids; `rows` ascend."""
        some = copy.copy(self)
        some.rows = rows if isinstance(self.rows, range) else self.rows[rows]
        return some

    def split_into_blocks(self) -> Iterator["ImageTextPairs"]:
        """The same pairs in parts, of which columns can be used, but no single rows."""
        if self._check is not None:
            self._check()
        for start in range(0, self.table.num_rows, BLOCK):
            part = copy.copy(self)
            part.table, part._check = self.table.slice(start, BLOCK), None
            if isinstance(self.rows, range):
                part.rows = range(part.table.num_rows)
            else:
                first, end = np.searchsorted(self.rows, [start, start + BLOCK])
                part.rows = self.rows[first:end] - start
            yield part

    @cached_property
    def rows_key(self) -> str:
        """Changes with the rows: the table, the columns in use, and where images are."""
        columns = (self.image_column, self.id_column, *self.caption_columns)
        facts = (self.table_key, columns, self.root)
        key = hashlib.blake2b(repr(facts).encode(), digest_size=16)
        for batch in self.table.to_batches() if not self.table_key else ():
            key.update(batch.serialize())
        if not isinstance(self.rows, range):
            key.update(self.rows.tobytes())
        return key.hexdigest()

    @cached_property
    def key(self) -> str:
        """Changes with the rows, and with size and time of every local image file: a few seconds
        for a million. What is behind URLs is taken to stay."""
        if (names := self.image_names()) is None:
            return self.rows_key
        key = hashlib.blake2b(self.rows_key.encode(), digest_size=16)
        for path in list_local_files(names, self.root):
            key.update(file_status(path).encode() if path else b"")
        return key.hexdigest()

    def fingerprint(self, *, images: bool = True) -> Facts:
        """Facts by which these pairs are known wherever they lie, as JSON values.

        Ids, captions and images' names or sizes are hashed whole, in the order of the rows: once
        for a table with a key. Some `images` are read, too; what is behind URLs is taken to stay.
        """
        facts, path = Facts(), None
        if self.table_key:
            named = "" if self.id_column else self.name  # of which ids are made that no column has
            key = {"content": FORM, "rows": self.rows_key, "name": named}
            path = index_folder() / f"{digest({**key, 'class': self.class_column})}.json"
            with suppress(OSError, ValueError):
                facts = read_sealed(path)
        if not facts:
            facts = self._hash_rows()
            with suppress(OSError):
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(path, to_json(seal(facts)))
        some = evenly_spaced(len(self), IMAGES, seed=0) if images else []
        hashes = [""] * len(some)  # of what is behind a URL, or cannot be read now
        for number, row in enumerate(some):
            with suppress(BadSample):
                if not is_url(self.where(row)):
                    hashes[number] = checksum(self.read_encoded(row))
        return {**facts, "sample": hashes} if images else facts

    def _hash_rows(self) -> Facts:
        def hash_named(*names: str) -> str:
            return hash_columns([self.select_column(name) for name in names])

        encoded, names = split_images(self.whole_column(self.image_column))
        if self.in_ranges:
            hashed = hash_named("size")  # shards may lie anywhere
        elif encoded is None:
            hashed = hash_columns([self.take_rows(names)])
        else:  # none is read, so their numbers of bytes stand for them
            lengths = count_bytes(encoded)
            if names is not None:
                lengths = pc.coalesce(lengths, count_bytes(names))
            hashed = hash_columns([self.take_rows(lengths)], are_lengths=True)
        facts = {
            "rows": len(self),
            "ids": hash_named(self.id_column) if self.id_column else f"{self.name}/row",
            "captions": hash_named(*self.caption_columns),
            "images": hashed,
        }
        if self.class_column is not None:
            facts["classes"] = hash_named(self.class_column)
        return facts

    def select_column(self, name: str) -> pa.ChunkedArray:
        """A value of a column for each pair."""
        return self.take_rows(self.whole_column(name))

    def take_rows(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """From a value for each row of the table, those of the rows that are pairs."""
        if isinstance(self.rows, range):
            return column
        pieces, start = [], 0
        for chunk in column.iterchunks():
            first, end = np.searchsorted(self.rows, [start, start + len(chunk)])
            pieces.append(chunk.take(pa.array(self.rows[first:end] - start)))
            start += len(chunk)
        return pa.chunked_array(pieces, column.type)

    def column(self, name: str) -> npt.NDArray[np.object_]:
        """Any column, such as `label`, as an array of length `len(self)`."""
        return np.asarray(read_cells(self.select_column(name)), dtype=object)

    def sample(self, row: int) -> Sample:
        return Sample(
            sample_id=self.sample_id(row),
            image=self.read_encoded(row),
            captions=self.sample_captions(row),
            where=self.where(row),
        )

    def sample_id(self, row: int) -> str:
        if self.id_column is None:
            return f"{self.name}/{self.rows[row]}"
        return f"{self.prefix}{self._cell(self.id_column, row).as_py()}"

    def sample_ids(self) -> Iterator[str]:
        if self.id_column is None:
            yield from (f"{self.name}/{row}" for row in self.rows)
            return
        for part in self.split_into_blocks():
            ids = part.select_column(self.id_column).to_pylist()
            yield from (f"{self.prefix}{sample_id}" for sample_id in ids)

    def sample_captions(self, row: int) -> tuple[str, ...]:
        """The captions without empty ones; raises `BadSample` if one is needed and none left."""
        try:
            texts = [text for column in self.caption_columns for text in self._texts(column, row)]
            return clean_captions(texts, needed=self.needs_captions)
        except UnicodeDecodeError:
            raise self._bad(row, "the caption is not UTF-8") from None
        except ValueError as error:
            raise self._bad(row, str(error)) from None

    def name_captions(self, row: int) -> tuple[str, ...]:
        """The column of each of `sample_captions`, where they come from several; else nothing."""
        if self.caption_names:
            numbers = self._texts("caption_of", row)
            named = [self.caption_names[number] for number in numbers]
        elif len(self.caption_columns) > 1:
            named = [name for name in self.caption_columns for _ in self._texts(name, row)]
        else:
            return ()
        texts = [text for column in self.caption_columns for text in self._texts(column, row)]
        pairs = zip(named, texts, strict=True)
        return tuple(name for name, text in pairs if clean_captions([text], needed=False))

    def _texts(self, column: str, row: int) -> list[Any]:
        cell = self._cell(column, row).as_py()
        return cell if isinstance(cell, list) else [cell]

    def most_captions(self, share: float = 1.0) -> int:
        """How many captions this share of the pairs has at most, empty texts included."""
        counts = np.zeros(len(self), np.int64)
        for name in self.caption_columns:
            cells = self.select_column(name)
            numbers = (pc.list_value_length if is_list(cells.type) else pc.is_valid)(cells)
            counts += pc.fill_null(numbers.cast(pa.int64()), 0).to_numpy()
        return max(1, int(np.quantile(counts, share, method="lower")))

    @cached_property
    def class_labels(self) -> list[str]:
        """The names of a column of `ClassLabel`s, by number; empty for other columns."""
        facts = json.loads((self.table.schema.metadata or {}).get(b"huggingface", b"{}"))
        features = facts.get("info", {}).get("features", {})
        return list(features.get(self.class_column, {}).get("names") or ())

    def read_class(self, row: int) -> str:
        """The class by its name; empty where there is none."""
        if self.class_column is None:
            return ""
        cell = self._cell(self.class_column, row)
        value, names = read_cell(cell), self.class_labels
        if names and isinstance(value, int) and value < len(names):
            return names[value] if value >= 0 else ""  # -1 is a `ClassLabel` that is not known
        return "" if value is None else str(value).strip() and str(value)

    def image(self, row: int) -> Image.Image:
        """The decoded image, upright and as RGB; raises `BadSample`."""
        encoded = self.read_encoded(row)
        try:
            return Image.fromarray(decode(encoded))
        except ValueError as error:
            raise self._bad(row, str(error)) from error

    def read_encoded(self, row: int, part: slice | None = None) -> bytes:
        """The encoded image, or only a part of it; raises `BadSample` if it cannot be read."""
        image = self._image(row, part)
        if isinstance(image, bytes):
            return image
        if image is None or (self.in_ranges and self._cell("offset", row).as_py() is None):
            raise self._bad(row, "no image")
        try:
            if self.in_ranges and not self.root:
                path = image  # of a shard that the user named
            else:
                path = resolve_cell(self.root, image, allow_links=self.allow_links)
            if self.in_ranges:
                size = self._cell("size", row).as_py()
                first, end, _ = (part or slice(None)).indices(size)
                return read_range(path, self._cell("offset", row).as_py() + first, end - first)
            if part is not None and not is_url(path):
                return read_range(path, part.start, part.stop - part.start)
            return read_file(path)[part or slice(None)]
        except MemoryError:
            raise
        except Exception as error:  # the clients of stores have exceptions of their own
            reason = describe_error(error)
            if not isinstance(error, FileNotFoundError):
                reason = f"cannot be read ({reason})"
            elif "\\" in image:  # as Windows writes paths
                reason += "; its path has backslashes, write /"
            raise self._bad(row, reason) from None

    def where(self, row: int) -> str:
        """The file that holds the image of a row."""
        image = self._image(row)
        return join(self.root, image) if isinstance(image, str) else self.name

    def image_name(self, row: int) -> str | None:
        """The path or URL of a row's image as the data name it; None for one in the data."""
        image = None if self.in_ranges else self._image(row, slice(0, 0))  # bytes stay unread
        return image if isinstance(image, str) else None

    def image_file(self, row: int) -> str | None:
        """The path or URL of the file that is the image of a row; None for one in the data."""
        name = self.image_name(row)
        return None if name is None else join(self.root, name)

    def image_key(self, row: int) -> str:
        """Names the image of a row: its file with size and time, or its row in the table."""
        path = self.image_file(row)
        if path is not None:
            return f"{file_status(path)}{path if is_url(path) else os.path.abspath(path)}"  # noqa: PTH100
        return f"{self.table_key or self.rows_key} {self.image_column} {self.rows[row]}"

    def image_names(self) -> pa.ChunkedArray | None:
        """The file or URL of each image, as bytes; null where the table holds the image itself.
        None if the table has no names, or images are in shards."""
        encoded, names = split_images(self.whole_column(self.image_column))
        if self.in_ranges or names is None or pa.types.is_null(names.type):
            return None
        names = names.cast(pa.large_binary())
        if encoded is not None:
            is_there = pc.greater(pc.fill_null(count_bytes(encoded), 0), 0)
            names = pc.if_else(is_there, pa.scalar(None, names.type), names)
        return self.take_rows(names)

    def image_sizes(self) -> npt.NDArray[np.int32]:
        """Bytes of each image as stored; -1 where that is unknown without reading it (URLs)."""

        def as_array(column: pa.ChunkedArray) -> npt.NDArray[np.int32]:
            numbers = pc.fill_null(self.take_rows(column).cast(pa.int32(), safe=False), -1)
            return np.array(numbers.to_numpy())  # a copy, to be written to

        if self.in_ranges:
            return as_array(self.whole_column("size"))
        encoded, _ = split_images(self.whole_column(self.image_column))
        sizes = np.full(len(self), -1, np.int32)
        if encoded is not None:
            sizes = as_array(count_bytes(encoded))
        if (names := self.image_names()) is not None:
            sizes[names.is_valid().to_numpy()] = -1
            is_file = pc.invert(pc.match_substring(names, "://")).fill_null(False)
            paths = list_local_files(names.filter(is_file), self.root)
            for row, path in zip(np.flatnonzero(is_file), paths, strict=True):
                if path is not None:
                    with suppress(OSError, ValueError):  # a path may hold a zero byte
                        sizes[row] = min(os.stat(path).st_size, 2**31 - 1)  # noqa: PTH116 (of millions)
        return sizes

    def _cell(self, column: str, row: int) -> pa.Scalar:
        number = int(self.rows[row])
        if self._check is not None:
            self._check(number)
        return self._arrays[column][number]

    def whole_column(self, name: str) -> pa.ChunkedArray:
        """A value of a column for each row of the table, whether it is a pair or not."""
        if self._check is not None:
            self._check()
        return self.table.column(name)

    def _image(self, row: int, part: slice | None = None) -> bytes | str | None:
        """The encoded image itself, or a part of it, or the name of its file, as `image_names`."""
        cell = self._cell(self.image_column, row)
        if isinstance(cell, pa.StructScalar):
            cells = [cell[name] for name in ("bytes", "path") if name in cell]
            cells = [value for value in cells if hasattr(value, "as_buffer")]  # bytes or a text
            cell = next((value for value in cells if value.as_buffer()), pa.scalar(None))
        if part is not None and "binary" in str(cell.type) and cell.is_valid:
            return bytes(memoryview(cell.as_buffer())[part])  # the rest stays on the disk
        image: bytes | str | None = read_cell(cell)
        return None if image == "" else image

    def _bad(self, row: int, reason: str) -> BadSample:
        return BadSample(self.sample_id(row), self.where(row), reason)


def evenly_spaced(total: int, number: int, seed: int) -> list[int]:
    """`number` different row numbers below `total`, one from each of equal parts; or all."""
    number = min(number, total)
    if not number:
        return []
    bounds = np.arange(number + 1, dtype=np.int64) * total // number
    chosen: list[int] = np.random.default_rng(seed).integers(bounds[:-1], bounds[1:]).tolist()
    return chosen


def split_by_source(sources: Sequence[Any], rows: Rows) -> list[tuple[Any, Rows]]:
    """Rows numbered over sources, as each source and the numbers that its rows have there."""
    starts = np.cumsum([0, *map(len, sources)])
    return [
        (source, rows[(rows >= start) & (rows < start + len(source))] - start)
        for source, start in zip(sources, starts[:-1], strict=True)
    ]


def split_images(images: pa.ChunkedArray) -> tuple[pa.ChunkedArray | None, pa.ChunkedArray | None]:
    """The encoded images in a column, and the names of files and URLs; None for what it lacks."""
    if pa.types.is_struct(images.type):
        fields = {field.name for field in images.type}
        encoded, names = (
            pc.struct_field(images, name) if name in fields else None for name in ("bytes", "path")
        )
        return encoded, names
    return (None, images) if "string" in str(images.type) else (images, None)


def count_bytes(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """The number of bytes of each value, null for null; most types leave these on the disk."""
    lengths = [pc.binary_length(chunk.cast(pa.large_binary())) for chunk in values.iterchunks()]
    return pa.chunked_array(lengths, pa.int64())


def list_local_files(names: pa.ChunkedArray, root: str) -> Iterator[str | None]:
    """The path of each name in bytes; None where there is none, and for a URL."""
    for chunk in names.iterchunks():
        for name in chunk.to_pylist():
            path = join(root, name.decode("utf-8", "replace")) if name else ""
            yield path if path and not is_url(path) else None


def read_cell(cell: pa.Scalar) -> Any:
    """The content of a cell; what is not UTF-8 in a text becomes �."""
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        text = cell.value if isinstance(cell, pa.DictionaryScalar) else cell
        return str(text.as_buffer(), "utf-8", "replace")


def read_cells(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The contents of a column's cells, as `read_cell` gives them."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [read_cell(cell) for cell in column]


def file_status(path: str) -> str:
    """Size and time of a file; nothing if there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116 (of millions)
    except (OSError, ValueError):
        return ""
    return f"{status.st_size} {status.st_mtime_ns} "


def clean_captions(texts: Iterable[str | bytes | None], *, needed: bool = True) -> tuple[str, ...]:
    """The captions stripped, without empty ones; raises `ValueError` if none is left, but needed,
    or one is not UTF-8 or holds a zero byte."""
    try:
        decoded = [t.decode("utf-8-sig") if isinstance(t, bytes) else t for t in texts]
    except UnicodeDecodeError:
        raise ValueError("the caption is not UTF-8") from None
    if any(text and "\0" in text for text in decoded):
        raise ValueError("the caption holds a zero byte")
    captions = tuple(text.strip() for text in decoded if text and text.strip())
    if needed and not captions:
        raise ValueError("empty caption")
    return captions


def fingerprint_sources(samples: Any, *, encoded: Any = None) -> list[Facts]:
    """The fingerprint of each source, and which rows are left out of the samples, and of those of
    them that are `encoded`."""
    facts = [source.fingerprint() for source in samples.sources]
    if len(facts) > 1:  # sample ids begin with the name
        facts = [{"name": s.name, **f} for s, f in zip(samples.sources, facts, strict=True)]
    for name, pairs in (("held_out", samples), ("encoded", encoded)):
        if pairs is not None:  # no fact at all would mean that it is not known
            left_out = pairs.left_out.astype("<i8").tobytes()
            facts[0][name] = checksum(left_out) if left_out else ""
    return facts


def describe_change(
    before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> str | None:
    """What differs, in a few words; None if nothing does. A fact that is unknown equals any."""
    if len(before) != len(now):
        return f"{len(before)} sources before, {len(now)} now"
    for number, (old, new) in enumerate(zip(before, now, strict=True)):
        owner = f" of '{new.get('name', number)}'" if len(now) > 1 else ""
        was_stream, is_stream = ({"shards", "names"} & facts.keys() for facts in (old, new))
        if was_stream and "rows" in new:
            return f"a stream{owner} before, pairs in any order now; set data.read = streaming"
        if "rows" in old and is_stream:
            return f"pairs in any order{owner} before, a stream now"
        for name, word in WORDS.items():
            one, other = old.get(name), new.get(name)
            if one is None or other is None or one == other:
                continue
            if name == "shards" and one == new.get("names"):  # up to version 1.0.0, of a store
                continue
            if name == "sample" and all(a == b for a, b in zip(one, other, strict=True) if a and b):
                continue
            if name in ("name", "rows"):
                return f"{word}{owner}: {one} before, {other} now"
            return f"other {word}{owner}"
    return None


def is_list(type_: pa.DataType) -> bool:
    """Whether a column holds lists, of any of the kinds that Arrow has."""
    return "list" in str(type_).partition("<")[0]


def flat_texts(values: pa.Array) -> tuple[pa.Array | None, pa.LargeBinaryArray]:
    """How many texts each cell holds, if cells are lists; and the texts, as bytes."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    counts = None
    if is_list(values.type):
        counts = pc.list_value_length(values)
        values = values.flatten()
    if not ("binary" in str(values.type) or pa.types.is_null(values.type)):
        values = values.cast(pa.large_string())  # whole numbers, too
    return counts, values.cast(pa.large_binary())


def text_parts(values: pa.Array) -> tuple[bytes, bytes, memoryview | bytes]:
    """The lengths of lists, the lengths of texts, and the texts: each goes on in the next chunk."""
    counts, texts = flat_texts(values)
    _, offsets, data = texts.buffers()
    content: memoryview | bytes = b""
    if data is not None and len(texts):
        first, last = np.frombuffer(offsets, np.int64)[[texts.offset, texts.offset + len(texts)]]
        content = memoryview(data)[first:last]
    return b"" if counts is None else as_bytes(counts), as_bytes(pc.binary_length(texts)), content


def as_bytes(numbers: pa.Array) -> bytes:
    """Whole numbers as bytes; -1 for null."""
    whole: bytes = pc.fill_null(numbers, -1).to_numpy(zero_copy_only=False).astype("<i4").tobytes()
    return whole


def hash_columns(columns: Sequence[pa.ChunkedArray], *, are_lengths: bool = False) -> str:
    """A hash of columns' values, or of these lengths of values, however they are stored."""
    whole = hashlib.blake2b(digest_size=16)
    for column in columns:
        kinds = [hashlib.blake2b(digest_size=16) for _ in range(3)]
        for chunk in column.iterchunks():
            parts = (b"", as_bytes(chunk), b"") if are_lengths else text_parts(chunk)
            for kind, part in zip(kinds, parts, strict=True):
                kind.update(part)
        for kind in kinds:
            whole.update(kind.digest())
    return whole.hexdigest()
