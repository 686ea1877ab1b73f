"""Columns that a table lacks, found in milliseconds: commands look here before slow imports.

What the columns hold is seen in `data/tables.py`. Standard library only, but for Parquet.
"""

import bz2
import csv
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from protoclip.files import open_local
from protoclip.terminal import line

COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# Tables of an image folder, the first of which counts.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
LONGEST_HEADER = 100_000  # characters
FIRST_LINES = 100  # among which a header is looked for
# A first line that names the separator for Excel, and belongs to no table.
SEPARATOR_LINE = re.compile(r'"?sep=([,;\t|])"?', re.IGNORECASE)


def require_columns(path: str, names: Sequence[str]) -> None:
    """Refuse columns that a local CSV, TSV or Parquet file, or that of a folder, lacks.

    All else passes, and so does what cannot be read: its reader says more.
    """
    table = table_at(Path(path)) if names else None
    present = [] if table is None else columns_of(table)
    if present and (lacking := [name for name in names if name not in present]):
        raise missing(str(table), present, f"no column '{lacking[0]}'")


def missing(label: str, names: Sequence[str], what: str) -> ValueError:
    """What to say of a table that lacks something, given the columns that it has."""
    present = ", ".join(f"'{name}'" for name in names)
    return ValueError(f"{label}: {what}; it has {line(present, 300) or 'none'}")


def table_at(path: Path) -> Path | None:
    """A file, or the one of a folder that its reader looks at first, if it may be such a table."""
    with suppress(OSError, ValueError):  # such as a name that no file can have
        if not path.is_dir():
            return path if path.is_file() else None
        files = [path / name for name in METADATA if (path / name).exists()]
        files = files or sorted(path.glob("*.parquet"))
        others = [path / "dataset_dict.json", path / "state.json", *path.glob("*.tar")]
        if files and not any(other.exists() for other in others):
            return files[0]
    return None


def columns_of(table: Path) -> list[str]:
    """The names of a table's columns; none if its form has no header of them that can be read."""
    suffixes = [suffix.lower() for suffix in table.suffixes]
    *_, before, last = ("", "", *suffixes)
    with suppress(OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, csv.Error):
        if last == ".parquet":
            from pyarrow import parquet

            return [*parquet.read_schema(table).names]
        if (before if last in COMPRESSED else last) in (".csv", ".tsv"):
            unpack = COMPRESSED.get(last, lambda file: file)
            with open_local(table) as raw, unpack(raw) as file:
                text = io.TextIOWrapper(file, "utf-8-sig", newline="\n")
                lines = iter(lambda: text.readline(LONGEST_HEADER), "")
                _, header, named = find_header(islice(lines, FIRST_LINES))
            is_whole = len(header) < LONGEST_HEADER and "\0" not in header
            return read_header(header, suffixes, named)[1] if is_whole else []
    return []


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
