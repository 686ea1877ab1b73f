"""CSV, TSV, JSON Lines, Parquet and Arrow tables of any size, as batches of the wanted columns.

Memory stays bounded whatever the file holds. Text of CSV, TSV and JSON Lines is handed on as bytes,
so that one row that is not UTF-8 stops nothing. Lines of CSV and TSV whose quote is left open are
taken out before the rows are parsed, or they would swallow those that follow.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from protoclip.data.index import BATCH_BYTES, BATCH_ROWS
from protoclip.data.locations import (
    Access,
    is_url,
    open_file,
    visible,
)

# Bytes at a file's start that tell what it is, and that hold a table's header.
HEAD_BYTES = 1 << 16
# A row of more bytes, or a quoted field of more lines, is a quote that was left open.
LONGEST_ROW, MOST_LINES = 1 << 20, 100
# Numbers of lines that are told.
TOLD_LINES = 5
# Records of JSON Lines that tell the columns.
SAMPLED_RECORDS = 1000


@dataclass(kw_only=True)
class Skipped:
    """Rows of a file that were left out: how many, and what the first looks like."""

    count: int = 0
    example: str = ""
    open_quotes: int = 0
    lines: list[int] = field(default_factory=list)  # of open quotes, the first ones
    open_example: str = ""

    def add(self, text: str) -> None:
        self.count += 1
        self.example = self.example or line(text, 60)

    def add_open_quote(self, text: str, number: int) -> None:
        self.open_quotes += 1
        self.lines += [number] if len(self.lines) < TOLD_LINES else []
        self.open_example = self.open_example or line(text, 60)

    def notes(self, path: str) -> list[str]:
        found = []
        if self.count:
            found.append(
                f"{path}: rows left out that have not the header's columns: {self.count} "
                f"(first: '{self.example}')"
            )
        if self.open_quotes:
            more = ", ..." if self.open_quotes > len(self.lines) else ""
            found.append(
                f"{path}: lines left out whose quote is left open: {self.open_quotes} (line "
                f"{', '.join(map(str, self.lines))}{more}; first: '{self.open_example}')"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class Table:
    """A file's columns, and its rows on demand.

    Attributes:
        path: The file or URL.
        schema: Names and types. Of text formats the text is `string`, and comes as `binary`.
        batches: Rows of the named columns, in order; counts those it leaves out.
    """

    path: str
    schema: pa.Schema
    batches: Callable[[list[str], Skipped], Iterator[pa.RecordBatch]]


def open_table(path: str, access: Access) -> Table:
    """Look at a table's columns.

    Args:
        path: A file or URL; `.csv`, `.tsv` and `.jsonl` may be compressed.
        access: What the user allows.

    Raises:
        ValueError: No such file, of no known kind, or not what its suffix says.
    """
    suffix, packed = kind(path)
    opener = READERS.get(suffix)
    if opener is None or (packed and opener in (open_parquet, open_arrow)):
        raise ValueError(
            f"{path}: not a table that can be read; supported are {', '.join(READERS)}, and text "
            f"compressed as {', '.join(PACKED)}"
        )
    with faults(path):
        return opener(path, access)


def kind(path: str) -> tuple[str, bool]:
    """The suffix that names a file's format, and whether another says that it is compressed."""
    name = path.partition("?")[0] if is_url(path) else path
    suffixes = ["", *(suffix.lower() for suffix in PurePath(name).suffixes)]
    packed = suffixes[-1] in PACKED
    return suffixes[-2 if packed else -1], packed


def line(text: str, limit: int = 200) -> str:
    """A text on one line that any terminal can show, cut to a length."""
    text = visible(" ".join(text.encode("utf-8", "replace").decode().split()))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


@contextmanager
def faults(path: str) -> Iterator[None]:
    """What goes wrong with a file as one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UNREADABLE as error:
        if "straddling" in str(error):
            raise ValueError(
                f"{path}: a row is longer than {LONGEST_ROW} bytes; a quote may be left open, or "
                "the file holds no table"
            ) from None
        raise ValueError(f"{path}: cannot be read ({line(str(error))})") from error


@contextmanager
def unpacked(path: str, access: Access) -> Iterator[Any]:
    with open_file(path, access) as file:
        suffix = PurePath(path.partition("?")[0] if is_url(path) else path).suffix.lower()
        yield PACKED[suffix](file) if suffix in PACKED else file


def text_head(path: str, access: Access) -> str:
    """The start of a text file.

    Raises:
        ValueError: It is empty or no text.
    """
    with unpacked(path, access) as file:
        head = file.read(HEAD_BYTES)
    if not head:
        raise ValueError(f"{path}: is empty")
    for magic, suffix in MAGIC.items():
        if head.startswith(magic):
            raise ValueError(f"{path}: is not text but {suffix}; name it so")
    # A stray zero byte costs its row; other encodings and binary files have many.
    if 8 * head.count(0) > len(head) or head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path}: is not UTF-8 text; save it as UTF-8")
    return str(head.decode("utf-8-sig", "surrogateescape"))


def open_delimited(path: str, access: Access) -> Table:
    """A CSV or TSV file; the separator is what the header shows: tab, comma or semicolon."""
    text = text_head(path, access).lstrip("\r\n")
    first = text.partition("\n")[0]
    usual = "\t" if kind(path)[0] == ".tsv" else ","
    separator = next((s for s in (usual, "\t", ",", ";") if s in first), usual)
    names = next((row for row in csv.reader(io.StringIO(text), delimiter=separator) if row), [])
    if any("\udc80" <= letter <= "\udcff" or ord(letter) < 9 for letter in "".join(names)):
        raise ValueError(f"{path}: its header is not UTF-8 text; save it as UTF-8")

    def batches(columns: list[str], skipped: Skipped) -> Iterator[pa.RecordBatch]:
        def leave_out(row: Any) -> str:
            skipped.add(row.text)
            return "skip"

        with faults(path), unpacked(path, access) as file:
            whole = without_open_quotes(file, separator.encode(), len(names), skipped)
            yield from pa.csv.open_csv(
                _Pieces(whole),
                read_options=pa.csv.ReadOptions(block_size=LONGEST_ROW, use_threads=False),
                parse_options=pa.csv.ParseOptions(
                    delimiter=separator, newlines_in_values=True, invalid_row_handler=leave_out
                ),
                convert_options=pa.csv.ConvertOptions(
                    include_columns=columns, column_types=dict.fromkeys(columns, pa.binary())
                ),
            )

    return Table(
        path=path, schema=pa.schema([(name, pa.string()) for name in names]), batches=batches
    )


def without_open_quotes(
    file: Any, separator: bytes, columns: int, skipped: Skipped
) -> Iterator[bytes]:
    """The bytes of a delimited file without the lines whose quote is left open.

    A quoted field may go on over several lines. It is taken for left open where it does not end
    within `MOST_LINES` lines and `LONGEST_ROW` bytes, where its end is followed by more than the
    end of a field, or where a line within it is a row of a tab-separated file.

    Args:
        file: The table's bytes.
        separator: Between fields.
        columns: Fields of the header.
        skipped: Counts the lines left out.
    """
    waiting: deque[bytes] = deque()  # lines read and not looked at
    whole: list[bytes] = []  # rows to be handed on
    number = 0  # of the line looked at
    header = True

    def fetch() -> bytes:
        block: bytes = file.read(LONGEST_ROW)
        return block + file.readline(LONGEST_ROW) if block else b""

    while True:
        if not waiting:
            yield b"".join(whole)
            whole.clear()
            block = fetch()
            if not block:
                return
            if b'"' not in block:
                number += block.count(b"\n")
                header = header and not block.strip()
                yield block
                continue
            waiting.extend(io.BytesIO(block))
        row = [waiting.popleft()]
        number += 1
        left_open = is_left_open(row[0], separator)
        while left_open and len(row) < MOST_LINES and sum(map(len, row)) < LONGEST_ROW:
            if not waiting:
                waiting.extend(io.BytesIO(fetch()))
            if not waiting:
                break
            row.append(waiting.popleft())
            left_open = is_left_open(row[-1], separator, inside=True)
            if left_open and separator == b"\t" and row[-1].count(separator) >= columns - 1:
                break
        if left_open is False or header:
            whole += row
            number += len(row) - 1
            header = header and not b"".join(row).strip()
        else:
            skipped.add_open_quote(row[0].decode("utf-8", "replace"), number)
            waiting.extendleft(reversed(row[1:]))


def is_left_open(text: bytes, separator: bytes, *, inside: bool = False) -> bool | None:
    """Whether a quoted field goes on after a line, or None where its end is no end of a field.

    Args:
        text: The line.
        separator: Between fields.
        inside: Whether the line begins in a quoted field.
    """
    if b'"' not in text:
        return inside
    place, first = 0, inside
    while True:
        if not inside:
            if place == 0 and text.startswith(b'"'):
                place = 1
            else:
                found = text.find(separator + b'"', place)
                if found < 0:
                    return False
                place = found + len(separator) + 1
        while (end := text.find(b'"', place)) >= 0 and text.startswith(b'"', end + 1):
            place = end + 2
        if end < 0:
            return True
        place = end + 1
        # On the line of its beginning a field may go on: Arrow, as others, takes all as its text.
        if first and not text.startswith((separator, b"\r", b"\n"), place) and place < len(text):
            return None
        inside = first = False


class _Pieces(io.RawIOBase):
    """Pieces of bytes as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces, self.rest = pieces, b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        assert size >= 0
        while not self.rest and (piece := next(self.pieces, None)) is not None:
            self.rest = piece
        found, self.rest = self.rest[:size], self.rest[size:]
        return found


def open_json_lines(path: str, access: Access) -> Table:
    """A file with a JSON object a line; the first thousand tell the columns."""
    text_head(path, access)
    with unpacked(path, access) as file:
        types: dict[str, pa.DataType] = {}
        for record in islice(json_records(file, Skipped()), SAMPLED_RECORDS):
            for name, value in record.items():
                if value is not None and name not in types:
                    types[name] = json_type(value)

    def batches(columns: list[str], skipped: Skipped) -> Iterator[pa.RecordBatch]:
        schema = pa.schema(
            [(c, pa.binary() if types[c] == pa.string() else types[c]) for c in columns]
        )
        with faults(path), unpacked(path, access) as file:
            records = json_records(file, skipped)
            while held := list(islice(records, BATCH_ROWS // 16)):
                rows = [
                    {c: json_value(record.get(c), schema.field(c).type) for c in columns}
                    for record in held
                ]
                yield pa.RecordBatch.from_pylist(rows, schema=schema)

    return Table(path=path, schema=pa.schema(list(types.items())), batches=batches)


def json_records(file: Iterable[bytes], skipped: Skipped) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file; what is none is counted."""
    for number, raw in enumerate(file):
        text = raw.decode("utf-8-sig" if number == 0 else "utf-8", "surrogateescape")
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            yield record
        else:
            skipped.add(text)


def json_type(value: Any) -> pa.DataType:
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return pa.string()
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return pa.list_(pa.binary())
    # Any type that is neither text nor a list of text: the column cannot be used.
    return pa.bool_()


def json_value(value: Any, type_: pa.DataType) -> bytes | list[bytes] | None:
    """A value as its column's type, or None where it is something else."""
    if pa.types.is_list(type_):
        value = [value] if isinstance(value, str) else value
        return [encode(v) for v in value if isinstance(v, str)] if isinstance(value, list) else None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return encode(value) if isinstance(value, str) else None


def encode(text: str) -> bytes:
    """The bytes a text came from, which need not be UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def open_parquet(path: str, access: Access) -> Table:
    """A Parquet file, read by parts of its row groups."""
    with open_file(path, access) as file:
        if file.read(4) != b"PAR1":
            raise ValueError(f"{path}: not a Parquet file, whatever its suffix says")
        parquet = pa.parquet.ParquetFile(file)
        schema, facts = parquet.schema_arrow, parquet.metadata
        groups = [facts.row_group(number) for number in range(facts.num_row_groups)]
        widest = max((g.total_byte_size / max(1, g.num_rows) for g in groups), default=1.0)
    # Reading holds several batches' bytes at a time.
    rows = int(min(BATCH_ROWS, max(1, BATCH_BYTES // 4 // max(1.0, widest))))

    def batches(columns: list[str], skipped: Skipped) -> Iterator[pa.RecordBatch]:
        with faults(path), open_file(path, access) as file:
            # A buffered stream reads a column page by page instead of a row group at once.
            parquet = pa.parquet.ParquetFile(file, buffer_size=LONGEST_ROW, pre_buffer=False)
            yield from parquet.iter_batches(rows, columns=columns, use_threads=False)

    return Table(path=path, schema=schema, batches=batches)


def open_arrow(path: str, access: Access) -> Table:
    """An Arrow IPC file or stream, as Hugging Face `datasets` writes them."""

    def reader(file: Any) -> Iterator[Any]:
        head = file.read(6)
        file.seek(0)
        if head == b"ARROW1":
            found = pa.ipc.open_file(file)
            yield found.schema
            yield from (found.get_batch(number) for number in range(found.num_record_batches))
        else:
            found = pa.ipc.open_stream(file)
            yield found.schema
            yield from found

    with open_file(path, access) as file:
        schema = next(reader(file))

    def batches(columns: list[str], skipped: Skipped) -> Iterator[pa.RecordBatch]:
        with faults(path), open_file(path, access) as file:
            yield from (batch.select(columns) for batch in islice(reader(file), 1, None))

    return Table(path=path, schema=schema, batches=batches)


READERS: dict[str, Callable[[str, Access], Table]] = {
    ".csv": open_delimited,
    ".tsv": open_delimited,
    ".jsonl": open_json_lines,
    ".parquet": open_parquet,
    ".arrow": open_arrow,
}
UNREADABLE = (
    *(pa.ArrowException, OSError, EOFError, ImportError),
    *(csv.Error, zlib.error, lzma.LZMAError),
)
PACKED: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MAGIC = {
    b"PAR1": "a Parquet file (.parquet)",
    b"ARROW1": "an Arrow file (.arrow)",
    b"\x1f\x8b": "compressed (.gz)",
    b"PK\x03\x04": "a zip archive",
}
