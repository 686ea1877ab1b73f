"""Mixtures: rows, streams, and the episodes drawn from them."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest

from protoclip.data.pairs import BadSample, ImageTextPairs, Sample, SampleStream, split_by_source
from protoclip.data.sources import AllBut, MixedStreams, PairsView
from testing import tiny_pairs


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


@pytest.mark.parametrize("first", [0, 1, 999, 1000, 2345])
def test_a_mixed_stream_is_the_same_from_anywhere(first):
    """Starting at a number equals reading from the beginning and dropping so many."""
    mixed = mixture("abc", (5.0, 3.0, 2.0), seed=1)
    assert isinstance(mixed, SampleStream)
    assert ids(mixed, first, 500) == ids(mixed, 0, first + 500)[first:]


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
