"""Pairs in an Arrow table: captions, faults of samples, and the content that a run compares."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from protoclip.data.pairs import BadSample, ImageTextPairs, describe_change, fingerprint_sources
from protoclip.data.shards import ShardStream, facts_that_may_move
from protoclip.data.sources import drop_rows, mix_pairs
from protoclip.data.split import hold_out_rows
from protoclip.data.tools import pack
from protoclip.evaluation.datasets import read_classes
from testing import tiny_pairs


def test_a_range_that_a_file_does_not_hold_is_bad(tmp_path):
    (tmp_path / "many.bin").write_bytes(b"..second..")
    columns = {"path": ["many.bin"] * 2, "offset": [2, 8], "size": [6, 6], "caption": ["x"] * 2}
    shards = ImageTextPairs(pa.table(columns), name="a", root=str(tmp_path), in_ranges=True)
    assert shards.sample(0).image == b"second"
    with pytest.raises(BadSample, match="ends after 2 of 6 bytes"):
        shards.sample(1)


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


def of(table: pa.Table, name: str = "tiny", **more: Any) -> list[dict[str, Any]]:
    return fingerprint_sources(ImageTextPairs(table, name=name, **more))


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


TINY = tiny_pairs(40)
CAPTIONS = TINY["caption"].combine_chunks()
STRUCTS = pa.array([{"bytes": b, "path": "x.png"} for b in TINY["image"].to_pylist()])
# The same pairs, stored in another way.
EQUAL: dict[str, Callable[[], pa.Table]] = {
    "chunks": lambda: pa.concat_tables([TINY[:7], TINY[7:30], TINY[30:]]),
    "large texts": lambda: with_column(TINY, "caption", CAPTIONS.cast(pa.large_string())),
    "bytes": lambda: with_column(TINY, "caption", CAPTIONS.cast(pa.binary())),
    "dictionary": lambda: with_column(TINY, "caption", CAPTIONS.dictionary_encode()),
    "structs": lambda: with_column(TINY, "image", STRUCTS),
    "one column more": lambda: TINY.append_column("new", CAPTIONS),
}
PNG = TINY["image"].to_pylist()
OTHER: dict[str, tuple[Callable[[], pa.Table], str]] = {
    "fewer rows": (lambda: TINY[:32], "number of rows: 40 before, 32 now"),
    "another order": (lambda: TINY.take(list(range(40))[::-1]), "other sample ids, or their order"),
    "a caption": (
        lambda: with_column(TINY, "caption", pa.array([*CAPTIONS.to_pylist()[:39], "new"])),
        "other captions",
    ),
    "an image": (
        lambda: with_column(TINY, "image", pa.array([*PNG[:39], PNG[39] + b"\0"])),
        "other images",
    ),
}


@pytest.mark.parametrize("way", EQUAL)
def test_equal_content_is_equal(way):
    assert describe_change(of(TINY), of(EQUAL[way]())) is None


@pytest.mark.parametrize("way", OTHER)
def test_other_content_is_told(way):
    table, words = OTHER[way]
    assert describe_change(of(TINY), of(table())) == words


def test_the_ends_of_texts_and_of_lists_count():
    """The same letters in the same order, divided in another way."""
    one, other = (
        with_column(TINY[:2], "caption", pa.array(captions))
        for captions in (["ab", "c"], ["a", "bc"])
    )
    assert describe_change(of(one), of(other)) == "other captions"
    one, other = (
        with_column(TINY[:2], "caption", pa.array(captions))
        for captions in ([["a", "b"], ["c"]], [["a"], ["b", "c"]])
    )
    assert describe_change(of(one), of(other)) == "other captions"
    assert describe_change(of(one), of(pa.concat_tables([one[:1], one[1:]]))) is None


def test_equal_images_under_other_ids_and_file_names(tmp_path):
    """Row numbers are ids with the file's name; a mixture names its sources."""
    plain = TINY.drop_columns("sample_id")
    assert describe_change(of(plain), of(plain)) is None
    assert describe_change(of(plain), of(plain, "other")) == "other sample ids, or their order"
    one, other = (
        fingerprint_sources(
            mix_pairs([ImageTextPairs(TINY, name="a"), ImageTextPairs(table, name="b")])
        )
        for table in (TINY, TINY[:9])
    )
    assert describe_change(one, other) == "number of rows of 'b': 40 before, 9 now"
    assert describe_change(one, of(TINY)) == "2 sources before, 1 now"
    for row, image in enumerate(PNG):
        (tmp_path / f"{row}.png").write_bytes(image)
    files = with_column(TINY, "image", pa.array([f"{row}.png" for row in range(40)]))
    before = of(files, root=str(tmp_path))
    (tmp_path / "3.png").unlink()  # what cannot be read now is not known to differ
    assert describe_change(before, of(files, root=str(tmp_path))) is None
    (tmp_path / "5.png").write_bytes(PNG[6])
    assert describe_change(before, of(files, root=str(tmp_path))) == "other images"


def test_a_stream_moves_between_a_disk_and_a_store_and_stays_a_stream(tmp_path):
    """Known then by the names of its shards, which are all that checkpoints up to version 1.0.0
    know of shards in a store."""
    pack(ImageTextPairs(TINY, name="tiny"), tmp_path, samples_per_shard=8)

    def facts(pattern: str) -> list[dict[str, Any]]:
        stream = ShardStream(pattern, seed=0, name="tiny")
        return [facts_that_may_move(of_one, stream) for of_one in fingerprint_sources(stream)]

    local, remote = facts(f"{tmp_path}/{{00000..00004}}.tar"), facts("s3://b/{00000..00004}.tar")
    before = fingerprint_sources(
        ShardStream("s3://a/{00000..00004}.tar", seed=0)
    )  # of an earlier version
    for one, other in ((local, remote), (remote, local), (before, remote), (before, local)):
        assert describe_change(one, other) is None
    assert describe_change(remote, facts("s3://b/{00000..00003}.tar")) == "other shards"
    (tmp_path / "00003.tar").write_bytes(b"other")
    assert describe_change(local, facts(f"{tmp_path}/*.tar")) == "other shards"
    for stream in (local, remote, before):
        assert describe_change(stream, of(TINY)) == (
            "a stream before, pairs in any order now; set data.read = streaming"
        )
        assert describe_change(of(TINY), stream) == "pairs in any order before, a stream now"


def test_pairs_of_which_some_are_held_out_now_are_others():
    """Whether they are may follow from settings that a run may change; unknown is no difference."""
    pairs = mix_pairs([ImageTextPairs(TINY, name="a")])
    whole, part = (
        fingerprint_sources(pairs),
        fingerprint_sources(drop_rows(pairs, np.array([3, 5]))),
    )
    assert describe_change(whole, part) == describe_change(part, whole)
    assert describe_change(whole, part) == (
        "other pairs that are held out, as by another run.guard or run.evaluate_every"
    )
    del whole[0]["held_out"]  # as in a checkpoint of an earlier version
    assert describe_change(whole, part) is None


def test_changed_classes_and_names_of_rows_are_other_content():
    """Also where the facts of the rows are kept."""
    kinds = [str(row % 3) for row in range(40)]
    with_classes = of(
        TINY.append_column("kind", pa.array(kinds)), class_column="kind", table_key="same"
    )
    changed = TINY.append_column("kind", pa.array(kinds[::-1]))
    assert describe_change(with_classes, of(changed, class_column="kind")) == "other classes"
    assert describe_change(of(TINY), with_classes) is None
    without_ids = TINY.drop_columns(["sample_id"])
    one, other = (of(without_ids, name, id_column=None, table_key="x") for name in ("a", "b"))
    assert (one[0]["ids"], other[0]["ids"]) == ("a/row", "b/row")


@pytest.mark.parametrize("rows", [slice(None), slice(1, None)])
@pytest.mark.parametrize("kind", ["bytes", "structs"])
def test_facts_of_rows_copy_no_image(kind, rows):
    """Of all rows, and of those that are chosen."""
    images = [bytes(100_000)] * 30
    structs = pa.array([{"bytes": image, "path": "x.png"} for image in images])
    columns = {"image": structs if kind == "structs" else pa.array(images)}
    table = pa.table({**columns, "caption": ["x"] * 30})
    pairs = ImageTextPairs(table, name="large").subset(np.arange(30)[rows])
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        pairs.fingerprint(images=False)
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 100_000
