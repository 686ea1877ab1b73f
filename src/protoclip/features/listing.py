"""The different images and captions of the pairs of `align`, listed once and mapped by all ranks.

The first rank writes the list to the store of the halves. While the pairs stay as they are, later
starts read it, and hash no name and no caption again.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from protoclip.data.index import ArrowIndex, build_index, index_folder
from protoclip.data.pairs import BadSample, Pairs
from protoclip.data.view import AllBut, PairsView, as_array
from protoclip.features.store import Hashes, Numbers, hash_ids
from protoclip.files import checksum, to_json

BLOCK = 2**14  # pairs whose captions are in memory at once
FOLDER = "listings"


class Listing(NamedTuple):
    """Images in the order of the rows that show them first, and their captions image after image.

    Attributes:
        rows: The first row that shows each image `(i,)`.
        images: The hash of each image's id in each view `(i, v)`.
        shown: The number of the image that each row shows `(n,)`.
        captions: The hash of each caption `(c,)`.
        first: Where the captions of each image begin `(i + 1,)`.
        texts: The hashes of different captions, ascending `(t,)`.
        text_rows, text_places: A row that has each of these, and which of its captions it is.
    """

    rows: Numbers
    images: Hashes
    shown: Numbers
    captions: Hashes
    first: Numbers
    texts: Hashes
    text_rows: Numbers
    text_places: Numbers


def located(pairs: Pairs, row: int) -> tuple[Any, int]:
    """The source that holds a row, and its number there."""
    return pairs.locate(row) if isinstance(pairs, PairsView) else (pairs, row)


def image_key(pairs: Pairs, row: int) -> str:
    """Names the image of a row, whatever else the run reads of its source."""
    source, number = located(pairs, row)
    return str(source.image_key(number))


def view_id(key: str, view: int) -> str:
    """The id of a view of an image with this key."""
    return f"{key} view {view}" if view else key


def hashes_of_images(pairs: Pairs, view: int = 0) -> Hashes:
    """Equal for rows that name the same image file."""
    return hash_ids(view_id(image_key(pairs, row), view) for row in range(len(pairs)))


def hashes_of_captions(pairs: Pairs) -> tuple[Hashes, Numbers]:
    """Of all captions, row after row; and how many each row has, which may be none."""
    parts, counts = [], np.zeros(len(pairs), np.int64)
    for start in range(0, len(pairs), BLOCK):
        texts: list[str] = []
        for row in range(start, min(start + BLOCK, len(pairs))):
            with suppress(BadSample):
                captions = pairs.sample_captions(row)
                counts[row] = len(captions)
                texts += captions
        parts.append(hash_ids(texts))
    return np.concatenate(parts), counts


def list_pairs(pairs: Pairs, views: int) -> Listing:
    images = np.stack([hashes_of_images(pairs, view) for view in range(views)], axis=1)
    captions, counts = hashes_of_captions(pairs)
    _, rows, image = np.unique(images[:, 0], return_index=True, return_inverse=True)
    first_rows, rows = rows[image], np.sort(rows)
    shown = np.searchsorted(rows, first_rows)
    row_of_caption = np.repeat(np.arange(len(pairs)), counts)
    image_of_caption = shown[row_of_caption]
    captions_of_images = np.bincount(image_of_caption, minlength=len(rows))
    texts, at = np.unique(captions, return_index=True)
    text_rows = row_of_caption[at]
    return Listing(
        rows=rows,
        images=images[rows],
        shown=shown,
        captions=captions[np.argsort(image_of_caption, kind="stable")],
        first=np.concatenate([[0], np.cumsum(captions_of_images)]),
        texts=texts,
        text_rows=text_rows,
        text_places=at - (np.cumsum(counts) - counts)[text_rows],
    )


def write_listing(pairs: Pairs, root: Path, views: int) -> Path:
    """The file with the list of some pairs, which is written unless it is there."""
    parts: Any = pairs.parts if isinstance(pairs, PairsView) else [(pairs, AllBut(len(pairs)))]
    facts: list[Any] = [views, str(Path.cwd())]  # where relative paths start
    for source, rows in parts:
        numbers = rows.left_out if isinstance(rows, AllBut) else as_array(rows)
        facts += [source.key, len(source), len(rows), checksum(numbers.tobytes())]

    def build(_: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        listing = list_pairs(pairs, views)._asdict()
        cells = {
            n: pa.LargeListArray.from_arrays([0, a.size], a.ravel()) for n, a in listing.items()
        }
        yield pa.RecordBatch.from_pydict(cells)

    # A store that can only be read may lack the list of these pairs.
    can_write = os.access(root, os.W_OK) or not root.exists()
    folder = root / FOLDER if can_write else index_folder()
    name = checksum(to_json(facts).encode())
    return build_index(name, build, folder=folder, label=pairs.name, way_out="").path


def open_listing(path: Path) -> Listing:
    """A list, mapped into memory; raises `ValueError` if it is damaged."""
    index = ArrowIndex(path)
    index.check()
    cells = {name: index.table.column(name).chunk(0).values.to_numpy() for name in Listing._fields}
    images = cells.pop("images")
    return Listing(**cells, images=images.reshape(len(cells["rows"]), -1))
