"""What `protoclip data inspect` reports of known data; how many processes decode."""

import json
import os
import re
import time
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from tars import write_tar

from protoclip.cli.data import load_clip_tokenizer
from protoclip.config import Config, DataConfig, ModelConfig, TextTowerConfig
from protoclip.data import decode, sources, summary, tools
from protoclip.data.emoji import emoji_captions
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.shards import ShardStream
from protoclip.data.sources import mix_pairs
from protoclip.data.summary import count_tokens
from protoclip.data.tools import CARDS, UNCOUNTED, advise, inspect, pack, show
from protoclip.distributed import collectives
from protoclip.models.start import resolve_start
from testing import save_to_bytes, tiny_pairs

SPEED = ("images_per_second", "processes", "enough_for_cards")


def count_words(texts: list[str]) -> list[tuple[int, int]]:
    """A tokenizer of words, with a start and an end, which does not know "three"."""
    return [(len(words := text.split()) + 2, words.count("three")) for text in texts]


def encoded(width: int, height: int, *, format: str = "JPEG", mode: str = "RGB") -> bytes:
    return save_to_bytes(Image.new(mode, (width, height)), format)


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
        "blank_images": 6,
        "blank_image_examples": [f"mixed/{row}" for row in range(5)],
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


def test_what_is_shown_is_about_the_data_unless_a_model_is_named(mixed, capsys):
    """Ranges in words, and each unreadable file; what towers ask for only with one's name."""
    settings = {"workers": 1, "context_length": 6, "count_tokens": count_words}
    show(inspect(mixed, **settings), has_model=False)
    shown = capsys.readouterr().out
    assert re.search(r"^width +50 to 1,000, half at most 300$", shown, re.MULTILINE)
    assert not re.search("context|cards", shown)
    show(inspect(mixed, **settings), has_model=True)
    shown = capsys.readouterr().out
    assert re.search(r"^captions cut +1$", shown, re.MULTILINE)
    assert "ViT-B/32 on an H100" in shown


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

    def crop_slowly(*arguments: Any) -> np.ndarray:
        time.sleep(0.01)
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setattr(tools, "decode_crop", crop_slowly)
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
    assert one["blank_images"] == 7  # those of `tiny` show shapes
    assert one == two


@pytest.mark.parametrize("workers", [1, 2])
def test_streamed_shards_are_read_once(workers, tmp_path, capsys):
    """One pass where all are asked for; else the starts of several shards; never a sample twice."""
    table = tiny_pairs(210)
    for first in range(0, 210, 70):
        files = {}
        for row in range(first, first + 70):
            files[f"{row:05}.png"] = table["image"][row].as_py() + bytes(row)  # is not read
            files[f"{row:05}.txt"] = f"caption {row}".encode()
        write_tar(tmp_path / f"{first // 70}.tar", files)
    shards = ShardStream(str(tmp_path / "{0..2}.tar"), seed=0)
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


SIDE = 100  # of the images, in pixels
PIXELS = 64 * SIDE * SIDE * 3  # bytes of all of them, decoded


@pytest.fixture
def pairs() -> ImageTextPairs:
    return ImageTextPairs(tiny_pairs(64, side=SIDE), name="tiny")


@pytest.mark.parametrize(
    ("settings", "cores", "number"),
    [
        ({}, 8, 0),
        ({"cache_gb": 1.01 * PIXELS / 1e9}, 8, 0),
        ({"cache_gb": 0.99 * PIXELS / 1e9}, 8, 8),
        ({"cache_gb": 0.99 * PIXELS / 1e9}, 1, 0),  # a process beside this one brings nothing
        ({"cache_gb": 0.0}, 8, 8),
        ({"workers": 3}, 8, 3),
        ({"workers": 0, "cache_gb": 0.0}, 8, 0),
    ],
)
def test_images_that_fit_in_memory_are_decoded_in_this_process(
    settings, cores, number, pairs, monkeypatch
):
    monkeypatch.setattr(summary, "count_cores", lambda: cores)
    data = DataConfig(**settings)
    found, note = summary.choose_workers(data, pairs, image_size=40)
    assert found == number
    assert (note is None) == ("workers" in settings)
    assert note is None or note.startswith(f"data.workers = {number}, ")
    idle = number > 0 and bool(settings.get("cache_gb")) and "workers" not in settings
    assert idle == (note is not None and note.endswith("so data.cache_gb has no effect"))


def test_a_stream_is_decoded_by_all_cores(pairs, tmp_path, monkeypatch):
    """Since its length is not known."""
    pack(pairs, tmp_path / "shards")
    data = DataConfig(train=str(tmp_path / "shards"), read="streaming")
    stream = sources.open_samples(Config(data=data))
    monkeypatch.setattr(summary, "count_cores", lambda: 8)
    assert summary.choose_workers(data, stream, image_size=40)[0] == 8
    looked = [sample.sample_id for sample in summary.read_some(stream, 5)]
    assert looked == [pairs.sample_id(row) for row in range(5)]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 12),
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "64"}, 3),  # torchrun; not by all ranks
        ({"LOCAL_WORLD_SIZE": "32"}, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2),3", "SLURM_NODEID": "2"}, 4),
        # srun bound this rank to 12 of the host's 96 cores.
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_CPUS_ON_NODE": "96"}, 12),
    ],
)
def test_ranks_of_a_host_share_its_cores(environment, expected, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(12), raising=False)
    monkeypatch.setattr(collectives, "read_quota", lambda: None)
    monkeypatch.setattr(collectives, "world_size", lambda: 19 if environment else 1)
    assert collectives.count_cores() == expected
    monkeypatch.setattr(collectives, "read_quota", lambda: 1)
    assert collectives.count_cores() == 1


def test_a_container_may_have_fewer_cores_than_its_host(tmp_path, monkeypatch):
    monkeypatch.setattr(collectives, "CGROUPS", tmp_path)
    assert collectives.read_quota() is None
    (tmp_path / "cpu.max").write_text("max 100000\n", encoding="utf-8")
    assert collectives.read_quota() is None
    (tmp_path / "cpu.max").write_text("250000 100000\n", encoding="utf-8")
    assert collectives.read_quota() == 2
