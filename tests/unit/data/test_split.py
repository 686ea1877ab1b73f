"""Held-out pairs: nothing of them is left in training."""

import errno
import io
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from protoclip.data import split
from protoclip.data.captions import normalise_texts, normalised
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.split import count_shared, held_out_rows
from protoclip.data.view import PairsView, mixed_pairs, without
from protoclip.evaluation.datasets import have_class


def source(number: int, name: str, *, captions: int, images: int, seed: int = 0) -> ImageTextPairs:
    """Rows with one or two of so many captions, and one of so many images; ids of their own."""
    draw = np.random.default_rng(seed)
    table = pa.table(
        {
            "sample_id": [f"{name}{row}" for row in range(number)],
            "image": [b"image %d" % draw.integers(images) for _ in range(number)],
            "caption": [
                [f" a {draw.integers(captions)}" for _ in range(draw.integers(1, 3))]
                for _ in range(number)
            ],
        }
    )
    return ImageTextPairs(table, name=name)


def contents(pairs: ImageTextPairs | PairsView, rows: Iterable[int]) -> tuple[set[str], set[bytes]]:
    samples = [pairs.sample(row) for row in rows]
    return {text for s in samples for text in s.captions}, {s.image for s in samples}


@pytest.mark.parametrize(
    ("captions", "images"), [(100_000, 100_000), (2000, 100_000), (100_000, 2000), (2000, 2000)]
)
def test_no_caption_and_no_image_is_on_both_sides(captions, images, tmp_path):
    pairs = source(1000, "web", captions=captions, images=images)
    rows = held_out_rows([pairs], share=0.1, folder=tmp_path)
    rest = without(pairs, rows)
    assert 0 < len(rows) <= 100
    assert len(rows) > 65 or captions < 5000 or images < 5000
    assert len(rows) + len(rest) == 1000
    seen = contents(rest, range(len(rest)))
    for one, other in zip(contents(pairs, rows.tolist()), seen, strict=True):
        assert not one & other


@pytest.mark.parametrize("copies", [2, 5])
def test_copies_of_an_image_are_held_out_together(copies, tmp_path):
    """As in a Parquet file of images with a row a caption, where each is in several rows."""
    table = pa.table(
        {
            "sample_id": [str(row) for row in range(1000)],
            "image": [b"image %d" % (row // copies) for row in range(1000)],
            "caption": [f"caption {row}" for row in range(1000)],
        }
    )
    pairs = ImageTextPairs(table, name="web")
    rows = held_out_rows([pairs], share=0.1, folder=tmp_path)
    assert len(rows) == 100
    rest = without(pairs, rows)
    assert not contents(pairs, rows.tolist())[1] & contents(rest, range(len(rest)))[1]


def jpeg(number: int, quality: int = 90, side: int = 64) -> bytes:
    """A smooth image of random colours."""
    colours = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC)
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


@pytest.mark.parametrize(
    "again",
    [
        {"caption": lambda row: f"A  SHOE \u00e9 {row}"},
        {"caption": lambda row: f"a shoe e\u0301 {row}"},
        {"image": lambda row: jpeg(row, quality=80)},
        {"image": lambda row: jpeg(row, side=48)},
    ],
    ids=["case and spaces", "Unicode form", "saved again", "smaller"],
)
def test_a_pair_is_held_out_with_its_copy_in_another_form(again, tmp_path):
    first = {"caption": "a shoe \u00e9 {}".format, "image": jpeg}
    other = {"caption": "other {}".format, "image": lambda row: jpeg(1000 + row)}
    columns = {name: [*map(first[name], range(60))] for name in first}
    for name, column in columns.items():
        column += map(again.get(name, other[name]), range(60))
    pairs = ImageTextPairs(pa.table(columns), name="web", id_column=None)
    rows = {*held_out_rows([pairs], share=0.3, folder=tmp_path).tolist()}
    assert len(rows) == 36
    assert rows == {(row + 60) % 120 for row in rows}


def test_images_of_one_colour_are_no_copies(tmp_path):
    columns = {"image": [flat(shade) for shade in range(100)], "caption": [*map(str, range(100))]}
    pairs = ImageTextPairs(pa.table(columns), name="web", id_column=None)
    assert len(held_out_rows([pairs], share=0.3, folder=tmp_path)) == 30


def flat(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


@given(st.lists(st.one_of(st.none(), st.text(), st.text(" \t\x1cAbÉé\u0301ﬁ™", max_size=5))))
def test_many_captions_are_normalised_as_one_is(captions):
    texts = normalise_texts(pa.array(captions, pa.large_string()).cast(pa.large_binary()))
    assert texts.to_pylist() == [c if c is None else normalised(c).encode() for c in captions]


@pytest.mark.parametrize(
    "labels",
    [
        ["a", None, " ", "a", "\x1c"],
        [1, None, 2, 1, 0],
        pa.array(["a", None, ""]).dictionary_encode(),
    ],
)
def test_rows_with_a_class_are_found_a_block_at_a_time(labels, monkeypatch):
    """So that no rank makes a Python object for each row."""
    monkeypatch.setattr("protoclip.data.pairs.BLOCK", 2)
    columns = {"image": ["a"] * len(labels), "caption": ["a"] * len(labels), "label": labels}
    pairs = ImageTextPairs(pa.table(columns), name="web", class_column="label")
    assert have_class(pairs).tolist() == [bool(pairs.class_of(row)) for row in range(len(pairs))]
    some = pairs.subset(np.array([1, 2]))
    assert have_class(some).tolist() == [bool(some.class_of(row)) for row in range(2)]
    assert [*some.sample_ids()] == [some.sample_id(row) for row in range(2)]


def test_no_more_than_5000_pairs_are_held_out_by_default(tmp_path):
    pairs = source(5600, "web", captions=10**12, images=10**12)
    assert len(held_out_rows([pairs], share=0.95, folder=tmp_path)) == 5000


def test_captions_that_many_pairs_share_are_not_held_out(tmp_path):
    pairs = source(3000, "web", captions=5, images=100_000)
    assert len(held_out_rows([pairs], share=0.1, folder=tmp_path)) == 0


def test_the_choice_is_kept_and_hardly_changes_when_pairs_are_added(tmp_path):
    pairs = source(2000, "web", captions=10**9, images=10**9)
    rows = held_out_rows([pairs], share=0.1, folder=tmp_path)
    assert np.array_equal(rows, held_out_rows([pairs], share=0.1, folder=tmp_path / "other"))
    longer = source(2100, "web", captions=10**9, images=10**9)
    again = held_out_rows([longer], share=0.1, folder=tmp_path)
    assert len(np.intersect1d(rows, again)) > 0.9 * len(rows)
    kept = {len(np.load(file)["rows"]): file for file in tmp_path.glob("*.npz")}[len(rows)]
    np.savez(kept, rows=rows[:7])
    assert len(held_out_rows([pairs], share=0.1, folder=tmp_path)) == 7
    content = kept.read_bytes()
    kept.write_bytes(content.replace(rows[:7].tobytes(), rows[1:8].tobytes()))
    assert np.array_equal(rows, held_out_rows([pairs], share=0.1, folder=tmp_path))


def test_a_choice_of_version_1_0_stays(tmp_path, monkeypatch):
    """So its runs go on with the pairs that they held out, though another rule chose them."""
    pairs = source(200, "web", captions=10**9, images=10**9)
    monkeypatch.setattr(split, "FORM", split.FORM_1_0)
    held_out_rows([pairs], share=0.1, folder=tmp_path)
    (kept,) = tmp_path.glob("*.npz")
    np.savez(kept, rows=np.arange(7))
    monkeypatch.undo()
    assert len(held_out_rows([pairs], share=0.1, folder=tmp_path)) == 7


def test_a_chain_of_pairs_is_held_out_whole_or_not_at_all(tmp_path, monkeypatch):
    """Each shares a caption with the next one, so a pass over the data finds one more at most."""
    for passes, number in ((8, 36), (2, 0)):
        monkeypatch.setattr(split, "PASSES", passes)
        captions = [[f"{row // 4} {row % 4}", f"{row // 4} {row % 4 + 1}"] for row in range(400)]
        columns = {"image": [b"%d" % row for row in range(400)], "caption": captions}
        pairs = ImageTextPairs(pa.table(columns), name="web", id_column=None)
        rows = held_out_rows([pairs], share=0.1, folder=tmp_path / str(passes))
        assert len(rows) >= number
        assert {*rows.tolist()} == {4 * (row // 4) + n for row in rows.tolist() for n in range(4)}


def test_at_most_so_many_are_held_out(tmp_path):
    pairs = source(2000, "web", captions=10**9, images=10**9)
    assert len(held_out_rows([pairs], share=0.5, most=30, folder=tmp_path)) == 30


def test_equal_files_and_equal_urls_stay_together(tmp_path):
    for row in range(40):
        (tmp_path / f"{row}.jpg").write_bytes(b"%04d" % (row // 2))
    names = [f"{row}.jpg" for row in range(40)]
    names += [f"https://example.org/{row // 2}" for row in range(40)]
    table = pa.table({"image": names, "caption": [str(row) for row in range(80)]})
    pairs = ImageTextPairs(table, name="files", root=str(tmp_path), id_column=None)
    rows = held_out_rows([pairs], share=0.5, folder=tmp_path)
    assert len(rows) > 4
    assert set(rows.tolist()) == {row ^ 1 for row in rows.tolist()}


def test_the_rest_of_a_mixture_keeps_ids_and_order(tmp_path):
    one = source(500, "a", captions=10**9, images=10**9)
    two = source(300, "b", captions=10**9, images=10**9, seed=1)
    mixed = mixed_pairs([one, two])
    rows = held_out_rows([one, two], share=0.2, folder=tmp_path)
    rest, left = without(mixed, rows), set(rows.tolist())
    ids = [sample_id for row, sample_id in enumerate(mixed.sample_ids()) if row not in left]
    assert [*rest.sample_ids()] == [rest.sample_id(row) for row in range(len(rest))] == ids
    assert [rest.sample(row).sample_id for row in range(len(rest))] == ids
    first = sum(rows < 500)
    assert [len(rows) for _, rows in rest.parts] == [500 - first, 300 - len(rows) + first]


@pytest.mark.parametrize("number", [10**9, 2000], ids=["all differ", "many are equal"])
def test_what_the_start_was_trained_on_is_not_held_out(number, tmp_path):
    """Of the same pairs no others than the start's are, whatever the share; of pairs that were
    added, some of these too. What the start held out still is."""
    grown = source(1000, "web", captions=number, images=number)
    pairs = grown.subset(np.arange(700))
    first = held_out_rows([pairs], share=0.02, folder=tmp_path)
    before = [(pairs, first)]
    again = held_out_rows([pairs], share=0.05, folder=tmp_path, before=before)
    assert np.array_equal(again, first)
    rows = held_out_rows([grown], share=0.05, folder=tmp_path, before=before)
    assert (rows >= 700).any()
    if number > 2000:  # else a new pair may have an image of these, and is trained on
        assert np.array_equal(rows[rows < 700], first)
    seen = contents(pairs, np.setdiff1d(np.arange(700), first).tolist())
    for one, other in zip(contents(grown, rows.tolist()), seen, strict=True):
        assert not one & other


def test_files_of_one_name_in_two_folders_are_two_images(tmp_path):
    """So pairs are held out of one, though the model was trained on the other before."""
    both = []
    for name in "ab":
        (tmp_path / name).mkdir()
        for row in range(40):
            (tmp_path / name / f"{row}.jpg").write_bytes(f"{name} {row:04}".encode())
        captions = [f"{name} {row}" for row in range(40)]
        table = pa.table({"image": [f"{row}.jpg" for row in range(40)], "caption": captions})
        both.append(ImageTextPairs(table, name=name, root=str(tmp_path / name), id_column=None))
    before = [(both[0], np.array([], np.int64))]
    assert len(held_out_rows([both[1]], share=0.5, folder=tmp_path, before=before)) == 20
    assert count_shared([both[1]], before, folder=tmp_path) == (40, 0, 0)
    assert len(held_out_rows([both[0]], share=0.5, folder=tmp_path, before=before)) == 0


def test_a_column_that_is_called_offset_hides_no_image(tmp_path):
    """With a size it would be that of an image in a shard."""
    images = [f"{row // 2}.jpg" for row in range(40)]
    columns = {"image": images, "caption": [f"a {row}" for row in range(40)], "offset": range(40)}
    pairs = ImageTextPairs(pa.table(columns), name="web", id_column=None)
    rows = held_out_rows([pairs], share=0.5, folder=tmp_path)
    assert len(rows)
    assert not {images[row] for row in rows} & {images[r] for r in range(40) if r not in rows}


@pytest.mark.parametrize("kind", [pa.int64(), pa.string()])
def test_columns_called_offset_and_size_beside_images_are_a_shops(kind, tmp_path):
    images = [b"image %d" % (row // 2) for row in range(40)]
    columns = {"image": images, "caption": [f"a {row}" for row in range(40)]}
    numbers = pa.array([*map(str, range(40))]).cast(kind)
    table = pa.table({**columns, "offset": numbers, "size": numbers})
    pairs = ImageTextPairs(table, name="web", id_column=None)
    assert pairs.encoded(3) == images[3]
    rows = held_out_rows([pairs], share=0.5, folder=tmp_path)
    assert len(rows)
    assert not {images[row] for row in rows} & {images[r] for r in range(40) if r not in rows}


def test_the_choice_depends_on_the_names_that_ids_begin_with(tmp_path):
    """Wherever it is kept."""
    tables = [source(200, name, captions=10**9, images=10**9).table for name in "ab"]

    def chosen(names: str, folder: str) -> list[int]:
        named = [ImageTextPairs(t, name=n) for t, n in zip(tables, names, strict=True)]
        pairs = mixed_pairs(named).sources
        return held_out_rows(pairs, share=0.2, folder=tmp_path / folder).tolist()

    assert chosen("ab", "one") != chosen("uv", "one")
    assert chosen("uv", "one") == chosen("uv", "other")


def test_names_below_a_url_are_the_urls(tmp_path):
    names, captions = [f"{n}.jpg" for n in range(12)], [f"a {n}" for n in range(12)]
    whole = pa.table({"image": [f"s3://b/{name}" for name in names], "caption": captions})
    judging = ImageTextPairs(whole, name="a", id_column=None)
    table = pa.table({"image": names, "caption": captions})
    training = ImageTextPairs(table, name="b", id_column=None, root="s3://b")
    none = np.array([], np.int64)
    assert count_shared([judging], [(training, none)], folder=tmp_path) == (12, 12, 12)


def test_pairs_that_judge_and_are_trained_on_are_counted(tmp_path):
    judging = source(300, "other", captions=4000, images=10**9)
    training = source(2000, "web", captions=4000, images=10**9, seed=1)
    table = training.table.take(np.arange(20))  # with their captions
    both = ImageTextPairs(pa.concat_tables([judging.table, table]), name="both", id_column=None)
    captions, _ = contents(training, range(2000))
    with_caption = sum(bool(captions & {*both.sample_captions(row)}) for row in range(len(both)))
    assert 20 < with_caption < 320
    found = count_shared([both], [(training, np.array([], np.int64))], folder=tmp_path)
    assert found == (320, 20, with_caption)
    held = np.arange(5)  # of what is trained on
    assert count_shared([both], [(training, held)], folder=tmp_path)[:2] == (320, 15)


def test_of_many_images_only_those_that_look_equal_are_read_whole(tmp_path, monkeypatch):
    """All have the same size; of the others a page is read at most."""
    monkeypatch.setattr(split, "COMPARED", 299)
    draw, read = np.random.default_rng(0), list[tuple[int, bool]]()
    images = [draw.bytes(20_000) for _ in range(300)]
    images[280:] = images[:20]
    captions = [str(row) for row in range(300)]
    table = pa.table({"image": pa.array(images, pa.binary()), "caption": captions})

    class Counted(ImageTextPairs):
        def encoded(self, row: int, part: slice | None = None) -> bytes:
            data = super().encoded(row, part)
            read.append((row, len(data) == 20_000))
            assert len(data) <= 4096 or part is None
            return data

    pairs = Counted(table, name="web", id_column=None)
    rows = {*held_out_rows([pairs], share=0.2, folder=tmp_path).tolist()}
    assert all((row + 280 in rows) == (row in rows) for row in range(20))
    assert 40 < len(rows) <= 60
    whole = {row for row, is_whole in read if is_whole}
    assert whole
    assert not whole & {*range(20, 280)}


def test_images_of_every_binary_type_are_measured():
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view()):
        images = pa.array([b"a", b"abc"]).cast(kind)
        pairs = ImageTextPairs(pa.table({"image": images, "caption": ["a", "b"]}), name="t")
        assert pairs.image_sizes().tolist() == [1, 3]


def test_sizes_without_a_sign_and_names_with_a_zero_byte(tmp_path):
    """Legal in a Parquet file."""
    (tmp_path / "many").write_bytes(b"firstsecond")
    ranges = {"offset": pa.array([0, 5], pa.uint64()), "size": pa.array([5, 6], pa.uint64())}
    for columns, sizes in (
        ({"image": ["many"] * 2, **ranges}, [5, 6]),
        ({"image": ["a\0b", "many"]}, [-1, 11]),
    ):
        table = pa.table({**columns, "caption": ["a", "b"]})
        pairs = ImageTextPairs(table, name="a", root=str(tmp_path), id_column=None)
        assert pairs.image_sizes().tolist() == sizes


def test_a_choice_is_read_from_a_cache_that_is_read_only(tmp_path, monkeypatch):
    """One that is not there yet needs a folder that can be written."""

    def refused(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path))
    pairs = source(200, "web", captions=10**9, images=10**9)
    rows = held_out_rows([pairs], share=0.1, folder=tmp_path)
    monkeypatch.setattr(split, "in_turn", refused)
    assert np.array_equal(held_out_rows([pairs], share=0.1, folder=tmp_path), rows)
    with pytest.raises(ValueError, match=r"cannot be written \(Perm.*; set PROTOCLIP_CACHE to an"):
        held_out_rows([pairs], share=0.2, folder=tmp_path)


def test_data_that_cannot_be_read_are_no_fault_of_the_cache(tmp_path, monkeypatch):
    pairs = source(200, "web", captions=10**9, images=10**9)
    broken = OSError(errno.EIO, "Input/output error", "pairs.parquet")
    monkeypatch.setattr(split, "_choose", Mock(side_effect=broken))
    with pytest.raises(OSError, match=r"Input/output error: 'pairs\.parquet'"):
        held_out_rows([pairs], share=0.1, folder=tmp_path)


def test_what_was_counted_while_images_could_not_be_read_is_not_kept(tmp_path, monkeypatch):
    both = []
    for name in "ab":
        (tmp_path / name).mkdir()
        for row in range(12):
            (tmp_path / name / f"{row}.jpg").write_bytes(b"%04d" % row)
        table = pa.table({"image": [f"{row}.jpg" for row in range(12)], "caption": [name] * 12})
        both.append(ImageTextPairs(table, name=name, root=str(tmp_path / name), id_column=None))
    before = [(both[0], np.array([], np.int64))]
    with monkeypatch.context() as patch:
        for read in ("read_file", "read_range"):
            failing = Mock(side_effect=OSError(errno.EIO, "Input/output error"))
            patch.setattr(f"protoclip.data.pairs.{read}", failing)
        assert count_shared([both[1]], before, folder=tmp_path) == (12, 0, 0)
    assert count_shared([both[1]], before, folder=tmp_path) == (12, 12, 0)
