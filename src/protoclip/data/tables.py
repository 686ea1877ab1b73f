"""Tables of pairs: text files, whatever Hugging Face `datasets` reads, and datasets of the hub.

`datasets` reads Parquet, Arrow and the like. Its readers of CSV and JSON Lines stop at a malformed
row, or drop it without a word, so these are parsed here: lines left out are counted and named.
"""

import csv
import glob
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa

from protoclip.config import DataConfig
from protoclip.data.access import (
    NO_WEB_IMAGES,
    digest,
    download,
    files_like,
    fingerprint,
    hub_answer,
    is_url,
    is_web,
)
from protoclip.data.index import (
    ROWS,
    ArrowIndex,
    batches,
    build_index,
    index_folder,
    unwritable,
)
from protoclip.data.lines import (
    COMPRESSED,
    NOT_UTF8,
    TEXT_SUFFIXES,
    Cell,
    LeftOut,
    lines_of,
    read_csv,
    read_json,
    suffixes_of,
)
from protoclip.data.pairs import ImageTextPairs
from protoclip.terminal import line, without_secrets

# Tables of an image folder, the first of which counts.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Usual names of columns, the likeliest first; capitals do not matter.
IMAGE_COLUMNS = (
    *("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "filepath", "file_path"),
    *("image_path", "img_path", "file_name", "filename", "file", "path", "image_url", "url"),
)
# In tables of an image folder, Hugging Face `datasets` reads `file_name`, so it comes first.
METADATA_IMAGE_COLUMNS = tuple(dict.fromkeys(("file_name", *IMAGE_COLUMNS)))
CAPTION_COLUMNS = (
    *("caption", "captions", "title", "text", "texts", "txt"),
    *("description", "alt_text", "sentence", "sentences"),
)
BINARY = ("binary", "large_binary", "binary_view", "fixed_size_binary")  # types of pyarrow
NO_COLUMN = ""  # named to say that no column is to be used
ID_COLUMNS = ("sample_id", "key", "uid")
# What a reason of `datasets` means, by a part of it.
PLAIN = {
    "corresponds to no data": "it holds no row",
    "BatchSize must be greater than 0": "it holds no row or no column",
    "Multiple matches for FieldRef": "two of its columns have one name; rename one",
    "datasets dtype equivalent": "a column is of a type such as map; convert or drop it",
}

FORM = 5  # Changes when the same file would be read differently than before.


def open_table(data: DataConfig, *, name: str | None = None) -> ImageTextPairs:
    """Open `data.train`: a file, a URL, or files that match a local pattern (`train-*.parquet`).

    `name` is what messages and sample ids call the pairs. With `data.class_column` there need not
    be captions. Raises `ValueError` if a file is missing or damaged, a column is missing or holds
    something else, ids repeat, or no row is left.
    """
    path = data.train
    folder, _, file = path.partition("?")[0].rpartition("/")
    if is_url(path):
        return open_files([path], data, name=name or file, root=folder)
    parent, file = Path(path).parent, Path(path).name
    paths = [*map(str, files_like(parent, file))] if "*" in path else [path]
    if not paths:
        raise ValueError(f"{path}: no such file")
    return open_files(paths, data, name=name or file, root=str(parent))


def open_files(
    paths: Sequence[str], data: DataConfig, *, name: str, root: str, saved: bool = False
) -> ImageTextPairs:
    """Open files of one form as one table, or those that `Dataset.save_to_disk` wrote to `root`.

    Relative paths in the table start at `data.root`, else at `root`.
    """
    label, folder = without_secrets(paths[0]), index_folder()
    prints = [fingerprint(path) for path in paths]
    first = "file_name" if is_metadata(label) else None  # as versions had it that knew no other
    columns = [data.image_column or first, caption_columns(data), data.id_column]
    columns += [data.class_column] if data.class_column else []
    key = digest({"form": FORM, "files": prints, "columns": columns})
    *_, before, last = ("", "", *suffixes_of(paths[0]))
    if not saved and (before if last in COMPRESSED else last) in TEXT_SUFFIXES:
        build, way_out = partial(_text_batches, paths, data), "check the separator and the quotes"
        # Indexes by `key` alone, of 1.0.0, do not say how many lines are bad. Pairs are still known
        # by `key`, so that runs and features go with them.
        index = build_index(f"{key}-bad", build, folder=folder, label=label, way_out=way_out)
        return pairs_of(index, data, key=key, label=label, name=name, root=root)
    with _library() as datasets:
        builder = datasets.packaged_modules._EXTENSION_TO_MODULE.get(last, ("folder",))[0]
        if not saved and builder not in ("parquet", "arrow", "json"):
            raise ValueError(
                f"{label}: not a table that can be read; use {', '.join(TEXT_SUFFIXES)} (also "
                f"compressed: {', '.join(COMPRESSED)}), .parquet, .arrow, .json"
            )
        with faults(label, Exception):
            if saved:
                loaded = datasets.load_from_disk(root)
            else:
                files = [_local_copy(*pair, data) for pair in zip(paths, prints, strict=True)]
                cache, files = str(folder / "datasets"), [*map(glob.escape, files)]
                loaded = datasets.load_dataset(
                    builder, data_files=files, split="train", cache_dir=cache
                )
    return pairs_of(loaded.data, data, key=key, label=label, name=name, root=root)


def open_hub(data: DataConfig, *, name: str | None = None) -> ImageTextPairs:
    """Open `hf:OWNER/NAME[,config=NAME][,split=SPLIT]`, of the hub or from an earlier download.

    Raises `ValueError` if there is no such dataset, config or split, no access, or no network.
    """
    from huggingface_hub import HfApi, constants

    label, folder = data.train, index_folder()
    form = re.compile(r"hf:(\w[\w.-]*/(\w[\w.-]*))((?:,(?:config|split)=[^,]*)*)")
    if (parts := form.fullmatch(label)) is None:
        raise ValueError(f"{label}: write hf:OWNER/NAME[,config=NAME][,split=SPLIT]")
    names = dict(part.split("=", 1) for part in parts[3].split(",")[1:])
    # If the hub answers with an error, `load_dataset` says what is wrong.
    online = hub_answer(partial(HfApi().dataset_info, parts[1])) is not None
    options = {"split": names.get("split", "train"), "cache_dir": str(folder / "datasets")}
    try:
        with _library(offline=not online) as datasets, faults(label, Exception):
            loaded = datasets.load_dataset(parts[1], names.get("config"), **options)
    except ValueError as error:
        if online:
            raise
        raise ValueError(
            f"{label}: the hub does not answer, and there is no earlier download in {folder}; "
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error
    key, root = digest({"hub": loaded._fingerprint, "id": data.id_column}), constants.HF_HUB_CACHE
    return pairs_of(loaded.data, data, key=key, label=label, name=name or parts[2], root=root)


def pairs_of(
    source: Any,
    data: DataConfig,
    *,
    key: str,
    label: str,
    name: str,
    root: str,
    way_out: str = "make ids unique, set id_column to another, or to '' for row numbers",
) -> ImageTextPairs:
    """The pairs in an index, or in the columns of another memory-mapped table that fit.

    Raises `ValueError` if ids repeat, a column is missing, or the images are on the web. `key`
    identifies the content.
    """
    columns: dict[str, Any] = {}
    if isinstance(source, ArrowIndex):
        notes, present = source.notes, source.table.column_names
        columns["caption_columns"] = ["caption"] if "caption" in present else []
        columns["class_column"] = "class" if "class" in present else None
        if data.needs_caption_column and not columns["caption_columns"]:  # `embed` built it
            raise ValueError(f"{label}: no column with captions; set caption_column to one")
    else:
        columns, notes = choose(label, source.table.schema, data)
    pairs = ImageTextPairs(
        source,
        name=name,
        root=data.root or root,
        allow_links=data.allow_links,
        table_key=key,
        notes=notes,
        needs_captions=data.needs_captions,
        **columns,
    )
    if is_web(image := pairs.where(0)):
        raise ValueError(f"{label}: row 0 has the image {without_secrets(image)}; {NO_WEB_IMAGES}")
    checked = index_folder() / f"{key}.unique"
    if pairs.id_column and not checked.exists():
        with faults(label, UnicodeDecodeError):
            _require_unique(pairs.checked.column(pairs.id_column), label, way_out)
        with suppress(OSError):  # where nothing can be written, they are compared each time
            checked.parent.mkdir(parents=True, exist_ok=True)
            checked.touch()
    return pairs


def _require_unique(ids: pa.ChunkedArray, label: str, way_out: str) -> None:
    """Eight bytes an id tell which may repeat; only those are compared."""

    def texts() -> Iterator[str]:
        values = chain.from_iterable(chunk.to_pylist() for chunk in ids.iterchunks())
        for row, value in enumerate(values):
            if value is None or value == "":
                raise ValueError(f"{label}: row {row} has no id; {way_out}")
            yield str(value)

    hashes = np.fromiter((hash(text) for text in texts()), np.int64, len(ids))
    values, counts = np.unique(hashes, return_counts=True)
    suspects = set(values[counts > 1].tolist())
    counted = Counter(text for text in texts() if hash(text) in suspects) if suspects else {}
    if repeated := [text for text, count in counted.items() if count > 1]:
        raise ValueError(
            f"{label}: {len(repeated)} sample ids come more than once, such as "
            f"'{line(repeated[0], 60)}'; {way_out}"
        )


def describe_bad_lines(samples: Any, most: float) -> str:
    """A note on a text file with a larger share of bad lines; empty if there is none."""
    for file in getattr(samples, "bad_lines", ()):
        if (number := file["lines"]) > most * file["of"]:
            return (
                f"{file['file']}: {number:,} of {file['of']:,} lines ({number / file['of']:.0%}) "
                f"{file['are']}, more than data.max_bad_share ({most:g}) allows; {file['way_out']}"
            )
    return ""


def caption_columns(data: DataConfig) -> list[str]:
    """The columns or keys of captions that the user named."""
    named = data.caption_column or []
    return [named] if isinstance(named, str) else named


def note_unused(data: DataConfig) -> list[str]:
    """A note of the settings that only a table has a use for, if some are given."""
    names = list_changed(data, ("image_column", "id_column", "root", "class_column"))
    return (
        [f"{without_secrets(data.train)}: has no columns, and does not use {names}"]
        if names
        else []
    )


def list_changed(data: DataConfig, settings: Iterable[str]) -> str:
    """The settings among these that differ from their defaults."""
    return ", ".join(s for s in settings if getattr(data, s) != getattr(DataConfig(), s))


@contextmanager
def _library(*, offline: bool = True) -> Iterator[Any]:
    """`datasets`; without progress bars and network, unless it is for the hub."""
    import datasets
    import datasets.packaged_modules
    import huggingface_hub.constants as hub

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    (datasets.disable_progress_bars if offline else datasets.enable_progress_bars)()
    before = hub.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = offline
    try:
        yield datasets
    finally:
        datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = before


def _local_copy(path: str, print_: str, data: DataConfig) -> str:
    """A local path as it is; of a URL, a copy in the cache."""
    if not is_url(path):
        return path
    copy = index_folder() / f"{print_}{suffixes_of(path)[-1]}"
    if not copy.exists():
        download(path, copy)
    return str(copy)


def choose(label: str, schema: pa.Schema, data: DataConfig) -> tuple[dict[str, Any], list[str]]:
    """The columns that settings name, or that have a usual name and type; and notes.

    They are called as in `ImageTextPairs`. Raises `ValueError` if a table has no such column.
    """
    notes: list[str] = []
    choice = partial(_choose_columns, label, schema, notes)
    usual = METADATA_IMAGE_COLUMNS if is_metadata(label) else IMAGE_COLUMNS
    images = choice("image", usual, [data.image_column])
    captions = choice("caption", CAPTION_COLUMNS, caption_columns(data))
    ids = choice("id", ID_COLUMNS, [data.id_column])
    classes = choice("class", (), [data.class_column])
    for kind, columns in (("image", images), ("caption", captions)):
        if not columns and (kind == "image" or data.needs_caption_column):
            lack = f"no column with {kind}s; set {kind}_column to one, or add it"
            raise missing_error(label, schema.names, lack)
    chosen: dict[str, Any] = {"image_column": images[0], "caption_columns": captions}
    chosen["id_column"] = ids[0] if ids else None
    chosen["class_column"] = classes[0] if classes else None
    return chosen, notes


def _choose_columns(
    label: str,
    schema: pa.Schema,
    notes: list[str],
    kind: str,
    usual: Sequence[str],
    named: Sequence[str | None],
) -> list[str]:
    """The columns of one kind: those that are named, else the first usual one that fits."""
    what = "classes" if kind == "class" else f"{kind}s"
    by_name = {name.lower().strip(): name for name in reversed(schema.names)}
    used = [name for name in named if name]
    present = [by_name[name] for name in usual if name in by_name]
    if [*named] == [NO_COLUMN]:
        present = []
    for column in sorted({*used, *present}):
        if schema.names.count(column) > 1:
            raise missing_error(label, schema.names, f"more than one column '{column}'")
    if not used:
        fit = [name for name in present if _holds(what, schema.field(name).type)]
        if len(fit) > 1:
            notes.append(
                f"{label}: {what} are taken from column '{fit[0]}', not from '{fit[1]}'; "
                f"{kind}_column names another"
            )
        # A column of a usual name that holds something else is refused below, not passed over.
        used = (fit or (present if kind in ("image", "caption") else []))[:1]
    for column in used:
        if column not in schema.names:
            raise missing_error(label, schema.names, f"no column '{column}'")
        if not _holds(what, type_ := schema.field(column).type):
            held = line(str(type_), 60)
            lack = f"column '{column}' holds {held}, not {what}; set {kind}_column to another"
            raise missing_error(label, schema.names, lack)
    return used


def is_metadata(path: str) -> bool:
    return PurePath(path).name in METADATA


def _holds(what: str, type_: pa.DataType) -> bool:
    """Whether a column of that type can hold images, captions, ids or classes."""
    if what == "images" and pa.types.is_struct(type_):
        return any(type_.field(n).name in ("bytes", "path") for n in range(type_.num_fields))
    if what in ("ids", "classes") and pa.types.is_integer(type_):
        return True
    is_list = what == "captions" and "list" in str(type_).partition("<")[0]
    if is_list or pa.types.is_dictionary(type_):
        type_ = type_.value_type
    kind = str(type_).partition("[")[0]  # without the width of fixed_size_binary[9]
    if what not in ("ids", "classes") and kind in BINARY:
        return True
    return kind in ("string", "large_string", "string_view", "null")


@contextmanager
def faults(path: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions into one line that names the file, or the cache if that cannot be written."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except kinds as error:
        cause, cache = error.__cause__ or error, index_folder()
        if isinstance(cause, OSError) and Path(str(cause.filename)).is_relative_to(cache):
            raise unwritable(cache, cause) from error
        reason = line(str(cause))
        reason = next((plain for part, plain in PLAIN.items() if part in reason), reason)
        raise ValueError(f"{path}: cannot be read ({reason})") from error


def captions_in(record: Any, keys: Sequence[str] = ()) -> list[bytes]:
    """The texts of a JSON object under these keys, or else under the likeliest usual one."""
    record = record if isinstance(record, dict) else {}
    present = {key.lower(): key for key in reversed(record)}
    usual = [present[key] for key in CAPTION_COLUMNS if key in present][:1]
    captions: list[bytes] = []
    for value in map(record.get, keys or usual):
        texts = value if isinstance(value, list) else [value]
        captions += [
            text.encode("utf-8", "surrogatepass") for text in texts if isinstance(text, str)
        ]
    return captions


def _text_batches(
    paths: Sequence[str], data: DataConfig, facts: dict[str, Any]
) -> Iterator[pa.RecordBatch]:
    """The used columns of CSV, TSV and JSON Lines files, in batches."""
    facts["left_out"], facts["bad_lines"] = [], []
    columns: dict[str, Any] = {}
    for path in paths:
        shown = without_secrets(path)
        left_out = LeftOut(shown)
        unreadable = (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error)
        with faults(shown, *unreadable), lines_of(path) as lines:
            read = read_json if {".jsonl", ".ndjson"} & {*suffixes_of(path)} else read_csv
            names, rows = read(path, lines, left_out)
            if not names and left_out.counts:
                left_out.advice[NOT_UTF8] = left_out.to_utf8
                raise ValueError(f"{left_out.notes[0]}; nothing else is in it")
            if not columns:
                schema = pa.schema([(name, pa.string()) for name in names])
                columns, facts["notes"] = choose(shown, schema, data)
            single = [columns[f"{which}_column"] for which in ("image", "id", "class")]
            captions = columns["caption_columns"]
            for name in filter(None, [*single, *captions]):
                if name not in names:
                    first = without_secrets(paths[0])
                    raise missing_error(shown, names, f"no column '{name}', which {first} has")
            fields = [pa.field(name, pa.string()) for name in ("image", "sample_id", "class")]
            schema = pa.schema([f for f, name in zip(fields, single, strict=True) if name])
            if captions:
                schema = schema.append(ROWS.field("caption"))
            numbers = [names.index(name) for name in single if name], [*map(names.index, captions)]
            used = 0
            for batch in batches((_row(cells, *numbers) for cells in rows), schema):
                used += batch.num_rows
                yield batch
        if not used:
            left_out.advice[NOT_UTF8] = left_out.to_utf8
        facts["left_out"] += left_out.notes
        if left := left_out.counts.total():
            facts["left_out"].append(f"{shown}: {used:,} of {used + left:,} rows are used")
        for number, are, way_out in (
            (left_out.counts[NOT_UTF8], "are not UTF-8", left_out.to_utf8),
            (left_out.surplus, "have too many fields", "quote the captions, or use tabs"),
        ):
            bad = {"file": shown, "lines": number, "of": used + left}
            facts["bad_lines"].append({**bad, "are": are, "way_out": way_out})


def _row(cells: list[Cell], single: list[int], captions: list[int]) -> list[Any]:
    """The cells of the columns with one text, and the captions of all columns with captions."""
    row: list[Any] = [cells[n] if isinstance(cells[n], str) else None for n in single]
    texts: list[Any] = []
    for cell in (cells[n] for n in captions):
        texts += cell if isinstance(cell, list) else [cell]
    return [*row, texts] if captions else row


def missing_error(label: str, names: Sequence[str], what: str) -> ValueError:
    """An error for a table that lacks something; it lists the columns that exist."""
    present = ", ".join(f"'{name}'" for name in names)
    return ValueError(f"{label}: {what}; it has {line(present, 300) or 'none'}")
