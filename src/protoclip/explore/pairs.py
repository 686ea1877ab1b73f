"""The pairs to explore: rows of one or several sources, with captions, classes, images.

Sources are opened in `data/sources.py`; `atlas.py` maps and groups the pairs.
"""

import io
from contextlib import suppress
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt
from PIL import Image

from protoclip.data.access import digest
from protoclip.data.bands import show
from protoclip.data.pairs import BadSample, Pairs, Rows, SampleStream, split_by_source
from protoclip.data.sources import AllBut, PairsView
from protoclip.encode.store import hash_bytes, hash_ids
from protoclip.evaluation.validation import list_sources
from protoclip.progress import Progress
from protoclip.terminal import visible

# Of two images whose pixels are compared. A mirrored one is so much more alike than as it is.
COMPARED_SIDE, MOST_ALIKE, MIRRORED = 16, 0.999, 0.02


class ExploredPairs(PairsView):
    """All rows of sources, as training sees them, with their sample ids.

    A text is the first caption of its pair.
    """

    @cached_property
    def key(self) -> str:
        """Changes with the pairs."""
        return digest({"pairs": [source.key for source in self.sources]})

    @property
    def has_classes(self) -> bool:
        return any(source.class_column for source in self.sources)

    def source_name(self, row: int) -> str:
        return str(self.locate(row)[0].name)

    def caption(self, row: int) -> str:
        """The first caption; raises `BadSample` if there is none."""
        return str(self.sample_captions(row)[0])

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

    def number_images(self, rows: Rows, content: npt.NDArray[np.int64] | None) -> Rows:
        """The image of each row `(n,)`, as the position of the first of the rows that shows it.

        A file is one image, and its copy in another file a second one. So is each image in a table
        or a shard, unless at least half of the rows share theirs: then the data have a row a
        caption, and equal content is one image. Unless `content` has the hashes of the encoded
        images, those that are in no file of their own are read.
        """
        by_place, by_content = list[str](), list[str]()
        for position, row in enumerate(rows.tolist()):
            source, number = self.locate(row)
            key = source.image_key(number)
            by_place.append(key)
            if source.image_file(number) is None:
                if content is None:
                    key = str(hash_bytes(source.read_encoded(number)))
                else:
                    key = str(content[position])
            by_content.append(key)
        for keys in (by_content, by_place):
            _, first, images, counts = np.unique(
                hash_ids(keys), return_index=True, return_inverse=True, return_counts=True
            )
            if (counts[images] > 1).mean() >= 0.5:
                break
        numbers: Rows = first[images]
        return numbers

    def correlate_images(self, one: int, other: int) -> float:
        """The correlation of two images' pixels, both shrunk to a square: 1 only for equal pixels,
        negative if one is the other mirrored, and 0 if an image cannot be read."""
        try:
            pixels = [show(self.read_encoded(row), at_least=COMPARED_SIDE) for row in (one, other)]
        except (ValueError, OSError):
            return 0.0
        if np.array_equal(pixels[0], pixels[1]):
            return 1.0
        side = (COMPARED_SIDE, COMPARED_SIDE)
        first, second = (np.asarray(Image.fromarray(image).resize(side)) for image in pixels)
        rows = np.stack([first, second, second[:, ::-1]]).reshape(3, -1) / 255
        rows -= rows.mean(1, keepdims=True)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-3)
        alike, mirrored = np.minimum(rows[1:] @ rows[0], MOST_ALIKE).tolist()
        return float(-mirrored if mirrored > alike + MIRRORED else alike)

    def thumbnail(self, row: int, side: int, quality: int = 80) -> bytes:
        """The image as WebP without metadata, at most `side` pixels a side; a grey one if it cannot
        be read."""
        try:
            image = Image.fromarray(show(self.read_encoded(row), at_least=side))
            image.thumbnail((side, side))
        except (ValueError, OSError):
            image = Image.new("RGB", (side, side), "#868e96")
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=quality, method=6)  # the slowest and smallest
        return buffer.getvalue()


def explore_pairs(
    samples: Pairs | SampleStream, *, class_column: str | None = None
) -> ExploredPairs:
    """The pairs of a source or mixture. Sources without the class column have no classes.

    Raises `ValueError` for a stream, which cannot be read in any order, or if no source has it.
    """
    if not isinstance(samples, Pairs):
        raise ValueError(
            f"{samples.name}: a stream cannot be explored; copy the shards here, and name them "
            "with --data"
        )
    sources = list_sources(samples)
    for source in sources:
        # The index of a text table has its own name for the column that it was opened with.
        if class_column in source.table.column_names:
            source.class_column = class_column
    if class_column is not None and not any(source.class_column for source in sources):
        columns = dict.fromkeys(chain(*(source.table.column_names for source in sources)))
        raise ValueError(f"{samples.name}: no column '{class_column}'; it has {', '.join(columns)}")
    return ExploredPairs([(source, AllBut(len(source))) for source in sources], samples.name)
