"""Rows of one or several sources as one source: all of them, all but a few, or some.

A view numbers its rows over its sources, one source after the other. It holds no pair itself.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from protoclip.data.access import digest
from protoclip.data.pairs import Sample

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


def as_array(rows: RowNumbers) -> Rows:
    """The numbers at once, which is far faster than one after the other."""
    return rows.at(np.arange(len(rows))) if isinstance(rows, AllBut) else np.asarray(rows, np.int64)


class PairsView:
    """Rows of sources, with the ids that they have there; see `pairs.Pairs`.

    Args:
        parts: Sources, each with its rows in the view. What the view can give (`sample`, `image`,
            ...) is what its sources can give.
        name: What messages call the view; unset, the names of its sources.
    """

    def __init__(self, parts: Sequence[tuple[Any, RowNumbers]], name: str | None = None) -> None:
        self.parts = list(parts)
        self.sources = [source for source, _ in parts]
        self.name = name or " + ".join(source.name for source in self.sources)
        self.notes = [note for source in self.sources for note in getattr(source, "notes", ())]
        self._starts = list(accumulate((len(rows) for _, rows in parts), initial=0))

    @cached_property
    def key(self) -> str:
        """Changes with the pairs; empty if a source does not tell. All of a source have its key."""
        source, rows = self.parts[0]
        if len(self.parts) == 1 and np.array_equal(as_array(rows), np.arange(len(source))):
            return str(source.key)
        keys = [
            digest({"of": source.key, "rows": as_array(rows).tolist()}) if source.key else ""
            for source, rows in self.parts
        ]
        return keys[0] if len(keys) == 1 else digest({"parts": keys})

    @property
    def left_out(self) -> Rows:
        """The rows that are left out, as numbered over all rows of the sources."""
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
        source, rows = self.parts[number]
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


def by_source(sources: Sequence[Any], rows: Rows) -> list[tuple[Any, Rows]]:
    """Rows numbered over sources, as each source and the numbers that its rows have there."""
    starts = np.cumsum([0, *map(len, sources)])
    return [
        (source, rows[(rows >= start) & (rows < start + len(source))] - start)
        for source, start in zip(sources, starts[:-1], strict=True)
    ]


def without(pairs: Any, left_out: Rows) -> PairsView:
    """A source or view without some of its rows, which ascend; a view leaves out what it did, too.

    Of its sources a view has all rows, or all but a few.
    """
    view = pairs if isinstance(pairs, PairsView) else whole([pairs])
    # Rows of the view are rows of its sources without those that it leaves out already.
    in_sources = AllBut(sum(map(len, view.sources)), view.left_out).at(left_out)
    parts = by_source(view.sources, np.union1d(view.left_out, in_sources))
    return PairsView([(source, AllBut(len(source), rows)) for source, rows in parts], pairs.name)
