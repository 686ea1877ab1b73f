"""Held-out pairs: nothing of them is left in training."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from protoclip.data import split
from protoclip.data.captions import normalise, normalise_texts
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.sources import PairsView, drop_rows
from protoclip.data.split import choose_share, count_shared, hold_out_rows
from testing import save_to_bytes


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
    rows = hold_out_rows([pairs], share=0.1, folder=tmp_path)
    rest = drop_rows(pairs, rows)
    assert 0 < len(rows) <= 100
    assert len(rows) > 65 or captions < 5000 or images < 5000
    assert len(rows) + len(rest) == 1000
    seen = contents(rest, range(len(rest)))
    for one, other in zip(contents(pairs, rows.tolist()), seen, strict=True):
        assert not one & other


def jpeg(number: int, quality: int = 90, side: int = 64) -> bytes:
    """A smooth image of random colours."""
    colours = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC)
    return save_to_bytes(image, "JPEG", quality=quality)


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
    rows = {*hold_out_rows([pairs], share=0.3, folder=tmp_path).tolist()}
    assert len(rows) == 36
    assert rows == {(row + 60) % 120 for row in rows}


@given(st.lists(st.one_of(st.none(), st.text(), st.text(" \t\x1cAbÉé\u0301ﬁ™", max_size=5))))
@settings(max_examples=30, derandomize=True, deadline=None, database=None)
def test_many_captions_are_normalised_as_one_is(captions):
    texts = normalise_texts(pa.array(captions, pa.large_string()).cast(pa.large_binary()))
    assert texts.to_pylist() == [c if c is None else normalise(c).encode() for c in captions]


def test_no_more_than_5000_pairs_are_held_out_by_default(tmp_path):
    pairs = source(5600, "web", captions=10**12, images=10**12)
    assert len(hold_out_rows([pairs], share=0.95, folder=tmp_path)) == 5000


def test_captions_that_many_pairs_share_are_not_held_out(tmp_path):
    pairs = source(3000, "web", captions=5, images=100_000)
    assert len(hold_out_rows([pairs], share=0.1, folder=tmp_path)) == 0


def test_the_choice_is_kept_and_hardly_changes_when_pairs_are_added(tmp_path):
    pairs = source(2000, "web", captions=10**9, images=10**9)
    rows = hold_out_rows([pairs], share=0.1, folder=tmp_path)
    assert np.array_equal(rows, hold_out_rows([pairs], share=0.1, folder=tmp_path / "other"))
    longer = source(2100, "web", captions=10**9, images=10**9)
    again = hold_out_rows([longer], share=0.1, folder=tmp_path)
    assert len(np.intersect1d(rows, again)) > 0.9 * len(rows)
    kept = {len(np.load(file)["rows"]): file for file in tmp_path.glob("*.npz")}[len(rows)]
    np.savez(kept, rows=rows[:7])
    assert len(hold_out_rows([pairs], share=0.1, folder=tmp_path)) == 7
    content = kept.read_bytes()
    kept.write_bytes(content.replace(rows[:7].tobytes(), rows[1:8].tobytes()))
    assert np.array_equal(rows, hold_out_rows([pairs], share=0.1, folder=tmp_path))


def test_a_choice_of_version_1_0_stays(tmp_path, monkeypatch):
    """So its runs go on with the pairs that they held out, though another rule chose them."""
    pairs = source(200, "web", captions=10**9, images=10**9)
    monkeypatch.setattr(split, "FORM", split.FORM_1_0)
    hold_out_rows([pairs], share=0.1, folder=tmp_path)
    (kept,) = tmp_path.glob("*.npz")
    np.savez(kept, rows=np.arange(7))
    monkeypatch.undo()
    assert len(hold_out_rows([pairs], share=0.1, folder=tmp_path)) == 7


def test_a_chain_of_pairs_is_held_out_whole_or_not_at_all(tmp_path, monkeypatch):
    """Each shares a caption with the next one, so a pass over the data finds one more at most."""
    for passes, number in ((8, 36), (2, 0)):
        monkeypatch.setattr(split, "PASSES", passes)
        captions = [[f"{row // 4} {row % 4}", f"{row // 4} {row % 4 + 1}"] for row in range(400)]
        columns = {"image": [b"%d" % row for row in range(400)], "caption": captions}
        pairs = ImageTextPairs(pa.table(columns), name="web", id_column=None)
        rows = hold_out_rows([pairs], share=0.1, folder=tmp_path / str(passes))
        assert len(rows) >= number
        assert {*rows.tolist()} == {4 * (row // 4) + n for row in rows.tolist() for n in range(4)}


def test_equal_files_and_equal_urls_stay_together(tmp_path):
    for row in range(40):
        (tmp_path / f"{row}.jpg").write_bytes(b"%04d" % (row // 2))
    names = [f"{row}.jpg" for row in range(40)]
    names += [f"https://example.org/{row // 2}" for row in range(40)]
    table = pa.table({"image": names, "caption": [str(row) for row in range(80)]})
    pairs = ImageTextPairs(table, name="files", root=str(tmp_path), id_column=None)
    rows = hold_out_rows([pairs], share=0.5, folder=tmp_path)
    assert len(rows) > 4
    assert set(rows.tolist()) == {row ^ 1 for row in rows.tolist()}


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
    assert len(hold_out_rows([both[1]], share=0.5, folder=tmp_path, before=before)) == 20
    assert count_shared([both[1]], before, folder=tmp_path) == (40, 0, 0)
    assert len(hold_out_rows([both[0]], share=0.5, folder=tmp_path, before=before)) == 0


@pytest.mark.parametrize(
    ("pairs", "held_out"), [(99, 10), (400, 40), (1000, 100), (4000, 100), (10**6, 20_000)]
)
def test_at_least_a_hundred_are_held_out_or_a_tenth_of_few(pairs, held_out):
    assert round(choose_share(pairs) * pairs) == held_out
