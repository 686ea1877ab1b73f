"""Streams of runs that go on with other numbers of ranks: every batch keeps its samples."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count, islice
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protoclip.data import stream as streams
from protoclip.data.chosen import Chosen, IdList, Keeps
from protoclip.data.lanes import MIN_SPARE, shares_of_batches
from protoclip.data.loader import EpisodeLoader
from protoclip.data.mixture import MixedStreams
from protoclip.data.pairs import BadSample, Sample
from protoclip.data.sampler import Episode
from protoclip.data.stream import ShardStream
from protoclip.data.transforms import light_transform

BATCH, EPISODE = 24, 48
RANKS = st.sampled_from([1, 2, 3, 4, 8])
GREY = (0.5, 0.5, 0.5)


def items_of(
    shard: str, _keys: object, _access: object, keeps: Keeps, _: bool, *, sizes: Sequence[int]
) -> Iterator[Sample | BadSample]:
    """Stands in for a tar, named by one letter and its number. Every fifth sample is bad."""
    stem = shard.rpartition("/")[2].removesuffix(".tar")
    for number in range(sizes[int(stem[1:])]):
        name = f"{stem}/{number}"
        if number % 5 == 4:
            yield BadSample(name, shard, "truncated")
        elif keeps(name):
            yield Sample(sample_id=name, image=b"12345678", captions=("a",), where=shard)


def opened(letter: str, sizes: Sequence[int], **more: Any) -> ShardStream:
    return ShardStream(f"https://h/{letter}{{0..{len(sizes) - 1}}}.tar", seed=3, **more)


def loader(stream: ShardStream | MixedStreams, rank: int, world_size: int) -> EpisodeLoader:
    return EpisodeLoader(
        pairs=stream,
        tokenizer=lambda texts: torch.zeros(len(texts), 4),
        transform=light_transform(size=8, mean=GREY, std=GREY),
        batch_size=BATCH // world_size,
        seed=1,
        device=torch.device("cpu"),
        rank=rank,
        world_size=world_size,
    )


def read(ranks: list[EpisodeLoader], first: int, batches: int, ahead: int) -> list[str]:
    """The ids of the batches from a number on, in the order of their positions.

    Each rank has made more batches, as one does whose workers read ahead.
    """
    found: dict[int, str] = {}
    for source in ranks:
        requests = (
            (index * EPISODE + request.position, request.candidates)
            for index in count(first // 2)
            for request in source.requests(
                source.pass_over(
                    Episode(index=index, rows=torch.arange(EPISODE)), max(0, first - index * 2)
                )
            )
        )
        for positions, candidates in [*islice(requests, batches + ahead)][:batches]:
            for position, item in zip(positions.tolist(), candidates, strict=False):
                assert position not in found
                found[position] = item.sample_id
    assert sorted(found) == [*range(first * BATCH, (first + batches) * BATCH)]
    return [found[position] for position in sorted(found)]


def finished_passes(
    stream: ShardStream, lanes: Sequence[Sequence[str]]
) -> Iterator[tuple[list[str], list[str]]]:
    """Of each pass that all lanes have read to its end: what they read, and what the shards hold.

    `lanes` are the ids that each has read.
    """
    begun = [0] * len(lanes)
    for index in count():
        seen, held = list[str](), list[str]()
        for position in range(index * len(stream.shards), (index + 1) * len(stream.shards)):
            ids = [item.sample_id for item in stream.read(stream._shard(position))]
            lane = position % len(lanes)
            seen += lanes[lane][begun[lane] : begun[lane] + len(ids)]
            begun[lane] += len(ids)
            held += ids
        if any(end > len(own) for end, own in zip(begun, lanes, strict=True)):
            return
        yield seen, held


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    legs=st.lists(st.tuples(RANKS, st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=5),
    shuffle=st.sampled_from([5, 64]),
    block_bytes=st.sampled_from([60, 1 << 28]),
    is_mixed=st.booleans(),
)
@settings(max_examples=20, derandomize=True, deadline=None, database=None)
def test_each_sample_of_a_pass_is_seen_once(sizes, legs, shuffle, block_bytes, is_mixed):
    """However often a run stops, amid blocks, shards and episodes, and goes on with other ranks: as
    many or fewer than shards. Some samples are bad, and some left out."""
    left_out = IdList(setting="without", path="", ids=frozenset({"a0/1", "b0/1", "b0/2"}))

    def source(lanes: int) -> ShardStream | MixedStreams:
        parts = [
            opened(letter, sizes, lanes=lanes, shuffle=shuffle, name=letter) for letter in "ab"
        ]
        for part in parts:
            part.chosen = Chosen(without=left_out)
        return MixedStreams(parts, weights=[0.7, 0.3], seed=0) if is_mixed else parts[0]

    lanes, used, saved = legs[0][0], list[str](), list[str]()
    with (
        patch.object(streams, "read_shard", partial(items_of, sizes=sizes)),
        patch.object(streams, "BLOCK_BYTES", block_bytes),
    ):
        for world_size, batches, ahead in legs:
            ranks = [loader(source(world_size), rank, world_size) for rank in range(world_size)]
            for each, state in ((each, state) for each in ranks for state in saved):
                each.load_state_dict(json.loads(state))
            used += read(ranks, len(used) // BATCH, batches, ahead)
            position = divmod(len(used) // BATCH, EPISODE // BATCH)
            saved = [json.dumps(each.state_dict(*position, EPISODE)) for each in ranks]
        # As the run that nothing interrupts.
        whole = source(lanes)
        batches = np.array(used).reshape(-1, lanes, BATCH // lanes)
        for lane in range(lanes):
            own = batches[:, lane].ravel().tolist()
            assert own == [item.sample_id for item in islice(whole.samples(0, lane), len(own))]
        for part in whole.streams if isinstance(whole, MixedStreams) else [whole]:
            start = f"{part.name}/" if is_mixed else ""
            ids = [
                [name.removeprefix(start) for name in batches[:, lane].ravel() if start in name[:2]]
                for lane in range(lanes)
            ]
            for seen, held in finished_passes(part, ids):
                assert sorted(seen) == sorted(held)


@pytest.mark.parametrize(("lanes", "ranks"), [(1, 8), (2, 3), (2, 2), (3, 2), (4, 1), (3, 8)])
def test_no_two_ranks_have_the_same_samples(lanes, ranks):
    """Not the same spare ones either, of which each has enough."""
    stream = opened("a", [100] * 4, lanes=lanes)
    with patch.object(streams, "read_shard", partial(items_of, sizes=[100] * 4)):
        shares = [
            shares_of_batches(stream, 2, batch_size=BATCH, rank=rank, world_size=ranks)
            for rank in range(ranks)
        ]
        for candidates in zip(*islice(zip(*shares, strict=True), 3), strict=True):
            assert min(map(len, candidates)) >= BATCH // ranks + MIN_SPARE
        together = [item.sample_id for share in shares for item in next(share)]
    assert len({*together}) == len(together)


def test_a_stream_goes_on_amid_an_episode_without_reading_its_beginning():
    """And with the whole episode, if that is asked for."""
    opened_shards = list[str]()

    def noted(shard: str, *given: Any) -> Iterator[Sample | BadSample]:
        opened_shards.append(shard)
        return items_of(shard, *given, sizes=[8] * 40)

    with patch.object(streams, "read_shard", noted):
        stream = partial(opened, "a", [8] * 40, shuffle=4)
        one = loader(stream(), 0, 1)
        expected = read([one], 0, 4, 0)
        state = json.loads(json.dumps(one.state_dict(1, 1, EPISODE)))
        for first in (3, 2):
            opened_shards.clear()
            other = loader(stream(), 0, 1)
            other.load_state_dict(state)
            assert read([other], first, 1, 0) == expected[first * BATCH : (first + 1) * BATCH]
            assert opened_shards[0] == one.pairs._shard(first * BATCH // 8)


def test_a_state_of_a_version_that_had_a_lane_a_rank():
    """A rank's state was that of its lane, which other ranks take too."""
    with patch.object(streams, "read_shard", partial(items_of, sizes=[9] * 4)):
        ranks = [loader(opened("a", [9] * 4, lanes=2), rank, 2) for rank in range(2)]
        expected = read(ranks, 0, 8, 0)
        one = loader(opened("a", [9] * 4), 0, 1)
        for state in (each.state_dict(2, 1, EPISODE) for each in ranks):
            lane, _ = state["stream"]  # of the episode's start, and of the next batch
            one.load_state_dict({**state, "stream": lane})
        assert read([one], 5, 3, 0) == expected[5 * BATCH :]
