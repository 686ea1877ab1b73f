"""Rows of pairs whose images and captions two frozen halves have encoded, and halves as teachers.

How they are encoded and kept is in `halves.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.config import HALVES, Config
from protoclip.data.groups import Key, class_number
from protoclip.data.pairs import Pairs
from protoclip.data.view import NONE
from protoclip.features import store
from protoclip.features.store import Hashes, Numbers, Segments, hash_ids
from protoclip.features.whiten import Features, Whitens

BLOCK = 2**14  # pairs whose captions are in memory at once
SAMPLE = 2**14  # pairs that a whitening is fitted to


@dataclass(frozen=True, kw_only=True)
class HalfRows:
    """What both halves know of some pairs, by row.

    Attributes:
        image: A store for each view; the first is of plain images.
        text: The captions.
        images: The number of each row's image in each view `(n, v)`; -1 if it is bad.
        captions: The numbers of all rows' captions, row after row.
        same_text: A key of each of these captions, equal for texts that differ in nothing but case
            and space; nobody asked for keys if there are none.
        same_image: A key of each row's image in the first view, equal for images of equal features.
        first: Where each row's captions begin `(n + 1)`.
        repeated: Rows whose image an earlier row has too, which then has their captions.
    """

    image: Sequence[Segments]
    text: Segments
    images: Numbers
    captions: Numbers
    first: Numbers
    repeated: Numbers
    same_text: Numbers = field(default_factory=NONE.copy)
    same_image: Numbers = field(default_factory=NONE.copy)

    @property
    def bad(self) -> Numbers:
        """Rows that cannot be trained on: an image is bad, or there is no caption."""
        silent = np.diff(self.first) == 0
        silent[self.repeated] = False  # another row has their captions
        return np.flatnonzero((self.images < 0).any(1) | silent)

    def without(self, rows: Numbers) -> "HalfRows":
        """The same of all other rows."""
        kept = np.ones(len(self.images), bool)
        kept[rows] = False
        counts = np.diff(self.first)
        return HalfRows(
            image=self.image,
            text=self.text,
            images=self.images[kept],
            captions=self.captions[of_kept := np.repeat(kept, counts)],
            same_text=self.same_text[of_kept] if len(self.same_text) else NONE,
            same_image=self.same_image[kept] if len(self.same_image) else NONE,
            first=np.concatenate([[0], np.cumsum(counts[kept])]),
            repeated=NONE,
        )

    def image_rows(self, rows: Numbers, draws: npt.NDArray[np.float32] | None = None) -> Tensor:
        """The image features of rows `(b, q)`: of a drawn view, or of the plain image."""
        if draws is None or len(self.image) == 1:
            return torch.from_numpy(self.image[0].rows(self.images[rows, 0]))
        views = (draws * len(self.image)).astype(np.int64)
        features = np.empty((len(rows), self.image[0].width), np.float16)
        for view in np.unique(views):
            chosen = np.flatnonzero(views == view)
            features[chosen] = self.image[view].rows(self.images[rows[chosen], view])
        return torch.from_numpy(features)

    def text_rows(self, numbers: Numbers) -> Tensor:
        return torch.from_numpy(self.text.rows(numbers))

    def most_captions(self, share: float = 1.0) -> int:
        """How many captions this share of the rows has at most."""
        return int(np.quantile(np.diff(self.first), share, method="lower"))

    def drawn_captions(
        self, rows: Numbers, draws: npt.NDArray[np.float32], each: int = 1
    ) -> Numbers:
        """Indices in `captions`: `each` of every row, by draws in [0, 1), as `CaptionDraw` does."""
        counts = self.first[rows + 1] - self.first[rows]
        drawn = (draws * counts).astype(np.int64)[:, None] + np.arange(each)
        return (self.first[rows, None] + drawn % counts[:, None]).ravel()

    def groups(
        self, pairs: Pairs, rows: Numbers, captions: Numbers, by: tuple[Key, ...]
    ) -> Numbers:
        """The keys of rows with the drawn captions `(b, k)`, as batches of images have them."""
        keys: dict[Key, Callable[[], Numbers]] = {
            "caption": lambda: self.same_text[captions],
            "image": lambda: self.same_image[rows],
            "class": lambda: np.array([class_number(pairs, int(row)) for row in rows]),
        }
        return np.stack([keys[key]() for key in by], axis=1)

    def all_captions(self, rows: Numbers) -> Numbers:
        """The numbers of all captions of these rows, row after row."""
        counts = self.first[rows + 1] - self.first[rows]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        numbers: Numbers = self.captions[np.repeat(self.first[rows], counts) + within]
        return numbers

    def mean_text_rows(self, rows: Numbers) -> Tensor:
        """The mean over the captions of each row `(b, q)`."""
        counts = self.first[rows + 1] - self.first[rows]
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
    index = store.build_index(list(pairs.sample_ids()), name=pairs.name)
    of = {
        HALVES["image_half"]: (halves.image_rows, halves.image[0].width),
        HALVES["text_half"]: (halves.mean_text_rows, halves.text.width),
    }
    return {
        name: HalfTeacher(of[teacher.features][0], index, of[teacher.features][1])
        for name, teacher in config.external_teachers.items()
        if teacher.features in of
    }
