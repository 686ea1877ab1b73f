"""The pairs that are explored: rows of one or several sources, with captions, classes, images.

Sources are opened in `data/sources.py`; what a model makes of the pairs is in `atlas.py`.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from protoclip.data.access import digest
from protoclip.data.pairs import BadSample, Pairs, SampleStream
from protoclip.data.view import AllBut, PairsView, RowNumbers, Rows, by_source
from protoclip.encode.store import Hashes, hash_ids
from protoclip.evaluation.features import hash_of
from protoclip.evaluation.validation import plain_sources
from protoclip.progress import Progress
from protoclip.terminal import visible

CAPTION_LENGTH, ID_LENGTH = 300, 120  # characters that pages show


def shown(text: str, limit: int = CAPTION_LENGTH) -> str:
    """A text of others on one line, cut, with what turns or breaks lines made visible."""
    cut = visible(" ".join(text[: 2 * limit].split()))
    return cut if len(cut) <= limit and len(text) <= 2 * limit else f"{cut[: limit - 1]}…"


class ExploredPairs(PairsView):
    """All rows of sources, as training sees them, with their sample ids.

    A text is the first caption of its pair. An image in the data is read once for what it holds:
    hashes of contents are kept, by row.
    """

    def __init__(self, parts: Sequence[tuple[Any, RowNumbers]], name: str | None = None) -> None:
        super().__init__(parts, name)
        # Arrays, since a dict of a million rows takes a hundred megabytes.
        self._content = np.zeros(len(self), np.int64)
        self._content_is_known = np.zeros(len(self), bool)

    @cached_property
    def key(self) -> str:
        """Changes with the pairs."""
        return digest({"pairs": [source.key for source in self.sources]})

    def caption(self, row: int) -> str:
        """Raises `BadSample` if there is none."""
        return self.sample_captions(row)[0]

    def caption_or_reason(self, row: int) -> str:
        """The caption, or why there is none."""
        try:
            return self.caption(row)
        except BadSample as error:
            return str(error)

    def image_key(self, row: int) -> str:
        """Names the image of a pair, alike for pairs that show the same one: by its file, or an
        image in the data by its content."""
        source, number = self.locate(row)
        if source.image_file(number) is None:
            if not self._content_is_known[row]:
                with suppress(BadSample):
                    self.keep_content(row, hash_of(source.encoded(number)))
            if self._content_is_known[row]:
                return str(self._content[row])
        return self.file_or_row(row)

    def shown_images(self, rows: Rows) -> Hashes:
        """Hashes that are equal where a copy of an image is no copy, but the same one.

        Files have a hash each. So have images in a table or a shard, unless at least half of the
        rows share theirs: then there is a row a caption, and equal content is one image.
        """
        keys = hash_ids(self.image_key(int(row)) for row in rows)
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        if (counts[inverse] > 1).mean() >= 0.5:
            return keys
        return hash_ids(self.file_or_row(int(row)) for row in rows)

    def file_or_row(self, row: int) -> str:
        """Names the file of a pair's image, or its row."""
        source, number = self.locate(row)
        return str(source.image_key(number))

    def keep_content(self, rows: int | Rows, hashes: int | npt.NDArray[np.int64]) -> None:
        """Keep hashes (`hash_of`) of encoded images that were read."""
        self._content[rows] = hashes
        self._content_is_known[rows] = True  # last, since other threads may ask meanwhile

    def file_name(self, row: int) -> str:
        """The name of the file or URL that is a pair's image; empty for an image in the data."""
        source, number = self.locate(row)
        path = source.image_file(number) or ""
        return visible(path).rpartition("/")[2]  # without a query, which may be a secret

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
        parts = by_source(self.sources, rows)
        return PairsView([(source, some.tolist()) for source, some in parts if len(some)])

    @property
    def has_classes(self) -> bool:
        return any(source.class_column for source in self.sources)


def explored(samples: Pairs | SampleStream, *, class_column: str | None = None) -> ExploredPairs:
    """The pairs of a source or mixture. Sources without the column of classes have none.

    Raises:
        ValueError: It is a stream, which cannot be read in any order, or no source has the column.
    """
    if not isinstance(samples, Pairs):
        raise ValueError(
            f"{samples.name}: a stream cannot be explored; copy the shards here, and name them "
            "with --data"
        )
    sources = plain_sources(samples)
    for source in sources:
        # The index of a text table has its own name for the column that it was opened with.
        if class_column in source.table.column_names:
            source.class_column = class_column
    if class_column is not None and not any(source.class_column for source in sources):
        present = ", ".join(dict.fromkeys(chain(*(each.table.column_names for each in sources))))
        raise ValueError(f"{samples.name}: no column '{class_column}'; it has {present}")
    return ExploredPairs([(source, AllBut(len(source))) for source in sources], samples.name)
