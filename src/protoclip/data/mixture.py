"""Several sources as one, and a source with its captions shuffled."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from protoclip.data.index import digest
from protoclip.data.pairs import (
    BadSample,
    Pairs,
    Sample,
    SampleStream,
)
from protoclip.data.sampler import ORDER_STREAM, generator, permute

# Number of a permutation that no turn over the data reaches.
APART = 2**62
# Positions over which a mixture of streams keeps its shares exactly.
PERIOD = 1000


def check_names(names: Sequence[str]) -> None:
    """Check that sample ids which start with a source's name and `/` are unique.

    Raises:
        ValueError: Two sources have one name, or a name holds a `/`.
    """
    for name in names:
        wrong = (
            f"two are named '{name}'"
            if names.count(name) > 1
            else f"'{name}' cannot begin sample ids, because of its '/'"
        )
        if names.count(name) > 1 or "/" in name:
            raise ValueError(
                f"data.sources: {wrong}; give each source a name of its own, without '/', by "
                "name = ... in its [[data.sources]]"
            )


def under(name: str, item: Sample | BadSample) -> Sample | BadSample:
    """A sample of the source of that name, under the id that it has in a mixture."""
    sample_id = f"{name}/{item.sample_id}"
    if isinstance(item, Sample):
        return replace(item, sample_id=sample_id)
    return BadSample(sample_id, item.where, item.reason)


class MixedPairs:
    """Sources one after the other: the rows of the second follow those of the first.

    Every sample id is `<name of the source>/<id in the source>`, so that none comes twice. How
    often each source is drawn is the sampler's affair.

    Args:
        sources: At least one.

    Raises:
        ValueError: Two sources of one name, or a name with a `/`.
    """

    has_ids = True

    def __init__(self, sources: Sequence[Pairs]) -> None:
        check_names([source.name for source in sources])
        self.sources = list(sources)
        self._ends = list(accumulate(len(source) for source in sources))

    @property
    def name(self) -> str:
        return " + ".join(source.name for source in self.sources)

    def __len__(self) -> int:
        return self._ends[-1]

    def sample(self, row: int) -> Sample:
        source, own = self._find(row)
        try:
            return replace(source.sample(own), sample_id=self.sample_id(row))
        except BadSample as error:
            raise BadSample(self.sample_id(row), error.where, error.reason) from None

    def sample_id(self, row: int) -> str:
        source, row = self._find(row)
        return f"{source.name}/{source.sample_id(row) if source.has_ids else row}"

    def sample_captions(self, row: int) -> tuple[str, ...]:
        source, own = self._find(row)
        try:
            return source.sample_captions(own)
        except BadSample as error:
            raise BadSample(self.sample_id(row), error.where, error.reason) from None

    def _find(self, row: int) -> tuple[Pairs, int]:
        number = bisect_right(self._ends, row)
        return self.sources[number], row - (self._ends[number - 1] if number else 0)

    def sample_ids(self) -> Iterator[str]:
        for source in self.sources:
            if source.has_ids:
                yield from (f"{source.name}/{own}" for own in source.sample_ids())
            else:
                yield from (f"{source.name}/{row}" for row in range(len(source)))


class MixedStreams:
    """Streams in turns, each with its share of every thousand samples, in a seeded order.

    Every sample id is `<name of the stream>/<id in the stream>`.

    Args:
        streams: At least one.
        weights: Relative share of each.
        seed: Names the order.

    Raises:
        ValueError: Two streams of one name, a name with a `/`, or a weight that is too small.
    """

    def __init__(
        self, streams: Sequence[SampleStream], *, weights: Sequence[float], seed: int
    ) -> None:
        check_names([stream.name for stream in streams])
        self.streams, self.seed = list(streams), seed
        bounds = np.rint(PERIOD * np.cumsum(weights) / sum(weights)).astype(np.int64)
        self._shares = np.diff(bounds, prepend=0)
        if not self._shares.all():
            raise ValueError("data.sources: a weight is less than a thousandth of their sum")

    @property
    def name(self) -> str:
        return " + ".join(stream.name for stream in self.streams)

    def samples(self, first: int = 0) -> Iterator[Sample | BadSample]:
        period, skip = divmod(first, PERIOD)
        readers = [
            stream.samples(number)
            for stream, number in zip(self.streams, self._counts(first), strict=True)
        ]
        while True:
            for source in self._order(period)[skip:]:
                yield under(self.streams[source].name, next(readers[source]))
            period, skip = period + 1, 0

    def landmark(self, first: int) -> dict[str, Any]:
        marks = [
            stream.landmark(number)
            for stream, number in zip(self.streams, self._counts(first), strict=True)
        ]
        return {"streams": marks, "mixture": self._identity()}

    def learn(self, landmark: dict[str, Any]) -> None:
        if landmark.get("mixture") != self._identity():
            raise ValueError(
                f"{self.name}: the names, the weights or the seed are not those of what was "
                "interrupted, so the streams cannot go on; restore them, or start anew"
            )
        for stream, mark in zip(self.streams, landmark["streams"], strict=True):
            stream.learn(mark)

    def _identity(self) -> str:
        names = [stream.name for stream in self.streams]
        return digest({"names": names, "shares": self._shares.tolist(), "seed": self.seed})

    def _order(self, period: int) -> npt.NDArray[np.int64]:
        sources = np.repeat(np.arange(len(self.streams)), self._shares)
        return generator(self.seed, ORDER_STREAM, period).permutation(sources)

    def _counts(self, first: int) -> list[int]:
        """How many of the first samples came from each stream."""
        period, within = divmod(first, PERIOD)
        begun = np.bincount(self._order(period)[:within], minlength=len(self.streams))
        counts: list[int] = (period * self._shares + begun).tolist()
        return counts


class ShuffledCaptions:
    """Each picture with another's captions: the control that must learn nothing."""

    def __init__(self, pairs: Pairs, *, seed: int) -> None:
        self.pairs, self.seed = pairs, seed

    @property
    def name(self) -> str:
        return self.pairs.name

    @property
    def has_ids(self) -> bool:
        return self.pairs.has_ids

    def __len__(self) -> int:
        return len(self.pairs)

    def sample(self, row: int) -> Sample:
        return replace(self.pairs.sample(row), captions=self.sample_captions(row))

    def sample_id(self, row: int) -> str:
        return self.pairs.sample_id(row)

    def sample_captions(self, row: int) -> tuple[str, ...]:
        other = int(permute(np.array([row]), len(self), seed=self.seed, turn=APART)[0])
        try:
            return self.pairs.sample_captions(other)
        except BadSample as error:
            raise BadSample(self.sample_id(row), error.where, error.reason) from None

    def sample_ids(self) -> Iterator[str]:
        return self.pairs.sample_ids()
