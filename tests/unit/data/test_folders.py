"""Folders as pairs: captions beside images, metadata, saved datasets, Parquet exports."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protoclip.config import DataConfig
from protoclip.data.folders import open_folder
from protoclip.data.pairs import BadSample, ImageTextPairs


def write(folder: Path, files: dict[str, Any]) -> Path:
    """Files of text or bytes, or JSON of anything else."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, (str, bytes)):
            content = json.dumps(content)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def opened(path: Path | str, **options: Any) -> ImageTextPairs:
    return open_folder(DataConfig(train=str(path), **options))


def ids(pairs: ImageTextPairs) -> list[str]:
    return list(pairs.sample_ids())


def test_images_with_captions_beside_them(tmp_path, cache):
    """At any depth and behind links, in order of the names, each with its image and captions.

    Links that lead out of the folder need a permission: an archive of somebody else's may hold one
    to any file, whose text would be a caption.
    """
    store = write(cache / "store", {"x/1.jpg": b"L", "x/1.txt": "linked", "2.jpg": b"M"})
    write(
        tmp_path,
        {
            "b.jpg": b"B",
            "b.txt": "\ufeffein Häuschen\n",
            "a.PNG": b"A",
            "a.json": {"caption": "一只猫", "url": "x"},
            "sub/deep er/c.webp": b"C",
            "sub/deep er/c.json": {"Captions": ["one", "", "two"]},
            "sub/d.jpeg": b"D",
            "sub/d.txt": "from the text",
            "sub/d.json": {"caption": "from the JSON"},
            ".hidden/e.jpg": b"E",
            ".hidden/e.txt": "hidden",
            "._a.png": b"no image",
            "readme.md": "no image",
            "z.txt": "of a linked image",
        },
    )
    (tmp_path / "linked").symlink_to(store / "x")
    (tmp_path / "z.jpg").symlink_to(store / "2.jpg")
    pairs = opened(tmp_path)
    (note,) = pairs.notes
    assert "left out 1 captions that are links out of it; see --allow_links (" in note
    with pytest.raises(BadSample, match=r"leads out; --allow_links true follows it"):
        pairs.read_encoded(ids(pairs).index("z"))
    pairs = opened(tmp_path, allow_links=True)
    assert ids(pairs) == ["a", "b", "z", "linked/1", "sub/d", "sub/deep er/c"]
    assert [pairs.read_encoded(row) for row in range(6)] == [b"A", b"B", b"M", b"L", b"D", b"C"]
    assert [pairs.sample_captions(row) for row in range(6)] == [
        ("一只猫",),
        ("ein Häuschen",),
        ("of a linked image",),
        ("linked",),
        ("from the text",),
        ("one", "two"),
    ]
    assert pairs.name == tmp_path.name
    assert pairs.notes == []


def test_ids_are_unique(tmp_path):
    """Pictures that differ in their suffix alone keep it, whatever else is called like them."""
    names = ["a.jpg", "a.png", "a.jpg.png", "b.jpg", "a/a.jpg", "a/b.jpg"]
    files = dict.fromkeys(names, b"x")
    captions = {str(Path(name).with_suffix(".txt")): "caption" for name in names}
    pairs = opened(write(tmp_path, files | captions))
    assert ids(pairs) == ["a.jpg", "a.jpg.png", "a.png", "b", "a/a", "a/b"]


def test_what_is_left_out_is_counted(tmp_path):
    """Images without a caption, or with one that cannot be read; links that lead nowhere or in a
    circle; names that are not UTF-8. The rest is read."""
    write(
        tmp_path,
        {
            "good.jpg": b"A",
            "good.txt": "fine",
            "alone1.jpg": b"B",
            "alone2.jpg": b"B",
            "broken.jpg": b"C",
            "broken.json": '{"caption": ',
            "other.jpg": b"D",
            "other.json": {"label": "no caption"},
            "sub/e.jfif": b"E",
            "sub/e.txt": "fine too",
            "sub/f.HEIC": b"F",
            "sub/f.txt": "of a kind that is not read",
        },
    )
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "sub" / "again").symlink_to(tmp_path / "sub")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(b"F")
    pairs = opened(tmp_path)
    assert ids(pairs) == ["good", "sub/e"]
    counted = [note.removeprefix(f"{tmp_path}: left out ").split(" (")[0] for note in pairs.notes]
    assert sorted(counted) == [
        "1 images of a kind that is not read",
        "1 images whose .json has no caption",
        "1 images whose caption file cannot be read",
        "1 names that are not UTF-8",
        "2 links to folders already read",
        "3 images without a caption",
    ]
    assert f"{tmp_path}: left out 3 images without a caption ('alone1.jpg')" in pairs.notes
    # Also when the index is there already.
    notes = opened(write(tmp_path, {"late.avif": b"G"})).notes
    note = "left out 2 images of a kind that is not read ('late.avif'); convert them to JPEG, PNG,"
    assert sum(note in line for line in notes) == 1


def test_a_caption_that_is_not_utf8_spoils_its_row_alone(tmp_path):
    write(tmp_path, {"a.jpg": b"A", "a.txt": b"caf\xe9", "b.jpg": b"B", "b.txt": "b"})
    write(tmp_path, {"c.jpg": b"C", "c.json": b'{"caption": "caf\xe9"}'})
    write(tmp_path, {"d.jpg": b"D", "d.json": b'{"caption": "\\ud800"}'})
    pairs = opened(tmp_path)
    assert pairs.sample_captions(1)[0] == "b"
    for row in (0, 2, 3):
        with pytest.raises(BadSample, match="not UTF-8"):
            pairs.sample(row)


def test_keys_of_json_captions_are_chosen(tmp_path):
    """By the usual names, or by the setting; settings without effect are told."""
    content = {"a.jpg": b"A", "a.json": {"text": "usual", "short": "s", "long": ["l", "ll"]}}
    path = str(write(tmp_path, content))
    assert opened(path).sample_captions(0) == ("usual",)
    pairs = opened(path, caption_column=["short", "long"], id_column="x")
    assert pairs.sample_captions(0) == ("s", "l", "ll")
    assert pairs.notes == []


def test_a_folder_that_changed_is_read_again(tmp_path):
    """When a pair or a caption changes; the images themselves are not in the index."""
    keys = [opened(write(tmp_path, {"a.jpg": b"A", "a.txt": "a"})).table_key]
    for change in ({"a.jpg": b"B"}, {"a.txt": "other"}, {"b.jpg": b"B"}, {"c/d.jpg": b"D"}):
        keys.append(opened(write(tmp_path, change)).table_key)
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_name_the_images(tmp_path, kind):
    """In the column `file_name`, whatever other columns there are; captions beside are unused."""
    rows = {"image": "no", "file_name": "x/a.jpg", "text": "猫"}
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([rows]), tmp_path / "metadata.parquet")
    text = f"{','.join(rows)}\n{','.join(rows.values())}" if kind == "csv" else rows
    write(tmp_path, {"x/a.jpg": b"A", "b.jpg": b"B", "b.txt": "beside"})
    if kind != "parquet":
        write(tmp_path, {f"metadata.{kind}": text})
    pairs = opened(tmp_path)
    assert len(pairs) == 1
    assert (pairs.sample_captions(0)[0], pairs.read_encoded(0)) == ("猫", b"A")


def dataset(captions: list[str]) -> datasets.Dataset:
    images = [{"bytes": f"image of {text}".encode(), "path": None} for text in captions]
    features = {"image": datasets.Image(), "text": datasets.Value("string")}
    return datasets.Dataset.from_dict(
        {"image": images, "text": captions}, features=datasets.Features(features)
    )


def test_a_saved_dataset(tmp_path, cache):
    """All its files in order, read where they lie."""
    captions = [f"caption {n} 猫" for n in range(11)]
    dataset(captions).save_to_disk(tmp_path / "data", num_shards=3)
    pairs = opened(tmp_path / "data")
    assert [pairs.sample_captions(row)[0] for row in range(11)] == captions
    assert pairs.read_encoded(10) == "image of caption 10 猫".encode()
    assert pairs.sample_id(10) == "data/10"
    assert not list(cache.rglob("*.arrow"))


def test_a_dataset_of_several_splits(tmp_path):
    """One of them must be named; a single one need not be."""
    two = datasets.DatasetDict({split: dataset([split]) for split in ("train", "test")})
    two.save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"splits \(train, test\); name one, as in .*/two/train"):
        opened(tmp_path / "two")
    assert opened(tmp_path / "two" / "test").sample_captions(0)[0] == "test"
    datasets.DatasetDict({"train": dataset(["only"])}).save_to_disk(tmp_path / "one")
    assert opened(tmp_path / "one").sample_captions(0)[0] == "only"


def test_a_folder_of_parquet_files(tmp_path):
    """One after the other by name; files of several splits are not mixed."""
    for n in range(12):
        part = pa.table({"image": [b"%d" % n], "text": [f"caption {n}"]})
        pq.write_table(part, tmp_path / f"train-{n:05d}-of-00012.parquet")
    pairs = opened(tmp_path)
    assert [pairs.sample_captions(row)[0] for row in range(12)] == [
        f"caption {n}" for n in range(12)
    ]
    pq.write_table(part, tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"splits \(test, train\).*as in .*test-\*\.parquet"):
        opened(tmp_path)


def test_hidden_tables_are_passed_over(tmp_path):
    pq.write_table(pa.table({"image": ["a.png"], "caption": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "._a.parquet").write_bytes(b"\0\5\26\7")
    assert len(opened(tmp_path)) == 1
