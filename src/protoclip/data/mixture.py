"""Several sources as one, and a source with its captions shuffled."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from protoclip.data.access import digest
from protoclip.data.pairs import BadSample, Pairs, Sample, SampleStream
from protoclip.data.sampler import ORDER_STREAM, generator, permute

# A permutation that no pass over the data uses.
CAPTION_PERMUTATION = 2**62
# A mixture of streams keeps its shares exactly over this many samples.
PERIOD = 1000


def check_names(names: Sequence[str]) -> None:
    """Raise `ValueError` if ids `<name>/<id in the source>` of these sources could be equal."""
    for name in names:
        if names.count(name) > 1 or "/" in name:
            wrong = f"two are named '{name}'" if "/" not in name else f"'{name}' holds a '/'"
            raise ValueError(
                f"data.sources: {wrong}, but sample ids start with the name; give each source a "
                "name of its own, without '/', by name = ... in its [[data.sources]]"
            )


def under(name: str, item: Sample | BadSample) -> Sample | BadSample:
    """A sample with the id that it has in a mixture, if its source has that name."""
    sample_id = f"{name}/{item.sample_id}"
    if isinstance(item, Sample):
        return replace(item, sample_id=sample_id)
    return BadSample(sample_id, item.where, item.reason)


class MixedPairs:
    """Sources one after the other: the rows of the second follow those of the first.

    Every sample id is `<name of the source>/<id in the source>`, so ids are unique. The sampler
    decides how often each source is drawn.

    Raises:
        ValueError: Two sources of one name, or a name with a `/`.
    """

    has_ids = True

    def __init__(self, sources: Sequence[Pairs]) -> None:
        check_names([source.name for source in sources])
        self.sources = list(sources)
        self.name = " + ".join(source.name for source in sources)
        self._ends = list(accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1]

    def sample(self, row: int) -> Sample:
        source, own = self._find(row)
        try:
            return replace(source.sample(own), sample_id=self.sample_id(row))
        except BadSample as error:
            raise BadSample(self.sample_id(row), error.where, error.reason) from None

    def sample_id(self, row: int) -> str:
        source, own = self._find(row)
        return f"{source.name}/{source.sample_id(own) if source.has_ids else own}"

    def sample_captions(self, row: int) -> tuple[str, ...]:
        source, own = self._find(row)
        try:
            return source.sample_captions(own)
        except BadSample as error:
            raise BadSample(self.sample_id(row), error.where, error.reason) from None

    def sample_ids(self) -> Iterator[str]:
        for source in self.sources:
            for own in source.sample_ids() if source.has_ids else range(len(source)):
                yield f"{source.name}/{own}"

    def _find(self, row: int) -> tuple[Pairs, int]:
        number = bisect_right(self._ends, row)
        return self.sources[number], row - (self._ends[number - 1] if number else 0)


class MixedStreams:
    """Streams in a seeded order, each with its exact share of every thousand samples.

    Every sample id is `<name of the stream>/<id in the stream>`.

    Raises:
        ValueError: Two streams of one name, a name with a `/`, or a weight that is too small.
    """

    def __init__(
        self, streams: Sequence[SampleStream], *, weights: Sequence[float], seed: int
    ) -> None:
        names = [stream.name for stream in streams]
        check_names(names)
        self.streams, self.seed, self.name = list(streams), seed, " + ".join(names)
        bounds = np.rint(PERIOD * np.cumsum(weights) / sum(weights)).astype(np.int64)
        self._shares = np.diff(bounds, prepend=0)
        if not self._shares.all():
            raise ValueError("data.sources: a weight is less than a thousandth of their sum")
        shares = self._shares.tolist()
        self._identity = digest({"names": names, "shares": shares, "seed": seed})

    def samples(self, first: int = 0) -> Iterator[Sample | BadSample]:
        period, skip = divmod(first, PERIOD)
        counts = self._counts(first)
        readers = [s.samples(count) for s, count in zip(self.streams, counts, strict=True)]
        while True:
            for source in self._order(period)[skip:]:
                yield under(self.streams[source].name, next(readers[source]))
            period, skip = period + 1, 0

    def state_dict(self, first: int) -> dict[str, Any]:
        counts = self._counts(first)
        states = [s.state_dict(count) for s, count in zip(self.streams, counts, strict=True)]
        return {"streams": states, "mixture": self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("mixture") != self._identity:
            raise ValueError(
                f"{self.name}: the names, the weights or the seed are not those of the interrupted "
                "run, so the streams cannot go on; restore them, or start anew"
            )
        for stream, own in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(own)

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
    """Each image with the captions of another: a control from which nothing can be learned."""

    def __init__(self, pairs: Pairs, *, seed: int) -> None:
        self.pairs, self.seed = pairs, seed
        self.name, self.has_ids = pairs.name, pairs.has_ids
        self.sample_id, self.sample_ids = pairs.sample_id, pairs.sample_ids

    def __len__(self) -> int:
        return len(self.pairs)

    def sample(self, row: int) -> Sample:
        return replace(self.pairs.sample(row), captions=self.sample_captions(row))

    def sample_captions(self, row: int) -> tuple[str, ...]:
        rows = np.array([row])
        other = permute(rows, len(self), seed=self.seed, number=CAPTION_PERMUTATION)
        try:
            return self.pairs.sample_captions(int(other[0]))
        except BadSample as error:
            raise BadSample(self.sample_id(row), error.where, error.reason) from None
