"""Tables of image-text pairs: which columns hold what, and their conversion into an index."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from protoclip.data.columns import (
    Columns,
    choose,
    holds_lists,
    is_bytes,
    is_text,
    missing,
)
from protoclip.data.index import build_index, digest, fingerprint
from protoclip.data.locations import NOTHING_MORE, Access, is_url
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.tables import (
    Skipped,
    Table,
    faults,
    line,
    open_table,
)

# Raised when the same file would be converted otherwise than before.
FORMAT = 2
# Lines of a caption from which on it looks like a quote that was left open.
MANY_LINES = 20


def open_manifest(
    path: str,
    *,
    image_column: str | None = None,
    caption_column: str | Sequence[str] | None = None,
    id_column: str | None = None,
    root: str | None = None,
    name: str | None = None,
    cache: Path | None = None,
    access: Access = NOTHING_MORE,
) -> ImageTextPairs:
    """Open a table of pairs, converting it into an index the first time.

    Args:
        path: A `.csv`, `.tsv`, `.jsonl`, `.parquet` or `.arrow` file, or a URL;
            or a local pattern such as `train-*.parquet`, whose files follow each other by name.
        image_column: Holds paths, URLs, or encoded pictures as bytes (also as Hugging Face's
            structure of bytes and path); the first of `IMAGE_COLUMNS` there is if unset.
        caption_column: Holds a caption or a list of them, or several columns with one each; the
            first of `CAPTION_COLUMNS` if unset.
        id_column: Holds unique ids; the first of `ID_COLUMNS` if unset. Without one, a sample is
            named after the source and its row.
        root: Folder or URL that relative paths start from, and all paths have to lie below; the
            table's own if unset.
        name: What messages and derived ids call the source; the file's name if unset.
        cache: Folder for the index; the user's cache folder if unset.
        access: What the user allows.

    Raises:
        ValueError: There is no such file, it is not what its suffix says, a column is missing or
            holds something else, ids repeat, or no row is left.
    """
    paths = [path]
    if "*" in path and not is_url(path):
        paths = sorted(map(str, Path(path).parent.glob(Path(path).name)))
        if not paths:
            raise ValueError(f"{path}: no such file")
    folder, _, file = path.rpartition("/") if is_url(path) else (str(Path(path).parent), "", path)
    return open_tables(
        paths,
        image_column=image_column,
        caption_column=caption_column,
        id_column=id_column,
        root=root if root is not None else folder,
        name=name or Path(file.partition("?")[0] if is_url(path) else file).name,
        cache=cache,
        access=access,
    )


def open_tables(
    paths: list[str],
    *,
    image_column: str | None,
    caption_column: str | Sequence[str] | None,
    id_column: str | None,
    root: str,
    name: str,
    cache: Path | None,
    access: Access,
) -> ImageTextPairs:
    """Open tables with the same columns as one; see `open_manifest`."""
    captions = [caption_column] if isinstance(caption_column, str) else list(caption_column or ())
    settings = {"image": image_column, "captions": captions, "id": id_column}
    key = digest(
        {"format": FORMAT, "files": [fingerprint(path, access) for path in paths], **settings}
    )

    def build(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        tables = [open_table(path, access) for path in paths]
        columns = choose(tables[0], image=image_column, captions=captions, sample_id=id_column)
        for table in tables[1:]:
            for column in columns.wanted:
                if column not in table.schema.names:
                    raise missing(table, f"no column '{column}', which {paths[0]} has")
        yield from converted(tables, columns, facts)

    index = build_index(key, None, build, folder=cache)
    return ImageTextPairs(index, name=name, root=root, access=access)


def converted(
    tables: list[Table], columns: Columns, facts: dict[str, Any]
) -> Iterator[pa.RecordBatch]:
    """The rows of an index, with the notes it is to keep."""
    left_out: list[Skipped] = []
    hashes: list[npt.NDArray[np.int64]] = []
    rows = long = 0
    picture: tuple[str, str | None] | None = None
    for table in tables:
        left_out.append(Skipped())
        for batch in table.batches(columns.wanted, left_out[-1]):
            with faults(table.path):
                picture = picture or picture_kind(
                    batch.column(columns.image), table.schema.field(columns.image).type
                )
                image = as_pictures(batch.column(columns.image), *picture)
                caption = as_captions([batch.column(c) for c in columns.captions])
                arrays = {picture[0]: image, "caption": caption}
            if columns.sample_id:
                arrays["sample_id"] = as_ids(batch.column(columns.sample_id), columns, table, rows)
                hashes.append(hashed(arrays["sample_id"]))
            if pa.types.is_binary(caption.type):
                lines = pc.count_substring(caption, "\n")
                long += pc.sum(pc.greater(lines, MANY_LINES)).as_py() or 0
            rows += batch.num_rows
            yield pa.RecordBatch.from_pydict(arrays)
    path = tables[0].path
    notes = [
        note
        for table, skipped in zip(tables, left_out, strict=True)
        for note in skipped.notes(table.path)
    ]
    if not rows and notes:
        raise ValueError(f"{notes[0]}; no row is left: check the separator and the quotes")
    if not rows:
        raise ValueError(f"{path}: holds no sample")
    if columns.sample_id:
        check_unique(hashes, tables, columns)
    facts["notes"] = [*columns.notes, *notes]
    if long:
        facts["notes"].append(
            f"{path}: {long} captions have more than {MANY_LINES} lines; is a quote left open?"
        )


def picture_kind(column: pa.Array, type_: pa.DataType) -> tuple[str, str | None]:
    """The index's column for pictures, and the field of a structure to take them from."""
    if not pa.types.is_struct(type_):
        return ("image" if is_bytes(type_) else "path"), None
    fields = [type_.field(n).name for n in range(type_.num_fields)]
    if "bytes" in fields:
        data = pc.struct_field(column, "bytes")
        if "path" not in fields or data.null_count < len(data):
            return "image", "bytes"
    return "path", "path"


def as_pictures(column: pa.Array, kind: str, field: str | None) -> pa.Array:
    """Encoded pictures as bytes; or paths as text, null where there is none."""
    if field is not None:
        column = pc.struct_field(column, field)
    if kind == "image":
        return column.cast(pa.binary())
    try:
        column = column.cast(pa.string())
    except pa.ArrowInvalid:
        # Some path is not UTF-8. Its row stays, and cannot be read.
        column = pa.array([utf8(value) for value in column.to_pylist()], pa.string())
    return pc.if_else(pc.equal(column, ""), None, column)


def utf8(value: bytes | None) -> str | None:
    try:
        return value.decode() if value is not None else None
    except UnicodeDecodeError:
        return None


def as_captions(columns: list[pa.Array]) -> pa.Array:
    """Bytes of a column; or lists of them, of a column of lists or of several columns."""
    if holds_lists(columns[0].type):
        return columns[0].cast(pa.list_(pa.binary()))
    texts = [column.cast(pa.string()) if is_text(column.type) else column for column in columns]
    texts = [text.cast(pa.binary()) for text in texts]
    if len(texts) == 1:
        return texts[0]
    rows, several = len(texts[0]), len(texts)
    # One after the other in memory, then by row.
    by_row = np.arange(rows * several).reshape(several, rows).T.reshape(-1)
    offsets = pa.array(np.arange(0, rows * several + 1, several), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.concat_arrays(texts).take(pa.array(by_row)))


def as_ids(column: pa.Array, columns: Columns, table: Table, first: int) -> pa.Array:
    """Ids as text.

    Raises:
        ValueError: One is missing or not UTF-8.
    """
    try:
        ids = column.cast(pa.string())
    except pa.ArrowInvalid:
        raise ValueError(f"{table.path}: an id in '{columns.sample_id}' is not UTF-8") from None
    empty = pc.or_kleene(pc.is_null(ids), pc.equal(ids, ""))
    if (row := pc.index(empty, True).as_py()) >= 0:
        raise ValueError(
            f"{table.path}: row {first + row} has no id in '{columns.sample_id}'; fill it in, or "
            "set id_column to another"
        )
    return ids


def hashed(ids: pa.Array) -> npt.NDArray[np.int64]:
    return np.fromiter(map(hash, ids.to_pylist()), np.int64, len(ids))


def check_unique(parts: list[npt.NDArray[np.int64]], tables: list[Table], columns: Columns) -> None:
    """Eight bytes an id tell which may repeat; only those are compared, in a second pass.

    Raises:
        ValueError: An id is there twice.
    """
    assert columns.sample_id is not None
    hashes = np.concatenate(parts)
    parts.clear()
    hashes.sort()
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not suspects:
        return
    seen: set[str] = set()
    repeats, example = 0, ""
    for table in tables:
        for batch in table.batches([columns.sample_id], Skipped()):
            for text in as_ids(batch.column(columns.sample_id), columns, table, 0).to_pylist():
                if hash(text) in suspects:
                    example = text if text in seen and not example else example
                    repeats += text in seen
                    seen.add(text)
    if repeats:
        raise ValueError(
            f"{tables[0].path}: {repeats} rows repeat an id in '{columns.sample_id}', such as "
            f"'{line(example, 60)}'; make ids unique, or set id_column to another"
        )
