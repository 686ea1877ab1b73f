"""Inputs that are nearly right: valid ones with a few changes, so that they get far."""

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from PIL import Image

from testing import tiny_pairs

# No host is looked up and nothing public is asked: such a URL may be read, and would connect.
TEXTS = (
    *("", " ", "a", "-", "--", "0", "-1", "1e999", "NaN", "inf", "null", "true", "é", "\U0001d54f"),
    *("a red square", "x" * 300, "[red]red[/red]", "[/]", "[", "]", "{c}", "{", "{0}", "%s", "\\"),
    *('"', "'", '"open', "a\tb", "a\nb", "a\r\nb", "a,b;c", "\ufeff", "<script>alert(1)</script>"),
    *("\x07", "\x1b]0;title\x07", "\x1b[2J", "\x9b2J", "\u202eturned", "\u2066in"),
    *("a\u2028b", "\x85"),
    *("..", "../..", "../../etc/passwd", "/etc/passwd", "/dev/zero", "/proc/self/mem", "~", "a/b"),
    *("pipe:touch ran", "http://127.0.0.1:9/a.jpg", "https://[::1]/a.jpg", "file:///etc/passwd"),
    *("ftp://127.0.0.1/a", "reference://x", "s4://a::b", "0.png", "1.png", "emoji", "none.tsv"),
)
text = st.one_of(
    st.sampled_from(TEXTS),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=12),
    st.tuples(st.sampled_from(TEXTS), st.sampled_from(TEXTS)).map("".join),
)
# Small, or too large for anything: what lies between may take all memory, and all time.
numbers = st.one_of(
    st.integers(-3, 64),
    st.sampled_from([2**62, 2**63, 2**64, -(2**63), 10**30]),
    # Commands let the processor flush denormal numbers to zero, which Hypothesis's own refuse.
    floats := st.sampled_from(
        [0.0, -0.0, 0.1, 0.5, 1.0, -1.0, 2.5, 1e-30, 1e9, 1e308, float("inf"), float("nan")]
    ),
)
scalars = st.one_of(text, numbers, st.booleans())
json_values = st.recursive(
    st.none() | scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
# TOML knows no null, and no number of more than 64 bits.
toml_values = st.recursive(
    text | st.integers(-3, 64) | st.sampled_from([2**62, -(2**63)]) | floats | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
PIECES = [
    *(piece.encode() for piece in TEXTS),
    *(b"\0", b"\0" * 512, b"\xff", b"\xed\xa0\x80", b"\xc3", b"\n", b"\r", b"\t", b",", b"\n\n"),
    *(b"{}", b"[]", b"[" * 300, b'{"a":' * 300, b"\xff\xd8", b"\x89PNG", b"\x1f\x8b", b"PAR1"),
]


@st.composite
def mutated(draw: st.DrawFn, whole: bytes, *, most: int = 4) -> bytes:
    """Bytes of which a few pieces are replaced, removed or added; often the end is cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, most))):
        first = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([0, 1, 1, 2, 8, 60, 512, len(data)]))
        data[first : first + length] = draw(st.sampled_from(PIECES) | st.binary(max_size=6))
    return bytes(data)


def paths_of(tree: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to each value of a tree."""
    inner: Sequence[tuple[Any, Any]] = ()
    if isinstance(tree, Mapping):
        inner = [*tree.items()]
    elif isinstance(tree, list):
        inner = [*enumerate(tree[:3])]
    found = [before] if before else []
    for key, value in inner:
        found += paths_of(value, (*before, key))
    return found


@st.composite
def edited(
    draw: st.DrawFn, tree: Any, values: st.SearchStrategy[Any] = json_values, *, most: int = 3
) -> Any:
    """A tree of which a few values are replaced, removed or added."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, most))):
        paths = paths_of(tree)
        if not paths:
            return draw(values)
        *way, last = draw(st.sampled_from(paths))
        place = tree
        for key in way:
            place = place[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if how == "remove":
            del place[last]
        elif how == "add" and isinstance(place, dict):
            place[draw(text)] = draw(values)
        else:
            place[last] = draw(values)
    return tree


# Tables

IMAGES: list[bytes] = tiny_pairs(8).column("image").to_pylist()
COLUMNS = ("image", "filepath", "caption", "title", "text", "sample_id", "key", "label", "url")


@st.composite
def table(draw: st.DrawFn) -> tuple[str, bytes]:
    """The suffix and the bytes of a table whose images are `0.png` to `7.png` beside it."""
    names = draw(st.sampled_from([("image", "caption"), ("filepath", "title", "key")]))
    names = draw(st.just(names) | st.lists(st.sampled_from(COLUMNS) | text, max_size=4))
    number = draw(st.integers(0, 8))
    cells = [
        [f"{row}.png", f"a caption {row}", f"id{row}", "x"][: len(names)] for row in range(number)
    ]
    for _ in range(draw(st.integers(0, 4)) if cells and names else 0):
        row = cells[draw(st.integers(0, number - 1))]
        if row:
            row[draw(st.integers(0, len(row) - 1))] = draw(text)
    suffix = draw(st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet", ".json", ".arrow"]))
    if suffix in (".csv", ".tsv"):
        out = io.StringIO()
        writer = csv.writer(out, delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
        if draw(st.booleans()):
            writer.writerows([names, *cells])
        else:
            joint = "\t" if suffix == ".tsv" else ","
            out.write("\n".join(joint.join(row) for row in [names, *cells]))
        data = out.getvalue().encode()
    elif suffix in (".jsonl", ".json"):
        records: list[Any] = [dict(zip(names, row, strict=False)) for row in cells]
        if draw(st.booleans()) and records:
            records = draw(edited(records))
        if isinstance(records, list):
            data = "\n".join(json.dumps(record) for record in records).encode()
        else:
            data = json.dumps(records).encode()
    else:
        data = draw(arrow_table(suffix, cells, names))
    if draw(st.booleans()):
        data = draw(mutated(data))
    if suffix in (".csv", ".tsv", ".jsonl") and draw(st.integers(0, 4)) == 0:
        packed = gzip.compress(data, mtime=0)
        suffix, data = f"{suffix}.gz", draw(st.just(packed) | mutated(packed, most=1))
    return suffix, data


@st.composite
def arrow_table(
    draw: st.DrawFn, suffix: str, cells: list[list[str]], names: Sequence[str]
) -> bytes:
    """A table with typed columns, as Parquet or as an Arrow stream."""
    columns: list[pa.Array] = []
    for place, _ in enumerate(names):
        values = [row[place] if place < len(row) else None for row in cells]
        column = pa.array(values, pa.string())
        kind = draw(
            st.sampled_from(["text", "text", "image", "struct", "list", "int", "null", "dict"])
        )
        if kind == "image":
            column = pa.array([IMAGES[n % 8] for n in range(len(cells))], pa.binary())
        elif kind == "struct":
            rows = [{"bytes": IMAGES[n % 8], "path": v} for n, v in enumerate(values)]
            column = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        elif kind == "list":
            column = pa.array([[v, None, v] for v in values], pa.list_(pa.string()))
        elif kind == "int":
            column = pa.array(range(len(cells)), pa.int64())
        elif kind == "null":
            column = pa.nulls(len(cells))
        elif kind == "dict":
            column = column.dictionary_encode()
        columns.append(column)
    found = pa.Table.from_arrays(columns, names=[*names])
    out = pa.BufferOutputStream()
    if suffix == ".parquet":
        pq.write_table(found, out)
    else:
        with pa.ipc.new_stream(out, found.schema) as writer:
            writer.write_table(found)
    return out.getvalue().to_pybytes()


@st.composite
def image(draw: st.DrawFn) -> bytes:
    """An encoded image, most often damaged."""
    kind = draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    mode = draw(st.sampled_from(["RGB", "L", "P", "RGBA", "CMYK", "I;16", "1"]))
    out = io.BytesIO()
    try:
        Image.new(mode, draw(st.sampled_from([(24, 24), (1, 1), (1, 300), (300, 2)]))).save(
            out, kind
        )
    except (OSError, ValueError):  # the format has no such mode
        return draw(st.binary(max_size=60))
    return draw(mutated(out.getvalue()) | st.just(out.getvalue()))


# Tar shards

MEMBERS = (
    *("0.png", "0.txt", "0.json", "1.png", "1.txt", "1.cls"),
    *("./a/2.jpg", "a/2.txt", "../3.png"),
)
KINDS = (tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)


@st.composite
def tar(draw: st.DrawFn) -> bytes:
    """A tar of samples, some of whose members are odd, and some of whose bytes."""
    out = io.BytesIO()
    form = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:

        def add(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> None:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(data)
            if kind != tarfile.REGTYPE:
                member.linkname, member.size = "/etc/passwd", 0
            try:
                archive.addfile(member, io.BytesIO(data))
            except (ValueError, UnicodeError):  # the form of the tar cannot hold the name
                return

        for number in range(draw(st.integers(0, 4))):
            add(f"s{number}.png", IMAGES[number])
            add(f"s{number}.txt", f"a caption {number}".encode())
        for _ in range(draw(st.integers(0, 4))):
            name = draw(st.sampled_from(MEMBERS) | text)
            data = draw(
                st.sampled_from([IMAGES[0], b"a caption", b""])
                | json_values.map(lambda value: json.dumps(value).encode())
                | st.sampled_from(PIECES)
            )
            add(name, data, draw(st.sampled_from(KINDS)) if draw(st.booleans()) else KINDS[0])
    data = out.getvalue()
    return draw(mutated(data)) if draw(st.booleans()) else data
