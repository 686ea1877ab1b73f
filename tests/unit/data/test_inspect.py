"""What `protoclip data inspect` reports, against data whose facts are known."""

import io
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from tars import write_tar

from protoclip.cli.data import load_clip_tokenizer
from protoclip.config import ModelConfig, TextTowerConfig
from protoclip.data import decode, tools
from protoclip.data.emoji import emoji_captions
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.shards import ShardStream
from protoclip.data.sources import mix_pairs
from protoclip.data.summary import count_tokens
from protoclip.data.tools import CARDS, UNCOUNTED, advise, inspect
from protoclip.models.start import resolve_start
from testing import tiny_pairs

SPEED = ("images_per_second", "processes", "enough_for_cards")


def count_words(texts: list[str]) -> list[tuple[int, int]]:
    """A tokenizer of words, with a start and an end, which does not know "three"."""
    return [(len(words := text.split()) + 2, words.count("three")) for text in texts]


def encoded(width: int, height: int, *, format: str = "JPEG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, format=format)
    return buffer.getvalue()


def look(source: Any, **settings: Any) -> dict[str, Any]:
    settings = {"workers": 1, "context_length": 6, "count_tokens": count_words, **settings}
    found = inspect(source, **settings)
    for name in SPEED:
        assert found.pop(name)  # which differs each time
    return found


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


def test_facts_are_those_of_the_data(mixed, monkeypatch):
    """Every number of a small source, as counted by hand; all of it is JSON."""
    monkeypatch.setattr(decode, "MAX_IMAGE_PIXELS", 1_000_000)
    found = look(mixed, notes=["a note"])
    assert json.loads(json.dumps(found)) == found
    examples = found.pop("unreadable_examples")
    assert [example.split("'")[1] for example in examples] == [
        f"mixed/{row}" for row in (6, 7, 8, 9)
    ]
    assert "1000 x 2000" in examples[2]
    assert found.pop("kilobytes")["0"] > 0
    for name, expected in MEASURED.items():
        values = found.pop(name)
        assert [values[p] for p in ("0", "50", "100")] == expected, name
    assert found == {
        **{"source": "mixed", "pairs": 10, "read": 6, "unreadable": 4, "notes": ["a note"]},
        "reasons": {
            "truncated": 1,
            "not an image": 1,
            "N x N pixels are more than the limit": 1,
            "empty caption": 1,
        },
        "formats": {"JPEG": 4, "PNG": 1, "WEBP": 1},
        "captions": 7,
        "context_length": 6,
        "captions_cut": 1,
        "unknown_tokens": {"captions": round(4 / 18, 3)},
        "repeated_image_copies": 1,
        "repeated_image_examples": ["2 x mixed/0"],
        "repeated_caption_copies": 2,
        "repeated_caption_examples": ["3 x one two three"],
        "next": advise(10),
    }


MEASURED = {
    "width": [50, 224, 640],
    "height": [90, 260, 480],
    "shorter_side": [50, 224, 480],
    "captions_per_image": [1, 1, 2],
    "tokens": [3, 5, 8],  # 3, 3, 3, 5, 5, 5, 8
}


def test_unknown_tokens_are_said_by_language():
    """Of captions in columns of their own, with a tokenizer that was made for English."""
    table = emoji_captions().slice(0, 60).drop_columns("concept").drop_null()
    images = pa.array([encoded(32, 32)] * len(table), pa.binary())
    pairs = ImageTextPairs(
        table.append_column("image", images), name="emoji", caption_columns=table.column_names
    )
    start = resolve_start(ModelConfig(text=TextTowerConfig(name="minilm")))
    found = look(pairs, count_tokens=partial(count_tokens, start.tokenizer()))
    shares = found["unknown_tokens"]
    assert [*shares] == table.column_names
    assert all(shares[f"caption_{language}"] == 0 for language in ("ar", "cs", "de", "es", "fr"))
    assert all(shares[f"caption_{language}"] > 0.2 for language in ("th", "zh"))
    bytes_of_any_script = partial(count_tokens, load_clip_tokenizer())
    assert {*look(pairs, count_tokens=bytes_of_any_script)["unknown_tokens"].values()} == {0}


def test_the_speed_is_that_of_reading_and_cropping(monkeypatch):
    """Images a second of a process, without what is counted besides; and over those of cards."""

    def count_slowly(texts: list[str]) -> list[tuple[int, int]]:
        time.sleep(0.1)
        return count_words(texts)

    monkeypatch.setattr(tools, "decode_crop", lambda *arguments: time.sleep(0.01))
    pairs = ImageTextPairs(tiny_pairs(5), name="tiny")
    found = inspect(pairs, count_tokens=count_slowly, context_length=6, workers=1)
    rate, processes, cards = (found[name] for name in SPEED)
    assert processes == 1
    assert 10 < rate <= 100
    assert cards == {card: pytest.approx(rate / CARDS[card], abs=0.01) for card in CARDS}


def test_processes_find_what_one_finds(mixed):
    """Two sources in one, some of them bad: the same facts in the same order."""
    source = mix_pairs([ImageTextPairs(tiny_pairs(80), name="tiny"), mixed])
    one, two = (look(source, workers=workers) for workers in (1, 2))
    assert one["read"] + one["unreadable"] == 80 + 10
    assert one == two


@pytest.fixture
def shards(tmp_path: Path) -> ShardStream:
    """Three tar shards of 70 pairs, all different."""
    table = tiny_pairs(210)
    for first in range(0, 210, 70):
        files = {}
        for row in range(first, first + 70):
            files[f"{row:05}.png"] = table["image"][row].as_py() + bytes(row)  # is not read
            files[f"{row:05}.txt"] = f"caption {row}".encode()
        write_tar(tmp_path / f"{first // 70}.tar", files)
    return ShardStream(str(tmp_path / "{0..2}.tar"), seed=0)


@pytest.mark.parametrize("workers", [1, 2])
def test_streamed_shards_are_read_once(shards, workers, capsys):
    """One pass where all are asked for; else the starts of several shards; never a sample twice."""
    for samples, read, advice in (
        (None, 210, advise(210)),
        (128, 128, UNCOUNTED),
        (999, 210, UNCOUNTED),
    ):
        found = look(shards, samples=samples, workers=workers)
        assert (found["pairs"], found["read"], found["unreadable"]) == (None, read, 0)
        assert found["next"] == advice
        assert found["repeated_caption_copies"] == found["repeated_image_copies"] == 0
        assert capsys.readouterr().err.count("inspect") == 1
