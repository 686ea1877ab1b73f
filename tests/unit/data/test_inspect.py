"""What `protoclip data inspect` reports, against data whose facts are known."""

import io
import json
import pickle
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from protoclip.data import inspect as inspection
from protoclip.data.emoji import emoji_table
from protoclip.data.inspect import GAP, SIDE, drawn, inspect, montage, percentile, show
from protoclip.data.mixture import MixedPairs
from protoclip.data.pairs import BadSample, ImageTextPairs, Sample
from protoclip.data.stream import ShardStream
from protoclip.testing import tiny_pairs


def count_words(texts: list[str]) -> list[int]:
    """A tokenizer of words, with a start and an end."""
    return [len(text.split()) + 2 for text in texts]


def encoded(width: int, height: int, *, format: str = "JPEG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, format=format)
    return buffer.getvalue()


def look(source: Any, **settings: Any) -> dict[str, Any]:
    settings = {"workers": 1, "context_length": 6, "progress": False, **settings}
    return inspect(source, count_tokens=count_words, **settings)


@pytest.fixture(scope="module")
def mixed() -> ImageTextPairs:
    """Ten pairs: images of four kinds, two of them the same; and four that cannot be read."""
    large = encoded(300, 400)
    rows = [
        (large, ["one two three"]),
        (large, ["one two three", "a b c d e f"]),
        (encoded(50, 260), ["one"]),
        (encoded(224, 230, format="PNG", mode="L"), ["two"]),
        (encoded(64, 90, format="WEBP"), ["one two three"]),
        (encoded(640, 480), ["three"]),
        (large[:-40], ["cut"]),
        (b"no image at all", ["no"]),
        (encoded(1000, 2000), ["large"]),
        (encoded(10, 10), ["  "]),
    ]
    images = pa.array([image for image, _ in rows], pa.binary())
    table = pa.table({"image": images, "caption": [captions for _, captions in rows]})
    return ImageTextPairs(table, name="mixed")


def test_facts_are_those_of_the_data(mixed: ImageTextPairs) -> None:
    """Every number of a small source, as counted by hand; all of it is JSON."""
    found = look(mixed, max_pixels=1_000_000, notes=["a note"])
    assert json.loads(json.dumps(found)) == found
    size = sum(len(mixed.encoded(row)) for row in range(6))
    assert found.pop("megabytes") == pytest.approx(size / 1e6, abs=6 * 5e-5)
    assert found.pop("seconds") >= 0
    examples = found.pop("unreadable_examples")
    assert [each["sample_id"] for each in examples] == [f"mixed/{row}" for row in (6, 7, 8, 9)]
    assert "1000 x 2000" in examples[2]["reason"]
    assert found.pop("kilobytes")["least"] > 0
    assert found == {
        **{"source": "mixed", "pairs": 10, "read": 10, "unreadable": 4, "notes": ["a note"]},
        "reasons": {
            "truncated": 1,
            "not an image": 1,
            "N x N pixels are more than data.max_image_pixels": 1,
            "empty caption": 1,
        },
        "width": {"least": 50, "median": 224, "most": 640},
        "height": {"least": 90, "median": 260, "most": 480},
        "shorter_side": {"least": 50, "median": 224, "most": 480},
        "shorter_side_below": {"64": 1 / 6, "224": 2 / 6},
        "formats": {"JPEG": 4, "PNG": 1, "WEBP": 1},
        "modes": {"RGB": 5, "L": 1},
        "captions": 7,
        "captions_per_image": {"least": 1, "median": 1, "most": 2},
        # Lengths 3, 3, 3, 5, 5, 5, 8.
        "tokens": {"1": 3, "5": 3, "25": 3, "50": 5, "75": 5, "95": 8, "99": 8, "100": 8},
        "context_length": 6,
        "captions_cut": 1,
        "repeated_images": {
            **{"values": 1, "extra": 1},
            "examples": [{"count": 2, "of": ["mixed/0", "mixed/1"]}],
        },
        "repeated_captions": {
            **{"values": 1, "extra": 2},
            "examples": [{"count": 3, "of": ["one two three"]}],
        },
    }


def test_findings_are_shown_as_lines(
    mixed: ImageTextPairs, capsys: pytest.CaptureFixture[str]
) -> None:
    """With their numbers; what a terminal would obey is escaped."""
    show(look(mixed, max_pixels=1_000_000, notes=["a \x1b[31mred note"]))
    text = " ".join(capsys.readouterr().out.split())
    for expected in (
        "pairs 10 read 10 unreadable 4 ",
        "mixed/8: 1000 x 2000 pixels",
        "width least: 50, median: 224, most: 640",
        "shorter side below 64: 0.167, 224: 0.333",
        "formats JPEG: 4, PNG: 1, WEBP: 1",
        "captions cut 1",
        "repeated captions 2 copies of 1 3 x one two three",
        "notes a \\x1b[31mred note",
    ):
        assert expected in text, expected


def test_reasons_are_bounded(mixed: ImageTextPairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Further kinds of reasons are counted together; nothing else is known, and shown."""
    monkeypatch.setattr(inspection, "REASONS", 2)
    bad = ImageTextPairs(mixed.table.slice(6), name="bad")
    found = look(bad, max_pixels=1_000_000)
    assert found["reasons"] == {"other": 2, "truncated": 1, "not an image": 1}
    assert (found["width"], found["tokens"]) == (None, {})
    show(found)


def test_repeats_of_the_emoji_are_those_a_dictionary_finds() -> None:
    """Of 2,087 pairs, against counting the contents themselves."""
    table = emoji_table("test")
    found = look(ImageTextPairs(table, name="emoji"))
    for name, column in (("repeated_images", "image"), ("repeated_captions", "caption")):
        several = [n for n in Counter(table[column].to_pylist()).values() if n > 1]
        repeats = found[name]
        assert repeats["values"] == len(several)
        assert repeats["extra"] == sum(several) - len(several)
        counts = [example["count"] for example in repeats["examples"]]
        assert counts == sorted(several, reverse=True)[: len(counts)]


def test_processes_find_what_one_finds(mixed: ImageTextPairs) -> None:
    """Two sources in one, some of them bad: the same facts in the same order."""
    source = MixedPairs([ImageTextPairs(tiny_pairs(200), name="tiny"), mixed])
    one, two = (look(source, workers=workers, max_pixels=1_000_000) for workers in (1, 2))
    assert one["read"] == 200 + 10
    assert {**one, "seconds": 0} == {**two, "seconds": 0}


@pytest.mark.parametrize(("total", "number"), [(10, 10), (10, 3), (1000, 7), (10**12, 5)])
def test_samples_are_drawn_evenly(total: int, number: int) -> None:
    """One from each of equal parts, all different, determined by the seed."""
    rows = drawn(total, number, 0)
    for place, row in enumerate(rows):
        assert place * total // number <= row < (place + 1) * total // number
    assert len(set(rows)) == number
    assert rows == drawn(total, number, 0)
    assert number == total or rows != drawn(total, number, 1)


def test_some_samples_stand_for_all() -> None:
    source = ImageTextPairs(emoji_table("train"), name="emoji")
    found = look(source, samples=300)
    assert (found["pairs"], found["read"]) == (7077, 300)
    with pytest.raises(ValueError, match="samples: 0 is too small"):
        look(source, samples=0)


@pytest.mark.parametrize("share", [0, 1, 25, 50, 99, 100])
def test_percentiles(share: int) -> None:
    """Those of NumPy's inverted distribution function, over repeated and single values."""
    values = np.random.default_rng(0).integers(0, 40, 500)
    expected = np.percentile(values, share, method="inverted_cdf")
    assert percentile(Counter(values.tolist()), share) == expected


def test_memory_is_eight_bytes_an_image_and_a_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of 16,000 further samples, none like another, is their hashes."""
    monkeypatch.setattr(inspection, "REMEMBERED", 100)
    tally = inspection._Tally()

    def size_after(numbers: range) -> int:
        for n in numbers:
            name = f"a sample with a long name {n}"
            values = {"width": n % 500}
            content = inspection._hash(name.encode())
            facts = inspection._Facts(name, content, values, [(name, content ^ 1, 5)])
            tally.add([facts, BadSample(name, "somewhere", f"reason {n}")])
        return len(pickle.dumps(tally))

    before = size_after(range(3200))
    assert (size_after(range(3200, 19200)) - before) / 16_000 < 2 * 8 * 1.2


@pytest.fixture
def shards(tmp_path: Path) -> ShardStream:
    """Five tar shards of 100 pairs, all different."""
    table = tiny_pairs(500)
    for first in range(0, 500, 100):
        with tarfile.open(tmp_path / f"{first // 100}.tar", "w") as tar:
            for row in range(first, first + 100):
                image = table["image"][row].as_py() + bytes(row)  # PNG ignores what follows it
                for kind, content in (("png", image), ("txt", f"caption {row}".encode())):
                    entry = tarfile.TarInfo(f"{row:05}.{kind}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return ShardStream(str(tmp_path / "{0..4}.tar"), seed=0)


@pytest.mark.parametrize("workers", [1, 2])
def test_streamed_shards_are_read_once(
    shards: ShardStream, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """One pass where all are asked for; else the starts of several shards; never a sample twice."""
    for samples, read in ((None, 500), (128, 128), (10_000, 500)):
        found = look(shards, samples=samples, workers=workers, progress=True)
        assert (found["pairs"], found["read"], found["unreadable"]) == (None, read, 0)
        assert found["repeated_captions"]["extra"] == found["repeated_images"]["extra"] == 0
        assert capsys.readouterr().err.count("inspect") == 1


class Threads(ImageTextPairs):
    """Samples that tell of the process that reads them."""

    def sample(self, row: int) -> Sample:
        raise BadSample(str(row), "here", f"{torch.get_num_threads()} threads")


def test_a_worker_has_one_thread() -> None:
    """Though this process may use more."""
    torch.set_num_threads(3)
    try:
        found = look(Threads(tiny_pairs(70), name="threads"), workers=2)
    finally:
        torch.set_num_threads(1)
    assert found["unreadable_examples"][0]["reason"] == "1 threads"


def test_a_montage_shows_pairs_and_leaves_out_bad_ones(mixed: ImageTextPairs) -> None:
    """Six good pairs of ten in a grid of four columns; each image in a cell of its own."""
    sheet = montage(mixed, columns=4, rows=4, max_pixels=1_000_000)
    assert sheet.size == (4 * (SIDE + GAP) + GAP, 2 * (inspection.CELL + GAP) + GAP)
    x, y = GAP + SIDE // 2, GAP + SIDE // 2
    middles = [
        sheet.getpixel((x + column * (SIDE + GAP), y + row * (inspection.CELL + GAP)))
        for row in range(2)
        for column in range(4)
    ]
    assert middles == [(0, 0, 0)] * 6 + [(255, 255, 255)] * 2


def test_a_montage_of_a_stream_and_of_nothing(shards: ShardStream) -> None:
    assert montage(shards, columns=2, rows=2).width == 2 * (SIDE + GAP) + GAP
    images = pa.array([b"x"] * 3, pa.binary())
    bad = ImageTextPairs(pa.table({"image": images, "caption": ["a"] * 3}), name="bad")
    with pytest.raises(ValueError, match="bad: none of its samples that were tried"):
        montage(bad)


CAPTIONS = {
    "short": "a dog",
    "long": "a rather long caption of " + "many words " * 30,
    "one word": "x" * 300,
    "blanks": "a\n\tb   c",
    "Chinese": "猫坐在窗台上看着外面的雨和过往的行人" * 5,
    "Arabic": "قطة تجلس على النافذة وتنظر إلى المطر",
    "emoji": "😀 and ☂ 👩‍🔬",
    "unassigned": "\U0010fffe\ufffd\x00",
}


@pytest.mark.parametrize("caption", CAPTIONS)
def test_captions_are_wrapped(caption: str) -> None:
    """Lines are few and short; what fits keeps every character but blanks, else dots end it."""
    text = CAPTIONS[caption]
    font = inspection.font_of(text)
    lines = inspection.wrapped(text, font)
    assert 1 <= len(lines) <= 3
    assert all(font.getlength(line) <= SIDE * 1.3 for line in lines)
    found, wanted = ("".join("".join(each).split()) for each in (lines, text))
    assert found == wanted or wanted.startswith(found.removesuffix("..."))
    assert (found != wanted) == (caption in ("long", "one word", "Chinese"))


def test_a_caption_is_set_in_the_font_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL's own font has no Chinese; half of a surrogate pair does no harm."""
    own, other = (inspection.ImageFont.load_default(size) for size in (14, 15))
    assert inspection.has(own, "a")
    assert not inspection.has(own, "猫")
    monkeypatch.setattr(inspection, "_fonts", lambda: [own, other])
    monkeypatch.setattr(inspection, "has", lambda font, c: c.isascii() == (font is own))
    assert inspection.font_of("a cat 猫") is own
    assert inspection.font_of("猫坐") is other
    table = pa.table({"image": pa.array([encoded(9, 9)], pa.binary()), "caption": ["x"]})
    source = ImageTextPairs(table, name="half")
    monkeypatch.setattr(ImageTextPairs, "sample_captions", lambda self, row: ("a \ud83d b",))
    assert montage(source).width == SIDE + 2 * GAP
