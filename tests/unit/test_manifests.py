"""Tables as pairs: every format gives the same rows, and every fault is named in one line."""

import csv
import gzip
import io
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from protoclip.data import index, manifests, tables
from protoclip.data.locations import Access
from protoclip.data.manifests import open_manifest
from protoclip.data.pairs import BadSample, ImageTextPairs

CAPTIONS = [
    "a red square",
    "ein Häuschen am Fluß",
    "一只猫, 两只狗",
    "собака у моста",
    "قطة على النافذة",
    "बिल्ली",
    "emoji 👩‍🚀 and a zero-width\u200bspace",
    'said "so", twice',
    "two\nlines",
    "a\ttab",
    "NULL",
    "'single', and ; a semicolon",
]
PATHS = [f"images/{n} ü.jpg" for n in range(len(CAPTIONS))]
KEYS = [f"key-{n}" for n in range(len(CAPTIONS))]


def delimited(separator: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator)
    writer.writerow(["filepath", "title", "key"])
    writer.writerows(zip(PATHS, CAPTIONS, KEYS, strict=True))
    return text.getvalue().encode()


def json_lines() -> bytes:
    rows = zip(PATHS, CAPTIONS, KEYS, strict=True)
    return b"\n".join(
        json.dumps({"filepath": p, "title": t, "key": k}, ensure_ascii=n % 2 == 0).encode()
        for n, (p, t, k) in enumerate(rows)
    )


def table() -> pa.Table:
    return pa.table({"filepath": PATHS, "title": CAPTIONS, "key": KEYS})


def parquet(content: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(content, sink, **options)
    return sink.getvalue()


def arrow(content: pa.Table, new: Callable[..., Any]) -> bytes:
    sink = io.BytesIO()
    with new(sink, content.schema) as writer:
        writer.write_table(content, max_chunksize=5)
    return sink.getvalue()


BOM = b"\xef\xbb\xbf"
FORMATS = {
    "pairs.csv": lambda: delimited(","),
    "bom.csv": lambda: BOM + delimited(","),
    "tabs.csv": lambda: delimited("\t"),
    "semicolons.csv": lambda: delimited(";"),
    "unix.csv": lambda: delimited(",").replace(b"\r\n", b"\n"),
    "blank.csv": lambda: b"\n\n" + delimited(",") + b"\n\n",
    "pairs.tsv": lambda: delimited("\t"),
    "PAIRS.TSV": lambda: delimited("\t"),
    "pairs.csv.gz": lambda: gzip.compress(delimited(",")),
    "pairs.tsv.gz": lambda: gzip.compress(delimited("\t")),
    "pairs.jsonl": json_lines,
    "bom.jsonl": lambda: BOM + json_lines(),
    "pairs.parquet": lambda: parquet(table()),
    "groups.parquet": lambda: parquet(table(), row_group_size=2, compression="zstd"),
    "stream.arrow": lambda: arrow(table(), pa.ipc.new_stream),
    "file.arrow": lambda: arrow(table(), pa.ipc.new_file),
}


@pytest.mark.parametrize("file", FORMATS)
@pytest.mark.parametrize("place", ["folder", "server", "bucket"])
def test_every_format_gives_the_same_rows(
    tmp_path: Path, file: str, place: str, bucket: str, serve: Callable[..., str]
) -> None:
    """Ids, captions in every script, quotes, newlines and tabs, and paths below the manifest's
    folder or URL come as they were written."""
    (tmp_path / file).write_bytes(FORMATS[file]())
    if place == "server":
        folder = serve("ranges", tmp_path)
    elif place == "bucket":
        folder = bucket
        fsspec.filesystem("s3").pipe(f"{folder}/{file}", FORMATS[file]())
    else:
        folder = str(tmp_path)
    access = Access(private_hosts=True)
    pairs = open_manifest(f"{folder}/{file}", cache=tmp_path / "cache", access=access)
    assert pairs.name == file
    assert list(pairs.sample_ids()) == KEYS
    assert [pairs.sample_captions(row) for row in range(len(pairs))] == [(c,) for c in CAPTIONS]
    assert [pairs.where(row) for row in range(len(pairs))] == [f"{folder}/{p}" for p in PATHS]
    assert pairs.index is not None
    assert pairs.index.facts == {"notes": []}


def opened(tmp_path: Path, content: bytes | pa.Table, file: str = "", **settings: Any) -> Any:
    """The manifest with that content: Parquet of a table, else CSV."""
    file = file or ("pairs.parquet" if isinstance(content, pa.Table) else "pairs.csv")
    data = parquet(content) if isinstance(content, pa.Table) else content
    (tmp_path / file).write_bytes(data)
    return open_manifest(str(tmp_path / file), cache=tmp_path / "cache", **settings)


def notes(pairs: ImageTextPairs) -> list[str]:
    assert pairs.index is not None
    return list(pairs.index.facts["notes"])


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (pa.array([b"one", b"two"], pa.binary()), "caption"),
        (pa.array([b"one", b"two"], pa.large_binary()), "caption"),
        (pa.array([{"bytes": b"one", "path": "a"}, {"bytes": b"two", "path": None}]), "caption"),
        (pa.array([{"bytes": b"one"}, {"bytes": b"two"}]), "TEXT"),
    ],
)
def test_pictures_in_the_table(tmp_path: Path, image: pa.Array, text: str) -> None:
    """As bytes, or Hugging Face's structure of bytes and path."""
    pairs = opened(tmp_path, pa.table({"image": image, text: ["a", "b"]}))
    assert [pairs.encoded(row) for row in (0, 1)] == [b"one", b"two"]
    assert [pairs.sample_id(row) for row in (0, 1)] == ["pairs.parquet/0", "pairs.parquet/1"]


@pytest.mark.parametrize(
    "image",
    [
        pa.array(["a.jpg", "b.jpg"]),
        pa.array(["a.jpg", "b.jpg"], pa.large_string()),
        pa.array(["a.jpg", "b.jpg"]).dictionary_encode(),
        pa.array([{"bytes": None, "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}]),
    ],
)
@pytest.mark.parametrize("root", [None, "elsewhere"])
def test_pictures_in_files(tmp_path: Path, image: pa.Array, root: str | None) -> None:
    """Named by the table, below its own folder or a given root."""
    folder = tmp_path / (root or "")
    folder.mkdir(exist_ok=True)
    (folder / "a.jpg").write_bytes(b"one")
    (folder / "b.jpg").write_bytes(b"two")
    content = pa.table({"image": image, "text": ["a", "b"]})
    pairs = opened(tmp_path, content, root=str(folder) if root else None)
    assert [pairs.encoded(row) for row in (0, 1)] == [b"one", b"two"]


def test_pictures_at_absolute_paths_and_urls(tmp_path: Path, bucket: str) -> None:
    """URLs whatever the root, paths below it."""
    (tmp_path / "a.jpg").write_bytes(b"one")
    fsspec.filesystem("s3").pipe(f"{bucket}/b.jpg", b"two")
    rows = f"url,caption\n{tmp_path}/a.jpg,a\n{bucket}/b.jpg,b\n"
    for root in (None, str(tmp_path), "/"):
        pairs = opened(tmp_path, rows.encode(), root=root)
        assert [pairs.encoded(row) for row in (0, 1)] == [b"one", b"two"]


@pytest.mark.parametrize(
    "several",
    [
        pa.array([["a", "b"], ["c"]]),
        pa.array([["a", "b"], ["c"]], pa.large_list(pa.large_string())),
        pa.array([["a", "b"], ["c", None]], pa.list_(pa.string(), 2)),
    ],
)
def test_a_column_of_lists_of_captions(tmp_path: Path, several: pa.Array) -> None:
    """All are kept."""
    pairs = opened(tmp_path, pa.table({"path": ["x", "y"], "captions": several}))
    assert [pairs.sample_captions(row) for row in (0, 1)] == [("a", "b"), ("c",)]


def test_lists_of_captions_in_json_lines(tmp_path: Path) -> None:
    """A list, or now and then a single text; another type counts as none."""
    rows = [{"path": "x", "captions": c} for c in (["a", "ü"], "c", 3.5, None)]
    content = "\n".join(map(json.dumps, rows)).encode()
    pairs = opened(tmp_path, content, "pairs.jsonl")
    assert [pairs.sample_captions(row) for row in (0, 1)] == [("a", "ü"), ("c",)]
    for row in (2, 3):
        with pytest.raises(BadSample, match="empty caption"):
            pairs.sample_captions(row)


@pytest.mark.parametrize("make", [lambda t: t, lambda t: delimited_table(t)])
def test_several_caption_columns(tmp_path: Path, make: Any) -> None:
    """All are kept in the order of the setting, without the empty ones."""
    content = pa.table({"path": ["x", "y", "z"], "en": ["a", "b", "c"], "de": ["ä", "", "č"]})
    pairs = opened(tmp_path, make(content), caption_column=["de", "en"])
    assert [pairs.sample_captions(row) for row in range(3)] == [("ä", "a"), ("b",), ("č", "c")]


def delimited_table(content: pa.Table) -> bytes:
    rows = [",".join(content.column_names)]
    rows += [",".join(map(str, row.values())) for row in content.to_pylist()]
    return "\n".join(rows).encode()


def test_a_caption_that_is_not_utf8_spoils_its_row_alone(tmp_path: Path) -> None:
    """Conversion goes on, in text and in JSON; the row names itself when it is read."""
    content = b"path,caption\nx,good\ny,caf\xe9\nz,fine\n"
    lines = b'{"path": "x", "caption": "good"}\n{"path": "y", "caption": "caf\xe9"}\n'
    lines += b'{"path": "z", "caption": "fine"}\n{"path": "w", "caption": "\\ud800"}\n'
    for pairs, bad in (
        (opened(tmp_path, content), [1]),
        (opened(tmp_path, lines, "pairs.jsonl"), [1, 3]),
    ):
        for row in range(len(pairs)):
            if row in bad:
                with pytest.raises(BadSample, match=f"/{row}' .*not UTF-8"):
                    pairs.sample_captions(row)
            else:
                assert pairs.caption(row) in ("good", "fine")


@pytest.mark.parametrize("path", [b"", b"\xff.jpg"])
def test_a_row_without_a_usable_path_is_a_bad_sample(tmp_path: Path, path: bytes) -> None:
    """Empty, or not UTF-8: the rest of the table can be used."""
    (tmp_path / "a.jpg").write_bytes(b"one")
    pairs = opened(tmp_path, b"path,caption\na.jpg,a\n" + path + b",b\n")
    assert pairs.sample(0).image == b"one"
    with pytest.raises(BadSample, match=r"pairs\.csv/1.*no image"):
        pairs.sample(1)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.csv", b"path,caption\nx,a\ny,b, and more\nz\nw,d\n"),
        ("a.jsonl", b'{"path": "x", "caption": "a"}\nnot json\n[1]\n{"path": "w", "caption": "d"}'),
    ],
)
def test_ragged_rows_are_left_out_and_counted(tmp_path: Path, file: str, content: bytes) -> None:
    """Those of another number of columns, or that are no JSON object; one is shown."""
    pairs = opened(tmp_path, content, file)
    assert [pairs.caption(row) for row in range(len(pairs))] == ["a", "d"]
    example = "y,b, and more" if file == "a.csv" else "not json"
    assert notes(pairs) == [
        f"{tmp_path}/{file}: rows left out that have not the header's columns: 2 "
        f"(first: '{example}')"
    ]


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("later", ["", "quoted", "open", "closing", "end"])
def test_an_open_quote_costs_its_line_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str, later: str
) -> None:
    """Wherever it stands, with good, open and closing quotes behind it; lines and rows add up."""
    monkeypatch.setattr(tables, "LONGEST_ROW", 1000)  # many blocks
    captions = [f"caption {n}" for n in range(300)]
    wrong = {40: '"open at 40'}
    if later == "quoted":
        captions[45] = 'of ""two""\nlines'
        wrong[44] = '"' if separator == "\t" else '"x'  # in CSV it would close the first
    elif later == "open":
        wrong |= {n: f'"open at {n}' for n in (41, 42, 250)}
    elif later == "closing":
        captions[210] = '5"'  # too far to be the end of the first
    elif later == "end":
        wrong[299] = '"to the end'
    rows = [
        f"{n}.jpg{separator}" + wrong.get(n, f'"{c}"' if "\n" in c else c)
        for n, c in enumerate(captions)
    ]
    text = "\n".join([f"path{separator}caption", *rows]).encode()
    pairs = opened(tmp_path, text, "pairs.tsv" if separator == "\t" else "pairs.csv")
    good = [c.replace('""', '"') for n, c in enumerate(captions) if n not in wrong]
    assert [pairs.caption(row) for row in range(len(pairs))] == good
    (note,) = notes(pairs)
    lines = [number + 2 + (number > 45 and later == "quoted") for number in sorted(wrong)]
    assert f"left open: {len(wrong)} (line {', '.join(map(str, lines))}; first: '40.jpg" in note


def test_a_row_within_quotes_ends_them_in_a_tab_separated_file(tmp_path: Path) -> None:
    """Though a quote follows that would close them."""
    text = b'path\tcaption\tn\na\t"open\t1\nb\tinside\t2\nc\tclosing"\t3\n'
    pairs = opened(tmp_path, text, "pairs.tsv")
    assert [pairs.caption(row) for row in range(len(pairs))] == ["inside", 'closing"']


def test_quotes_within_a_line_are_read_as_before(tmp_path: Path) -> None:
    """What Arrow makes of a line whose quotes are closed stays, in any place."""
    letters = np.random.default_rng(0)
    rows = ["".join(letters.choice(list('a" ,'), 12)) for _ in range(600)]
    rows = [row for row in rows if tables.is_left_open(row.encode(), b",") is False]
    text = "\n".join(["a,b,c", *rows]).encode()
    skipped = tables.Skipped()
    parts = tables.without_open_quotes(io.BytesIO(text), b",", 3, skipped)
    assert b"".join(parts) == text
    assert not skipped.open_quotes
    assert len(rows) > 200
    for row in rows:
        # Nothing that was found closed swallows the row after it.
        file = io.BytesIO(f"{row}\nx,y,z\n".encode())
        options = pa.csv.ParseOptions(
            newlines_in_values=True, invalid_row_handler=lambda row: "skip"
        )
        found = pa.csv.read_csv(
            file,
            read_options=pa.csv.ReadOptions(column_names=["a", "b", "c"]),
            parse_options=options,
        )
        assert found.slice(found.num_rows - 1).to_pylist() == [{"a": "x", "b": "y", "c": "z"}]


@pytest.mark.parametrize("file", ["pairs.tsv", "pairs.csv"])
def test_zero_bytes_and_line_separators_cost_no_other_row(tmp_path: Path, file: str) -> None:
    """A row with a zero byte is bad, with its reason; U+2028 is a letter, in the header too."""
    separator = "\t" if file == "pairs.tsv" else ","
    lines = [
        "path,ca\u2028ption",
        "a.jpg,fine",
        "b.jpg,nu\0l",
        "c\0.jpg,fine",
        "d.jpg,two\u2028lines",
    ]
    text = "\n".join(lines).replace(",", separator).encode()
    pairs = opened(tmp_path, text, file, caption_column="ca\u2028ption")
    (tmp_path / "a.jpg").write_bytes(b"one")
    assert pairs.sample(0).image == b"one"
    assert pairs.caption(3) == "two\u2028lines"
    with pytest.raises(BadSample, match="the caption holds a zero byte"):
        pairs.sample_captions(1)
    with pytest.raises(BadSample, match=r"cannot be read .*null"):
        pairs.sample(2)


def test_columns_are_detected_by_type_too(tmp_path: Path) -> None:
    """A column of a usual name that cannot hold pictures is passed over; a choice is told."""
    content = pa.table(
        {"image": [1, 2], "url": ["x", "y"], "text": ["a", "b"], "title": ["c", "d"]}
    )
    pairs = opened(tmp_path, content)
    assert [pairs.where(0), pairs.caption(0)] == [str(tmp_path / "x"), "c"]
    assert len(notes(pairs)) == 1
    assert "captions are taken from column 'title', not from 'text'" in notes(pairs)[0]
    assert not notes(opened(tmp_path, content, caption_column="title"))


@pytest.mark.parametrize("settings", [{"caption_column": "c"}, {"image_column": "b"}])
def test_settings_name_other_columns(tmp_path: Path, settings: dict[str, str]) -> None:
    """The same file read with other settings is another index."""
    content = pa.table({"path": ["x"], "caption": ["a"], "b": ["y"], "c": ["d"]})
    first, second = opened(tmp_path, content), opened(tmp_path, content, **settings)
    assert (first.where(0)[-1], first.caption(0)) == ("x", "a")
    expected = ("y", "a") if "image_column" in settings else ("x", "d")
    assert (second.where(0)[-1], second.caption(0)) == expected


def test_whole_numbers_are_ids(tmp_path: Path) -> None:
    content = pa.table({"path": ["x", "y"], "caption": ["a", "b"], "uid": [7, 8]})
    assert list(opened(tmp_path, content).sample_ids()) == ["7", "8"]
    lines = b'{"path": "x", "caption": "a", "uid": 7}\n{"path": "y", "caption": "b", "uid": 8}'
    assert list(opened(tmp_path, lines, "a.jsonl").sample_ids()) == ["7", "8"]


def test_a_changed_manifest_is_read_again(tmp_path: Path) -> None:
    """With the same size, too; an unchanged one is not."""
    first = opened(tmp_path, b"path,caption\nx,one\n")
    stamp = (tmp_path / "pairs.csv").stat().st_mtime_ns
    again = open_manifest(str(tmp_path / "pairs.csv"), cache=tmp_path / "cache")
    assert again.index.path == first.index.path
    (tmp_path / "pairs.csv").write_bytes(b"path,caption\nx,two\n")
    os.utime(tmp_path / "pairs.csv", ns=(stamp, stamp))
    assert open_manifest(str(tmp_path / "pairs.csv"), cache=tmp_path / "cache").caption(0) == "two"


def test_an_index_is_opened_without_parsing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path, b"path,caption\nx,one\n")
    monkeypatch.delattr(manifests, "open_table")
    assert open_manifest(str(tmp_path / "pairs.csv"), cache=tmp_path / "cache").caption(0) == "one"


def test_a_pattern_opens_files_as_one(tmp_path: Path) -> None:
    """In order of their names, with ids that are unique over all."""
    for n in (10, 2, 1):
        part = pa.table({"path": [f"{n}"], "caption": [f"c{n}"], "key": [f"k{n}"]})
        pq.write_table(part, tmp_path / f"train-{n:05d}-of-00003.parquet")
    pairs = open_manifest(str(tmp_path / "train-*.parquet"), cache=tmp_path / "cache")
    assert list(pairs.sample_ids()) == ["k1", "k2", "k10"]
    assert [pairs.caption(row) for row in range(3)] == ["c1", "c2", "c10"]
    pq.write_table(pa.table({"path": ["x"], "key": ["k4"]}), tmp_path / "train-00020.parquet")
    with pytest.raises(
        ValueError, match=r"train-00020\.parquet: no column 'caption', which .*00001"
    ):
        open_manifest(str(tmp_path / "train-*.parquet"), cache=tmp_path / "cache")


def test_batches_stay_small_whatever_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row group of large pictures is neither read nor written as one batch."""
    monkeypatch.setattr(tables, "BATCH_BYTES", 100_000)
    monkeypatch.setattr(index, "BATCH_BYTES", 100_000)
    images = [os.urandom(10_000) for _ in range(100)]
    content = pa.table({"image": images, "caption": [str(n) for n in range(100)]})
    (tmp_path / "a.parquet").write_bytes(parquet(content))
    read = tables.open_table(str(tmp_path / "a.parquet"), Access()).batches(
        ["image"], tables.Skipped()
    )
    assert max(batch.nbytes for batch in read) < 110_000
    pairs = open_manifest(str(tmp_path / "a.parquet"), cache=tmp_path / "cache")
    assert max(batch.nbytes for batch in pairs.table.to_batches()) <= 100_000
    assert [pairs.encoded(row) for row in range(100)] == images


def many(count: int) -> bytes:
    return b"path,caption,key\n" + b"".join(
        b"%d.jpg,caption %d,k%d\n" % (n, n, n) for n in range(count)
    )


def test_rows_of_many_batches_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's id and caption are its own, at the borders of batches too."""
    monkeypatch.setattr(index, "BATCH_ROWS", 64)
    pairs = opened(tmp_path, many(1000))
    assert pairs.table.column("caption").num_chunks >= 1000 // 64
    for row in range(1000):
        assert (pairs.sample_id(row), pairs.caption(row)) == (f"k{row}", f"caption {row}")


def open_at_once(path: str, cache: Path, barrier: Any, answers: Any) -> None:
    barrier.wait()
    pairs = open_manifest(path, cache=cache)
    answers.put((pairs.index.path.stat().st_ino, len(pairs), pairs.caption(19_999)))


def test_four_processes_open_a_manifest_at_once(tmp_path: Path) -> None:
    """All get one and the same index, and nothing else is left."""
    (tmp_path / "pairs.csv").write_bytes(many(20_000))
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    arguments = (str(tmp_path / "pairs.csv"), tmp_path / "cache", barrier, answers)
    processes = [context.Process(target=open_at_once, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    found = {answers.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    (_, rows, caption) = found.pop()
    assert not found
    assert (rows, caption) == (20_000, "caption 19999")
    left = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    assert left == [".arrow", ".json", ".lock"]


def test_equal_hashes_are_no_equal_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids whose hashes meet are compared as text."""
    monkeypatch.setattr(manifests, "hash", lambda text: 1, raising=False)
    assert len(opened(tmp_path, many(50))) == 50
    with pytest.raises(ValueError, match="1 rows repeat an id in 'key', such as 'k7'"):
        opened(tmp_path, many(50) + b"x,y,k7\n", "twice.csv")


GOOD = b"path,caption,key\nx,a,1\ny,b,2\n"
PARQUET = parquet(pa.table({"path": ["x"], "caption": ["a"], "label": [0.5], "tags": [[1]]}))
FAULTS = {
    "no such file": ("gone.csv", None, {}, "no such file"),
    "no such URL": ("s3://gone.parquet", None, {}, "no such file"),
    "no such pattern": ("gone-*.csv", None, {}, "no such file"),
    "unknown protocol": ("nowhere://a.csv", None, {}, "'nowhere://' is not read"),
    "unknown suffix": ("a.xlsx", GOOD, {}, "supported are .csv, .tsv, .jsonl, .parquet, .arrow"),
    "no suffix": ("pairs", GOOD, {}, "not a table that can be read; supported are"),
    "compressed Parquet": ("a.parquet.gz", PARQUET, {}, "not a table that can be read"),
    "empty file": ("a.csv", b"", {}, "is empty"),
    "blank lines": ("a.csv", b"\n\n\n", {}, "no column with images"),
    "header only": ("a.csv", b"path,caption\n", {}, "holds no sample"),
    "Parquet without rows": (
        "a.parquet",
        parquet(table().slice(0, 0)),
        {},
        "holds no sample",
    ),
    "no JSON": ("a.jsonl", b"path,caption\nx,a\n", {}, "no column with images"),
    "Parquet named CSV": ("a.csv", PARQUET, {}, "not text but a Parquet file"),
    "gzip named TSV": ("a.tsv", gzip.compress(GOOD), {}, "not text but compressed"),
    "CSV named gzip": ("a.csv.gz", GOOD, {}, "cannot be read"),
    "gzip cut short": ("a.csv.gz", gzip.compress(many(9999))[:-9], {}, "cannot be read"),
    "CSV named Parquet": ("a.parquet", GOOD, {}, "not a Parquet file"),
    "Parquet cut short": ("a.parquet", PARQUET[:-9], {}, "cannot be read"),
    "CSV named Arrow": ("a.arrow", GOOD, {}, "cannot be read"),
    "binary junk": ("a.csv", bytes(range(256)) * 9, {}, "not UTF-8 text"),
    "junk without zeros": ("a.csv", bytes(range(1, 256)) * 9, {}, "header is not UTF-8"),
    "UTF-16": ("a.csv", GOOD.decode().encode("utf-16"), {}, "not UTF-8 text; save it as UTF-8"),
    "Latin-1 header": ("a.csv", b"path,l\xe9gende\nx,a\n", {}, "header is not UTF-8"),
    "no header": ("a.tsv", b"x.jpg\ta dog\n", {}, "no column with images.*has 'x.jpg', 'a dog'"),
    "no captions": ("a.csv", b"path,label\nx,1\n", {}, "no column with captions.*'path', 'label'"),
    "wrong image": ("a.csv", GOOD, {"image_column": "no"}, "'no'; it has 'path', 'caption', 'key'"),
    "wrong caption": ("a.csv", GOOD, {"caption_column": ["caption", "no"]}, "no column 'no'"),
    "wrong id": ("a.csv", GOOD, {"id_column": "no"}, "no column 'no'; it has 'path'"),
    "column twice": ("a.csv", b"path,caption,path\nx,a,y\n", {}, "more than one column 'path'"),
    "caption type": ("a.parquet", PARQUET, {"caption_column": "label"}, "'label' holds double"),
    "caption lists": ("a.parquet", PARQUET, {"caption_column": "tags"}, "'tags' holds list"),
    "image type": ("a.parquet", PARQUET, {"image_column": "tags"}, "'tags' holds list"),
    "id type": ("a.parquet", PARQUET, {"id_column": "label"}, "'label' holds double, not"),
    "all ragged": ("a.csv", b"path,caption\nx,a,b\ny,c,d\n", {}, "columns: 2 .*; no row is left"),
    "endless row": ("a.csv", b"path,caption\nx," + b"ab " * 900_000, {}, "a row is longer than"),
    "repeated ids": (
        "a.csv",
        GOOD + b"z,c,2\nw,d,2\n",
        {},
        "2 rows repeat an id in 'key', such as '2'",
    ),
    "missing id": ("a.csv", GOOD + b"z,c,\n", {}, "row 2 has no id in 'key'"),
    "id not UTF-8": ("a.csv", GOOD + b"z,c,\xff\n", {}, "an id in 'key' is not UTF-8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_structural_fault_is_named_in_one_line(tmp_path: Path, bucket: str, fault: str) -> None:
    """The file, what is wrong with it, what to do; and nothing is left in the cache."""
    file, content, settings, message = FAULTS[fault]
    path = file if "://" in file else str(tmp_path / file)
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_manifest(path, cache=tmp_path / "cache", **settings)
    assert str(error.value).startswith(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(path) + 400
    assert not list((tmp_path / "cache").glob("*.arrow"))
