"""The pairs of `align` as rows: their images and captions, and their features by two encoders.

An image is known by its file, or by its row in data that hold it; a caption by its text. The first
rank lists the different ones beside the stores, for all ranks and later starts.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from operator import add
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from protoclip.config import ENCODERS, Config, EngineName
from protoclip.data.access import cache_folder, index_folder
from protoclip.data.captions import Key, hash_content, normalise
from protoclip.data.loader import Batch, EpisodeLoader, Packed, Pass, pair_numbers
from protoclip.data.pairs import Pairs, Sample
from protoclip.data.sampler import caption_draws
from protoclip.data.sources import AllBut, PairsView, to_array
from protoclip.data.tables import ArrowIndex, build_index
from protoclip.data.transforms import EvaluationTransform
from protoclip.distributed.collectives import raise_on_all_ranks, rank, rank0_first, require_shared
from protoclip.encode import linear_maps
from protoclip.encode.encoder import Encoder, image_sides, text_sides
from protoclip.encode.run import (
    encode_missing,
    hash_captions,
    hash_images,
    images_at_once,
    read_captions,
    read_image,
)
from protoclip.encode.store import Hashes, JoinedRows, Numbers, Store, StoredRows
from protoclip.encode.teachers import TeacherFeatures, index_pairs
from protoclip.files import checksum, to_json
from protoclip.models.opening import Tokenizer
from protoclip.models.projections import FrozenEncoders
from protoclip.models.protoclip import Autocast

FOLDER = "listings"
CHOOSING_CAPTIONS = 2**13  # by which layers are chosen
SETTING = "align.features"  # says where the stores are
IDS_KEPT = 2**17  # of samples; the largest episode that is chosen has as many


def features_folder(config: Config) -> Path:
    """Where the features of a run's encoders are."""
    given = config.align.features
    return cache_folder() / "features" if given is None else Path(given)


def open_side(encoder: Encoder, root: Path) -> Store:
    """The store of a side of `align`, by the key of its encoder. Collective."""
    key = rank0_first(encoder.key)  # unlike hosts may compute other last digits
    return Store(root / checksum(key.encode()), setting=SETTING)


def encode_sides(
    encoders: FrozenEncoders,
    pairs: Pairs,
    *,
    tokenizer: Tokenizer,
    transform: EvaluationTransform,
    root: Path,
    autocast: Autocast,
    engine: EngineName = "auto",
    threads: int | None = None,
) -> "PairRows":
    """Encode what is not in the stores below `root` yet, and open them. All ranks call it."""
    at_once = images_at_once(encoders)
    # The first rank decides for all: files may have other times on other hosts.
    path = rank0_first(lambda: write_listing(pairs, root))
    require_shared(path.with_suffix(".json"), by=SETTING)
    listing = raise_on_all_ranks(lambda: open_listing(path))

    def read_listed_image(number: int) -> Sample:
        return read_image(pairs, int(listing.rows[number]))

    def encode_images(encoder: Encoder) -> StoredRows:
        images, hashes = open_side(encoder, root), listing.images
        if rank() and not images.has(hashes).all():  # files have to be named as on the first rank
            hashes = hash_images(pairs)[listing.rows]
        encode_missing(
            images, encoder, hashes, read_listed_image, batch_size=at_once, threads=threads
        )
        return StoredRows(images, find_mapped(images, listing.images))

    sides = image_sides(encoders, transform, autocast=autocast, engine=engine)
    image_rows = JoinedRows([*map(encode_images, sides)])
    bad = (np.diff(listing.first) == 0) | (image_rows.numbers < 0)

    def read_text(number: int) -> Sample:
        return read_captions(
            pairs, int(listing.text_rows[number]), int(listing.text_places[number])
        )

    def encode_texts(encoder: Encoder) -> StoredRows:
        texts = open_side(encoder, root)
        if not texts.has(listing.texts).all():
            order = np.argsort(listing.text_rows, kind="stable")
            encode_missing(
                texts,
                encoder,
                listing.texts[order],
                lambda number: read_text(int(order[number])),
                batch_size=4 * at_once,
            )
        return StoredRows(texts, find_mapped(texts, listing.texts))

    return PairRows(
        listing=listing,
        image=image_rows,
        text=JoinedRows([*map(encode_texts, text_sides(encoders, tokenizer, autocast=autocast))]),
        texts=lambda number: read_text(number).captions[0],
        good=AllBut(len(bad), np.flatnonzero(bad)),
    )


def find_mapped(store: Store, hashes: Hashes) -> npt.NDArray[np.int32]:
    """The numbers of ids in a store, in a file without a name: memory is for other things."""
    with TemporaryFile() as file:
        numbers = np.memmap(file, np.int32, "w+", shape=max(len(hashes), 1))[: len(hashes)]
        numbers[:] = store.find(hashes)
    store.forget_order()
    return numbers


class Listing(NamedTuple):
    """Images in the order of rows that first show them, and their captions image after image."""

    rows: Numbers  # the first row that shows each image `(i,)`
    images: Hashes  # the hash of each image's id `(i,)`
    shown: Numbers  # the number of the image that each row shows `(n,)`
    captions: npt.NDArray[np.int32]  # which of the texts each caption is `(c,)`
    first: Numbers  # where the captions of each image begin `(i + 1,)`
    texts: Hashes  # of different captions, ascending `(t,)`
    text_rows: Numbers  # a row that has each of these
    text_places: Numbers  # which of its captions it is


@dataclass(frozen=True, kw_only=True)
class PairRows:
    """The features of some pairs, which are images with all their captions."""

    listing: Listing  # of the pairs that were given
    image: JoinedRows  # of the listed images; a bad one is not there
    text: JoinedRows  # of the listed texts
    texts: Callable[[int], str]  # reads each text of the listing, by its number
    good: AllBut  # the listed images that these pairs are: readable ones with a caption

    def __len__(self) -> int:
        return len(self.good)

    def image_rows(self, rows: Numbers) -> Tensor:
        """The image features of rows `(b, q)`."""
        return torch.from_numpy(self.image[self.good.at(rows)])

    def text_rows(self, captions: Numbers) -> Tensor:
        """The features of listed captions `(c, q)`."""
        return torch.from_numpy(self.text[self.listing.captions[captions]])

    def most_captions(self, share: float = 1.0) -> int:
        """How many captions this share of the rows has at most."""
        return int(np.quantile(np.diff(self.listing.first), share, method="lower"))

    def counts(self, rows: Numbers) -> tuple[Numbers, Numbers]:
        """Where the captions of each row begin, and how many they are."""
        images = self.good.at(rows)
        first = self.listing.first[images]
        return first, self.listing.first[images + 1] - first

    def draw_captions(
        self, rows: Numbers, draws: npt.NDArray[np.float32], number: int = 1
    ) -> Numbers:
        """Listed captions: `number` of every row, by draws in [0, 1), as `CaptionDraw` does."""
        first, counts = self.counts(rows)
        drawn = (draws * counts).astype(np.int64)[:, None] + np.arange(number)
        return (first[:, None] + drawn % counts[:, None]).ravel()

    def groups(self, rows: Numbers, captions: Numbers, by: tuple[Key, ...]) -> Numbers:
        """The keys of rows with the drawn captions `(b, k)`, as batches of images have them."""
        keys = []
        for key in by:
            if key == "caption":
                texts = map(self.texts, self.listing.captions[captions].tolist())
                keys.append([hash_content(normalise(text)) for text in texts])
            else:
                features = self.image_rows(rows).numpy()
                keys.append([hash_content(row.tobytes()) for row in features])
        return np.stack([np.array(numbers) for numbers in keys], axis=1)

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

    def choose_columns(
        self, options: tuple[Sequence[Tensor], Sequence[Tensor]], fit: linear_maps.Fit | None = None
    ) -> tuple[tuple[int, int], dict[tuple[int, int], float]]:
        """`choose_columns`, by images with at most `CHOOSING_CAPTIONS` captions, evenly spaced."""
        step = -(-len(self.listing.captions) // CHOOSING_CAPTIONS)
        rows = np.arange(0, len(self), step)
        counts = torch.from_numpy(self.counts(rows)[1])
        texts = self.text_rows(self.all_captions(rows))
        return linear_maps.choose_columns(self.image_rows(rows), texts, counts, options, fit)

    def second_moments(self, device: torch.device) -> linear_maps.SecondMoments:
        """Those of the plain images and of all their captions, of `SAMPLE` images at most."""
        chosen = np.arange(0, len(self), -(-len(self) // linear_maps.SAMPLE))
        parts = []
        for rows in np.array_split(chosen, -(-len(chosen) // linear_maps.BLOCK)):
            counts = torch.from_numpy(self.counts(rows)[1])
            x = self.image_rows(rows).to(device)
            y = self.text_rows(self.all_captions(rows)).to(device)
            parts.append(linear_maps.moments_of_images(x, y, counts))
        return reduce(add, parts)


def list_pairs(pairs: Pairs) -> Listing:
    images = hash_images(pairs)
    captions, counts = hash_captions(pairs)
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
    columns = {name: index.table.column(name).chunk(0).values for name in Listing._fields}
    # Not `to_numpy`, which imports pandas.
    cells: dict[str, Any] = {name: np.from_dlpack(column) for name, column in columns.items()}
    return Listing(**cells)


def side_teachers(config: Config, pairs: Pairs, encoded: PairRows) -> dict[str, TeacherFeatures]:
    """The sides that group the pairs of a run, by the names of its teachers."""
    sides = {
        ENCODERS["image_half"]: (encoded.image_rows, encoded.image.width),
        ENCODERS["text_half"]: (encoded.mean_text_rows, encoded.text.width),
    }
    teachers, index = dict[str, TeacherFeatures](), None
    for name, teacher in config.external_teachers.items():
        if teacher.features in sides:
            read, width = sides[teacher.features]
            index = index_pairs(pairs) if index is None else index
            teachers[name] = TeacherFeatures(
                name=teacher.features,
                index=index,
                read=lambda rows, read=read: read(rows).numpy(),  # type: ignore[misc]
                width=width,
                is_in_memory=True,  # they never change
            )
    return teachers


@dataclass(frozen=True, kw_only=True)
class RowLoader(EpisodeLoader):
    """An `EpisodeLoader` whose images and captions are rows that the encoders made of them."""

    encoded: PairRows

    @cached_property
    def sample_id(self) -> Callable[[int], str]:
        """The id of a row's sample, which each pass over the pairs asks for."""
        assert isinstance(self.pairs, Pairs)
        return lru_cache(IDS_KEPT)(self.pairs.sample_id)

    def batches(self, wanted: Pass) -> Iterator[Batch]:
        """This rank's batches of a pass: a pure function of it, with any number of ranks."""
        episode, all_rows = wanted.episode, wanted.episode.rows.numpy()
        size, stride = len(all_rows), self.batch_size * self.world_size
        captions = caption_draws(self.seed, episode.index, size)
        for begin in range(wanted.start * stride, size, stride):
            numbers = np.arange(begin, min(begin + stride, size))
            position = np.array_split(numbers, self.world_size)[self.rank]
            rows = all_rows[position]
            number = self.captions.number
            drawn = self.encoded.draw_captions(rows, captions[position], number)
            hashes = self.encoded.listing.texts[self.encoded.listing.captions[drawn]]
            image = self.encoded.image_rows(rows)
            pair_rows = np.repeat(rows, number)
            sample_ids = [*map(self.sample_id, pair_rows.tolist())]
            tensors: dict[str, Any] = {
                "position": torch.from_numpy(pair_numbers(position, number)),
                "image": image,
                "text": self.encoded.text_rows(drawn),
            }
            if wanted.with_features:
                tensors["features"] = {
                    name: read(sample_ids) for name, read in self.features_of.items()
                }
            if wanted.group_by:
                groups = self.encoded.groups(pair_rows, drawn, wanted.group_by)
                tensors["groups"] = torch.from_numpy(groups)
            self.on_read(len(rows), [])
            fields = Packed.pack(tensors).send(self.device)
            keys = hashes.view("V8").tolist()
            yield Batch(sample_id=sample_ids, captions=keys, **fields)
