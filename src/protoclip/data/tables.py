"""Tables of pairs: text files, whatever Hugging Face `datasets` reads, and datasets of the hub.

`datasets` reads Parquet, Arrow and the like. Its readers of CSV and JSON Lines stop at a malformed
row, or drop it without a word, so these are parsed here: lines left out are counted and named.
"""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import re
import shutil
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa

from protoclip.data.access import (
    NOTHING_MORE,
    Access,
    digest,
    fingerprint,
    is_url,
    open_file,
    visible,
    within,
)
from protoclip.data.index import build_index, cache_folder
from protoclip.data.pairs import ImageTextPairs
from protoclip.files import replacing

# Usual names of columns, the likeliest first; capitals do not matter.
IMAGE_COLUMNS = (
    *("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "filepath", "file_path"),
    *("image_path", "img_path", "file_name", "filename", "file", "path", "image_url", "url"),
)
CAPTION_COLUMNS = (
    *("caption", "captions", "title", "text", "texts", "txt"),
    *("description", "alt_text", "sentence", "sentences"),
)
ID_COLUMNS = ("sample_id", "key", "uid")

TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# A longer line, or a quoted field of more lines, comes from a quote that was left open.
MAX_LINE, MAX_QUOTED_LINES = 1 << 20, 100
BATCH_ROWS = 8192
HUB_SECONDS = 3.0
# Changes when the same file would be read differently than before.
FORM = 4


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How to open a table, as in `DataConfig`; what is unset is detected.

    `name` is what messages and sample ids call the source; `cache` holds what is derived from it.
    With a `class_column`, which evaluation reads, there need not be captions.
    """

    image_column: str | None = None
    caption_column: Sequence[str] = ()
    id_column: str | None = None
    root: str | None = None
    name: str | None = None
    cache: Path = field(default_factory=lambda: cache_folder() / "index")
    access: Access = NOTHING_MORE
    class_column: str | None = None

    def unused(self) -> str:
        """The settings that only a table has a use for, as far as they are given."""
        settings = ("image_column", "id_column", "root", "class_column")
        return ", ".join(setting for setting in settings if getattr(self, setting))


def open_table(path: str, options: TableOptions) -> ImageTextPairs:
    """Open a file, a URL, or the files that a local pattern such as `train-*.parquet` matches.

    Raises `ValueError` if a file is missing or damaged, a column is missing or holds something
    else, ids repeat, or no row is left.
    """
    folder, _, file = path.partition("?")[0].rpartition("/")
    if is_url(path):
        return open_files([path], options, root=folder, name=file)
    place = Path(path)
    paths = sorted(map(str, place.parent.glob(place.name))) if "*" in path else [path]
    if not paths:
        raise ValueError(f"{path}: no such file")
    return open_files(paths, options, root=str(place.parent), name=place.name)


def open_files(
    paths: Sequence[str], options: TableOptions, *, root: str, name: str
) -> ImageTextPairs:
    """Open files of one form as one table; `root` and `name` are used if the options have none."""
    prints = [fingerprint(path, options.access) for path in paths]
    builder = _builder(paths[0])
    used = [options.image_column, options.caption_column, options.id_column]
    used += [options.class_column] if options.class_column else []
    key = digest({"form": FORM, "files": prints, "columns": used})
    if builder == "text":
        build = partial(_text_batches, paths, options)
        source: Any = build_index(key, None, build, folder=options.cache)
    else:
        with _library() as datasets, faults(paths[0], Exception):
            files = [_local_copy(*each, options) for each in zip(paths, prints, strict=True)]
            cache = str(options.cache / "datasets")
            data = datasets.load_dataset(
                builder, data_files=[*map(glob.escape, files)], split="train", cache_dir=cache
            )
            source = data.data
    return _pairs(source, options, where=paths[0], key=key, root=root, name=name)


def _builder(path: str) -> str:
    """`text`, or the name of the builder in `datasets` that reads a file with this suffix."""
    *_, suffix, last = ("", "", *_suffixes(path))
    if (suffix if last in COMPRESSED else last) in TEXT_SUFFIXES:
        return "text"
    with _library() as datasets:
        builder = datasets.packaged_modules._EXTENSION_TO_MODULE.get(last, ("folder",))[0]
    if builder.endswith("folder") or builder == "webdataset":
        raise ValueError(
            f"{path}: not a table that can be read; use {', '.join(TEXT_SUFFIXES)} (also "
            f"compressed: {', '.join(COMPRESSED)}), .parquet, .arrow, .json"
        )
    return str(builder)


def _suffixes(path: str) -> list[str]:
    file = PurePath(path.partition("?")[0] if is_url(path) else path)
    return [suffix.lower() for suffix in file.suffixes]


def _pairs(
    source: Any, options: TableOptions, *, where: str, key: str, root: str, name: str
) -> ImageTextPairs:
    """The pairs of a memory-mapped table, once its ids are known to be unique."""
    chosen, notes = choose(where, source.table.schema, options)
    id_column = next(iter(chosen["id_column"]), None)
    checked = options.cache / f"{key}.unique"
    if id_column and not checked.exists():
        with faults(where, UnicodeDecodeError):
            _require_unique(source.table.column(id_column), id_column, where)
        checked.parent.mkdir(parents=True, exist_ok=True)
        checked.touch()
    return ImageTextPairs(
        source,
        name=options.name or name,
        root=options.root or root,
        access=options.access,
        image_column=chosen["image_column"][0],
        caption_columns=chosen["caption_column"],
        id_column=id_column,
        key=key,
        notes=notes,
    )


def open_hub(reference: str, options: TableOptions) -> ImageTextPairs:
    """Open `hf:OWNER/NAME[,config=NAME][,split=SPLIT]`, of the hub or from an earlier download.

    Raises `ValueError` if there is no such dataset, config or split, no access, or no network.
    """
    from huggingface_hub import HfApi, constants, errors

    name, *given = reference.removeprefix("hf:").split(",")
    settings = dict(part.partition("=")[::2] for part in given)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or not settings.keys() <= {"config", "split"}:
        raise ValueError(f"{reference}: write hf:OWNER/NAME[,config=NAME][,split=SPLIT]")
    online = not constants.HF_HUB_OFFLINE
    try:
        if online:
            within(HUB_SECONDS, partial(HfApi().dataset_info, name, timeout=HUB_SECONDS))
    except errors.HfHubHTTPError:
        pass  # the hub answers; `load_dataset` says what is wrong
    except Exception:  # no network, in one of many ways
        online = False
    config, split = settings.get("config"), settings.get("split", "train")
    cache = str(options.cache / "datasets")
    try:
        with _library(offline=not online) as datasets, faults(reference, Exception):
            data = datasets.load_dataset(name, config, split=split, cache_dir=cache)
    except ValueError as error:
        if online:
            raise
        raise ValueError(
            f"{reference}: the hub does not answer, and there is no earlier download in "
            f"{options.cache}; check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error
    key = digest({"hub": data._fingerprint, "id": options.id_column})
    root, name = constants.HF_HUB_CACHE, name.split("/")[1]
    return _pairs(data.data, options, where=reference, key=key, root=root, name=name)


def open_saved(
    folder: Path, files: Sequence[Path], options: TableOptions, *, name: str
) -> ImageTextPairs:
    """Open what `Dataset.save_to_disk` wrote, where it lies."""
    key = digest({"saved": [fingerprint(str(file)) for file in files], "id": options.id_column})
    where = str(folder)
    with _library() as datasets, faults(where, Exception):
        data = datasets.load_from_disk(where)
    return _pairs(data.data, options, where=where, key=key, root=where, name=name)


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


def _local_copy(path: str, print_: str, options: TableOptions) -> str:
    """A local path as it is; of a URL, a copy in the cache."""
    if not is_url(path):
        return path
    copy = options.cache / f"{print_}{_suffixes(path)[-1]}"
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with (
            open_file(path, options.access) as source,
            replacing(copy) as scratch,
            scratch.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
    return str(copy)


def _require_unique(ids: pa.ChunkedArray, column: str, where: str) -> None:
    """Eight bytes an id tell which may repeat; only those are compared."""
    way_out = "set id_column to another"

    def texts() -> Iterator[str]:
        values = chain.from_iterable(chunk.to_pylist() for chunk in ids.iterchunks())
        for row, value in enumerate(values):
            if value is None or value == "":
                raise ValueError(f"{where}: row {row} has no id in '{column}'; {way_out}")
            yield str(value)

    hashes = np.fromiter((hash(text) for text in texts()), np.int64, len(ids))
    unique, counts = np.unique(hashes, return_counts=True)
    suspects = set(unique[counts > 1].tolist())
    found = Counter(text for text in texts() if hash(text) in suspects) if suspects else {}
    if repeated := [text for text, count in found.items() if count > 1]:
        raise ValueError(
            f"{where}: {len(repeated)} ids in '{column}' come more than once, such as "
            f"'{line(repeated[0], 60)}'; make ids unique, or {way_out}"
        )


def choose(
    where: str, schema: pa.Schema, options: TableOptions
) -> tuple[dict[str, list[str]], list[str]]:
    """The columns that each setting names, or that have a usual name and type; and notes."""
    by_name = {name.lower().strip(): name for name in reversed(schema.names)}
    chosen: dict[str, list[str]] = {}
    notes: list[str] = []
    optional = {"ids", "classes"} | ({"captions"} if options.class_column else set())
    repeated = {name for name, count in Counter(schema.names).items() if count > 1}
    for setting, what, usual, given in (
        ("image_column", "images", IMAGE_COLUMNS, [options.image_column]),
        ("caption_column", "captions", CAPTION_COLUMNS, options.caption_column),
        ("id_column", "ids", ID_COLUMNS, [options.id_column]),
        ("class_column", "classes", (), [options.class_column]),
    ):
        named = [name for name in given if name]
        present = [by_name[name] for name in usual if name in by_name]
        if clash := repeated & {*named, *present}:
            raise _missing(where, schema, f"more than one column '{min(clash)}'")
        fit = [name for name in present if _holds(what, schema.field(name).type)]
        if len(fit) > 1 and not named:
            notes.append(
                f"{where}: {what} are taken from column '{fit[0]}', not from '{fit[1]}'; "
                f"{setting} names another"
            )
        chosen[setting] = named or fit[:1]
        if not chosen[setting] and what not in optional:
            raise _missing(where, schema, f"no column with {what}; set {setting} to one, or add it")
        for column in chosen[setting]:
            if column not in schema.names:
                raise _missing(where, schema, f"no column '{column}'")
            if not _holds(what, type_ := schema.field(column).type):
                raise ValueError(
                    f"{where}: column '{column}' holds {line(str(type_), 60)}, not {what}; set "
                    f"{setting} to another"
                )
    return chosen, notes


def _holds(what: str, type_: pa.DataType) -> bool:
    """Whether a column of that type can hold images, captions, ids or classes."""
    if what == "images" and pa.types.is_struct(type_):
        return any(type_.field(n).name in ("bytes", "path") for n in range(type_.num_fields))
    if what in ("ids", "classes") and pa.types.is_integer(type_):
        return True
    is_list = what == "captions" and "list" in str(type_).partition("<")[0]
    if is_list or pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if what not in ("ids", "classes") and "binary" in str(type_):
        return True
    return str(type_) in ("string", "large_string", "string_view", "null")


def _missing(where: str, schema: pa.Schema, what: str) -> ValueError:
    names = ", ".join(f"'{name}'" for name in schema.names)
    return ValueError(f"{where}: {what}; it has {line(names, 300) or 'none'}")


def line(text: str, limit: int = 200) -> str:
    """A text on one line that any terminal can show, cut to a length."""
    text = visible(" ".join(text.split()))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


@contextmanager
def faults(path: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions into one line that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except kinds as error:
        raise ValueError(
            f"{path}: cannot be read ({line(str(error.__cause__ or error))})"
        ) from error


class LeftOut:
    """Counts what is left out of a source, by reason, with an example and the first lines."""

    def __init__(self, path: str) -> None:
        self.path, self.counts = path, Counter[str]()
        self.first: dict[str, list[tuple[int, str]]] = {}

    def add(self, what: str, example: str, number: int = 0) -> None:
        self.counts[what] += 1
        if self.counts[what] <= 5:
            self.first.setdefault(what, []).append((number, line(example, 60)))

    @property
    def notes(self) -> list[str]:
        found = []
        for what, first in self.first.items():
            lines = ", ".join(str(number) for number, _ in first if number)
            more = ", ..." if self.counts[what] > 5 else ""
            place = f"line {lines}{more}: " if lines else ""
            found.append(
                f"{self.path}: left out {self.counts[what]} {what} ({place}'{first[0][1]}')"
            )
        return found


def _text_batches(
    paths: Sequence[str], options: TableOptions, facts: dict[str, Any]
) -> Iterator[pa.RecordBatch]:
    """The used columns of CSV, TSV and JSON Lines files, in batches."""
    total, schema = 0, None
    notes: list[str] = []
    faulty: list[str] = []
    for path in paths:
        left_out = LeftOut(path)
        unreadable = (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error)
        with faults(path, *unreadable), _lines(path, options.access) as lines:
            read = _read_json if {".jsonl", ".ndjson"} & {*_suffixes(path)} else _read_csv
            found, rows = read(path, lines, left_out)
            if schema is None:
                chosen, notes = choose(path, found, options)
                schema = pa.schema(map(found.field, dict.fromkeys(chain(*chosen.values()))))
            for name in schema.names:
                if name not in found.names:
                    raise _missing(path, found, f"no column '{name}', which {paths[0]} has")
            places = [found.names.index(name) for name in schema.names]
            while held := list(islice(rows, BATCH_ROWS)):
                cells = list(zip(*held, strict=True))
                arrays = [pa.array(cells[p], f.type) for p, f in zip(places, schema, strict=True)]
                total += len(held)
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)
        faulty += left_out.notes
    if not total:
        left = f"{faulty[0]}; no row is left: check the separator and the quotes" if faulty else ""
        raise ValueError(left or f"{paths[0]}: holds no sample")
    facts["notes"] = notes + faulty


@contextmanager
def _lines(path: str, access: Access) -> Iterator[Iterator[str]]:
    """The lines of a text file; bytes that are not UTF-8 come as lone surrogates."""
    unpack = COMPRESSED.get(_suffixes(path)[-1], lambda file: file)
    with open_file(path, access) as raw, unpack(raw) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="\n")
        yield iter(partial(text.readline, MAX_LINE), "")


def fault_of(text: str) -> str:
    """Why a line cannot be used; empty if it can."""
    if len(text) >= MAX_LINE:
        return "lines of more than a megabyte"
    if "\0" in text:
        return "lines with a zero byte"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "lines that are not UTF-8"
    return ""


def _read_csv(
    path: str, lines: Iterator[str], left_out: LeftOut
) -> tuple[pa.Schema, Iterator[list[str]]]:
    """The header and the rows of a CSV or TSV file; the separator is the one in the header."""
    number, header = next((found for found in enumerate(lines, 1) if found[1].strip()), (0, ""))
    usual = "\t" if ".tsv" in _suffixes(path) else ","
    separator = next((s for s in (usual, "\t", ",", ";") if s in header), usual)
    names = next(csv.reader([header], delimiter=separator), [])
    if fault_of(header):
        raise ValueError(f"{path}: its header is not UTF-8 text; save it as UTF-8")
    schema = pa.schema([(name, pa.string()) for name in names])
    return schema, _csv_rows(lines, number + 1, separator, len(names), left_out)


def _csv_rows(
    lines: Iterator[str], number: int, separator: str, width: int, left_out: LeftOut
) -> Iterator[list[str]]:
    """The good rows. `number` is that of the first line."""
    ahead: deque[str] = deque()
    while ahead or (ahead := deque(islice(lines, 1))):
        row, used = ahead[0].rstrip("\r\n").split(separator), 1
        what = "lines with another number of fields than the header"
        if '"' in ahead[0]:
            ahead.extend(islice(lines, MAX_QUOTED_LINES - len(ahead)))
            row, used = _quoted_row(ahead, separator, width)
            what = what if row else "lines with an open quote"
        text = "".join(ahead.popleft() for _ in range(used))
        fault = fault_of(text)
        if len(row) == width and not fault:
            yield row
        elif text.strip():
            left_out.add(fault or what, text, number)
        number += used


def _quoted_row(lines: deque[str], separator: str, width: int) -> tuple[list[str], int]:
    """The fields of the row that begins there (none: a quote is left open) and its lines."""
    readers = [csv.reader(lines, delimiter=separator, strict=True)]
    if lines[0].count('"') % 2 == 0:
        # Text after a closing quote, as in `"Seven" (1995)`, is kept.
        readers.append(csv.reader([lines[0]], delimiter=separator))
    for reader in readers:
        with suppress(csv.Error):
            row = next(reader)
            if len(row) == width or reader.line_num == 1:
                return row, reader.line_num
    return [], 1


def _read_json(
    path: str, lines: Iterator[str], left_out: LeftOut
) -> tuple[pa.Schema, Iterator[list[Any]]]:
    """The columns of a JSON Lines file, by its first records, and its rows."""
    records = _json_records(lines, left_out)
    head = list(islice(records, 1000))
    cells = list(chain.from_iterable(record.items() for record in head))
    lists = {name: False for name, _ in cells}
    lists |= {name: True for name, value in cells if isinstance(value, list)}

    def cell(value: str | list[str] | None, is_list: bool) -> str | list[str] | None:
        if is_list and isinstance(value, str):
            return [value]
        return value if isinstance(value, list) == is_list else None

    rows = ([cell(r.get(n), is_list) for n, is_list in lists.items()] for r in chain(head, records))
    text = pa.string()
    schema = pa.schema([(name, pa.list_(text) if lists[name] else text) for name in lists])
    return schema, rows


def _json_records(lines: Iterator[str], left_out: LeftOut) -> Iterator[dict[str, str | list[str]]]:
    """The values of each record that are texts, whole numbers or lists of these, as texts."""
    for number, text in enumerate(lines, 1):
        try:
            record = json.loads(text) if text.strip() else {}
            texts = {name: _json_texts(value) for name, value in record.items()}
        except (ValueError, AttributeError, RecursionError):
            left_out.add("lines that are no JSON object", text, number)
            continue
        used = {name: value for name, value in texts.items() if value is not None}
        escaped = chain.from_iterable(used.values() if "\\u" in text else ())
        if fault := fault_of(text) or fault_of("".join(escaped)):
            left_out.add(fault, text, number)
        elif record:
            yield used


def _json_texts(value: Any) -> str | list[str] | None:
    if isinstance(value, list):
        return [text for text in map(_json_texts, value) if isinstance(text, str)]
    is_text = isinstance(value, (str, int)) and not isinstance(value, bool)
    return str(value) if is_text else None
