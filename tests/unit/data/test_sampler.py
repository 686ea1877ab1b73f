"""Episodes are pure functions of seed and number, also of mixtures."""

import collections
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from protoclip.config import Config, DataConfig, EpisodeConfig, SourceConfig
from protoclip.data.pairs import BadSample, ImageTextPairs, Sample, SampleStream, split_by_source
from protoclip.data.sampler import EpisodeSampler, episodes, permute, transform_draws
from protoclip.data.sources import AllBut, MixedStreams, PairsView, drop_rows, mix_pairs
from testing import tiny_pairs


def test_a_pass_over_many_pairs_takes_little_more_memory_than_its_rows():
    """And holds each pair once, though rows are permuted some at a time."""
    sampler = EpisodeSampler(2**20, 2**20, seed=0, replacement=False)
    tracemalloc.start()
    rows = sampler.episode(1).rows
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 24 * 2**20
    assert rows.sort().values.equal(torch.arange(2**20))


@pytest.mark.parametrize("replacement", [True, False])
def test_an_episode_depends_on_seed_and_number_alone(replacement):
    """In any order, from a fresh sampler, after the global generator moved: the same rows."""
    first = EpisodeSampler(1000, 100, seed=3, replacement=replacement)
    forward = [first.episode(i).rows for i in range(5)]
    torch.manual_seed(7)
    fresh = EpisodeSampler(1000, 100, seed=3, replacement=replacement)
    backward = [fresh.episode(i).rows for i in reversed(range(5))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(forward[0], forward[1])
    other = EpisodeSampler(1000, 100, seed=4, replacement=replacement).episode(0).rows
    assert not torch.equal(forward[0], other)


@pytest.mark.parametrize(("samples", "size"), [(100, 30), (97, 97), (64, 64), (10, 3), (1, 1)])
def test_without_replacement_each_pass_holds_every_row_once(samples, size):
    """Cut the stream of episodes into passes over the data: each is a permutation of all rows."""
    sampler = EpisodeSampler(samples, size, seed=0, replacement=False)
    stream = torch.cat([sampler.episode(i).rows for i in range(3 * samples // size + 1)])
    passes = [stream[t * samples : (t + 1) * samples] for t in range(3)]
    for rows in passes:
        assert sorted(rows.tolist()) == list(range(samples))
    if samples > 10:
        assert not torch.equal(passes[0], passes[1])


def test_with_replacement_rows_are_uniform():
    """Counts over many episodes stay within five standard deviations of even."""
    sampler = EpisodeSampler(50, 1000, seed=0)
    counts = collections.Counter(
        row for episode in range(20) for row in sampler.episode(episode).rows.tolist()
    )
    assert set(counts) == set(range(50))
    assert max(abs(count - 400) for count in counts.values()) < 5 * 20


def test_the_permutation_mixes():
    """Neighbours do not stay neighbours; a hundred billion rows cost no memory."""
    image = permute(np.arange(5000), 5000, seed=1, number=0)
    assert sorted(image.tolist()) == list(range(5000))
    assert (np.abs(np.diff(image)) == 1).mean() < 0.01
    assert abs(np.corrcoef(np.arange(5000), image)[0, 1]) < 0.05
    rows = EpisodeSampler(10**11, 1000, seed=0, replacement=False).episode(12345).rows
    assert len(rows.unique()) == 1000
    assert int(rows.max()) < 10**11


def test_transform_draws_repeat_and_change_with_the_episode():
    draws = transform_draws(0, 5, 20, 13)
    assert np.array_equal(draws, transform_draws(0, 5, 20, 13))
    assert not np.array_equal(draws, transform_draws(0, 6, 20, 13))
    assert 0 <= float(draws.min()) < float(draws.max()) < 1


@pytest.mark.parametrize("replacement", [True, False])
def test_weights_set_the_shares_of_an_episode(replacement):
    """Three to one, whatever the sizes: exactly without replacement, else by expectation."""
    sampler = EpisodeSampler([50, 4000], 400, seed=2, replacement=replacement, weights=[3.0, 1.0])
    small = [int((sampler.episode(i).rows < 50).sum()) for i in range(20)]
    if replacement:
        assert abs(np.mean(small) - 300) < 5 * np.sqrt(400 * 0.75 * 0.25 / 20)
    else:
        assert set(small) == {300}


def test_passes_over_weighted_sources_are_even():
    """Without replacement each source's draws cover it evenly: every row as often as any other."""
    sampler = EpisodeSampler([30, 70], 40, seed=2, replacement=False, weights=[1.0, 1.0])
    rows = np.concatenate([sampler.episode(i).rows.numpy() for i in range(21)])  # 420 of each
    counts = np.bincount(rows, minlength=100)
    assert set(counts[:30]) == {14}
    assert set(counts[30:]) == {6}
    assert not np.array_equal(np.sort(rows[:40]), rows[:40])


def test_sources_without_weights_are_one_long_source():
    """The same rows as from one source of their total size."""
    joined, single = (EpisodeSampler(s, 40, seed=5, replacement=False) for s in ([30, 70], 100))
    assert torch.equal(joined.episode(3).rows, single.episode(3).rows)


def test_a_source_with_a_weight_of_which_nothing_is_left_is_named():
    """A permutation of nothing would never end."""
    parts = [ImageTextPairs(tiny_pairs(size), name=n) for n, size in (("many", 8), ("few", 2))]
    data = DataConfig(sources=[SourceConfig(path=part.name, weight=1.0) for part in parts])
    samples = drop_rows(mix_pairs(parts), np.array([8, 9]))
    for replacement in (False, True):
        config = Config(data=data, episodes=EpisodeConfig(size=8, replacement=replacement))
        with pytest.raises(
            ValueError, match=r"^data\.sources: no pair of 'few' is left .* weight;"
        ):
            episodes(config, samples)


class Counting(SampleStream):
    """A stream whose samples are named by their number."""

    lanes = 2

    def __init__(self, name: str) -> None:
        self.name = name

    def samples(self, first: int = 0, lane: int = 0) -> Iterator[Sample | BadSample]:
        number = first
        while True:
            where = f"{self.name}/{number}"
            yield Sample(sample_id=where, image=b"", captions=("a",), where=where)
            number += 1

    def state_dict(self, first: int, lane: int = 0) -> dict[str, Any]:
        raise AssertionError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError


def ids(stream: SampleStream, first: int, number: int) -> list[str]:
    return [sample.sample_id for sample in islice(stream.samples(first), number)]


def mixture(names: str = "ab", weights: tuple[float, ...] = (0.7, 0.3), seed: int = 0):
    return MixedStreams([Counting(name) for name in names], weights=weights, seed=seed)


def test_a_view_gives_the_rows_of_its_sources():
    """All but some of one, and some of another in any order; rows are numbered over both."""
    one, two = (ImageTextPairs(tiny_pairs(5), name=name).prefix_ids() for name in "ab")
    view = PairsView([(one, AllBut(5, np.array([1, 3]))), (two, [4, 0])])
    expected = [(one, 0), (one, 2), (one, 4), (two, 4), (two, 0)]
    assert [view.locate(row) for row in range(len(view))] == expected
    ids = [source.sample_id(row) for source, row in expected]
    assert [*view.sample_ids()] == [view.sample_id(row) for row in range(5)] == ids
    assert [view.read_encoded(row) for row in range(5)] == [
        s.read_encoded(row) for s, row in expected
    ]
    assert view.left_out.tolist() == [1, 3]
    found = split_by_source([one, two], np.array([0, 4, 5, 9]))
    assert [(source, rows.tolist()) for source, rows in found] == [(one, [0, 4]), (two, [0, 4])]


def test_a_mixed_stream_keeps_its_shares_and_skips_nothing():
    """Exact shares over each thousand; every stream is read in its order, without a gap."""
    found = ids(mixture(), 0, 3000)
    for name, share in (("a", 700), ("b", 300)):
        expected = [f"{name}/{name}/{n}" for n in range(3 * share)]
        assert [i for i in found if i[0] == name] == expected
    assert Counter(i[0] for i in found[:1000]) == {"a": 700, "b": 300}
    assert max(len(run) for run in "".join(i[0] for i in found).split("b")) < 60
    with pytest.raises(ValueError, match="a weight is less than a thousandth"):
        mixture(weights=(1.0, 5000.0))
