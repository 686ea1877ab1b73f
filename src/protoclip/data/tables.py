"""Tables of pairs: text files, whatever Hugging Face `datasets` reads, and datasets of the hub.

Its readers of CSV and JSON Lines stop at a malformed row, or drop it without a word, so these are
parsed here. Rows of text files, folders and shards go to an index: a memory-mapped Arrow file.
"""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import re
import zlib
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from protoclip.config import DataConfig
from protoclip.data.access import (
    NO_WEB_IMAGES,
    digest,
    download,
    explain_unwritable,
    files_like,
    fingerprint,
    hub_answer,
    index_folder,
    is_url,
    open_file,
)
from protoclip.data.pairs import ImageTextPairs, clean_captions, is_list
from protoclip.files import in_turn, read_sealed, replacing, seal, to_json, write_atomically
from protoclip.progress import Progress
from protoclip.terminal import counted, line, without_secrets

# Tables of an image folder, the first of which counts.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Usual names of columns, the likeliest first; capitals do not matter.
IMAGE_COLUMNS = (
    *("image", "img", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "filepath"),
    *("file_path", "image_path", "img_path", "file_name", "filename", "file", "path"),
    *("image_url", "url"),
)
# In tables of an image folder, Hugging Face `datasets` reads `file_name`, so it comes first.
METADATA_IMAGE_COLUMNS = tuple(dict.fromkeys(("file_name", *IMAGE_COLUMNS)))
CAPTION_COLUMNS = (
    *("caption", "captions", "title", "text", "texts", "txt"),
    *("description", "alt_text", "sentence", "sentences"),
)
ID_COLUMNS = ("sample_id", "key", "uid")
NO_COLUMN = ""  # named to say that no column is to be used
BINARY = ("binary", "large_binary", "binary_view", "fixed_size_binary")  # types of pyarrow
TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error)
LONGEST_HEADER = 100_000  # characters
# A longer line, or a quoted field of more lines, comes from a quote that was left open.
MAX_LINE, MAX_QUOTED_LINES = 1 << 20, 100
csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
SHOWN_LINES = 1 << 16  # after as many, progress is shown
NOT_UTF8 = "lines that are not UTF-8"
TO_UTF8 = "save it as UTF-8 (if Windows wrote it: iconv -f cp1252 -t utf-8 FILE > NEW)"
FORM = 5  # Changes when the same file would be read differently than before.
# Of an index: captions as stored; the image is a path or URL.
ROWS = pa.schema({"image": pa.string(), "caption": pa.list_(pa.binary()), "sample_id": pa.string()})
# ... and the number of each caption's column, where there are several.
CAPTION_OF = pa.field("caption_of", pa.list_(pa.int32()))
BATCH_ROWS = 8192
Build = Callable[[dict[str, Any]], Iterable[pa.RecordBatch]]
Cell = str | list[str] | None


def open_table(data: DataConfig, *, name: str | None = None) -> ImageTextPairs:
    """Open `data.train`: a file, a URL, or files that match a local pattern (`train-*.parquet`).

    `name` is what messages and sample ids call the pairs. Raises `ValueError` if a file is missing
    or damaged, a column is missing or holds something else, ids repeat, or no row is left.
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
    """Open files of one form as one table, or those that `Dataset.save_to_disk` wrote to `root`,
    where relative paths start unless `data.root` is set."""
    label, folder = without_secrets(paths[0]), index_folder()
    prints = [fingerprint(path) for path in paths]
    image_column = data.image_column
    if image_column is None and PurePath(label).name in METADATA:
        image_column = "file_name"  # as in keys of 1.0
    columns = [image_column, caption_columns(data), data.id_column]
    columns += [data.class_column] if data.class_column else []
    key = digest({"form": FORM, "files": prints, "columns": columns})
    *_, before, last = ("", "", *list_suffixes(paths[0]))
    if not saved and (before if last in COMPRESSED else last) in TEXT_SUFFIXES:
        kind = "columns" if len(caption_columns(data)) > 1 else "bad"
        build, way_out = partial(_index_texts, paths, data), "check the separator and the quotes"
        # Indexes by `key` alone, of 1.0.0, do not say how many lines are bad. Pairs are still known
        # by `key`, so that runs and features go with them.
        index = build_index(f"{key}-{kind}", build, folder=folder, label=label, way_out=way_out)
        return make_pairs(index, data, key=key, label=label, name=name, root=root)
    with _library() as datasets:
        builder = datasets.packaged_modules._EXTENSION_TO_MODULE.get(last, ("folder",))[0]
        if not saved and builder not in ("parquet", "arrow", "json"):
            raise ValueError(
                f"{label}: not a table that can be read; use {', '.join(TEXT_SUFFIXES)} (also "
                f"compressed: {', '.join(COMPRESSED)}), .parquet, .arrow, .json"
            )
        with name_faults(label, Exception):
            if saved:
                loaded = datasets.load_from_disk(root)
            else:
                files, cache = list[str](), str(folder / "datasets")
                for path, print_ in zip(paths, prints, strict=True):
                    copy = folder / f"{print_}{last}"
                    if is_url(path) and not copy.exists():
                        download(path, copy)
                    files.append(glob.escape(str(copy) if is_url(path) else path))
                loaded = datasets.load_dataset(
                    builder, data_files=files, split="train", cache_dir=cache
                )
    return make_pairs(loaded.data, data, key=key, label=label, name=name, root=root)


def open_hub(data: DataConfig, *, name: str | None = None) -> ImageTextPairs:
    """Open `hf:OWNER/NAME[,config=NAME][,split=SPLIT]`, of the hub or from an earlier download;
    raises `ValueError` if it is not there, or cannot be reached."""
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
        with _library(offline=not online) as datasets, name_faults(label, Exception):
            loaded = datasets.load_dataset(parts[1], names.get("config"), **options)
    except ValueError as error:
        if online:
            raise
        raise ValueError(
            f"{label}: the hub does not answer, and there is no earlier download in {folder}; "
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error
    key, root = digest({"hub": loaded._fingerprint, "id": data.id_column}), constants.HF_HUB_CACHE
    return make_pairs(loaded.data, data, key=key, label=label, name=name or parts[2], root=root)


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


def make_pairs(
    source: Any,
    data: DataConfig,
    *,
    key: str,
    label: str,
    name: str,
    root: str,
    way_out: str = "make ids unique, set --id_column to another, or to '' for row numbers",
) -> ImageTextPairs:
    """The pairs in an index, or in the columns of another memory-mapped table that fit.

    Rows without an id are left out. Raises `ValueError` if ids repeat, a column is missing, or the
    images are on the web. `key` identifies the content.
    """
    if isinstance(source, ArrowIndex):
        notes, present = source.notes, source.table.column_names
        columns: dict[str, Any] = {
            "caption_columns": ["caption"] if "caption" in present else [],
            "class_column": "class" if "class" in present else None,
            "caption_names": source.facts.get("caption_columns", ()),
            "in_ranges": "offset" in present,
            "bad_lines": source.facts.get("bad_lines", ()),
        }
        if data.needs_caption_column and not columns["caption_columns"]:  # `embed` built it
            raise ValueError(f"{label}: no column with captions; set --caption_column to one")
    else:
        columns, notes = choose_columns(label, source.table.schema, data)
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
    if (image := pairs.where(0)).startswith(("http://", "https://")):
        raise ValueError(f"{label}: row 0 has the image {without_secrets(image)}; {NO_WEB_IMAGES}")
    checked = index_folder() / f"{key}.unique"
    if pairs.id_column and not checked.exists():
        with name_faults(label, pa.ArrowException):
            ids = pairs.whole_column(pairs.id_column)
            ids.validate(full=True)  # that they are UTF-8
            texts = pc.fill_null(ids.cast(pa.large_string()), "")
            empty, rows = pc.index(texts, "").as_py(), np.flatnonzero(pc.not_equal(texts, ""))
            values, counts = pc.value_counts(texts).flatten()
            repeated = values.filter(pc.and_(pc.greater(counts, 1), pc.not_equal(values, "")))
        if not len(rows):
            raise ValueError(f"{label}: no row has an id; {way_out}")
        if len(repeated):
            raise ValueError(
                f"{label}: {len(repeated)} sample ids come more than once, such as "
                f"'{line(str(repeated[0]), 60)}'; {way_out}"
            )
        if number := len(texts) - len(rows):
            pairs = pairs.subset(rows)
            left_out = f"left out {counted(number, 'row')} without an id"
            pairs.notes.append(f"{label}: {left_out} (row {empty})")
            bad = {"file": label, "lines": number, "of": len(texts), "are": "have no id"}
            pairs.bad_lines = [*pairs.bad_lines, {**bad, "way_out": way_out}]
            return pairs
        with suppress(OSError):  # where nothing can be written, they are compared each time
            checked.parent.mkdir(parents=True, exist_ok=True)
            checked.touch()
    return pairs


def describe_bad_lines(samples: Any, most: float) -> str:
    """A note on a text file with a larger share of bad lines; empty if there is none."""
    for file in samples.bad_lines:
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


def choose_columns(
    label: str, schema: pa.Schema, data: DataConfig
) -> tuple[dict[str, Any], list[str]]:
    """The columns that settings name, or that have a usual name and type, and notes; raises
    `ValueError` if a table has none."""
    by_name = {name.lower().strip(): name for name in reversed(schema.names)}
    chosen, notes = dict[str, list[str]](), list[str]()
    images = METADATA_IMAGE_COLUMNS if PurePath(label).name in METADATA else IMAGE_COLUMNS
    for kind, named, usual in (
        ("image", [data.image_column], images),
        ("caption", caption_columns(data), CAPTION_COLUMNS),
        ("id", [data.id_column], ID_COLUMNS),
        ("class", [data.class_column], ()),
    ):
        what = "classes" if kind == "class" else f"{kind}s"
        used = [name for name in named if name]
        present = [by_name[name] for name in usual if name in by_name]
        if used or named == [NO_COLUMN]:
            present = []
        for column in (*used, *present):
            if (number := schema.names.count(column)) != 1:
                lack = f"{'more than one' if number else 'no'} column '{column}'"
                if kind == "caption" and "," in column:
                    lack += f" (several are written as {' '.join(column.split(','))})"
                raise describe_lack(label, schema.names, lack)
        fit = [name for name in present if _holds(what, schema.field(name).type)]
        if len(fit) > 1:
            notes.append(
                f"{label}: {what} are taken from column '{fit[0]}', not from '{fit[1]}'; "
                f"--{kind}_column names another"
            )
        # A column of a usual name that holds something else is refused below, not passed over.
        used += (fit or (present if kind in ("image", "caption") else []))[:1]
        for column in used:
            if not _holds(what, type_ := schema.field(column).type):
                held = line(str(type_), 60)
                lack = f"column '{column}' holds {held}, not {what}; set --{kind}_column to another"
                raise describe_lack(label, schema.names, lack)
        if not used and (kind == "image" or (kind == "caption" and data.needs_caption_column)):
            lack = f"no column with {what}; set --{kind}_column to one, or add it"
            raise describe_lack(label, schema.names, lack)
        chosen[kind] = used
    single = {f"{kind}_column": next(iter(chosen[kind]), None) for kind in ("image", "id", "class")}
    return {**single, "caption_columns": chosen["caption"]}, notes


def _holds(what: str, type_: pa.DataType) -> bool:
    """Whether a column of that type can hold images, captions, ids or classes."""
    if what == "images" and pa.types.is_struct(type_):
        return any(type_.field(n).name in ("bytes", "path") for n in range(type_.num_fields))
    if what in ("ids", "classes") and pa.types.is_integer(type_):
        return True
    if (what == "captions" and is_list(type_)) or pa.types.is_dictionary(type_):
        type_ = type_.value_type
    kind = str(type_).partition("[")[0]  # without the width of fixed_size_binary[9]
    if what not in ("ids", "classes") and kind in BINARY:
        return True
    return kind in ("string", "large_string", "string_view", "null")


def describe_lack(label: str, names: Sequence[str], what: str) -> ValueError:
    """An error for a table that lacks something; it lists the columns that exist."""
    present = ", ".join(f"'{name}'" for name in names)
    return ValueError(f"{label}: {what}; it has {line(present, 300) or 'none'}")


@contextmanager
def name_faults(path: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions into one line that names the file, or the cache if that cannot be written."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except kinds as error:
        cause, cache = error.__cause__ or error, index_folder()
        if isinstance(cause, OSError) and Path(str(cause.filename)).is_relative_to(cache):
            raise explain_unwritable(cache, cause) from error
        raise ValueError(f"{path}: cannot be read ({line(str(cause))})") from error


def list_captions(record: Any, keys: Sequence[str] = ()) -> list[bytes]:
    """The texts of a JSON object under these keys, or else under the likeliest usual one."""
    record = record if isinstance(record, dict) else {}
    present = {key.lower(): key for key in reversed(record)}
    usual = [present[key] for key in CAPTION_COLUMNS if key in present][:1]
    values = (record.get(key) for key in keys or usual)
    texts = chain.from_iterable(v if isinstance(v, list) else [v] for v in values)
    return [text.encode("utf-8", "surrogatepass") for text in texts if isinstance(text, str)]


def _index_texts(
    paths: Sequence[str], data: DataConfig, facts: dict[str, Any]
) -> Iterator[pa.RecordBatch]:
    """The used columns of CSV, TSV and JSON Lines files, in batches."""
    facts["left_out"], facts["bad_lines"] = [], []
    columns: dict[str, Any] = {}
    for path in paths:
        shown, used = without_secrets(path), 0
        left_out = LeftOut(shown, {NOT_UTF8: TO_UTF8})
        with name_faults(shown, *UNREADABLE):
            names, rows = read_rows(path, left_out)
            if not names and left_out.counts:
                raise ValueError(f"{left_out.notes[0]}; nothing else is in it")
            if not columns:
                schema = pa.schema([(name, pa.string()) for name in names])
                columns, facts["notes"] = choose_columns(shown, schema, data)
            single = [columns[f"{which}_column"] for which in ("image", "id", "class")]
            captions = columns["caption_columns"]
            for name in filter(None, [*single, *captions]):
                if name not in names:
                    first = without_secrets(paths[0])
                    raise describe_lack(shown, names, f"no column '{name}', which {first} has")
            fields = [pa.field(name, pa.string()) for name in ("image", "sample_id", "class")]
            schema = pa.schema([f for f, name in zip(fields, single, strict=True) if name])
            if captions:
                schema = schema.append(ROWS.field("caption"))
            if len(captions) > 1:
                schema, facts["caption_columns"] = schema.append(CAPTION_OF), captions
            numbers = [names.index(name) for name in single if name], [*map(names.index, captions)]
            for batch in batch_rows((_pick_cells(cells, *numbers) for cells in rows), schema):
                used += batch.num_rows
                yield batch
        facts["left_out"] += left_out.notes
        if left := left_out.counts.total():
            facts["left_out"].append(f"{shown}: {used:,} of {used + left:,} rows are used")
        for number, are, way_out in (
            (left_out.counts[NOT_UTF8], "are not UTF-8", TO_UTF8),
            (left_out.surplus, "have too many fields", "quote the captions, or use tabs"),
        ):
            bad = {"file": shown, "lines": number, "of": used + left}
            facts["bad_lines"].append({**bad, "are": are, "way_out": way_out})


def _pick_cells(cells: list[Cell], single: list[int], captions: list[int]) -> list[Any]:
    """The cells of the columns with one text, and the captions of all columns with captions; where
    there are several, the number of each one's column too."""
    row: list[Any] = [cells[n] if isinstance(cells[n], str) else None for n in single]
    lists = [cell if isinstance(cell, list) else [cell] for cell in (cells[n] for n in captions)]
    if len(lists) < 2:
        return [*row, *lists]
    numbers = [number for number, own in enumerate(lists) for _ in own]
    return [*row, [*chain.from_iterable(lists)], numbers]


def list_suffixes(path: str) -> list[str]:
    file = PurePath(path.partition("?")[0] if is_url(path) else path)
    return [suffix.lower() for suffix in file.suffixes]


class LeftOut:
    """Counts what is left out of a source, by reason, with an example and the first lines."""

    def __init__(self, path: str, advice: Mapping[str, str] | None = None) -> None:
        # `advice` says what to do, by reason.
        self.path, self.advice, self.counts = path, advice or {}, Counter[str]()
        self.examples: dict[str, str] = {}
        self.lines: dict[str, list[str]] = defaultdict(list)
        self.surplus = 0  # lines with more fields than the header

    def add(self, what: str, example: str, number: int = 0) -> None:
        self.counts[what] += 1
        if what == NOT_UTF8:  # mostly that of Windows; lone surrogates would say less
            example = example.encode("utf-8", "surrogateescape").decode("cp1252", "replace")
        self.examples.setdefault(what, f"'{line(example, 60)}'")
        if number and self.counts[what] <= 6:
            self.lines[what].append(str(number) if self.counts[what] < 6 else "...")

    @property
    def notes(self) -> list[str]:
        numbers = {what: f"line {', '.join(lines)}: " for what, lines in self.lines.items()}
        return [
            f"{self.path}: left out {self.counts[what]} {what} ({numbers.get(what, '')}{example})"
            + (f"; {self.advice[what]}" if what in self.advice else "")
            for what, example in self.examples.items()
        ]


def read_lines(path: str) -> Iterator[str]:
    """The lines of a text file, or their starts; what is not UTF-8 comes as lone surrogates."""
    unpack = COMPRESSED.get(["", *list_suffixes(path)][-1], lambda file: file)
    with open_file(path) as raw, unpack(raw) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="\n")
        size = 0 if is_url(path) else Path(path).stat().st_size
        progress = Progress(f"read {path}", size, quiet=True)
        for number, read in enumerate(iter(partial(text.readline, MAX_LINE), ""), 1):
            if size and number % SHOWN_LINES == 0:
                progress.update(min(raw.tell(), size - 1))
            yield read
            while len(read) >= MAX_LINE and not read.endswith("\n"):
                read = text.readline(MAX_LINE)
        progress.update(size)


def describe_fault(text: str) -> str:
    """Why a line cannot be used; empty if it can."""
    if len(text) >= MAX_LINE:
        return "lines of more than a megabyte"
    if "\0" in text:
        return "lines with a zero byte"
    try:
        text.encode()
    except UnicodeEncodeError:
        return NOT_UTF8
    return ""


def read_rows(path: str, left_out: LeftOut) -> tuple[list[str], Iterator[list[Any]]]:
    """The names of columns, and the good rows of a CSV, TSV or JSON Lines file."""
    read = read_json if {".jsonl", ".ndjson"} & {*list_suffixes(path)} else read_csv
    return read(path, read_lines(path), left_out)


def read_texts(path: str) -> tuple[list[str], list[str]]:
    """The different captions of a text file, one a line, or of a table in CSV, TSV or JSON Lines;
    and notes on lines that are left out. Raises `ValueError` if there is none."""
    left_out, names = LeftOut(path, {NOT_UTF8: TO_UTF8}), [*CAPTION_COLUMNS[:1]]
    with name_faults(path, *UNREADABLE, UnicodeDecodeError):
        if {*TEXT_SUFFIXES} & {*list_suffixes(path)}:
            names, rows = read_rows(path, left_out)
        else:
            rows = ([text] for text in Path(path).read_text("utf-8-sig").splitlines())
        used = [names.index(name) for name in CAPTION_COLUMNS if name in names]
        if not used:
            raise describe_lack(path, names, "no column with captions; call it caption")
        cells = [row[used[0]] for row in rows]
    texts = chain.from_iterable(cell if isinstance(cell, list) else [cell] for cell in cells)
    if not (captions := [*dict.fromkeys(clean_captions(texts, needed=False))]):
        raise ValueError(f"{path}: holds no caption; write one a line")
    return captions, left_out.notes


def read_csv(
    path: str, lines: Iterator[str], left_out: LeftOut
) -> tuple[list[str], Iterator[list[Any]]]:
    """The header and the rows of a CSV or TSV file; the separator is the one in the header."""
    number, header = next(((n, text) for n, text in enumerate(lines, 1) if text.strip()), (0, ""))
    if len(header) > LONGEST_HEADER:
        raise ValueError(
            f"{path}: its first line is too long for a header; is this a table, with a row a line?"
        )
    if describe_fault(header):
        raise ValueError(f"{path}: its header is not UTF-8 text; {TO_UTF8}")
    usual = "\t" if ".tsv" in list_suffixes(path) else ","
    separator = next((s for s in (usual, "\t", ",", ";", "|") if s in header), usual)
    names = next(csv.reader([header], delimiter=separator), [])
    return names, _read_csv_rows(lines, number + 1, separator, len(names), left_out)


def _read_csv_rows(
    lines: Iterator[str], number: int, separator: str, width: int, left_out: LeftOut
) -> Iterator[list[Any]]:
    """The good rows. `number` is that of the first line."""
    ahead: deque[str] = deque()
    while text := ahead.popleft() if ahead else next(lines, ""):
        row, more = text.rstrip("\r\n").split(separator), 0
        what = "lines with another number of fields than the header"
        if '"' in text:
            ahead.extend(islice(lines, MAX_QUOTED_LINES - 1 - len(ahead)))
            row, more = _parse_quoted_row([text, *ahead], separator, width)
            what = what if row else "lines with an open quote"
        text += "".join(ahead.popleft() for _ in range(more))
        fault = describe_fault(text)
        if len(row) == width and not fault:
            yield row
        elif text.strip():
            left_out.add(fault or what, text, number)
            left_out.surplus += not fault and len(row) > width
        number += 1 + more


def _parse_quoted_row(lines: list[str], separator: str, width: int) -> tuple[list[str], int]:
    """The fields of the first row (none: a quote is left open), and how many more lines it has."""
    readers = [csv.reader(lines, delimiter=separator, strict=True)]
    if lines[0].count('"') % 2 == 0:
        # Text after a closing quote, as in `"Seven" (1995)`, is kept.
        readers.append(csv.reader(lines[:1], delimiter=separator))
    for reader in readers:
        with suppress(csv.Error):
            row = next(reader)
            if len(row) == width or reader.line_num == 1:
                return row, reader.line_num - 1
    return [], 0


def read_json(
    path: str, lines: Iterator[str], left_out: LeftOut
) -> tuple[list[str], Iterator[list[Any]]]:
    """The names in the first records of a JSON Lines file, and the values that all have there."""
    records = _read_records(lines, left_out)
    head = list(islice(records, 1000))
    names = list(dict.fromkeys(chain.from_iterable(head)))
    return names, ([record.get(name) for name in names] for record in chain(head, records))


def _read_records(lines: Iterator[str], left_out: LeftOut) -> Iterator[dict[str, Cell]]:
    """The values of each record that are texts, whole numbers or lists of these, as texts."""
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
            texts = {name: _as_text(value) for name, value in record.items()}
        except (ValueError, AttributeError, RecursionError):
            left_out.add(describe_fault(text) or "lines that are no JSON object", text, number)
            continue
        used = {name: value for name, value in texts.items() if value is not None}
        escaped = chain.from_iterable(used.values() if "\\u" in text else ())
        if fault := describe_fault(text) or describe_fault("".join(escaped)):
            left_out.add(fault, text, number)
        elif record:
            yield used
        else:
            left_out.add("lines with an empty object", text, number)


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [text for text in map(_as_text, value) if isinstance(text, str)]
    is_text = isinstance(value, (str, int)) and not isinstance(value, bool)
    return str(value) if is_text else None


class ArrowIndex:
    """A memory-mapped `table`, with `facts` about its source; pickled as its path.

    A file beside it has these facts and a checksum of each batch of rows. So that an index of any
    size opens at once, call `check` before you use rows of the table. Raises `OSError` if there is
    no such index, and `ValueError` if it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.facts = path, read_sealed(path.with_suffix(".json"))
        frame, self._checksums = self.facts.pop("checksums", (None, ()))  # none in indexes of 1.0
        try:
            self.table = read_table(path)
            is_intact = frame in (None, frame_checksum(self.table))
        except pa.ArrowException:  # not all of them are a `ValueError`
            is_intact = False
        if not is_intact:
            raise ValueError(f"{path}: damaged (not what was written: its checksum differs)")
        self._batches = self.table.to_batches()
        self._ends = list(accumulate(map(len, self._batches)))
        self._unchecked = set(range(len(self._checksums)))
        self.notes = [*self.facts.get("notes", ()), *self.facts.get("left_out", ())]

    def check(self, row: int | None = None) -> None:
        """Compare the checksum of the batch that holds a row, or of all, once; raises if wrong."""
        if not self._unchecked:
            return
        numbers = {*self._unchecked} if row is None else {bisect_right(self._ends, row)}
        for number in numbers & self._unchecked:
            if batch_checksum(self._batches[number]) != self._checksums[number]:
                end, size = self._ends[number], len(self._batches[number])
                raise ValueError(
                    f"{self.path}: damaged (the checksum of rows {end - size} to {end - 1} "
                    "differs); delete it, and it is built again"
                )
            self._unchecked.discard(number)

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return ArrowIndex, (self.path,)


def read_table(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def frame_checksum(table: pa.Table) -> int:
    """CRC-32 of what all batches depend on: columns, lengths, and the values of dictionaries."""
    lengths = [len(batch) for batch in table.to_batches()]
    checksum = zlib.crc32(f"{table.schema} {lengths}".encode())
    for column in table.columns:
        if pa.types.is_dictionary(column.type) and column.num_chunks:
            checksum = buffers_checksum(column.chunk(0).dictionary, checksum)
    return checksum


def batch_checksum(batch: pa.RecordBatch) -> int:
    checksum = 0
    for column in batch.columns:
        checksum = buffers_checksum(column, checksum)
    return checksum


def buffers_checksum(array: pa.Array, checksum: int) -> int:
    """CRC-32 of an array's bytes, and of the numbers that say how to read them."""
    parts = [array]
    while pa.types.is_list(parts[-1].type):
        parts.append(parts[-1].values)
    facts = [(str(part.type), len(part), part.null_count, part.offset) for part in parts]
    checksum = zlib.crc32(repr(facts).encode(), checksum)
    for buffer in array.buffers():
        checksum = zlib.crc32(b"" if buffer is None else buffer, checksum)
    return checksum


def batch_rows(rows: Iterable[Sequence[Any]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows of that schema, some thousands at a time."""
    left = iter(rows)
    while held := list(islice(left, BATCH_ROWS)):
        columns = zip(zip(*held, strict=True), schema, strict=True)
        arrays = [pa.array(values, field.type) for values, field in columns]
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def build_index(key: str, build: Build, *, folder: Path, label: str, way_out: str) -> ArrowIndex:
    """Open the index of that key; one process builds it if there is none, or half of one.

    `build` yields batches, and adds facts to the dictionary that it is given: `notes`, and notes
    of what is `left_out`. Raises `ValueError` if no batch comes, or the folder cannot be written.
    """
    path = folder / f"{key}.arrow"
    facts: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        return ArrowIndex(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with in_turn(path):
            with suppress(OSError, ValueError):
                return ArrowIndex(path)
            with replacing(path) as scratch:
                parts = iter(build(facts))
                first = next(parts, None)
                if first is None:
                    what = next(iter(facts.get("left_out", ())), f"{label}: holds no sample")
                    raise ValueError(f"{what}; no pair is left: {way_out}")
                with pa.ipc.new_file(str(scratch), first.schema) as writer:
                    for batch in chain([first], parts):
                        writer.write_batch(batch)
                table = read_table(scratch)
                batches = [batch_checksum(batch) for batch in table.to_batches()]
                facts["checksums"] = frame_checksum(table), batches
                del table
                write_atomically(path.with_suffix(".json"), to_json(seal(facts)))
    except OSError as error:
        raise explain_unwritable(folder, error) from error
    return ArrowIndex(path)
