"""A stream for tests."""

from collections.abc import Container, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

from protoclip.data.pairs import BadSample, ImageTextPairs, Sample, SampleStream
from testing import tiny_pairs


class TinyStream(SampleStream):
    """The tiny pairs over and over. Some numbers are bad: the stream says so, or a decoder."""

    name, lanes = "numbered", 1

    def __init__(
        self, bad: Container[int] = (), damaged: Container[int] = (), lanes: int = 1
    ) -> None:
        self.pairs, self.lanes = ImageTextPairs(tiny_pairs(), name="tiny"), lanes
        self.bad, self.damaged, self.open = bad, damaged, 0

    def samples(self, first: int = 0, lane: int = 0) -> Iterator[Sample | BadSample]:
        self.open += 1
        try:
            for number in count(first * self.lanes + lane, self.lanes):
                sample = self.pairs.sample(number % 96)
                if number in self.bad:
                    yield BadSample(sample.sample_id, "here", "truncated")
                else:
                    yield replace(sample, image=b"nonsense") if number in self.damaged else sample
        finally:
            self.open -= 1

    def state_dict(self, first: int, lane: int = 0) -> dict[str, Any]:
        return {"first": first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError
