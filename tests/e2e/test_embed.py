"""`protoclip.embed`: the vectors of a model in a Parquet file."""

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pyarrow import csv

import protoclip
from protoclip.cli import main
from protoclip.config import Config, DataConfig
from protoclip.data import access, sources
from protoclip.data import pairs as data_pairs
from protoclip.data.pairs import ImageTextPairs
from protoclip.encode import embed as module
from protoclip.encode import run as running
from protoclip.encode.encoder import Encoder
from protoclip.evaluation.datasets import open_data
from testing import run_distributed, tiny_pairs
from tiny_hugging_face import save_dual_encoder
from tiny_starts import save_open_clip

ROWS = 60
HALF = pa.list_(pa.float16())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with classes, several captions of some, a broken image and one without a caption."""
    table = tiny_pairs(ROWS)
    images, captions = table["image"].to_pylist(), table["caption"].to_pylist()
    kinds = [None if row == 3 else caption.split()[1] for row, caption in enumerate(captions)]
    several = [[caption, f"{row} times"][: 1 + row % 2] for row, caption in enumerate(captions)]
    images[57], several[41] = b"no image", [" "]
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    columns = {"image": images, "caption": several, "sample_id": table["sample_id"], "kind": kinds}
    pq.write_table(pa.table(columns), path)
    return path


def embedded(run: Path, pairs: Path, out: Path, *, kill_at: int | None = None) -> int:
    """Embed in batches of four, of which two make a block, and row groups of ten; the number of
    images that were encoded. At the batch `kill_at` of images the process is killed."""
    sizes, encode = [], Encoder.encode

    def watched(encoder: Encoder, inputs: list[Any]) -> Any:
        if encoder.reads == "image" and inputs is not encoder.examples and len(inputs) > 1:
            if len(sizes) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            sizes.append(len(inputs))
        return encode(encoder, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GROUP_ROWS", 10)
        patch.setattr(running, "BLOCK_ROWS", 8)
        patch.setattr(Encoder, "encode", watched)
        protoclip.embed(run, DataConfig(train=str(pairs), class_column="kind"), out, batch_size=4)
    return sum(sizes)


def test_a_row_has_the_vectors_of_the_model(tiny_run, pairs, tmp_path, capsys):
    """Of its image and of each caption, in half precision; bad samples are listed. The image that
    has no caption has its vector alone."""
    out = tmp_path / "vectors.parquet"
    main(f"embed {tiny_run} --data {pairs} --out {out} --class-column kind --batch-size 7".split())
    assert capsys.readouterr().err.splitlines()[-3:] == [
        f"note: 1 of 60 samples could not be read and have no row; {out.with_suffix('')}.skipped"
        ".jsonl lists them",
        "note: 1 of 59 images have no caption; their captions and text_vectors are null",
        f"written to {out}; 59 rows, vectors of width 16",
    ]
    bad = (tmp_path / "vectors.skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(entry)["sample_id"] for entry in bad] == ["tiny/57"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("vectors.parquet", "vectors.skipped.jsonl"),
    ]
    found, given = pq.read_table(out), pq.read_table(pairs).to_pylist()
    types = [pa.string(), HALF, pa.list_(HALF), pa.list_(pa.string()), pa.string(), pa.string()]
    names = ["sample_id", "image_vector", "text_vectors", "captions", "image", "class"]
    assert (found.column_names, found.schema.types) == (names, types)
    given = [row for number, row in enumerate(given) if number != 57]
    given[41]["caption"] = None  # it was a space
    for ours, its in (("sample_id", "sample_id"), ("captions", "caption"), ("class", "kind")):
        assert found[ours].to_pylist() == [row[its] for row in given]
    assert found["image"].null_count == len(found)  # they are in the table

    model, transform, tokenizer = protoclip.load(tiny_run)
    source = ImageTextPairs(pa.Table.from_pylist(given), name="given")
    with torch.inference_mode():
        pixels = torch.stack([transform(source.image(row)) for row in range(len(source))])
        image = model.encode_image(pixels, normalize=True)
        text = [
            model.encode_text(tokenizer(row["caption"] or ["none"]), normalize=True)
            for row in given
        ]
    vectors = np.stack(found["image_vector"].to_pylist())
    np.testing.assert_allclose(vectors, image, atol=5e-4)  # half of the last place below 1
    assert found["text_vectors"].is_null().to_pylist() == [not row["caption"] for row in given]
    for row, several in zip(found["text_vectors"].to_pylist(), text, strict=True):
        if row is not None:
            np.testing.assert_allclose(np.stack(row), several, atol=5e-4)
    facts = json.loads(found.schema.metadata[b"protoclip"])
    expected = {"reference": str(tiny_run), "width": 16, "rows": 59, "bad": 1}
    expected |= {"without_captions": 1}
    expected |= {"source": "pairs.parquet", "version": protoclip.__version__}
    assert expected.items() <= facts.items()


def test_image_and_captions_become_one_vector(tiny_run, pairs, tmp_path):
    """By the weight of the captions; an image without one keeps its own. Another weight is other
    settings, and so is a file that says nothing of it."""
    plain, out = tmp_path / "plain.parquet", tmp_path / "fused.parquet"
    main(f"embed {tiny_run} --data {pairs} --out {out} --fuse 0.25".split())
    protoclip.embed(tiny_run, pairs, plain)
    assert "vector" not in pq.read_schema(plain).names
    table = pq.read_table(out)
    assert table.schema.field("vector").type == HALF
    assert table.drop(["vector"]).equals(pq.read_table(plain))
    for row in table.to_pylist():
        wanted = np.array(row["image_vector"], dtype=np.float64)
        if row["text_vectors"] is not None:
            text = np.mean(row["text_vectors"], axis=0)
            wanted = 0.75 * wanted + 0.25 * text / np.linalg.norm(text)
        np.testing.assert_allclose(row["vector"], wanted / np.linalg.norm(wanted), atol=5e-4)
    assert sum(row["text_vectors"] is None for row in table.to_pylist()) == 1
    with pytest.raises(
        ValueError, match=r"was made with fuse 0\.25, not 0\.5; choose another --out"
    ):
        protoclip.embed(tiny_run, pairs, out, fuse=0.5)
    facts = {key: value for key, value in module.read_facts(plain).items() if key != "fuse"}
    older = pq.read_table(plain).replace_schema_metadata({b"protoclip": json.dumps(facts)})
    pq.write_table(older, plain)
    protoclip.embed(tiny_run, pairs, plain)
    with pytest.raises(ValueError, match=r"was made with fuse None, not 0\.5; choose another"):
        protoclip.embed(tiny_run, pairs, plain, fuse=0.5)
    with pytest.raises(ValueError, match=r"fuse: 2\.0 is no weight from 0 to 1"):
        protoclip.embed(tiny_run, pairs, plain, fuse=2.0)


@pytest.mark.parametrize("save", [save_open_clip, save_dual_encoder])
def test_a_model_of_another_library_embeds_a_folder_of_images(save, tmp_path):
    """With the captions that lie beside them."""
    table, images = tiny_pairs(6), tmp_path / "images"
    images.mkdir()
    captions = table["caption"].to_pylist()
    for row, image in enumerate(table["image"].to_pylist()):
        (images / f"{row}.png").write_bytes(image)
        (images / f"{row}.txt").write_text(captions[row])
    reference = str(save(tmp_path / "model"))
    rows = pq.read_table(protoclip.embed(reference, images, tmp_path / "vectors.parquet"))
    assert rows["captions"].to_pylist() == [[caption] for caption in captions]
    paths = rows["image"].to_pylist()
    assert [Path(path).name for path in paths] == [f"{row}.png" for row in range(6)]
    model, transform, tokenizer = protoclip.load(reference)
    with torch.inference_mode():
        pixels = torch.stack([transform(Image.open(images / Path(path).name)) for path in paths])
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(tokenizer(captions), normalize=True)
    np.testing.assert_allclose(np.stack(rows["image_vector"].to_pylist()), image, atol=5e-4)
    vectors = [row for (row,) in rows["text_vectors"].to_pylist()]
    np.testing.assert_allclose(np.stack(vectors), text, atol=5e-4)


def images_alone(folder: Path) -> list[str]:
    """Six images in the folders of two classes, one of them with a caption; their names."""
    table, names = tiny_pairs(6), []
    for row, image in enumerate(table["image"].to_pylist()):
        names.append(f"{'ab'[row % 2]}/{row}.png")
        (folder / names[-1]).parent.mkdir(parents=True, exist_ok=True)
        (folder / names[-1]).write_bytes(image)
    (folder / "b" / "3.txt").write_text("a caption")
    (folder / "b" / "5.json").write_text('{"width": 32}')
    return sorted(names)


def by_image(out: Path) -> dict[str, tuple[bool, Any]]:
    """By the end of the id, whether an image has no text vector, and its captions."""
    rows = pq.read_table(out).to_pylist()
    assert all(len(row["image_vector"]) == 16 for row in rows)
    return {
        row["sample_id"].rpartition("/")[2]: (row["text_vectors"] is None, row["captions"])
        for row in rows
    }


def test_images_without_captions_are_embedded(tiny_run, tmp_path, capsys):
    """Class folders; their ids are those that they have with captions, also once the folder has
    been opened for training. Other captions in the folder are noticed."""
    images, out = tmp_path / "images", tmp_path / "vectors.parquet"
    names = images_alone(images)
    trained = sources.open_samples(Config(data=DataConfig(train=str(images))))
    assert [*trained.sample_ids()] == ["b/3"]
    protoclip.embed(tiny_run, images, out)
    rows = pq.read_table(out)
    assert rows["image"].to_pylist() == names
    assert rows["sample_id"].to_pylist() == [name.removesuffix(".png") for name in names]
    none, one = (True, None), (False, ["a caption"])
    assert by_image(out) == {**dict.fromkeys("01245", none), "3": one}
    said = capsys.readouterr().err
    assert "note: 5 of 6 images have no caption; their captions and text_vectors are null\n" in said
    assert "left out" not in said
    trained = sources.open_samples(Config(data=DataConfig(train=str(images))))
    assert [*trained.sample_ids()] == ["b/3"]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_table_of_images_alone_is_embedded(form, tiny_run, tmp_path):
    """And remains none to train on, or to evaluate retrieval on."""
    names, table = images_alone(tmp_path), tmp_path / f"table.{form}"
    columns = pa.table({"image": names, "sample_id": names})
    (pq.write_table if form == "parquet" else csv.write_csv)(columns, table)
    out = protoclip.embed(tiny_run, table, tmp_path / "vectors.parquet", fuse=0.5)
    assert by_image(out) == dict.fromkeys((Path(name).name for name in names), (True, None))
    assert all(row["vector"] == row["image_vector"] for row in pq.read_table(out).to_pylist())
    with pytest.raises(ValueError, match="no column with captions; set --caption_column to one"):
        sources.open_samples(Config(data=DataConfig(train=str(table))))
    with pytest.raises(
        ValueError, match="no column with captions; write ,caption_column=NAME behind it"
    ):
        open_data(str(table))


def test_the_precision_of_vectors_and_of_teachers_is_chosen(tiny_run, tiny_parquet, tmp_path):
    """On a CPU `auto` is fp32, or that of what is there."""
    vectors, features = [], []
    for precision in ("auto", "bf16"):
        file, folder = tmp_path / f"{precision}.parquet", tmp_path / precision
        main(f"embed {tiny_run} --data {tiny_parquet} --out {file} --precision {precision}".split())
        words = f"--teacher {tiny_run} --data.train {tiny_parquet} --out {folder}"
        main(f"embed-teacher {words} --device cpu --precision {precision}".split())
        vectors.append(np.stack(pq.read_table(file)["image_vector"].to_pylist()))
        features.append(np.load(folder / "features.npy"))
    for exact, rounded in (vectors, features):
        assert 1e-3 < np.abs(exact.astype(np.float32) - rounded).max() < 0.05
    with pytest.raises(ValueError, match=r"was made with precision bf16, not fp32; choose another"):
        protoclip.embed(tiny_run, tiny_parquet, tmp_path / "bf16.parquet", precision="fp32")
    protoclip.embed(tiny_run, tiny_parquet, tmp_path / "bf16.parquet")
    main(f"embed-teacher {words} --device cpu".split())
    assert module.read_facts(tmp_path / "auto.parquet")["precision"] == "fp32"


def test_a_killed_pass_goes_on_after_its_last_block(tiny_run, pairs, tmp_path, capsys):
    """After SIGKILL in the third block the first two are not encoded again, and the file is, byte
    for byte, that of a pass that was not interrupted. A finished one is left alone."""
    whole, out = tmp_path / "whole.parquet", tmp_path / "vectors.parquet"
    assert embedded(tiny_run, pairs, whole) == 59
    fork = multiprocessing.get_context("fork")
    arguments = {"run": tiny_run, "pairs": pairs, "out": out, "kill_at": 5}
    process = fork.Process(target=embedded, kwargs=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    parts = tmp_path / ".vectors.parquet.parts"
    assert not out.exists()
    (parts / out.name).write_bytes(b"half of a file")  # as a kill at the end leaves it
    assert embedded(tiny_run, pairs, out) == 59 - 16
    assert out.read_bytes() == whole.read_bytes()
    assert pq.ParquetFile(out).num_row_groups == 6
    assert not parts.exists()
    assert embedded(tiny_run, pairs, out) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{out}: is finished; 59 rows")
    assert out.read_bytes() == whole.read_bytes()


def test_a_store_that_fails_for_long_costs_no_row(tiny_run, tmp_path, bucket, monkeypatch):
    """The pass ends, and the same call goes on. What is bad on the disk, missing in the store, or
    no image there, stays bad."""
    table, store, out = tiny_pairs(20), fsspec.filesystem("s3"), tmp_path / "vectors.parquet"
    images = dict(enumerate(table["image"].to_pylist()))
    paths = ["none.png" if row == 3 else f"{bucket}/{row}.png" for row in images]
    path = tmp_path / "pairs.csv"
    csv.write_csv(pa.table({"image": paths, "caption": table["caption"], "kind": paths}), path)
    del images[4]
    images[5] = b"no image"
    store.pipe({f"{bucket}/{row}.png": image for row, image in images.items()})
    read_file = data_pairs.read_file

    def failing(location: str) -> bytes:
        if location == f"{bucket}/15.png":
            raise OSError("no answer")
        return read_file(location)

    with monkeypatch.context() as patch:
        patch.setattr(access, "PATIENCE_SECONDS", 0.0)
        patch.setattr(data_pairs, "read_file", failing)
        line = r"^1 samples in a row took .*s3://bucket/15\.png.*; check the .* again \(.*\)$"
        with pytest.raises(ValueError, match=line):
            embedded(tiny_run, path, out)
    assert embedded(tiny_run, path, out) < 17
    found = pq.read_table(out)
    assert len(found) == 17
    assert found["image"] == found["class"]  # each row leads to its image


def test_two_ranks_make_the_file_of_one(tiny_run, pairs, tmp_path):
    """Up to the last digit of a vector, since ranks are processes of their own."""
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    assert embedded(tiny_run, pairs, one) == 59
    assert sorted(run_distributed(embedded, 2, tiny_run, pairs, two)) == [28, 31]
    tables = [pq.read_table(path).to_pydict() for path in (one, two)]
    assert tables[0].keys() == tables[1].keys()
    for name, column in tables[0].items():
        if "vector" in name:
            nulls = [[row for row, vector in enumerate(t[name]) if vector is None] for t in tables]
            assert nulls[0] == nulls[1] == ([41] if name == "text_vectors" else [])
            flat = [np.concatenate([np.ravel(v) for v in t[name] if v is not None]) for t in tables]
            np.testing.assert_allclose(*flat, atol=1e-3)
        else:
            assert column == tables[1][name]
    skipped = [path.with_suffix(".skipped.jsonl").read_bytes() for path in (one, two)]
    assert skipped[0] == skipped[1]


def test_a_file_of_something_else_is_kept(tiny_run, pairs, tmp_path):
    """It is replaced with --overwrite alone."""
    out = tmp_path / "vectors.parquet"
    pq.write_table(pa.table({"mine": [1]}), out)
    with pytest.raises(ValueError, match=r"exists, and was not made by this command; .*overwrite"):
        protoclip.embed(tiny_run, pairs, out)
    assert protoclip.embed(tiny_run, pairs, str(out), overwrite=True) == out
    assert "class" not in pq.read_schema(out).names
    by_class = DataConfig(train=str(pairs), class_column="kind")
    with pytest.raises(ValueError, match=r"made with class_column None, not kind; .*--overwrite"):
        protoclip.embed(tiny_run, by_class, out)
    other = DataConfig(train=str(pairs), caption_column="kind")
    with pytest.raises(ValueError, match=r"was made with other data; choose another --out"):
        protoclip.embed(tiny_run, other, out)
    protoclip.embed(tiny_run, other, out, overwrite=True)
    assert pq.read_table(out)["captions"].to_pylist()[0] == ["blue"]


@pytest.mark.parametrize("read", ["auto", "streaming"])
def test_shards_give_each_sample_once(read, tiny_run, shards, tmp_path):
    """Also as a stream."""
    data = DataConfig(train=shards, read=read, shuffle_buffer=20)
    out = protoclip.embed(tiny_run, data, tmp_path / "v.parquet")
    found = {row["sample_id"].split("/")[-1]: row for row in pq.read_table(out).to_pylist()}
    assert len(found) == pq.read_metadata(out).num_rows == 96
    model, _, tokenizer = protoclip.load(tiny_run)
    for row in list(found.values())[:3]:
        with torch.inference_mode():
            text = model.encode_text(tokenizer(row["captions"]), normalize=True)
        np.testing.assert_allclose(row["text_vectors"], text, atol=5e-4)
