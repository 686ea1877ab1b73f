"""Mixtures: rows, streams, and the episodes drawn from them."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest

from protoclip.data.mixture import MixedPairs, MixedStreams, ShuffledCaptions
from protoclip.data.pairs import (
    BadSample,
    ImageTextPairs,
    Pairs,
    Sample,
    SampleStream,
)
from protoclip.data.sampler import EpisodeSampler
from protoclip.testing import tiny_pairs


class Counting:
    """A stream whose samples are named by their number; remembers what it was asked for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.learned: list[dict[str, Any]] = []

    def samples(self, first: int = 0) -> Iterator[Sample | BadSample]:
        number = first
        while True:
            where = f"{self.name}/{number}"
            yield Sample(sample_id=where, image=b"", captions=("a",), where=where)
            number += 1

    def state_dict(self, first: int) -> dict[str, Any]:
        return {"first": first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learned.append(state)


def ids(stream: SampleStream, first: int, number: int) -> list[str]:
    found = []
    for sample in islice(stream.samples(first), number):
        assert isinstance(sample, Sample)
        found.append(sample.sample_id)
    return found


def test_rows_of_a_mixture_are_those_of_its_sources_in_turn() -> None:
    """Row numbers, sample ids and their order; all of the first source, then of the second."""
    first = ImageTextPairs(tiny_pairs(5).drop_columns(["sample_id"]), name="a")
    second = ShuffledCaptions(ImageTextPairs(tiny_pairs(3), name="b"), seed=0)
    mixed = MixedPairs([first, second])
    assert isinstance(mixed, Pairs)
    assert len(mixed) == 8
    expected = [f"a/{row}" for row in range(5)] + [f"b/tiny/{row}" for row in range(3)]
    assert list(mixed.sample_ids()) == expected
    assert [mixed.sample(row).sample_id for row in range(8)] == expected


def test_shuffled_captions_are_a_permutation_of_the_captions() -> None:
    """Every caption is used as often as before, pictures and ids stay, hardly any pair survives."""
    table = tiny_pairs(90).set_column(1, "caption", [[f"caption {row}" for row in range(90)]])
    plain = ImageTextPairs(table, name="a")
    shuffled = ShuffledCaptions(plain, seed=3)
    before = [plain.sample(row) for row in range(90)]
    after = [shuffled.sample(row) for row in range(90)]
    assert sorted(s.captions for s in after) == sorted(s.captions for s in before)
    assert [s.sample_id for s in after] == [s.sample_id for s in before]
    assert sum(a.captions == b.captions for a, b in zip(after, before, strict=True)) < 8


@pytest.mark.parametrize("first", [0, 1, 999, 1000, 2345])
def test_a_mixed_stream_is_the_same_from_anywhere(first: int) -> None:
    """Starting at a number equals reading from the beginning and dropping so many."""
    mixed = MixedStreams(
        [Counting("a"), Counting("b"), Counting("c")], weights=[5.0, 3.0, 2.0], seed=1
    )
    assert isinstance(mixed, SampleStream)
    assert ids(mixed, first, 500) == ids(mixed, 0, first + 500)[first:]


def test_a_mixed_stream_keeps_its_shares_and_skips_nothing() -> None:
    """Exact shares over each thousand; every stream is read in its order, without a gap."""
    mixed = MixedStreams([Counting("a"), Counting("b")], weights=[0.7, 0.3], seed=0)
    found = ids(mixed, 0, 3000)
    for name, share in (("a", 700), ("b", 300)):
        assert [i for i in found if i[0] == name] == [
            f"{name}/{name}/{n}" for n in range(3 * share)
        ]
    assert Counter(i[0] for i in found[:1000]) == {"a": 700, "b": 300}
    assert max(len(run) for run in "".join(i[0] for i in found).split("b")) < 60


def test_landmarks_of_a_mixed_stream_reach_each_stream() -> None:
    """Each stream's landmark is for the number of its own samples before that place."""
    streams = [Counting("a"), Counting("b")]
    mixed = MixedStreams(streams, weights=[0.7, 0.3], seed=0)
    landmark = mixed.state_dict(1500)
    counts = Counter(i[0] for i in ids(mixed, 0, 1500))
    assert landmark["streams"] == [{"first": counts["a"]}, {"first": counts["b"]}]
    mixed.load_state_dict(landmark)
    assert streams[1].learned == [{"first": counts["b"]}]
    for other in (
        MixedStreams([Counting("a"), Counting("c")], weights=[0.7, 0.3], seed=0),
        MixedStreams([Counting("a"), Counting("b")], weights=[0.6, 0.4], seed=0),
        MixedStreams([Counting("a"), Counting("b")], weights=[0.7, 0.3], seed=1),
    ):
        with pytest.raises(ValueError, match="the names, the weights or the seed are not those"):
            other.load_state_dict(landmark)


@pytest.mark.parametrize("replacement", [True, False])
def test_weights_set_the_shares_of_an_episode(replacement: bool) -> None:
    """Three to one, whatever the sizes: exactly without replacement, else by expectation."""
    sampler = EpisodeSampler([50, 4000], 400, seed=2, replacement=replacement, weights=[3.0, 1.0])
    small = [int((sampler.episode(i).rows < 50).sum()) for i in range(20)]
    if replacement:
        assert abs(np.mean(small) - 300) < 5 * np.sqrt(400 * 0.75 * 0.25 / 20)
    else:
        assert set(small) == {300}


def test_weighted_sources_are_gone_through_turn_by_turn() -> None:
    """Without replacement each source's draws cover it evenly: every row as often as any other."""
    sampler = EpisodeSampler([30, 70], 40, seed=2, replacement=False, weights=[1.0, 1.0])
    rows = np.concatenate([sampler.episode(i).rows.numpy() for i in range(21)])  # 420 of each
    counts = np.bincount(rows, minlength=100)
    assert set(counts[:30]) == {14}
    assert set(counts[30:]) == {6}
    assert not np.array_equal(np.sort(rows[:40]), rows[:40])


def test_sources_without_weights_are_one_long_source() -> None:
    """The same rows as from one source of their total size."""
    joined = EpisodeSampler([30, 70], 40, seed=5, replacement=False).episode(3)
    assert (
        joined.rows.tolist()
        == EpisodeSampler(100, 40, seed=5, replacement=False).episode(3).rows.tolist()
    )


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -2.0]])
def test_weights_that_make_no_sense_are_refused(weights: list[float]) -> None:
    """One above 0 for each source."""
    with pytest.raises(ValueError, match=r"weights: .* above 0, one for each source"):
        EpisodeSampler([10, 20], 5, seed=0, weights=weights)
