"""What `protoclip data inspect` reports, against data whose facts are known."""

import io
import json
import os
import pickle
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from protoclip.data import inspect as inspection
from protoclip.data import montage
from protoclip.data.emoji import emoji_table
from protoclip.data.examination import Facts, drawn, hashes
from protoclip.data.inspect import Inspection, Spread, inspect
from protoclip.data.manifests import open_manifest
from protoclip.data.mixture import MixedPairs
from protoclip.data.pairs import (
    BadSample,
    ImageTextPairs,
    Pairs,
    Sample,
)
from protoclip.data.stream import ShardStream
from protoclip.testing import tiny_pairs


def count_words(texts: list[str]) -> list[int]:
    """A tokenizer of words, with a start and an end."""
    return [len(text.split()) + 2 for text in texts]


def picture(width: int, height: int, *, format: str = "JPEG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, format=format)
    return buffer.getvalue()


def look(source: Any, **settings: Any) -> Inspection:
    settings = {"workers": 1, "context_length": 6, "progress": False, **settings}
    return inspect(source, count_tokens=count_words, **settings)


@pytest.fixture
def mixed() -> ImageTextPairs:
    """Ten pairs: pictures of four kinds, two of them the same; and four that cannot be read."""
    large = picture(300, 400)
    rows = [
        (large, ["one two three"]),
        (large, ["one two three", "a b c d e f"]),
        (picture(50, 260), ["one"]),
        (picture(224, 230, format="PNG", mode="L"), ["two"]),
        (picture(64, 90, format="WEBP"), ["one two three"]),
        (picture(640, 480), ["three"]),
        (large[:-40], ["cut"]),
        (b"no picture at all", ["no"]),
        (picture(1000, 2000), ["large"]),
        (picture(10, 10), ["  "]),
    ]
    table = pa.table(
        {
            "image": pa.array([image for image, _ in rows], pa.binary()),
            "caption": [captions for _, captions in rows],
        }
    )
    return ImageTextPairs(table, name="mixed")


def test_facts_are_those_of_the_data(mixed: ImageTextPairs) -> None:
    """Every number of a small source, as counted by hand."""
    found = look(mixed, max_pixels=1_000_000)
    assert (found.pairs, found.read, found.unreadable) == (10, 10, 4)
    assert found.width == Spread(least=50.0, median=224.0, most=640.0)
    assert found.height == Spread(least=90.0, median=260.0, most=480.0)
    assert found.shorter_side == Spread(least=50.0, median=224.0, most=480.0)
    assert found.shorter_side_below == {"64": 1 / 6, "224": 2 / 6}
    assert found.formats == {"JPEG": 4, "PNG": 1, "WEBP": 1}
    assert found.modes == {"RGB": 5, "L": 1}
    size = sum(len(mixed.encoded(row)) for row in range(6))
    assert found.megabytes == pytest.approx(size / 1e6, abs=6 * 5e-5)
    assert found.captions == 7
    assert found.captions_per_image == Spread(least=1.0, median=1.0, most=2.0)
    # Lengths 3, 3, 3, 5, 5, 5, 8.
    assert found.tokens["1"] == 3
    assert found.tokens["50"] == 5
    assert found.tokens["100"] == 8
    assert found.captions_cut == 1


def test_unreadable_samples_are_counted_by_reason(mixed: ImageTextPairs) -> None:
    """Each reason without its details, and the first samples with them."""
    found = look(mixed, max_pixels=1_000_000)
    assert found.reasons == {
        "truncated": 1,
        "not an image": 1,
        "N x N pixels are more than data.max_image_pixels": 1,
        "empty caption": 1,
    }
    assert [each["sample_id"] for each in found.unreadable_examples] == [
        f"mixed/{row}" for row in (6, 7, 8, 9)
    ]
    assert "1000 x 2000" in found.unreadable_examples[2]["reason"]


def test_reasons_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reasons of more kinds than are told apart are counted together."""
    monkeypatch.setattr(inspection, "REASONS", 3)
    bad = [BadSample(str(n), "here", f"reason {chr(97 + n)}") for n in range(10)]
    found = look(Stream(bad), samples=10)
    assert found.reasons == {"other": 7, "reason a": 1, "reason b": 1, "reason c": 1}
    assert found.unreadable == 10
    assert found.width is None
    assert found.tokens == {}
    inspect.show(found)


def test_repeated_contents(mixed: ImageTextPairs) -> None:
    """Equal bytes and equal captions, with how often and where."""
    found = look(mixed)
    assert asdict(found.repeated_images) == {
        "values": 1,
        "extra": 1,
        "examples": [{"count": 2, "of": ["mixed/0", "mixed/1"]}],
    }
    assert asdict(found.repeated_captions) == {
        "values": 1,
        "extra": 2,
        "examples": [{"count": 3, "of": ["one two three"]}],
    }


def test_repeats_of_the_emoji_are_those_a_dictionary_finds() -> None:
    """Over 7,077 pairs, against counting the contents themselves."""
    source = ImageTextPairs(emoji_table("train"), name="emoji")
    found = look(source)
    for repeats, contents in (
        (found.repeated_images, emoji_table("train")["image"].to_pylist()),
        (found.repeated_captions, emoji_table("train")["caption"].to_pylist()),
    ):
        several = [number for number in Counter(contents).values() if number > 1]
        assert (repeats.values, repeats.extra) == (len(several), sum(several) - len(several))
        top = sorted(several, reverse=True)[: len(repeats.examples)]
        assert [example["count"] for example in repeats.examples] == top


def test_processes_find_what_one_finds(mixed: ImageTextPairs) -> None:
    """Three sources in one, some of them bad: the same facts in the same order."""
    tiny = ImageTextPairs(tiny_pairs(200), name="tiny")
    source = MixedPairs([tiny, mixed, ImageTextPairs(emoji_table("test"), name="emoji")])
    one, two = (look(source, workers=workers, max_pixels=1_000_000) for workers in (1, 2))
    assert one.read == 200 + 10 + 2087
    assert replace(one, seconds=0.0) == replace(two, seconds=0.0)


def test_a_memory_mapped_source_opens_itself_again(tmp_path: Path) -> None:
    """What goes to a worker is the index's path, not the pictures."""
    pq.write_table(tiny_pairs(300), tmp_path / "pairs.parquet")
    source = open_manifest(str(tmp_path / "pairs.parquet"), cache=tmp_path / "cache")
    assert len(pickle.dumps(source)) < 1000
    found = look(source, workers=2)
    assert (found.read, found.unreadable) == (300, 0)


@pytest.mark.parametrize(("total", "number"), [(10, 10), (10, 3), (1000, 7), (10**12, 5)])
def test_samples_are_drawn_evenly(total: int, number: int) -> None:
    """One from each of equal parts, all different, determined by the seed."""
    rows = drawn(total, number, 0)
    for place, row in enumerate(rows.tolist()):
        assert place * total // number <= row < (place + 1) * total // number
    assert len(set(rows.tolist())) == number
    assert rows.tolist() == drawn(total, number, 0).tolist()
    assert number == total or rows.tolist() != drawn(total, number, 1).tolist()


def test_some_samples_stand_for_all() -> None:
    """A tenth of the emoji is read, and the number of all is reported beside it."""
    found = look(ImageTextPairs(emoji_table("train"), name="emoji"), samples=700)
    assert (found.pairs, found.read) == (7077, 700)
    with pytest.raises(ValueError, match="samples: 0 is too small"):
        look(ImageTextPairs(emoji_table("train"), name="emoji"), samples=0)


@pytest.mark.parametrize("share", [0, 1, 5, 25, 50, 75, 95, 99, 100])
def test_percentiles(share: int) -> None:
    """Those of NumPy's inverted distribution function, over repeated and single values."""
    values = np.random.default_rng(0).integers(0, 40, 500)
    expected = np.percentile(values, share, method="inverted_cdf")
    assert inspect.percentile(Counter(values.tolist()), share) == expected


def test_memory_is_eight_bytes_a_picture_and_a_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of 64,000 further samples, none like another, is their hashes."""
    monkeypatch.setattr(inspection, "REMEMBERED", 100)
    counted = inspection._Counted()

    def sizes(first: int, last: int) -> int:
        for start in range(first, last, 64):
            names = [f"a sample with a long name {n}" for n in range(start, start + 64)]
            found = hashes(name.encode() for name in names)
            bad = [BadSample(name, "somewhere", f"reason {n}") for n, name in enumerate(names)]
            counts = {"width": Counter(n % 500 for n in range(64)), "tokens": Counter({5: 64})}
            counted.add(
                Facts(
                    counts=counts,
                    sample_ids=names,
                    images=found,
                    captions=names,
                    texts=found[::-1].copy(),
                    bad=bad,
                )
            )
        return len(pickle.dumps(counted))

    before = sizes(0, 6400)
    assert (sizes(6400, 70400) - before) / 64_000 < 2 * 8 * 1.2


class Stream:
    """Samples again and again, from the first on."""

    name = "stream"

    def __init__(self, items: list[Sample | BadSample]) -> None:
        self.items = items

    def samples(self, first: int = 0) -> Iterator[Sample | BadSample]:
        while True:
            yield from self.items

    def state_dict(self, first: int) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stream_is_read_here_and_examined_there(workers: int) -> None:
    """As many of its samples as asked for; without end, it cannot be read as a whole."""
    tiny = ImageTextPairs(tiny_pairs(200), name="tiny")
    stream = Stream([*map(tiny.sample, range(200)), BadSample("x", "here", "empty file")])
    found = look(stream, samples=150, workers=workers)
    assert (found.pairs, found.read, found.unreadable) == (None, 150, 0)
    assert look(stream, samples=201, workers=workers).unreadable == 1
    with pytest.raises(ValueError, match="stream: has no end; say how many"):
        look(stream)


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


def test_streamed_shards_are_read_once(
    shards: ShardStream, capsys: pytest.CaptureFixture[str]
) -> None:
    """One pass where all are asked for; else the starts of several shards; never a sample twice."""
    whole = look(shards, progress=True)
    assert (whole.pairs, whole.read, whole.unreadable) == (None, 500, 0)
    assert whole.repeated_captions.extra == whole.repeated_images.extra == 0
    assert "inspect" in (shown := capsys.readouterr().err)
    assert shown.count("100%") == 1
    some = look(shards, samples=128)
    assert (some.read, some.repeated_captions.extra) == (128, 0)
    assert look(shards, samples=10_000, progress=True).read == 500
    assert capsys.readouterr().err.count("100%") == 1


class Faulty(ImageTextPairs):
    """Its row 70 kills the process that reads it; others tell of the process."""

    def sample(self, row: int) -> Sample:
        if row == 70:
            os.kill(os.getpid(), signal.SIGKILL)
        raise BadSample(str(row), "here", f"{torch.get_num_threads()} threads")


def test_a_killed_worker_is_one_line() -> None:
    """The run ends, and says what it may have been and what to do."""

    def hangs(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    faulty = Faulty(tiny_pairs(2000, side=12), name="faulty")
    with pytest.raises(ValueError, match=r"a worker process was killed.*use fewer") as error:
        look(faulty, workers=2)
    signal.alarm(0)
    assert "\n" not in str(error.value)


def test_a_worker_has_one_thread() -> None:
    """Though this process may use more."""
    torch.set_num_threads(3)
    try:
        found = look(Faulty(tiny_pairs(70), name="faulty"), workers=2)
    finally:
        torch.set_num_threads(1)
    assert found.unreadable_examples[0]["reason"] == "1 threads"


def test_findings_are_json_and_lines(
    mixed: ImageTextPairs, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dictionary survives JSON; the lines hold the same numbers."""
    found = look(mixed, max_pixels=1_000_000, notes=["2 rows were left out"])
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    inspect.show(found)
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(" ".join(line.split()) for line in lines)
    for expected in (
        "pairs 10",
        "unreadable 4 (40.00%)",
        "width 50 to 640, median 224 px",
        "33.3% below 224",
        "formats JPEG 4, PNG 1, WEBP 1",
        "longer than 6 tokens 1 captions (14.3%)",
        "repeated captions 2 copies of 1",
        "3 x one two three",
        "mixed/8: 1000 x 2000 pixels",
        "note 2 rows were left out",
    ):
        assert expected in text, expected


def test_a_montage_shows_pairs_and_passes_over_bad_ones(mixed: ImageTextPairs) -> None:
    """Six good pairs of ten in a grid of four columns; each picture in a cell of its own."""
    sheet = montage.montage(mixed, columns=4, rows=4, max_pixels=1_000_000)
    assert sheet.width == 2 * montage.MARGIN + 4 * (montage.SIDE + montage.GAP) - montage.GAP
    top = montage.MARGIN + montage.TITLE_ROOM
    cell = montage.SIDE + 8 + montage.LINES * montage.LINE + montage.GAP
    assert sheet.height == top + 2 * cell - montage.GAP + montage.MARGIN
    middles = [
        sheet.getpixel((montage.MARGIN + column * (montage.SIDE + montage.GAP) + 96, y))
        for y in (top + 96, top + cell + 96)
        for column in range(4)
    ]
    assert middles == [(0, 0, 0)] * 6 + [(255, 255, 255)] * 2


def test_a_montage_of_a_stream_and_of_nothing(shards: ShardStream) -> None:
    """A stream shows its first samples; a source with none that can be read says so."""
    assert montage.montage(shards, columns=2, rows=2).width < 500
    bad: Pairs = ImageTextPairs(
        pa.table({"image": pa.array([b"x"] * 3, pa.binary()), "caption": ["a"] * 3}), name="bad"
    )
    with pytest.raises(ValueError, match="bad: none of its samples that were tried"):
        montage.montage(bad)


CAPTIONS = {
    "short": "a dog",
    "long": "a rather long caption of " + "many words " * 30,
    "one word": "x" * 300,
    "blanks": "a\n\tb   c",
    "Chinese": "猫坐在窗台上看着外面的雨和过往的行人" * 5,
    "Arabic": "قطة تجلس على النافذة وتنظر إلى المطر",
    "emoji": "😀 and ☂ 👩‍🔬",
    "unassigned": "\U0010fffe\ufffd\x00",
    "half a pair": "a \ud83d b",
}


@pytest.mark.parametrize("caption", CAPTIONS)
def test_captions_are_wrapped(caption: str) -> None:
    """Lines are few and fit; what is whole keeps every character but blanks, else dots end it."""
    text = CAPTIONS[caption]
    lines = montage.wrapped(text, 192, 14, lines=3)
    assert 1 <= len(lines) <= 3
    assert all(montage.width_of(line, 14) <= 192 for line in lines)
    found, wanted = ("".join("".join(each).split()) for each in (lines, text))
    assert found == wanted or wanted.startswith(found.removesuffix("..."))
    assert (found != wanted) == (caption in ("long", "one word", "Chinese"))
    sheet = Image.new("RGB", (200, 30))
    montage.write(montage.ImageDraw.Draw(sheet), (0, 0), lines[0], 14, "white")
    assert sheet.getbbox() is not None


def test_a_run_of_letters_keeps_one_font(monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters go to the first font that has them, and PIL's own has no Chinese."""
    own = montage.ImageFont.load_default(14)
    assert montage.has(own, "a")
    assert not montage.has(own, "猫")
    other = montage.ImageFont.load_default(15)
    monkeypatch.setattr(montage, "font_of", lambda c, size: own if c.isascii() else other)
    assert montage.runs("a cat 猫 坐 here", 14) == [
        ("a cat ", own),
        ("猫 坐 ", other),
        ("here", own),
    ]
