"""The pairs of `align` as rows: their images and captions, and what two frozen halves make of them.

The first rank lists the different images and captions in the store of the halves, and all ranks map
the list. While the pairs stay as they are, later starts read it, and hash no name and no caption
again. How rows are encoded and kept is in `halves.py`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.config import HALVES, Config
from protoclip.data.captions import Key, normalise, number_of
from protoclip.data.index import ArrowIndex, build_index, index_folder
from protoclip.data.loader import Batch, EpisodeLoader, Pass, flatten, nest, pair_numbers
from protoclip.data.packed import Packed
from protoclip.data.pairs import BadSample, Pairs
from protoclip.data.sampler import caption_draws
from protoclip.data.view import AllBut, PairsView, to_array
from protoclip.encode import store
from protoclip.encode.store import Hashes, Numbers, Store, hash_ids
from protoclip.encode.whiten import Features, Whitens
from protoclip.files import checksum, to_json

BLOCK = 2**14  # pairs whose captions are in memory at once
FOLDER = "listings"


class Listing(NamedTuple):
    """Images in the order of the rows that show them first, and their captions image after image.

    Attributes:
        rows: The first row that shows each image `(i,)`.
        images: The hash of each image's id `(i,)`.
        shown: The number of the image that each row shows `(n,)`.
        captions: Which of the texts each caption is `(c,)`.
        first: Where the captions of each image begin `(i + 1,)`.
        texts: The hashes of different captions, ascending `(t,)`.
        text_rows, text_places: A row that has each of these, and which of its captions it is.
    """

    rows: Numbers
    images: Hashes
    shown: Numbers
    captions: npt.NDArray[np.int32]
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


def hashes_of_images(pairs: Pairs) -> Hashes:
    """Equal for rows that name the same image file."""
    return hash_ids(image_key(pairs, row) for row in range(len(pairs)))


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


def list_pairs(pairs: Pairs) -> Listing:
    images = hashes_of_images(pairs)
    captions, counts = hashes_of_captions(pairs)
    _, rows, image = np.unique(images, return_index=True, return_inverse=True)
    first_rows, rows = rows[image], np.sort(rows)
    shown = np.searchsorted(rows, first_rows)
    row_of_caption = np.repeat(np.arange(len(pairs)), counts)
    image_of_caption = shown[row_of_caption]
    captions_of_images = np.bincount(image_of_caption, minlength=len(rows))
    texts, at, numbers = np.unique(captions, return_index=True, return_inverse=True)
    text_rows = row_of_caption[at]
    return Listing(
        rows=rows,
        images=images[rows],
        shown=shown,
        captions=numbers[np.argsort(image_of_caption, kind="stable")].astype(np.int32),
        first=np.concatenate([[0], np.cumsum(captions_of_images)]),
        texts=texts,
        text_rows=text_rows,
        text_places=at - (np.cumsum(counts) - counts)[text_rows],
    )


def write_listing(pairs: Pairs, root: Path) -> Path:
    """The file with the list of some pairs, which is written unless it is there."""
    parts: Any = pairs.parts if isinstance(pairs, PairsView) else [(pairs, AllBut(len(pairs)))]
    facts: list[Any] = [2, str(Path.cwd())]  # the format, and where relative paths start
    for source, rows in parts:
        numbers = rows.left_out if isinstance(rows, AllBut) else to_array(rows)
        facts += [source.key, len(source), len(rows), checksum(numbers.tobytes())]

    def build(_: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        listing = list_pairs(pairs)._asdict()
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
    return Listing(**cells)


SAMPLE = 2**14  # pairs that a whitening is fitted to


@dataclass(frozen=True, kw_only=True)
class HalfRows:
    """What both halves know of some pairs, which are images with all their captions.

    Attributes:
        listing: The images and captions of the pairs that were given.
        image: The images.
        image_numbers: The rows of the listed images in this store; -1 for a bad one.
        text: The captions.
        text_numbers: The rows of the listed texts in this store.
        texts: Reads each text of the listing, by its number.
        good: Which of the listed images these pairs are: those that can be read, with a caption.
    """

    listing: Listing
    image: Store
    image_numbers: npt.NDArray[np.int32]
    text: Store
    text_numbers: npt.NDArray[np.int32]
    texts: Callable[[int], str]
    good: AllBut

    def __len__(self) -> int:
        return len(self.good)

    def image_rows(self, rows: Numbers) -> Tensor:
        """The image features of rows `(b, q)`."""
        return torch.from_numpy(self.image.read(self.image_numbers[self.good.at(rows)]))

    def text_rows(self, captions: Numbers) -> Tensor:
        """The features of listed captions `(c, q)`."""
        return torch.from_numpy(self.text.read(self.text_numbers[self.listing.captions[captions]]))

    def most_captions(self, share: float = 1.0) -> int:
        """How many captions this share of the rows has at most."""
        return int(np.quantile(np.diff(self.listing.first), share, method="lower"))

    def counts(self, rows: Numbers) -> tuple[Numbers, Numbers]:
        """Where the captions of each row begin, and how many they are."""
        images = self.good.at(rows)
        first = self.listing.first[images]
        return first, self.listing.first[images + 1] - first

    def drawn_captions(
        self, rows: Numbers, draws: npt.NDArray[np.float32], each: int = 1
    ) -> Numbers:
        """Listed captions: `each` of every row, by draws in [0, 1), as `CaptionDraw` does."""
        first, counts = self.counts(rows)
        drawn = (draws * counts).astype(np.int64)[:, None] + np.arange(each)
        return (first[:, None] + drawn % counts[:, None]).ravel()

    def groups(
        self, pairs: Pairs, rows: Numbers, captions: Numbers, by: tuple[Key, ...]
    ) -> Numbers:
        """The keys of rows with the drawn captions `(b, k)`, as batches of images have them."""

        def same_text() -> Numbers:
            texts = map(self.texts, self.listing.captions[captions].tolist())
            return np.array([number_of(normalise(text)) for text in texts])

        def same_image() -> Numbers:
            features = self.image_rows(rows).numpy()
            return np.array([number_of(row.tobytes()) for row in features])

        keys: dict[Key, Callable[[], Numbers]] = {
            "caption": same_text,
            "image": same_image,
        }
        return np.stack([keys[key]() for key in by], axis=1)

    def all_captions(self, rows: Numbers) -> Numbers:
        """All listed captions of these rows, row after row."""
        first, counts = self.counts(rows)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        captions: Numbers = np.repeat(first, counts) + within
        return captions

    def mean_text_rows(self, rows: Numbers) -> Tensor:
        """The mean over the captions of each row `(b, q)`."""
        _, counts = self.counts(rows)
        owner = np.repeat(np.arange(len(rows)), counts)
        features = self.text_rows(self.all_captions(rows))
        sums = torch.zeros(len(rows), self.text.width)
        sums.index_add_(0, torch.from_numpy(owner), features.float())
        return (sums / torch.from_numpy(counts)[:, None]).half()


class HalfTeacher(Whitens):
    """A frozen half as an external teacher: it groups pairs by the features that it makes of them.

    These never change, so all are whitened at once, and kept in memory: 128 bytes a pair.

    Args:
        of: The features of rows.
        index: Sample ids and rows, as `store.build_index` gives them.
    """

    def __init__(self, of: Callable[[Numbers], Tensor], index: Hashes, width: int) -> None:
        self.of, self.width = of, width
        self.hashes, self.row_of_hash = index[0], index[1].view(np.int64)

    def rows(self, sample_ids: Sequence[str]) -> Float[Tensor, "m q"]:
        """Features of these samples, all of which are known."""
        return self.of(self.row_of_hash[np.searchsorted(self.hashes, hash_ids(sample_ids))])

    def whiten(self, width: int) -> None:
        super().whiten(width)
        if self.whitening is None:
            return
        rows = np.arange(len(self.hashes))
        blocks = np.array_split(rows, -(-len(rows) // BLOCK))
        kept = torch.cat([self.whitened(self.of(block)).half() for block in blocks])
        self.of, self.width, self.whitening = kept.__getitem__, kept.shape[1], None

    def sample(self) -> Features:
        step = max(1, len(self.hashes) // SAMPLE)
        rows: Features = self.of(np.sort(self.row_of_hash[::step])).numpy()
        return rows


def half_teachers(config: Config, pairs: Pairs, halves: HalfRows) -> dict[str, HalfTeacher]:
    """The frozen halves that group the pairs of a run, by the names of its teachers."""
    teachers = config.external_teachers
    if {teacher.features for teacher in teachers.values()}.isdisjoint(HALVES.values()):
        return {}
    index = store.build_index(hash_ids(pairs.sample_ids()), pairs.sample_id, name=pairs.name)
    of = {
        HALVES["image_half"]: (halves.image_rows, halves.image.width),
        HALVES["text_half"]: (halves.mean_text_rows, halves.text.width),
    }
    return {
        name: HalfTeacher(of[teacher.features][0], index, of[teacher.features][1])
        for name, teacher in teachers.items()
        if teacher.features in of
    }


@dataclass(frozen=True, kw_only=True)
class RowLoader(EpisodeLoader):
    """An `EpisodeLoader` whose images and captions are rows that the halves made of them.

    Every pair is good, and nothing is decoded, so it needs no workers.
    """

    halves: HalfRows

    def batches_of(self, wanted: Pass) -> Iterator[Batch]:
        """This rank's batches of a pass: a pure function of it, with any number of ranks."""
        assert isinstance(self.pairs, Pairs)
        episode, all_rows = wanted.episode, wanted.episode.rows.numpy()
        size, stride = len(all_rows), self.batch_size * self.world_size
        captions = caption_draws(self.seed, episode.index, size)
        for begin in range(wanted.start * stride, size, stride):
            numbers = np.arange(begin, min(begin + stride, size))
            position = np.array_split(numbers, self.world_size)[self.rank]
            rows = all_rows[position]
            each = self.captions.number
            drawn = self.halves.drawn_captions(rows, captions[position], each)
            hashes = self.halves.listing.texts[self.halves.listing.captions[drawn]]
            image = self.halves.image_rows(rows)
            of_pairs = np.repeat(rows, each)
            sample_ids = [self.pairs.sample_id(int(row)) for row in of_pairs]
            tensors: dict[str, Any] = {
                "position": torch.from_numpy(pair_numbers(position, each)),
                "image": image,
                "text": self.halves.text_rows(drawn),
            }
            if wanted.with_features:
                tensors["features"] = {n: of(sample_ids) for n, of in self.features_of.items()}
            if wanted.group_by:
                groups = self.halves.groups(self.pairs, of_pairs, drawn, wanted.group_by)
                tensors["groups"] = torch.from_numpy(groups)
            self.on_read(len(rows), [])
            fields = nest(Packed.of(flatten(tensors)).send(self.device))
            captions_of = [each.tobytes() for each in hashes]
            yield Batch(sample_id=sample_ids, captions=captions_of, **fields)
