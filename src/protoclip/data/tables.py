"""Tables of pairs: text files, whatever Hugging Face `datasets` reads, and datasets of the hub.

`datasets` reads Parquet, Arrow and the like. Its readers of CSV and JSON Lines stop at a malformed
row, or drop it without a word, so these are parsed here: lines left out are counted and named.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import shutil
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
    *("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes"),
    *("filepath", "file_path", "image_path", "img_path", "file_name", "filename", "file", "path"),
    *("image_url", "url"),
)
CAPTION_COLUMNS = (
    *("caption", "captions", "title", "text", "texts", "txt"),
    *("description", "alt_text", "sentence", "sentences"),
)
ID_COLUMNS = ("sample_id", "key", "uid")

TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
BINARY = (b"PAR1", b"ARROW1", b"\x1f\x8b", b"PK\x03\x04", b"\xff\xfe", b"\xfe\xff")
# A longer line, or a quoted field of more lines, comes from a quote that was left open.
MAX_LINE, MAX_QUOTED_LINES = 1 << 20, 100
BATCH_ROWS = 8192
HUB_SECONDS = 3.0
# Changes when the same file would be read differently than before.
FORM = 3


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How to open a table, as in `DataConfig`; what is unset is detected.

    `name` is what messages and sample ids call the source; `cache` is the folder for what is
    derived from it, by default in the user's cache folder.
    """

    image_column: str | None = None
    caption_column: str | Sequence[str] | None = None
    id_column: str | None = None
    root: str | None = None
    name: str | None = None
    cache: Path | None = None
    access: Access = NOTHING_MORE

    @property
    def captions(self) -> list[str]:
        given = self.caption_column or []
        return [given] if isinstance(given, str) else list(given)

    def unused(self, *settings: str) -> list[str]:
        """Those of the settings that are given, though the source has no use for them."""
        return [setting for setting in settings if getattr(self, setting)]

    @property
    def folder(self) -> Path:
        return self.cache or cache_folder() / "index"

    def with_defaults(self, *, root: str, name: str) -> "TableOptions":
        root = self.root if self.root is not None else root
        return replace(self, root=root, name=self.name or name)


def open_table(path: str, options: TableOptions) -> ImageTextPairs:
    """Open a file, a URL, or the files that a local pattern such as `train-*.parquet` matches.

    Raises:
        ValueError: A file is missing or damaged, a column is missing or holds something else, ids
            repeat, or no row is left.
    """
    if is_url(path):
        folder, _, file = path.partition("?")[0].rpartition("/")
        return open_files([path], options, root=folder, name=file)
    place, paths = Path(path), [path]
    if "*" in path:
        paths = sorted(map(str, place.parent.glob(place.name)))
        if not paths:
            raise ValueError(f"{path}: no such file")
    return open_files(paths, options, root=str(place.parent), name=place.name)


def open_files(
    paths: Sequence[str], options: TableOptions, *, root: str, name: str
) -> ImageTextPairs:
    """Open files of one form as one table; `root` and `name` are used if the options have none."""
    options = options.with_defaults(root=root, name=name)
    prints = [fingerprint(path, options.access) for path in paths]
    builder = _builder(paths[0])
    used = (options.image_column, options.captions, options.id_column)
    key = digest({"form": FORM, "files": prints, "columns": used})
    if builder == "text":
        build = partial(_text_batches, paths, options)
        index = build_index(key, None, build, folder=options.folder)
        return _pairs(index, options, where=paths[0], key=key)
    with _library() as datasets, faults(paths[0], Exception):
        local = [_local_copy(*each, options) for each in zip(paths, prints, strict=True)]
        cache = str(options.folder / "datasets")
        data = datasets.load_dataset(builder, data_files=local, split="train", cache_dir=cache)
    return _pairs(data.data, options, where=paths[0], key=key)


def _builder(path: str) -> str:
    """`text`, or the name of the builder in `datasets` that reads a file with this suffix."""
    *_, suffix, last = ("", "", *_suffixes(path))
    suffix = suffix if last in COMPRESSED else last
    if suffix in TEXT_SUFFIXES:
        return "text"
    with _library() as datasets:
        builder = datasets.packaged_modules._EXTENSION_TO_MODULE.get(suffix, ("folder",))[0]
    if last in COMPRESSED or builder.endswith("folder") or builder == "webdataset":
        raise ValueError(
            f"{path}: not a table that can be read; use {', '.join(TEXT_SUFFIXES)} (also "
            f"compressed: {', '.join(COMPRESSED)}), .parquet, .arrow, .json"
        )
    return str(builder)


def _suffixes(path: str) -> list[str]:
    file = PurePath(path.partition("?")[0] if is_url(path) else path)
    return [suffix.lower() for suffix in file.suffixes]


def _pairs(source: Any, options: TableOptions, *, where: str, key: str) -> ImageTextPairs:
    """The pairs of a memory-mapped table, once its ids are known to be unique."""
    chosen, notes = choose(where, source.table.schema, options)
    if not source.table.num_rows:
        raise ValueError(f"{where}: holds no sample")
    checked = options.folder / f"{key}.unique"
    for column in chosen["id_column"] if not checked.exists() else ():
        with faults(where, UnicodeDecodeError):
            _require_unique(source.table.column(column), column, where)
        checked.parent.mkdir(parents=True, exist_ok=True)
        checked.touch()
    return ImageTextPairs(
        source,
        name=options.name or "",
        root=options.root or "",
        access=options.access,
        image_column=chosen["image_column"][0],
        caption_columns=chosen["caption_column"],
        id_column=next(iter(chosen["id_column"]), None),
        key=key,
        notes=notes,
    )


def open_hub(reference: str, options: TableOptions) -> ImageTextPairs:
    """Open `hf:OWNER/NAME[,config=NAME][,split=SPLIT]`, of the hub or from an earlier download.

    Raises:
        ValueError: There is no such dataset, config or split; no access; or no network.
    """
    name, *given = reference.removeprefix("hf:").split(",")
    settings = dict(part.partition("=")[::2] for part in given)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or not settings.keys() <= {"config", "split"}:
        raise ValueError(f"{reference}: write hf:OWNER/NAME[,config=NAME][,split=SPLIT]")
    online = _hub_answers(reference, name)
    try:
        with _library(offline=not online) as datasets, faults(reference, Exception):
            from huggingface_hub.constants import HF_HUB_CACHE

            data = datasets.load_dataset(
                name,
                settings.get("config"),
                split=settings.get("split", "train"),
                cache_dir=str(options.folder / "datasets"),
            )
    except ValueError as error:
        if online:
            raise
        raise ValueError(
            f"{reference}: the hub does not answer, and there is no earlier download in "
            f"{options.folder}; check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error
    options = options.with_defaults(root=HF_HUB_CACHE, name=name.split("/")[1])
    key = digest({"hub": data._fingerprint, "id": options.id_column})
    return _pairs(data.data, options, where=reference, key=key)


def _hub_answers(reference: str, name: str) -> bool:
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE or Path(name).is_dir():
        return False
    try:
        within(HUB_SECONDS, partial(HfApi().dataset_info, name, timeout=HUB_SECONDS))
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{reference}: no such dataset on the hub, or a private one: run `hf auth login`"
        ) from None
    except Exception:  # no network, in one of many ways
        return False
    return True


def open_saved(folder: Path, files: Sequence[Path], options: TableOptions) -> ImageTextPairs:
    """Open what `Dataset.save_to_disk` wrote, where it lies."""
    key = digest({"saved": [fingerprint(str(file)) for file in files], "id": options.id_column})
    with _library() as datasets, faults(str(folder), Exception):
        data = datasets.load_from_disk(str(folder))
    return _pairs(data.data, options, where=str(folder), key=key)


@contextmanager
def _library(*, offline: bool = True) -> Iterator[Any]:
    """`datasets`; without progress bars and network, unless it is for the hub."""
    import datasets
    import datasets.packaged_modules
    import huggingface_hub.constants as hub

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    (datasets.disable_progress_bars if offline else datasets.enable_progress_bars)()
    before = datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = offline
    try:
        yield datasets
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before


def _local_copy(path: str, print_: str, options: TableOptions) -> str:
    """A local path as it is; of a URL, a copy in the cache."""
    if not is_url(path):
        return path
    copy = options.folder / f"{print_}{_suffixes(path)[-1]}"
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
    first, hashes = 0, []
    for chunk in ids.iterchunks():
        values = chunk.to_pylist()
        for empty in (value for value in ("", None) if value in values):
            raise ValueError(
                f"{where}: row {first + values.index(empty)} has no id in '{column}'; fill it in, "
                "or set id_column to another"
            )
        first += len(values)
        hashes.append(np.fromiter((hash(str(value)) for value in values), np.int64, len(values)))
    unique, counts = np.unique(np.concatenate(hashes), return_counts=True)
    suspects = set(unique[counts > 1].tolist())
    again = chain.from_iterable(c.to_pylist() for c in ids.iterchunks()) if suspects else ()
    found = Counter(text for text in map(str, again) if hash(text) in suspects)
    if repeated := [text for text, count in found.items() if count > 1]:
        raise ValueError(
            f"{where}: {len(repeated)} ids in '{column}' come more than once, such as "
            f"'{line(repeated[0], 60)}'; make ids unique, or set id_column to another"
        )


def choose(
    where: str, schema: pa.Schema, options: TableOptions
) -> tuple[dict[str, list[str]], list[str]]:
    """The columns that each setting names, or that have a usual name and type; and notes."""
    by_name = {name.lower().strip(): name for name in reversed(schema.names)}
    chosen: dict[str, list[str]] = {}
    notes: list[str] = []
    if len(set(schema.names)) < len(schema.names):
        twice = Counter(schema.names).most_common(1)[0][0]
        raise _missing(where, schema, f"more than one column '{twice}'")
    for setting, what, usual, usable, given in (
        ("image_column", "images", IMAGE_COLUMNS, _holds_images, [options.image_column]),
        ("caption_column", "captions", CAPTION_COLUMNS, _holds_captions, options.captions),
        ("id_column", "ids", ID_COLUMNS, _holds_ids, [options.id_column]),
    ):
        given = [name for name in given if name]
        present = [by_name[name] for name in usual if name in by_name]
        fit = [name for name in present if usable(schema.field(name).type)]
        if len(fit) > 1 and not given:
            notes.append(
                f"{where}: {what} are taken from column '{fit[0]}', not from {_quoted(fit[1:])}; "
                f"{setting} names another"
            )
        chosen[setting] = given or fit[:1]
        if not chosen[setting] and setting != "id_column":
            raise _missing(where, schema, f"no column with {what}; set {setting} to one, or add it")
        for column in chosen[setting]:
            if column not in schema.names:
                raise _missing(where, schema, f"no column '{column}'")
            if not usable(type_ := schema.field(column).type):
                raise ValueError(
                    f"{where}: column '{column}' holds {line(str(type_), 60)}, not {what}; set "
                    f"{setting} to another"
                )
    return chosen, notes


def _holds_images(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        return any(type_.field(n).name in ("bytes", "path") for n in range(type_.num_fields))
    return _is_text(type_) or "binary" in str(type_)


def _holds_captions(type_: pa.DataType) -> bool:
    inner = type_.value_type if "list" in str(type_).partition("<")[0] else type_
    return _is_text(inner) or "binary" in str(inner)


def _holds_ids(type_: pa.DataType) -> bool:
    return _is_text(type_) or bool(pa.types.is_integer(type_))


def _is_text(type_: pa.DataType) -> bool:
    inner = type_.value_type if pa.types.is_dictionary(type_) else type_
    return str(inner) in ("string", "large_string", "string_view", "null")


def _missing(where: str, schema: pa.Schema, what: str) -> ValueError:
    return ValueError(f"{where}: {what}; it has {_quoted(schema.names)}")


def _quoted(names: Sequence[str]) -> str:
    return line(", ".join(f"'{name}'" for name in names), 300)


def line(text: str, limit: int = 200) -> str:
    """A text on one line that any terminal can show, cut to a length."""
    text = visible(" ".join(text.encode("utf-8", "replace").decode().split()))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


@contextmanager
def faults(path: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions (`UNREADABLE` if unset) into one line that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except kinds or UNREADABLE as error:  # noqa: B030
        cause = error if error.__cause__ is None else error.__cause__
        raise ValueError(f"{path}: cannot be read ({line(str(cause))})") from error


class LeftOut:
    """Counts what is left out of a source, by reason, with an example of each."""

    def __init__(self, path: str) -> None:
        self.path, self.counts = path, Counter[str]()
        self.examples: dict[str, str] = {}
        self.lines: dict[str, list[str]] = {}

    def add(self, what: str, example: str, number: int | None = None) -> None:
        self.counts[what] += 1
        self.examples.setdefault(what, line(example, 60))
        if number is not None and self.counts[what] <= 6:
            text = str(number) if self.counts[what] < 6 else "..."
            self.lines.setdefault(what, []).append(text)

    @property
    def notes(self) -> list[str]:
        found = []
        for what, count in self.counts.items():
            place = f"line {', '.join(self.lines[what])}: " if what in self.lines else ""
            found.append(f"{self.path}: left out {count} {what} ({place}'{self.examples[what]}')")
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
        with faults(path), _lines(path, options.access) as lines:
            read = _read_json if {".jsonl", ".ndjson"} & {*_suffixes(path)} else _read_csv
            found, rows = read(path, lines, left_out)
            if schema is None:
                chosen, notes = choose(path, found, options)
                names = dict.fromkeys(chain.from_iterable(chosen.values()))
                schema = pa.schema([found.field(name) for name in names])
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
    if not total and faulty:
        raise ValueError(f"{faulty[0]}; no row is left: check the separator and the quotes")
    if not total:
        raise ValueError(f"{paths[0]}: holds no sample")
    facts["notes"] = [*notes, *faulty]


@contextmanager
def _lines(path: str, access: Access) -> Iterator[Iterator[str]]:
    """The lines of a text file; bytes that are not UTF-8 come as lone surrogates."""
    unpack = COMPRESSED.get(_suffixes(path)[-1], lambda file: file)
    with open_file(path, access) as raw, unpack(raw) as file:
        head = file.peek(1 << 13)[: 1 << 13]
        if not head:
            raise ValueError(f"{path}: is empty")
        if head.startswith(BINARY) or 8 * head.count(0) > len(head):
            raise ValueError(f"{path}: is not UTF-8 text, as its suffix says")
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="\n")
        yield chain(
            [text.readline(MAX_LINE).removeprefix("\ufeff")],
            iter(partial(text.readline, MAX_LINE), ""),
        )


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
        row: list[str] | None
        if '"' in ahead[0]:
            ahead.extend(islice(lines, MAX_QUOTED_LINES - len(ahead)))
            row, used = _quoted_row(ahead, separator, width)
        else:
            row, used = ahead[0].rstrip("\r\n").split(separator), 1
        text = "".join(ahead.popleft() for _ in range(used))
        fault = "lines with an open quote" if row is None else fault_of(text)
        if not fault and row is not None and len(row) == width:
            yield row
        elif text.strip():
            ragged = "lines with another number of fields than the header"
            left_out.add(fault or ragged, text, number)
        number += used


def _quoted_row(lines: Sequence[str], separator: str, width: int) -> tuple[list[str] | None, int]:
    """The fields of the row that begins there (None: a quote is left open) and its lines."""

    def quoted() -> Iterator[str]:
        for number, text in enumerate(lines):
            # A whole row in the quotes of a TSV file shows that the quote was left open.
            plain = separator == "\t" and '"' not in text
            if number and plain and text.count("\t") >= max(1, width - 1):
                return
            yield text

    reader = csv.reader(quoted(), delimiter=separator, strict=True)
    try:
        return next(reader), reader.line_num
    except csv.Error:
        if reader.line_num > 1:
            return None, 1
    # Text after a closing quote, as in `"Seven" (1995)`, is kept if the line is complete.
    reader = csv.reader([lines[0], "\n"], delimiter=separator)
    try:
        row = next(reader)
    except csv.Error:
        return None, 1
    return row if reader.line_num == 1 else None, 1


def _read_json(
    path: str, lines: Iterator[str], left_out: LeftOut
) -> tuple[pa.Schema, Iterator[list[Any]]]:
    """The columns of a JSON Lines file, by its first records, and its rows."""
    records = _json_records(lines, left_out)
    head = list(islice(records, 1000))
    lists = {name: isinstance(v, list) for record in reversed(head) for name, v in record.items()}

    def rows() -> Iterator[list[Any]]:
        for record in chain(head, records):
            found = [(record.get(name), is_list) for name, is_list in lists.items()]
            yield [
                v if v is None or isinstance(v, list) == is_list else [v] if is_list else None
                for v, is_list in found
            ]

    text = pa.string()
    schema = pa.schema([(name, pa.list_(text) if lists[name] else text) for name in lists])
    return schema, rows()


def _json_records(lines: Iterator[str], left_out: LeftOut) -> Iterator[dict[str, str | list[str]]]:
    """The values of each record that are texts, whole numbers or lists of these, as texts."""
    for number, text in enumerate(lines, 1):
        try:
            record = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            left_out.add("lines that are no JSON object", text, number)
            continue
        texts = {name: _json_texts(value) for name, value in record.items()}
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
