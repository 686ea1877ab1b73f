"""The pairs that are explored: rows of one or several sources, with captions, classes, images."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from protoclip.data.access import digest
from protoclip.data.pairs import BadSample, ImageTextPairs, Pairs, SampleStream
from protoclip.evaluation.datasets import class_labels
from protoclip.evaluation.readers import Subset
from protoclip.evaluation.validation import Joined, plain_sources
from protoclip.progress import Progress
from protoclip.terminal import visible

Rows = npt.NDArray[np.int64]
CAPTION_LENGTH, ID_LENGTH = 300, 120  # characters that pages show


def shown(text: str, limit: int = CAPTION_LENGTH) -> str:
    """A text of others on one line, cut, with what turns or breaks lines made visible."""
    cut = visible(" ".join(text[: 2 * limit].split()))
    return cut if len(cut) <= limit and len(text) <= 2 * limit else f"{cut[: limit - 1]}…"


@dataclass(frozen=True, kw_only=True)
class ExploredPairs:
    """Rows of sources that follow each other, as training sees them, with their sample ids.

    A text is the first caption of its pair.
    """

    name: str
    sources: Sequence[ImageTextPairs]
    starts: Sequence[int] = field(default=(0,))

    @property
    def key(self) -> str:
        """Changes with the pairs."""
        return digest({"pairs": [source.key for source in self.sources]})

    def __len__(self) -> int:
        return self.starts[-1]

    def find(self, row: int) -> tuple[ImageTextPairs, int]:
        """The source of a row, and the row in it."""
        number = self.source_of(row)
        return self.sources[number], row - self.starts[number]

    def source_of(self, row: int) -> int:
        return bisect.bisect_right(self.starts, row) - 1

    def sample_id(self, row: int) -> str:
        source, index = self.find(row)
        return source.sample_id(index)

    def caption(self, row: int) -> str:
        """Raises `BadSample` if there is none."""
        source, index = self.find(row)
        return source.caption(index)

    def encoded(self, row: int) -> bytes:
        """The encoded image; raises `BadSample`."""
        source, index = self.find(row)
        return source.encoded(index)

    def with_captions(self) -> Rows:
        """The rows that have a caption."""
        progress, rows = Progress("reading captions", len(self)), []
        for row in range(len(self)):
            try:
                self.caption(row)
            except BadSample:
                continue
            rows.append(row)
            if row % 1000 == 0:
                progress.update(row)
        progress.update(len(self))
        return np.array(rows, np.int64)

    def images(self, rows: Rows) -> Any:
        """The images of some rows, as `Encoder.images` takes them."""
        parts = []
        for number, source in enumerate(self.sources):
            first, end = np.searchsorted(rows, self.starts[number : number + 2])
            inside = (rows[first:end] - self.starts[number]).tolist()
            if inside:
                parts.append(Subset(images=source, rows=inside))
        return parts[0] if len(parts) == 1 else Joined(parts)

    def class_of(self, row: int) -> str:
        """The class by its name; empty where there is none."""
        source, index = self.find(row)
        if source.class_column is None:
            return ""
        value, names = source.value(source.class_column, index), self._class_names[source.name]
        if isinstance(value, int) and 0 <= value < len(names):
            return names[value]
        return "" if value is None else str(value)

    @cached_property
    def _class_names(self) -> dict[str, list[str]]:
        """For each source, by its name, the names of classes that are numbers."""
        return {source.name: class_labels(source) for source in self.sources}

    @property
    def has_classes(self) -> bool:
        return any(source.class_column for source in self.sources)


def explored(samples: Pairs | SampleStream, *, class_column: str | None = None) -> ExploredPairs:
    """The pairs of a source or mixture.

    Raises:
        ValueError: It is a stream, which cannot be read in any order, or lacks the column.
    """
    if not isinstance(samples, Pairs):
        raise ValueError(
            f"{samples.name}: a stream cannot be explored; copy the shards, and leave data.read at "
            "auto"
        )
    sources = plain_sources(samples)
    for source in sources:
        source.class_column = class_column or source.class_column
        if source.class_column and source.class_column not in source.table.column_names:
            present = ", ".join(source.table.column_names)
            raise ValueError(f"{source.name}: no column '{source.class_column}'; it has {present}")
    starts = list(accumulate(map(len, sources), initial=0))
    return ExploredPairs(name=samples.name, sources=sources, starts=starts)
