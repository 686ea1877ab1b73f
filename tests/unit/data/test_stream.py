"""Streams over tar shards: their order, where they resume, and what they survive."""

import itertools
import json
import re
import tarfile
import weakref
from pathlib import Path
from typing import Any

import pytest
from tars import facts, numbered, write_tar

from protoclip.data import shards as streams
from protoclip.data.pairs import BadSample, Sample, SampleStream
from protoclip.data.sampler import BLOCK_STREAM, SHARD_STREAM, generator
from protoclip.data.shards import ShardStream

SIZES = (5, 3, 7, 4, 6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five shards of 3 to 7 samples: 25 in all."""
    numbers = iter(range(25))
    for shard, size in enumerate(SIZES):
        write_tar(tmp_path / f"{shard}.tar", numbered(*itertools.islice(numbers, size)))
    return tmp_path


def stream(source: Path | str, **options) -> ShardStream:
    return ShardStream(str(source), **{"seed": 3, "shuffle": 4, **options})


def take(
    source: ShardStream, count: int, first: int = 0, lane: int = 0
) -> list[Sample | BadSample]:
    found = source.samples(first, lane)
    items = list(itertools.islice(found, count))
    found.close()
    return items


def ids(items: list[Sample | BadSample]) -> list[str]:
    return [item.sample_id for item in items]


def bad(items: list[Sample | BadSample]) -> set[tuple[str, str]]:
    """Ids and reasons, without about how many samples of a shard are lost."""
    found = [item for item in items if isinstance(item, BadSample)]
    return {(item.sample_id, re.sub(r"\(about \d+ samples\) ", "", item.reason)) for item in found}


def restated(folder: Path, count: int, *, seed: int, lane: int, lanes: int, shuffle: int):
    """The order by its definition: deal permuted shards, then permute blocks of what they hold in
    one pass."""
    passes: dict[int, list[str]] = {}
    shards = sorted(folder.glob("*.tar"))
    for position in range(lane, lanes * count, lanes):
        epoch, place = divmod(position, len(shards))
        order = generator(seed, SHARD_STREAM, epoch).permutation(len(shards))
        with tarfile.open(shards[order[place]]) as opened:
            names = [name for name in opened.getnames() if name.endswith(".jpg")]
        stem = shards[order[place]].stem
        passes.setdefault(epoch, []).extend(f"{stem}/{name[:-4]}" for name in names)
    found: list[str] = []
    start = 0
    for samples in passes.values():
        for first in range(0, len(samples), shuffle):
            block = samples[first : first + shuffle]
            draw = generator(seed, BLOCK_STREAM, start * lanes + lane).permutation(len(block))
            found += [block[offset] for offset in draw]
            start += len(block)
    assert len(found) >= count
    return found[:count]


@pytest.mark.parametrize("shuffle", [1, 4, 64])
@pytest.mark.parametrize(("lane", "lanes"), [(0, 1), (1, 2), (2, 3), (6, 7)])
def test_the_order_is_its_definition(folder, shuffle, lane, lanes):
    """Over several passes, for any number of lanes and any size of block."""
    source = stream(folder, seed=lanes, lanes=lanes, shuffle=shuffle)
    assert isinstance(source, SampleStream)
    expected = restated(folder, 90, seed=lanes, lane=lane, lanes=lanes, shuffle=shuffle)
    assert ids(take(source, 90, lane=lane)) == expected


def test_a_state_saves_reading_what_came_before(folder, monkeypatch):
    """It is small and JSON. A new stream with it opens few shards, and so does the used stream."""
    source = stream(folder)
    whole = take(source, 200)
    text = json.dumps(source.state_dict(170))
    assert len(text) < 200
    opened: list[str] = []
    original = streams.read_shard
    monkeypatch.setattr(
        streams,
        "read_shard",
        lambda shard, *a, **k: opened.append(shard) or original(shard, *a, **k),
    )
    other = stream(folder)
    other.load_state_dict(json.loads(text))
    for used in (source, other):
        opened.clear()
        assert facts(take(used, 4, 170)) == facts(whole[170:174])
        # A block of four, the rest of its shard, and what is read ahead: shards of 3 to 7.
        assert len(opened) <= 5
    assert ids(take(stream(folder), 4, 170)) == ids(whole[170:174])
    assert len(opened) > 30


def test_states_of_other_streams(folder):
    """Other shards, seed or blocks are an error."""
    take(source := stream(folder), 100)
    state = source.state_dict(90)
    assert state["sample"] > 0
    for other in (stream(folder, seed=4), stream(folder, shuffle=5)):
        with pytest.raises(ValueError, match="the stream cannot continue; restore them"):
            other.load_state_dict(state)
    write_tar(folder / "9.tar", numbered(900))
    with pytest.raises(ValueError, match=r"shards, the seed or data\.shuffle_buffer are not those"):
        stream(folder).load_state_dict(state)


@pytest.mark.parametrize("handler", ["ranges", "whole"])
def test_shards_of_a_web_server(folder, serve, handler):
    """The samples of the files, from requests of ranges or of the whole; a missing one is bad."""
    server = serve(handler, folder)
    remote = take(stream(server + "/{0..4}.tar"), 60)
    assert facts(remote) == facts(take(stream(folder), 60))
    found = take(stream(server + "/{0..5}.tar", shuffle=1), 30)
    (missing,) = {b.where: b for b in found if isinstance(b, BadSample)}.values()
    assert (missing.sample_id, missing.where) == ("5", f"{server}/5.tar")
    assert missing.reason.startswith("no such file; all ")


def test_memory_is_that_of_two_blocks(folder, monkeypatch):
    """Samples are freed as they are handed out."""
    made: list[weakref.ref] = []

    class Remembered(Sample):
        def __init__(self, **fields: Any) -> None:
            super().__init__(**fields)
            made.append(weakref.ref(self))

    monkeypatch.setattr(streams, "Sample", Remembered)
    items = stream(folder, shuffle=10).samples()
    most = 0
    for _ in range(100):
        next(items)
        most = max(most, sum(ref() is not None for ref in made))
    items.close()
    assert len(made) >= 100
    assert 10 <= most <= 22  # with one that is being read and one that is in use


def test_a_break_says_about_how_many_samples_are_lost(folder):
    """As many as the shard before had, and where that is known."""
    source = stream(folder)
    (before,) = bad([*source.read(str(folder / "5.tar"))])
    assert len([*source.read(str(folder / "2.tar"))]) == 7
    (after,) = source.read(str(folder / "5.tar"))
    assert before == ("5", "no such file; all of the shard is lost")
    assert after.reason == "no such file; all (about 7 samples) of the shard is lost"
