"""Pairs in an Arrow table: ids, captions, and what is bad about a sample."""

import json

import pyarrow as pa
import pytest

from protoclip.data.pairs import BadSample, ImageTextPairs
from protoclip.data.split import hold_out_rows
from protoclip.evaluation.datasets import read_classes
from testing import tiny_pairs


def table(captions: pa.Array, **columns: list[object]) -> pa.Table:
    images = tiny_pairs(len(captions)).column("image")
    return pa.table({"image": images, "caption": captions, **columns})


@pytest.mark.parametrize(
    ("captions", "reason"),
    [
        (pa.array(["", "x"]), "empty caption"),
        (pa.array([None, "x"]), "empty caption"),
        (pa.array([[], ["x"]], pa.list_(pa.string())), "empty caption"),
        (pa.array([b"\xff\xfe", b"x"]), "not UTF-8"),
    ],
)
def test_a_pair_without_a_caption_is_bad(captions, reason):
    """It names sample and reason; its neighbour is fine."""
    pairs = ImageTextPairs(table(captions), name="a")
    with pytest.raises(BadSample, match=reason) as error:
        pairs.sample(0)
    assert error.value.sample_id == "a/0"
    assert pairs.sample(1).captions == ("x",)


def test_images_are_found_below_the_root(tmp_path):
    """Relative and absolute paths, ranges of a larger file; what is missing or short is bad."""
    (tmp_path / "one.png").write_bytes(b"first")
    (tmp_path / "many.bin").write_bytes(b"..second..")
    captions = ["x"] * 3
    paths = ["one.png", str(tmp_path / "one.png"), "none.png"]
    files = ImageTextPairs(
        pa.table({"path": paths, "caption": captions}), name="a", root=str(tmp_path)
    )
    assert [files.sample(row).image for row in (0, 1)] == [b"first"] * 2
    assert files.sample(0).where == str(tmp_path / "one.png")
    with pytest.raises(BadSample, match="no such file"):
        files.sample(2)
    ranges = pa.table(
        {"path": ["many.bin"] * 2, "offset": [2, 8], "size": [6, 6], "caption": captions[:2]}
    )
    shards = ImageTextPairs(ranges, name="a", root=str(tmp_path), in_ranges=True)
    assert shards.sample(0).image == b"second"
    with pytest.raises(BadSample, match="ends after 2 of 6 bytes"):
        shards.sample(1)


def test_an_unreadable_image_names_its_sample():
    """Broken bytes raise with the sample's id; so does a row without any."""
    broken = tiny_pairs(4).set_column(0, "image", pa.array([b"junk", None] * 2, pa.binary()))
    pairs = ImageTextPairs(broken, name="broken")
    with pytest.raises(BadSample, match="tiny/2"):
        pairs.image(2)
    with pytest.raises(BadSample, match="no image"):
        pairs.sample(3)


def test_ranges_of_files_stay_below_the_root(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "data").mkdir()
    for name in (str(tmp_path / "secret"), "../secret"):
        columns = {"image": [name], "caption": ["a"], "offset": [0], "size": [6]}
        root = str(tmp_path / "data")
        pairs = ImageTextPairs(pa.table(columns), name="t", root=root, in_ranges=True)
        with pytest.raises(BadSample, match="lies outside of"):
            pairs.read_encoded(0)


def test_an_unknown_class_is_none():
    """`datasets` writes -1 for a `ClassLabel` that is not known."""
    names = {"info": {"features": {"kind": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    columns = {"image": [b""] * 3, "caption": ["a"] * 3}
    of_numbers = ([1, -1, 0], {b"huggingface": json.dumps(names)})
    for values, metadata in (of_numbers, (["dog", " ", "cat"], {})):
        table = pa.table({**columns, "kind": values}).replace_schema_metadata(metadata)
        pairs = ImageTextPairs(table, name="t", class_column="kind")
        assert [pairs.read_class(row) for row in range(3)] == ["dog", "", "cat"]


def not_utf8(texts: list[bytes]) -> pa.Array:
    """A column of strings, as some programs write it to Parquet files."""
    encoded = pa.array(texts, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(encoded), encoded.buffers())


def test_a_string_that_is_not_utf8_costs_its_row_alone(tmp_path):
    """As a caption and as an image's name; a class is shown with a sign for what is wrong."""
    wrong = not_utf8([b"caf\xe9", b"x"])
    several = pa.ListArray.from_arrays([0, 1, 2], wrong)
    (tmp_path / "x").write_bytes(b"image")
    images = tiny_pairs(2)["image"]
    for columns, reason in (
        ({"image": images, "caption": wrong, "kind": wrong}, "caption is not UTF-8"),
        ({"image": images, "caption": several, "kind": wrong}, "caption is not UTF-8"),
        ({"image": wrong, "caption": ["a", "b"], "kind": wrong}, "no such file"),
    ):
        pairs = ImageTextPairs(
            pa.table(columns), name="a", root=str(tmp_path), id_column=None, class_column="kind"
        )
        with pytest.raises(BadSample, match=f"a/0.*{reason}"):
            pairs.sample(0)
        pairs.sample(1)
        assert [pairs.read_class(row) for row in (0, 1)] == ["caf\ufffd", "x"]
        assert read_classes(pairs, [1, 0]) == ["x", "caf\ufffd"]
        assert pairs.column("kind").tolist() == ["caf\ufffd", "x"]
        assert pairs.key
        assert hold_out_rows([pairs], share=0.5, folder=tmp_path / reason).size <= 1
