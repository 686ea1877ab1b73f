"""Several sources as one, and rows of them: all, all but a few, or some.

A view numbers its rows over its sources, one source after the other. It holds no pair itself. In a
mixture, of tables or of streams, sample ids begin with the name of their source.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from protoclip.data.access import digest
from protoclip.data.pairs import BadSample, ImageTextPairs, Pairs, Sample, SampleStream
from protoclip.data.sampler import ORDER_STREAM, generator

Rows = npt.NDArray[np.int64]
NONE: Rows = np.array([], np.int64)


class AllBut:
    """The numbers below `size` without some, which ascend; it takes memory for these alone."""

    def __init__(self, size: int, left_out: Rows = NONE) -> None:
        self.size, self.left_out = size, left_out
        # Number `n` of the rest is `n` plus the count of these that are at most `n`.
        self._before = left_out - np.arange(len(left_out))

    def __len__(self) -> int:
        return self.size - len(self.left_out)

    def __getitem__(self, number: int) -> int:
        return number + int(np.searchsorted(self._before, number, side="right"))

    def at(self, numbers: Rows) -> Rows:
        """Several at once."""
        return numbers + np.searchsorted(self._before, numbers, side="right")

    def __iter__(self) -> Iterator[int]:
        return map(self.__getitem__, range(len(self)))


RowNumbers = Sequence[int] | Rows | AllBut


def to_array(rows: RowNumbers) -> Rows:
    """All numbers in one array, which is far faster than one after the other."""
    return rows.at(np.arange(len(rows))) if isinstance(rows, AllBut) else np.asarray(rows, np.int64)


class PairsView(Pairs):
    """Rows of sources, with the ids that they have there; see `pairs.Pairs`.

    Args:
        parts: Sources, each with its rows in the view. What the view can give (`sample`, `image`,
            ...) is what its sources can give.
        name: What messages call the view; unset, the names of its sources.
    """

    def __init__(self, parts: Sequence[tuple[Any, RowNumbers]], name: str | None = None) -> None:
        self._parts = list(parts)
        self.name = name or " + ".join(source.name for source in self.sources)
        self.notes = [note for source in self.sources for note in getattr(source, "notes", ())]
        self._starts = list(accumulate((len(rows) for _, rows in parts), initial=0))

    @property
    def parts(self) -> Sequence[tuple[Any, RowNumbers]]:
        return self._parts

    @property
    def sources(self) -> Sequence[Any]:
        return [source for source, _ in self._parts]

    @cached_property
    def key(self) -> str:
        """Changes with the pairs; empty if a source does not tell. All of a source have its key."""
        source, rows = self.parts[0]
        if len(self.parts) == 1 and np.array_equal(to_array(rows), np.arange(len(source))):
            return str(source.key)
        keys = [
            digest({"of": source.key, "rows": to_array(rows).tolist()}) if source.key else ""
            for source, rows in self.parts
        ]
        return keys[0] if len(keys) == 1 else digest({"parts": keys})

    @property
    def left_out(self) -> Rows:
        starts = accumulate(map(len, self.sources), initial=0)
        parts = zip(self.parts, starts, strict=False)
        left_out = [rows.left_out + at for (_, rows), at in parts if isinstance(rows, AllBut)]
        return np.concatenate([NONE, *left_out])

    def __len__(self) -> int:
        return self._starts[-1]

    def source_of(self, row: int) -> int:
        """The number of the source that has a row."""
        return bisect_right(self._starts, row) - 1

    def locate(self, row: int) -> tuple[Any, int]:
        """The source that has a row, and the number of the row there."""
        number = self.source_of(row)
        source, rows = self._parts[number]
        return source, int(rows[row - self._starts[number]])

    def sample(self, row: int) -> Sample:
        source, number = self.locate(row)
        sample: Sample = source.sample(number)
        return sample

    def sample_id(self, row: int) -> str:
        source, number = self.locate(row)
        return str(source.sample_id(number))

    def sample_captions(self, row: int) -> tuple[str, ...]:
        source, number = self.locate(row)
        return tuple(source.sample_captions(number))

    def most_captions(self, share: float = 1.0) -> int:
        return max(int(source.most_captions(share)) for source in self.sources)

    def image_name(self, row: int) -> str | None:
        source, number = self.locate(row)
        name: str | None = source.image_name(number)
        return name

    def class_of(self, row: int) -> str:
        source, number = self.locate(row)
        return str(source.class_of(number))

    def image(self, row: int) -> Image.Image:
        source, number = self.locate(row)
        image: Image.Image = source.image(number)
        return image

    def encoded(self, row: int) -> bytes:
        source, number = self.locate(row)
        return bytes(source.encoded(number))

    def where(self, row: int) -> str:
        source, number = self.locate(row)
        return str(source.where(number))

    def sample_ids(self) -> Iterator[str]:
        for source, rows in self.parts:
            if isinstance(rows, AllBut):  # whole columns are read faster than cells
                left_out = set(rows.left_out.tolist())
                ids = enumerate(source.sample_ids())
                yield from (sample_id for row, sample_id in ids if row not in left_out)
            else:
                yield from map(source.sample_id, rows)


def whole(sources: Sequence[Any], name: str | None = None) -> PairsView:
    """All rows of the sources."""
    return PairsView([(source, AllBut(len(source))) for source in sources], name)


def split_by_source(sources: Sequence[Any], rows: Rows) -> list[tuple[Any, Rows]]:
    """Rows numbered over sources, as each source and the numbers that its rows have there."""
    starts = np.cumsum([0, *map(len, sources)])
    return [
        (source, rows[(rows >= start) & (rows < start + len(source))] - start)
        for source, start in zip(sources, starts[:-1], strict=True)
    ]


def drop_rows(pairs: Pairs, left_out: Rows) -> PairsView:
    """A source or view without some of its rows, which ascend; a view leaves out what it did, too.

    Of its sources a view has all rows, or all but a few.
    """
    # Rows of the view are rows of its sources without those that it leaves out already.
    in_sources = AllBut(sum(map(len, pairs.sources)), pairs.left_out).at(left_out)
    parts = split_by_source(pairs.sources, np.union1d(pairs.left_out, in_sources))
    return PairsView([(source, AllBut(len(source), rows)) for source, rows in parts], pairs.name)


PERIOD = 1000  # a mixture of streams keeps its shares exactly over as many samples


def _join_names(sources: Sequence[ImageTextPairs | SampleStream]) -> str:
    """The name of a mixture; raises if ids `<name>/<id in the source>` could be equal."""
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1 or "/" in name:
            wrong = f"two are named '{name}'" if "/" not in name else f"'{name}' holds a '/'"
            raise ValueError(
                f"data.sources: {wrong}, but sample ids start with the name; give each source a "
                "name of its own, without '/', by name = ... in its [[data.sources]]"
            )
    return " + ".join(names)


def under(name: str, item: Sample | BadSample) -> Sample | BadSample:
    """A sample with the id that it has in a mixture, if its source has that name."""
    sample_id = f"{name}/{item.sample_id}"
    if isinstance(item, Sample):
        return replace(item, sample_id=sample_id)
    return BadSample(sample_id, item.where, item.reason)


def mix_pairs(sources: Sequence[ImageTextPairs]) -> PairsView:
    """Sources one after the other; sample ids are `<name of the source>/<id in the source>`.

    Raises `ValueError` for two sources of one name, or a name with a `/`.
    """
    return whole([source.in_mixture() for source in sources], _join_names(sources))


class MixedStreams(SampleStream):
    """Streams in a seeded order, each with its exact share of every thousand samples.

    Sample ids are as in `mix_pairs`. Raises `ValueError` as that, or if a weight is too small.
    """

    def __init__(
        self, streams: Sequence[SampleStream], *, weights: Sequence[float], seed: int
    ) -> None:
        self.name, self._streams, self.seed = _join_names(streams), list(streams), seed
        self.notes = [note for stream in streams for note in stream.notes]
        bounds = np.rint(PERIOD * np.cumsum(weights) / sum(weights)).astype(np.int64)
        self._shares = np.diff(bounds, prepend=0)
        if not self._shares.all():
            raise ValueError("data.sources: a weight is less than a thousandth of their sum")
        names, shares = [stream.name for stream in streams], self._shares.tolist()
        self._identity = digest({"names": names, "shares": shares, "seed": seed})

    @property
    def sources(self) -> Sequence[SampleStream]:
        return self._streams

    @property
    def lanes(self) -> int:
        return self._streams[0].lanes

    def samples(self, first: int = 0, lane: int = 0) -> Iterator[Sample | BadSample]:
        period, skip = divmod(first, PERIOD)
        readers = [stream.samples(count, lane) for stream, count in self._counts(first)]
        while True:
            for source in self._order(period)[skip:]:
                yield under(self._streams[source].name, next(readers[source]))
            period, skip = period + 1, 0

    def state_dict(self, first: int, lane: int = 0) -> dict[str, Any]:
        states = [stream.state_dict(count, lane) for stream, count in self._counts(first)]
        return {"streams": states, "mixture": self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("mixture") != self._identity:
            raise ValueError(
                f"{self.name}: the names, the weights or the seed are not those of the interrupted "
                "run, so the streams cannot go on; restore them, or start anew"
            )
        for stream, of_stream in zip(self._streams, state["streams"], strict=True):
            stream.load_state_dict(of_stream)

    def _order(self, period: int) -> npt.NDArray[np.int64]:
        sources = np.repeat(np.arange(len(self._streams)), self._shares)
        return generator(self.seed, ORDER_STREAM, period).permutation(sources)

    def _counts(self, first: int) -> list[tuple[SampleStream, int]]:
        """The streams, each with how many of the first samples came from it."""
        period, within = divmod(first, PERIOD)
        begun = np.bincount(self._order(period)[:within], minlength=len(self._streams))
        return list(zip(self._streams, (period * self._shares + begun).tolist(), strict=True))
