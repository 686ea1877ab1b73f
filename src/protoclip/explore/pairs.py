"""The pairs to explore: rows of one or several sources, with captions, classes, images.

Sources are opened in `data/sources.py`; `atlas.py` maps and groups the pairs.
"""

import io
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain
from threading import BoundedSemaphore
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from protoclip.data.access import digest
from protoclip.data.decode import decode
from protoclip.data.pairs import MAX_IMAGE_PIXELS, BadSample, Pairs, SampleStream
from protoclip.data.view import AllBut, PairsView, RowNumbers, Rows, split_by_source
from protoclip.encode.store import Hashes, hash_ids
from protoclip.evaluation.features import hash_of
from protoclip.evaluation.validation import plain_sources
from protoclip.progress import Progress
from protoclip.terminal import visible

CAPTION_LENGTH, ID_LENGTH = 300, 120  # characters that pages show
COMPARED_SIDE, MOST_ALIKE = 16, 0.999  # of two images whose pixels are compared
DECODING = BoundedSemaphore(4)  # images at a time, since each may be large


def shorten(text: str, limit: int = CAPTION_LENGTH) -> str:
    """Cut a user's text to one line, and make visible what would turn or break lines."""
    cut = visible(" ".join(text[: 2 * limit].split()))
    return cut if len(cut) <= limit and len(text) <= 2 * limit else f"{cut[: limit - 1]}…"


class ExploredPairs(PairsView):
    """All rows of sources, as training sees them, with their sample ids.

    A text is the first caption of its pair. Images in tables and shards are read once to find equal
    ones, by the hash of their content.
    """

    def __init__(self, parts: Sequence[tuple[Any, RowNumbers]], name: str | None = None) -> None:
        super().__init__(parts, name)
        # Arrays, since a dict of a million rows takes a hundred megabytes.
        self._content = np.zeros(len(self), np.int64)
        self._has_content = np.zeros(len(self), bool)

    @cached_property
    def key(self) -> str:
        """Changes with the pairs."""
        return digest({"pairs": [source.key for source in self.sources]})

    @property
    def has_classes(self) -> bool:
        return any(source.class_column for source in self.sources)

    def source_name(self, row: int) -> str:
        return str(self.sources[self.source_of(row)].name)

    def caption(self, row: int) -> str:
        """The first caption; raises `BadSample` if there is none."""
        return self.sample_captions(row)[0]

    def caption_or_reason(self, row: int) -> str:
        """The first caption, or why there is none."""
        try:
            return self.caption(row)
        except BadSample as error:
            return str(error)

    def find_captioned(self) -> Rows:
        """The rows that have a caption."""
        progress, rows = Progress("reading captions", len(self)), []
        for row in range(len(self)):
            with suppress(BadSample):
                self.caption(row)
                rows.append(row)
            if row % 1000 == 0:
                progress.update(row)
        progress.update(len(self))
        return np.array(rows, np.int64)

    def images(self, rows: Rows) -> PairsView:
        """The images of some rows, as `Encoder.images` takes them."""
        parts = split_by_source(self.sources, rows)
        return PairsView([(source, some.tolist()) for source, some in parts if len(some)])

    def file_name(self, row: int) -> str:
        """The name of the file or URL that is a pair's image; empty for an image in the data."""
        source, number = self.locate(row)
        path = source.image_file(number) or ""
        return visible(path).rpartition("/")[2]  # without a query, which may be a secret

    def image_key(self, row: int) -> str:
        """Identifies the image of a pair, equal for pairs that show one image: by its file, or by
        its content if the data hold it."""
        source, number = self.locate(row)
        if source.image_file(number) is None:
            if not self._has_content[row]:
                with suppress(BadSample):
                    self.keep_content(row, hash_of(source.encoded(number)))
            if self._has_content[row]:
                return str(self._content[row])
        return str(source.image_key(number))

    def keep_content(self, rows: int | Rows, hashes: int | npt.NDArray[np.int64]) -> None:
        """Keep hashes (`hash_of`) of encoded images that were read."""
        self._content[rows] = hashes
        self._has_content[rows] = True  # last, since other threads may ask meanwhile

    def hash_images(self, rows: Rows) -> Hashes:
        """Hashes `(n,)` that are equal for rows of one image, and differ for an image and its copy.

        Each file has its own hash. So has each image in a table or a shard, unless at least half of
        the rows share theirs: then the data have a row a caption, and equal content is one image.
        """
        keys = hash_ids(self.image_key(int(row)) for row in rows)
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        if (counts[inverse] > 1).mean() >= 0.5:
            return keys
        places = (self.locate(int(row)) for row in rows)
        return hash_ids(str(source.image_key(number)) for source, number in places)

    def correlate_images(self, one: int, other: int) -> float:
        """The correlation of two images' pixels, both shrunk to a square: 1 only for equal pixels,
        and 0 if an image cannot be read."""
        try:
            pixels = [
                decode(self.encoded(row), max_pixels=MAX_IMAGE_PIXELS, at_least=COMPARED_SIDE)
                for row in (one, other)
            ]
        except (BadSample, ValueError, OSError):
            return 0.0
        if np.array_equal(pixels[0], pixels[1]):
            return 1.0
        side = (COMPARED_SIDE, COMPARED_SIDE)
        small = [np.asarray(Image.fromarray(image).resize(side)) for image in pixels]
        rows = np.stack(small).reshape(2, -1) / 255
        rows -= rows.mean(1, keepdims=True)
        norms = np.linalg.norm(rows, axis=1).prod()
        return min(MOST_ALIKE, float(rows[0] @ rows[1] / max(norms, 1e-6)))

    def thumbnail(self, row: int, side: int) -> bytes:
        """The image as WebP without metadata, at most `side` pixels a side; grey if it cannot be
        read."""
        try:
            with DECODING:
                encoded = self.encoded(row)
                pixels = decode(encoded, max_pixels=MAX_IMAGE_PIXELS, at_least=side)
                image = Image.fromarray(pixels)
                image.thumbnail((side, side))  # a very long, thin image keeps a pixel
        except (BadSample, ValueError, OSError):
            image = Image.new("RGB", (side, side), "#868e96")
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=80)
        return buffer.getvalue()


def explore_pairs(
    samples: Pairs | SampleStream, *, class_column: str | None = None
) -> ExploredPairs:
    """The pairs of a source or mixture. Sources without the class column have no classes.

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
        columns = dict.fromkeys(chain(*(source.table.column_names for source in sources)))
        raise ValueError(f"{samples.name}: no column '{class_column}'; it has {', '.join(columns)}")
    return ExploredPairs([(source, AllBut(len(source))) for source in sources], samples.name)
