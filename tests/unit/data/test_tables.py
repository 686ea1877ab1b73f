"""Tables as pairs: every format gives the same rows, and their index is built once."""

import csv
import gzip
import io
import json
import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protoclip.config import Config, DataConfig
from protoclip.data import sources, tables
from protoclip.data.pairs import BadSample, ImageTextPairs
from protoclip.data.tables import ArrowIndex, build_index, open_hub, open_table

CAPTIONS = [
    *("a red square", "ein Häuschen am Fluß", "一只猫, 两只狗", "собака у моста", "बिल्ली", "NULL"),
    *("emoji 👩‍🚀 and a zero-width\u200bspace", 'said "so", twice', "two\nlines", "a\ttab"),
    *("'one';", "a\u2028line separator", "carriage\rreturn"),
]
PATHS = [f"images/{n} ü.jpg" for n in range(len(CAPTIONS))]
KEYS = [f"{n:03}" for n in range(len(CAPTIONS))]
BOM = b"\xef\xbb\xbf"


def delimited(separator: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator)
    writer.writerows([("filepath", "title", "key"), *zip(PATHS, CAPTIONS, KEYS, strict=True)])
    return text.getvalue().encode()


def json_rows() -> list[str]:
    rows = zip(PATHS, CAPTIONS, KEYS, strict=True)
    return [json.dumps({"filepath": p, "title": t, "key": k}) for p, t, k in rows]


def table() -> pa.Table:
    return pa.table({"filepath": PATHS, "title": CAPTIONS, "key": KEYS})


def parquet(content: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(content, sink, **options)
    return sink.getvalue()


def arrow() -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=5)
    return sink.getvalue()


FORMATS = {
    "pairs.csv": lambda: delimited(","),
    "bom.csv": lambda: BOM + delimited(","),
    "semicolons.csv": lambda: delimited(";"),
    "bars.csv": lambda: BOM + delimited("|"),
    "blank.csv": lambda: b"\n\n" + delimited(",").replace(b"\r\n", b"\n") + b"\n\n",
    "PAIRS.TSV": lambda: delimited("\t"),
    "pairs.csv.gz": lambda: gzip.compress(delimited(",")),
    "bom.jsonl": lambda: BOM + "\n".join(json_rows()).encode(),
    "pairs.jsonl.gz": lambda: gzip.compress("\n\n".join(json_rows()).encode()),
    "pairs.json": lambda: f"[{','.join(json_rows())}]".encode(),
    "pairs.parquet": lambda: parquet(table()),
    "file.arrow": arrow,
}
REMOTE = ("pairs.csv", "pairs.jsonl.gz", "pairs.parquet", "file.arrow")


def table_at(path: Path | str, **options: Any) -> ImageTextPairs:
    return open_table(DataConfig(train=str(path), **options))


@pytest.mark.parametrize(
    ("file", "place"),
    [*((f, "folder") for f in FORMATS), *((f, p) for f in REMOTE for p in ("server", "bucket"))],
)
def test_every_format_gives_the_same_rows(tmp_path, file, place, bucket, serve):
    """Ids keep their zeros, captions their letters; a copy in another process reads the same."""
    (tmp_path / file).write_bytes(FORMATS[file]())
    folder = root = str(tmp_path)
    if place == "server":  # whose images are beside this process
        folder = serve("ranges", tmp_path)
    elif place == "bucket":
        folder = root = bucket
        fsspec.filesystem("s3").pipe(f"{folder}/{file}", FORMATS[file]())
    pairs = table_at(f"{folder}/{file}", root=root)
    sent = pickle.dumps(pairs)
    assert len(sent) < 2500
    for found in (pairs, pickle.loads(sent)):
        assert (found.name, list(found.sample_ids()), found.notes) == (file, KEYS, [])
        assert [found.sample_captions(row) for row in range(len(found))] == [(c,) for c in CAPTIONS]
        assert [found.where(row) for row in range(len(found))] == [f"{root}/{p}" for p in PATHS]


def opened(tmp_path: Path, content: bytes | pa.Table, file: str = "", **options: Any) -> Any:
    """The table with that content: Parquet of a table, else CSV."""
    file = file or ("pairs.parquet" if isinstance(content, pa.Table) else "pairs.csv")
    data = parquet(content) if isinstance(content, pa.Table) else content
    (tmp_path / file).write_bytes(data)
    return table_at(tmp_path / file, **options)


def captions(pairs: ImageTextPairs) -> list[tuple[str, ...]]:
    return [pairs.sample_captions(row) for row in range(len(pairs))]


@pytest.mark.parametrize(
    "image",
    [
        pa.array([b"one", b"two"], pa.large_binary()),
        pa.array([{"bytes": b"one", "path": "a"}, {"bytes": b"two", "path": None}]),
        pa.array(["a.jpg", "b.jpg"], pa.large_string()),
        pa.array(["a.jpg", "b.jpg"]).dictionary_encode(),
        pa.array([{"bytes": None, "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}]),
    ],
)
@pytest.mark.parametrize("root", [None, "elsewhere"])
def test_images_in_the_table_and_in_files(tmp_path, image, root):
    """As bytes, as structs of `datasets`, or paths below the table's own folder or a root."""
    folder = tmp_path / (root or "")
    folder.mkdir(exist_ok=True)
    (folder / "a.jpg").write_bytes(b"one")
    (folder / "b.jpg").write_bytes(b"two")
    content = pa.table({"image": image, "TEXT": ["a", "b"]})
    pairs = opened(tmp_path, content, root=str(folder) if root else None)
    assert [pairs.read_encoded(row) for row in (0, 1)] == [b"one", b"two"]
    assert [pairs.sample_id(row) for row in (0, 1)] == ["pairs.parquet/0", "pairs.parquet/1"]


def test_lists_of_captions(tmp_path):
    """All are kept, without the empty ones; in JSON a single text too, and no other type."""
    several = pa.array([["a", "b"], ["c", None]], pa.large_list(pa.large_string()))
    pairs = opened(tmp_path, pa.table({"path": ["x", "y"], "captions": several, "uid": [7, 8]}))
    assert captions(pairs) == [("a", "b"), ("c",)]
    assert list(pairs.sample_ids()) == ["7", "8"]
    rows = [{"path": "x", "captions": c} for c in (["a", "ü"], "c", 3.5, None)]
    pairs = opened(tmp_path, "\n".join(map(json.dumps, rows)).encode(), "pairs.jsonl")
    assert [pairs.sample_captions(row) for row in (0, 1)] == [("a", "ü"), ("c",)]
    for row in (2, 3):
        with pytest.raises(BadSample, match="empty caption"):
            pairs.sample_captions(row)
    content = pa.table({"path": ["x", "y", "z"], "en": ["a", "b", "c"], "de": ["ä", "", "č"]})
    text = b"path,en,de\nx,a,\xc3\xa4\ny,b,\nz,c,\xc4\x8d\n"
    for pairs in (opened(tmp_path, c, caption_column=["de", "en"]) for c in (content, text)):
        assert captions(pairs) == [("ä", "a"), ("b",), ("č", "c")]


def test_a_row_without_an_id_is_left_out_as_bad_lines_are(tmp_path):
    ids = ["x", None, "z"]
    content = pa.table({"path": ["1", "2", "3"], "caption": ["a", "b", "c"], "sku": ids})
    for table_of in (content, b"path,caption,sku\n1,a,x\n2,b,\n3,c,z\n"):
        for _ in range(2):  # also when its ids were looked at before
            pairs = opened(tmp_path, table_of, id_column="sku")
            assert [*pairs.sample_ids()] == ["x", "z"]
            assert captions(pairs) == [("a",), ("c",)]
            (_,) = (note for note in pairs.notes if "left out 1 row without an id (row 1)" in note)
        assert not tables.describe_bad_lines(pairs, 0.34)
        assert "1 of 3 lines (33%) have no id" in tables.describe_bad_lines(pairs, 0.05)
    with pytest.raises(ValueError, match=r"no row has an id; make ids unique"):
        opened(tmp_path, content.set_column(2, "sku", [["", None, ""]]), id_column="sku")


SPOILED = b"path,caption\na,fine\nb,caf\xe9\n\xff,x\nc,nu\0l\nd,also fine\ne,one,more\nf,last\n"
SPOILED_JSON = rb"""{"path": "a", "caption": "fine"}
{"path": "b", "caption": "caf\xe9"}
{"path": "\ud800", "caption": "x"}
{"path": "c", "caption": "nu\u0000l"}
{"path": "d", "caption": "also fine"}
{"path":
["e"]
{"path": "f", "caption": "last"}
""".replace(rb"\xe9", b"\xe9")
WIDTH = "lines with another number of fields than the header"


@pytest.mark.parametrize(
    ("file", "text", "first", "ragged"),
    [
        ("pairs.csv", SPOILED, 2, f"1 {WIDTH} (line 7: 'e"),
        ("pairs.tsv", SPOILED.replace(b",", b"\t"), 2, f"1 {WIDTH} (line 7: 'e"),
        ("pairs.jsonl", SPOILED_JSON, 1, "2 lines that are no JSON object (line 6, 7: '{"),
    ],
)
def test_a_malformed_line_is_counted_and_named(tmp_path, file, text, first, ragged):
    """And costs no other line; numbers of lines add up."""
    pairs = opened(tmp_path, text, file)
    assert captions(pairs) == [("fine",), ("also fine",), ("last",)]
    expected = [
        f"2 lines that are not UTF-8 (line {first + 1}, {first + 2}: '",
        f"1 lines with a zero byte (line {first + 3}: '",
        ragged,
    ]
    *notes, total = pairs.notes
    for note, what in zip(notes, expected, strict=True):
        assert note.startswith(f"{tmp_path / file}: left out {what}")
    assert "; save it as UTF-8" in notes[0]
    rows = len(text.strip().splitlines()) - (first == 2)
    assert total == f"{tmp_path / file}: 3 of {rows} rows are used"


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("later", ["", "quoted", "open", "closing", "end"])
def test_an_open_quote_costs_its_line_alone(tmp_path, separator, later):
    """Wherever it stands, with good, open and closing quotes behind it; lines and rows add up."""
    texts = [f"caption {n}" for n in range(300)]
    wrong = {40: '"open at 40'}
    if later == "quoted":
        texts[45] = 'of ""two""\nlines'
        wrong[44] = '"x'
    elif later == "open":
        wrong |= {n: f'"open at {n}' for n in (41, 42, 250)}
    elif later == "closing":
        texts[210] = '5"'  # too far away to be the end of the first
    elif later == "end":
        wrong[299] = '"to the end'
    rows = [
        f"{n}.jpg{separator}" + wrong.get(n, f'"{c}"' if "\n" in c else c)
        for n, c in enumerate(texts)
    ]
    text = "\n".join([f"path{separator}caption", *rows]).encode()
    pairs = opened(tmp_path, text, "pairs.tsv" if separator == "\t" else "pairs.csv")
    good = [(c.replace('""', '"'),) for n, c in enumerate(texts) if n not in wrong]
    assert captions(pairs) == good
    lines = [number + 2 + (number > 45 and later == "quoted") for number in sorted(wrong)]
    note, total = pairs.notes
    assert total.endswith(f": {300 - len(wrong)} of 300 rows are used")
    assert f"{len(wrong)} lines with an open quote (line {', '.join(map(str, lines))}: '40" in note


def of_windows(bad: int, file: Path) -> DataConfig:
    """Twenty rows as Excel writes them, of which so many are not UTF-8 too."""
    captions = ["grüne Tasse" if row < bad else "rote Tasse" for row in range(20)]
    rows = (f"{row}.jpg;{caption}\r\n" for row, caption in enumerate(captions))
    file.write_bytes("".join(["image;caption\r\n", *rows]).encode("cp1252"))
    return DataConfig(train=str(file))


def test_a_table_in_another_encoding_is_refused_and_a_few_such_lines_are_told(tmp_path):
    """Also when it is opened a second time, in files of a pattern, and as far as settings allow."""
    few = of_windows(1, tmp_path / "few.csv")
    note, _ = sources.open_samples(Config(data=few)).notes
    assert "left out 1 lines that are not UTF-8 (line 2: '0.jpg;grüne Tasse'); save it as" in note
    many = of_windows(15, tmp_path / "fewer.csv")
    for data in (many, many, replace(many, train=str(tmp_path / "few*.csv"))):
        with pytest.raises(ValueError, match=r"fewer.csv: 15 of 20 lines \(75%\)") as raised:
            sources.open_samples(Config(data=data))
        assert "more than data.max_bad_share (0.05) allows; save it as UTF-8" in str(raised.value)
    assert len(sources.open_samples(Config(data=replace(many, max_bad_share=0.8)))) == 5
    with pytest.raises(ValueError, match=r"NEW\); no pair is left"):
        sources.open_samples(Config(data=of_windows(20, tmp_path / "fewer.csv")))


def test_quotes_that_are_no_quotes_are_kept(tmp_path):
    """Text after a closing quote, and inches."""
    text = b'path\tcaption\na\t"Seven" (1995)\nb\t5" pipe\ne\tclosing"\n'
    pairs = opened(tmp_path, text, "pairs.tsv")
    assert captions(pairs) == [("Seven (1995)",), ('5" pipe',), ('closing"',)]


def test_columns_are_detected_by_name_and_type(tmp_path):
    """A choice between several is noted; settings name other columns."""
    content = pa.table({"image": [1], "url": ["x"], "text": ["a"], "title": ["c"], "b": ["y"]})
    pairs = opened(tmp_path, content)
    assert [pairs.where(0), pairs.sample_captions(0)[0]] == [str(tmp_path / "x"), "c"]
    (note,) = pairs.notes
    assert "captions are taken from column 'title', not from 'text'" in note
    pairs = opened(tmp_path, content, caption_column=["text"], image_column="b")
    assert [pairs.where(0), pairs.sample_captions(0)[0], pairs.notes] == [
        str(tmp_path / "y"),
        "a",
        [],
    ]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_is_read_again_when_it_changes(tmp_path, monkeypatch, kind):
    """Otherwise nothing is parsed or checked twice."""

    def write(caption: str) -> Any:
        content = pa.table({"path": ["x"], "caption": [caption], "key": ["k"]})
        text = f"path,caption,key\nx,{caption},k\n".encode()
        return opened(tmp_path, content if kind == "parquet" else text)

    write("one")
    with monkeypatch.context() as patch:
        patch.delattr(tables, "read_csv")
        patch.setattr(Path, "touch", None)
        assert table_at(tmp_path / f"pairs.{kind}").sample_captions(0)[0] == "one"
    assert write("two").sample_captions(0)[0] == "two"


def test_a_pattern_opens_files_as_one(tmp_path):
    """In order of their names, with ids that are unique over all."""
    for n in (10, 2, 1):
        (tmp_path / f"part-{n:05}.csv").write_text(f"path,caption,key\n{n},c{n},k{n}\n")
        part = pa.table({"path": [f"{n}"], "caption": [f"c{n}"], "key": [f"k{n}"]})
        pq.write_table(part, tmp_path / f"part-{n:05}-of-00003.parquet")
    for kind in ("csv", "parquet"):
        pairs = table_at(tmp_path / f"part-*.{kind}")
        assert list(pairs.sample_ids()) == ["k1", "k2", "k10"]
        assert captions(pairs) == [("c1",), ("c2",), ("c10",)]
    (tmp_path / "part-00020.csv").write_text("path,key\nx,k4\n")
    with pytest.raises(ValueError, match=r"part-00020\.csv: no column 'caption', which .*00001"):
        table_at(tmp_path / "part-*.csv")


def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    """With the config and split that its name gives."""
    import datasets

    asked: list[Any] = []
    rows = {"image": [b"one", b"two", b"three"], "text": ["a", "b", "c"]}

    def load_dataset(*arguments: Any, split: str, cache_dir: str) -> Any:
        asked.append((*arguments, split))
        if split == "dev":
            raise ValueError('Unknown split "dev". Should be one of\n["train"].')
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **more: object())

    def hub(reference: str) -> ImageTextPairs:
        return open_hub(DataConfig(train=reference))

    pairs = hub("hf:owner/name")
    assert [pairs.read_encoded(row) for row in range(3)] == rows["image"]
    assert captions(pairs) == [("a",), ("b",), ("c",)]
    assert pairs.sample_id(1) == "name/1"
    hub("hf:owner/name,config=full,split=test[:10%]")
    assert asked == [("owner/name", None, "train"), ("owner/name", "full", "test[:10%]")]
    with pytest.raises(ValueError, match=r"hf:owner/name,split=dev: cannot .*Unknown split") as e:
        hub("hf:owner/name,split=dev")
    assert "\n" not in str(e.value)
    for wrong in ("hf:name", "hf:owner/name,train", "hf:../name", "hf:owner/name,revision=x"):
        with pytest.raises(ValueError, match="write hf:OWNER/NAME"):
            hub(wrong)


ROWS = {"caption": [f"caption {n}" for n in range(1000)], "path": ["x" * 100] * 1000}


def build(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
    facts["notes"] = ["as told"]
    yield from pa.table(ROWS).to_batches(max_chunksize=300)


def never(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
    raise AssertionError("built again")
    yield


def indexed(build: Any, folder: Path) -> ArrowIndex:
    return build_index("key", build, folder=folder, label="there", way_out="add some")


def build_slowly(folder: Path, barrier: Any, answers: Any) -> None:
    def slowly(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        with (folder / "builders").open("a") as log:
            log.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        yield from build(facts)

    barrier.wait()
    found = indexed(slowly, folder)
    answers.put((found.path.stat().st_ino, found.table.to_pydict(), found.facts))


def test_of_four_processes_at_once_one_builds(tmp_path):
    """The others wait for it, and all see the same file, rows and facts."""
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    arguments = (tmp_path, barrier, answers)
    processes = [context.Process(target=build_slowly, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(one == found[0] for one in found)
    assert found[0][1:] == (ROWS, {"notes": ["as told"]})
    assert len((tmp_path / "builders").read_text().split()) == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".arrow", ".json", ".lock"}
    assert indexed(never, tmp_path).table.to_pydict() == ROWS
