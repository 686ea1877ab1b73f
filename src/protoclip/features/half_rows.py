"""Rows of pairs whose images and captions two frozen halves have encoded, and halves as teachers.

How they are encoded and kept is in `halves.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.config import HALVES, Config
from protoclip.data.groups import Key, class_number, normalised, number_of
from protoclip.data.pairs import Pairs
from protoclip.data.view import AllBut
from protoclip.features import store
from protoclip.features.listing import BLOCK, Listing
from protoclip.features.store import Hashes, Numbers, Segments, hash_ids
from protoclip.features.whiten import Features, Whitens

SAMPLE = 2**14  # pairs that a whitening is fitted to


@dataclass(frozen=True, kw_only=True)
class HalfRows:
    """What both halves know of some pairs, which are images with all their captions.

    Attributes:
        listing: The images and captions of the pairs that were given.
        image: A store for each view; the first is of plain images.
        text: The captions.
        texts: Reads each text of the listing, by its number.
        good: Which of the listed images these pairs are: those that can be read, with a caption.
    """

    listing: Listing
    image: Sequence[Segments]
    text: Segments
    texts: Callable[[int], str]
    good: AllBut

    def __len__(self) -> int:
        return len(self.good)

    def image_rows(self, rows: Numbers, draws: npt.NDArray[np.float32] | None = None) -> Tensor:
        """The image features of rows `(b, q)`: of a drawn view, or of the plain image."""
        hashes, views = self.listing.images[self.good.at(rows)], np.zeros(len(rows), np.int64)
        if draws is not None:
            views = (draws * len(self.image)).astype(np.int64)
        features = np.empty((len(rows), self.image[0].width), np.float16)
        for view in np.unique(views):
            features[views == view] = self.image[view].rows(hashes[views == view, view])
        return torch.from_numpy(features)

    def text_rows(self, captions: Numbers) -> Tensor:
        """The features of listed captions `(c, q)`."""
        return torch.from_numpy(self.text.rows(self.listing.captions[captions]))

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
            numbers = np.searchsorted(self.listing.texts, self.listing.captions[captions])
            return np.array([number_of(normalised(self.texts(int(each)))) for each in numbers])

        def same_image() -> Numbers:
            features = self.image_rows(rows).numpy()
            return np.array([number_of(row.tobytes()) for row in features])

        keys: dict[Key, Callable[[], Numbers]] = {
            "caption": same_text,
            "image": same_image,
            "class": lambda: np.array([class_number(pairs, int(row)) for row in rows]),
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
        HALVES["image_half"]: (halves.image_rows, halves.image[0].width),
        HALVES["text_half"]: (halves.mean_text_rows, halves.text.width),
    }
    return {
        name: HalfTeacher(of[teacher.features][0], index, of[teacher.features][1])
        for name, teacher in teachers.items()
        if teacher.features in of
    }
