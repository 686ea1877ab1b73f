"""Streams of runs that go on with other numbers of ranks: every batch keeps its samples."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import count, islice, product
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from endless import TinyStream
from hypothesis import given, settings
from hypothesis import strategies as st

from protoclip.data import shards as streams
from protoclip.data.loader import EpisodeLoader, Pass
from protoclip.data.pairs import BadSample, Sample, SampleStream
from protoclip.data.sampler import EXTRACTION_STREAM, TRANSFORM_STREAM, Episode
from protoclip.data.shards import ShardStream
from protoclip.data.sources import MixedStreams
from protoclip.data.split import Chosen
from protoclip.data.transforms import EvaluationTransform, light_transform
from protoclip.distributed import collectives
from protoclip.encode.store import hash_ids
from protoclip.prototypes.features import ExtractedFeatures
from testing import build_model, run_distributed, tiny_model

BATCH, EPISODE = 24, 48
RANKS = st.sampled_from([1, 2, 3, 4, 8])
GREY = (0.5, 0.5, 0.5)
WHOLE = Episode(index=0, rows=torch.arange(EPISODE))


def items_of(
    shard: str, _: object, keeps: Callable[[str], bool], *, sizes: Sequence[int], **more: object
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


def loader(stream: SampleStream, rank: int, world_size: int) -> EpisodeLoader:
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
            (index * EPISODE + request.position, request.stretches)
            for index in count(first // 2)
            for request in source.requests(
                Pass(Episode(index=index, rows=torch.arange(EPISODE)), max(0, first - index * 2))
            )
        )
        for positions, stretches in [*islice(requests, batches + ahead)][:batches]:
            items = [item for stretch in stretches for item in stretch.samples]
            for position, item in zip(positions.tolist(), items, strict=True):
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
    left_out = {"without": frozenset({"a0/1", "b0/1", "b0/2"})}

    def source(lanes: int) -> ShardStream | MixedStreams:
        parts = [
            opened(letter, sizes, lanes=lanes, shuffle=shuffle, name=letter) for letter in "ab"
        ]
        for part in parts:
            part.chosen = Chosen(ids=left_out, paths={})
        return MixedStreams(parts, weights=[0.7, 0.3], seed=0) if is_mixed else parts[0]

    lanes, used, saved = legs[0][0], list[str](), list[str]()
    with (
        patch.object(streams, "read_shard", partial(items_of, sizes=sizes)),
        patch.object(streams, "BLOCK_BYTES", block_bytes),
    ):
        for world_size, batches, ahead in legs:
            ranks = [loader(source(world_size), rank, world_size) for rank in range(world_size)]
            for resumed, state in product(ranks, saved):
                resumed.load_state_dict(json.loads(state))
            used += read(ranks, len(used) // BATCH, batches, ahead)
            position = divmod(len(used) // BATCH, EPISODE // BATCH)
            saved = [json.dumps(left.state_dict(*position, EPISODE)) for left in ranks]
        # As the run that nothing interrupts.
        whole = source(lanes)
        batches = np.array(used).reshape(-1, lanes, BATCH // lanes)
        for lane in range(lanes):
            own = batches[:, lane].ravel().tolist()
            assert own == [item.sample_id for item in islice(whole.samples(0, lane), len(own))]
        for part in whole.sources if isinstance(whole, MixedStreams) else [whole]:
            start = f"{part.name}/" if is_mixed else ""
            ids = [
                [name.removeprefix(start) for name in batches[:, lane].ravel() if start in name[:2]]
                for lane in range(lanes)
            ]
            for seen, held in finished_passes(part, ids):
                assert sorted(seen) == sorted(held)


BAD, DAMAGED = frozenset({3, 5, 19, 33, 41}), frozenset({12, 16, 24, 26, 30, 44, 50})


def all_ranks(
    lanes: int, ranks: int, start: int = 0, **settings: Any
) -> tuple[list[Any], int, int]:
    """The batches of an episode as all ranks have them; how many were read, and how many bad."""
    parts, read = [], list[tuple[int, list[BadSample]]]()
    for rank in range(ranks):
        made = loader(TinyStream(BAD, DAMAGED, lanes), rank, ranks)
        made = replace(made, on_read=lambda *counts: read.append(counts))
        parts.append([*made.batches(Pass(WHOLE, start, **settings))])
    batches = [
        (
            [name for part in together for name in part.sample_id],
            torch.cat([b.image for b in together]),
        )
        for together in zip(*parts, strict=True)
    ]
    return batches, sum(number for number, _ in read), sum(len(bad) for _, bad in read)


@pytest.mark.parametrize("longest", [256, 5])
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_ranks_of_a_stream_replace_bad_samples_alike(lanes, longest, monkeypatch):
    """As many ranks as lanes, fewer or more: each position has the same sample and the same crop of
    it, no batch has one twice, and each bad one is counted once. Stretches may be short."""
    monkeypatch.setattr("protoclip.data.sampler.MAX_STRETCH", longest)
    alone, read, bad = all_ranks(lanes, 1)
    assert all(len({*ids}) == BATCH for ids, _ in alone)
    assert read == EPISODE + bad
    for ranks in (2, 3, 8):
        batches, *counts = all_ranks(lanes, ranks)
        assert counts == [read, bad]
        for (ids, images), (expected, same) in zip(batches, alone, strict=True):
            assert ids == expected
            assert torch.equal(images, same)


def test_all_passes_over_a_stream_replace_bad_samples_alike():
    """Prototypes are those of positions: extraction, and training from its middle on, also by other
    ranks, see the same samples there."""
    evaluation = EvaluationTransform(size=12, mean=GREY, std=GREY)
    trained = [ids for ids, _ in all_ranks(2, 2)[0]]
    extracted = all_ranks(2, 2, transform=evaluation, stream=EXTRACTION_STREAM)[0]
    assert [ids for ids, _ in extracted] == trained
    for ranks in (1, 2, 8):
        assert [ids for ids, _ in all_ranks(2, ranks, 1)[0]] == trained[1:]


@contextmanager
def good_shards(number: int, read: list[str]) -> Iterator[None]:
    """Shards of this many samples, whose images are grey; `read` gets the id of each sample."""

    def items(shard: str, *_: object, **more: object) -> Iterator[Sample]:
        for index in range(number):
            name = f"{shard}/{index}"
            read.append(name)
            yield Sample(sample_id=name, image=b"", captions=("a",), where=shard)

    def decoded(_: object, item: Sample | BadSample, decode: object) -> tuple[Sample, np.ndarray]:
        if isinstance(item, BadSample):
            raise item
        return item, np.zeros((8, 8, 3), np.uint8)

    with (
        patch.object(streams, "read_shard", items),
        patch("protoclip.data.loader.read_image", decoded),
    ):
        yield


LOSSES = {
    "extraction": {(0, 0): 2},
    "training": {(0, 1): 2, (1, 1): 2},
    "both": {(0, 0): 1, (0, 1): 3, (1, 0): 2},
    "one rank alone": {(1, 1): 1},
}


class Losing(ShardStream):
    """Cannot read the shard that it opens as this number."""

    loses = -1

    def read(self, shard: str) -> Iterator[Sample | BadSample]:
        self.loses -= 1
        if self.loses == 0:
            yield BadSample(shard, shard, "refused; all of the shard is lost")
        else:
            yield from super().read(shard)


@pytest.mark.parametrize("lost", LOSSES)
def test_no_sample_has_the_prototype_of_another(lost):
    """Two ranks extract and then train; shards are lost, by rank and pass."""
    episode, passes = Episode(index=0, rows=torch.arange(240)), list[list[Any]]()
    source = partial(Losing, "https://h/a{0..39}.tar", seed=3, lanes=2, shuffle=8)
    ranks = [loader(source(), rank, 2) for rank in range(2)]
    with good_shards(24, []):
        for number, kind in enumerate((EXTRACTION_STREAM, TRANSFORM_STREAM)):
            passes.append([])
            for rank, own in enumerate(ranks):
                own.close()
                own.pairs.loses = LOSSES[lost].get((rank, number), 0)
                passes[-1] += [*own.batches(Pass(episode, stream=kind))]
    extracted = {
        position: name
        for batch in passes[0]
        for position, name in zip(batch.position.tolist(), batch.sample_id, strict=True)
    }
    names = [extracted[position] for position in range(240)]
    features = ExtractedFeatures(
        model=build_model(tiny_model(), seed=0),
        batches=lambda _: [],
        teachers={},
        autocast=nullcontext,
    )
    features.remember(torch.from_numpy(hash_ids(names).view(np.int64)))
    wrong = unknown = 0
    for batch in passes[1]:
        for row, name in zip(features._rows(batch).tolist(), batch.sample_id, strict=True):
            wrong += row >= 0 and names[row] != name
            unknown += row < 0
            assert (row < 0) == (name not in names)
    assert wrong == 0
    assert 0 < unknown < 80


def batches_of_lane(loses: int) -> int:
    """The batches of this rank, which shares a lane with another, until the run ends."""
    stream = Losing("https://h/a{0..39}.tar", seed=3)
    rank = collectives.rank()
    stream.loses = loses if rank == 1 else 0
    made = 0
    with good_shards(24, []), suppress(ValueError):
        for _ in loader(stream, rank, 2).batches(Pass(Episode(index=0, rows=torch.arange(240)))):
            made += 1
    return made


def test_ranks_that_share_a_lane_do_not_go_on_with_other_samples():
    """The batches before the shard that one of them loses are alike."""
    assert run_distributed(batches_of_lane, 2, 0) == [10, 10]
    ended = run_distributed(batches_of_lane, 2, 7)
    assert ended[0] == ended[1] < 8


@pytest.mark.parametrize("extracts", [False, True])
def test_passes_go_on_where_they_stood(extracts):
    """A lane's reader is opened once for each kind of pass, amid a block and a shard."""
    read_of_shards, used = list[str](), 0
    with good_shards(100, read_of_shards):
        one = loader(ShardStream("https://h/a{0..39}.tar", seed=3, shuffle=96), 0, 1)
        for index in range(40):
            episode = Episode(index=index, rows=torch.arange(EPISODE))
            for kind in [EXTRACTION_STREAM] * extracts + [TRANSFORM_STREAM]:
                used += sum(len(batch.image) for batch in one.batches(Pass(episode, stream=kind)))
        one.close()
    assert len(read_of_shards) < 1.5 * used
