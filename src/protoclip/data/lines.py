"""The lines of CSV, TSV and JSON Lines files as rows: those left out are counted and named."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import shlex
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, count, islice
from pathlib import Path, PurePath
from typing import Any

from protoclip.data.access import is_url, open_file
from protoclip.progress import Progress
from protoclip.terminal import line

COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
LONGEST_HEADER = 100_000  # characters
FIRST_LINES = 100  # among which a header is looked for
# A first line that names the separator for Excel, and belongs to no table.
SEPARATOR_LINE = re.compile(r'"?sep=([,;\t|])"?', re.IGNORECASE)
TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
# A longer line, or a quoted field of more lines, comes from a quote that was left open.
MAX_LINE, MAX_QUOTED_LINES = 1 << 20, 100
csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
MAX_EMPTY_LINES = 1_000_000  # in a row
SHOWN_LINES = 1 << 16  # after as many, progress is shown
NOT_UTF8 = "lines that are not UTF-8"
# Bytes beyond ASCII in a row: usual in other alphabets, and hardly ever in Windows-1252.
NO_LATIN = re.compile(rb"[\x80-\xff]{4}")
Cell = str | list[str] | None


def suffixes_of(path: str) -> list[str]:
    file = PurePath(path.partition("?")[0] if is_url(path) else path)
    return [suffix.lower() for suffix in file.suffixes]


class LeftOut:
    """Counts what is left out of a source, by reason, with an example and the first lines."""

    def __init__(self, path: str) -> None:
        self.path, self.counts = path, Counter[str]()
        self.examples: dict[str, str] = {}
        self.lines: dict[str, list[str]] = defaultdict(list)
        self.advice: dict[str, str] = {}  # what to do, by reason
        self.to_utf8 = ""  # how the file becomes UTF-8, if a line is not
        self.surplus = 0  # lines with more fields than the header

    def add(self, what: str, example: str, number: int = 0) -> None:
        self.counts[what] += 1
        if what == NOT_UTF8:  # mostly that of Windows; lone surrogates would say less
            self.to_utf8 = self.to_utf8 or way_to_utf8(self.path, example)
            example = _encode(example).decode("cp1252", "replace")
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


@contextmanager
def lines_of(path: str) -> Iterator[Iterator[str]]:
    """The lines of a text file; bytes that are not UTF-8 come as lone surrogates."""
    unpack = COMPRESSED.get(suffixes_of(path)[-1], lambda file: file)
    with open_file(path) as raw, unpack(raw) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="\n")
        size = 0 if is_url(path) else Path(path).stat().st_size
        progress = Progress(f"read {path}", size)

        def show() -> None:
            if size:
                progress.update(min(raw.tell(), size - 1))

        yield _limit_lines(text, path, show)
        if progress.last_shown > progress.started:  # it took long enough to be shown
            progress.update(size)


def _limit_lines(text: io.TextIOWrapper, path: str, show: Callable[[], None]) -> Iterator[str]:
    """The lines; only the start of one that is too long."""
    empty = 0
    for number in count():
        if not (line := text.readline(MAX_LINE)):
            return
        empty = 0 if line.strip() else empty + 1
        if empty > MAX_EMPTY_LINES:
            raise ValueError(
                f"{path}: more than {MAX_EMPTY_LINES:,} empty lines in a row; is this a table, "
                "with a row a line?"
            )
        if number % SHOWN_LINES == SHOWN_LINES - 1:
            show()
        yield line
        while len(line) >= MAX_LINE and not line.endswith("\n"):
            line = text.readline(MAX_LINE)


def fault_of(text: str) -> str:
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


def _encode(text: str) -> bytes:
    """The bytes of a line as they are in the file."""
    return text.encode("utf-8", "surrogateescape")


def way_to_utf8(path: str, text: str) -> str:
    """How a file becomes UTF-8, judged by a line of it that is not."""
    encoded = _encode(text)
    is_plain = not is_url(path) and suffixes_of(path)[-1] not in COMPRESSED
    if is_plain and b"\0" not in encoded and not NO_LATIN.search(encoded):
        with suppress(UnicodeDecodeError):
            encoded.decode("cp1252")
            command = f"iconv -f cp1252 -t utf-8 {shlex.quote(path)} > NEW"
            return f"convert it (it looks like Windows-1252: {command})"
    return "save it as UTF-8"


def read_csv(
    path: str, lines: Iterator[str], left_out: LeftOut
) -> tuple[list[str], Iterator[list[Cell]]]:
    """The header and the rows of a CSV or TSV file; the separator is the one in the header."""
    left_out.advice[NOT_UTF8] = "save it as UTF-8"  # spreadsheets often write another encoding
    number, header, named = find_header(lines)
    if len(header) > LONGEST_HEADER:
        raise ValueError(
            f"{path}: its first line is too long for a header; is this a table, with a row a line?"
        )
    if fault_of(header):
        raise ValueError(f"{path}: its header is not UTF-8 text; {way_to_utf8(path, header)}")
    separator, names = read_header(header, suffixes_of(path), named)
    return names, _csv_rows(lines, number + 1, separator, len(names), left_out)


def _csv_rows(
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
        fault = fault_of(text)
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
) -> tuple[list[str], Iterator[list[Cell]]]:
    """The names in the first records of a JSON Lines file, and the values that all have there."""
    records = _json_records(lines, left_out)
    head = list(islice(records, 1000))
    names = list(dict.fromkeys(chain.from_iterable(head)))
    return names, ([record.get(name) for name in names] for record in chain(head, records))


def _json_records(lines: Iterator[str], left_out: LeftOut) -> Iterator[dict[str, str | list[str]]]:
    """The values of each record that are texts, whole numbers or lists of these, as texts."""
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
            texts = {name: _json_texts(value) for name, value in record.items()}
        except (ValueError, AttributeError, RecursionError):
            left_out.add(fault_of(text) or "lines that are no JSON object", text, number)
            continue
        used = {name: value for name, value in texts.items() if value is not None}
        escaped = chain.from_iterable(used.values() if "\\u" in text else ())
        if fault := fault_of(text) or fault_of("".join(escaped)):
            left_out.add(fault, text, number)
        elif record:
            yield used
        else:
            left_out.add("lines with an empty object", text, number)


def _json_texts(value: Any) -> Cell:
    if isinstance(value, list):
        return [text for text in map(_json_texts, value) if isinstance(text, str)]
    is_text = isinstance(value, (str, int)) and not isinstance(value, bool)
    return str(value) if is_text else None


def find_header(lines: Iterable[str]) -> tuple[int, str, str]:
    """The number of a header's line, the header, and the separator that a line before it names.

    Such a line is `sep=;`. Without a header, they are 0 and two empty texts.
    """
    separator = ""
    for number, text in enumerate(lines, 1):
        if not separator and (named := SEPARATOR_LINE.fullmatch(text.strip(" \r\n"))):
            separator = named[1]
        elif text.strip():
            return number, text, separator
    return 0, "", ""


def read_header(header: str, suffixes: Sequence[str], named: str = "") -> tuple[str, list[str]]:
    """The separator of a CSV or TSV file, and the names of its columns.

    The separator is the one that a line before the header named, or else one in the header.
    """
    usual = "\t" if ".tsv" in suffixes else ","
    separator = named or next((s for s in (usual, "\t", ",", ";") if s in header), usual)
    return separator, next(csv.reader([header], delimiter=separator), [])
