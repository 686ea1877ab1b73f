"""Which pairs a run uses, by lists of ids, and which it holds out to evaluate a model on.

Pairs that share a caption or an image are held out together or not at all, so a model has seen
nothing that it is evaluated on. Captions are equal as `captions.normalise` has them. Images are
equal by file, by their bytes and, among at most `COMPARED`, by what they show.

The pairs whose ids have the lowest hashes are drawn. Each pass over the data then finds what shares
something with them, until nothing new is found. Memory grows by four bytes a row with the data.
"""

import csv
import hashlib
import io
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from protoclip.config import DataConfig
from protoclip.data.access import describe_error, digest, explain_unwritable, is_url
from protoclip.data.bands import show
from protoclip.data.captions import hash_content, normalise_texts
from protoclip.data.pairs import (
    BLOCK,
    BadSample,
    ImageTextPairs,
    Rows,
    evenly_spaced,
    file_status,
    flat_texts,
    split_by_source,
)
from protoclip.distributed.collectives import count_cores
from protoclip.files import checksum, in_turn, read_local, replacing
from protoclip.progress import Progress
from protoclip.terminal import visible

Mask = npt.NDArray[np.bool_]
Sources = Sequence[ImageTextPairs]
Before = tuple[ImageTextPairs, Rows]  # what a model was trained on, and the rows held out of it
Texts = Callable[[ImageTextPairs], tuple[Rows, pa.LargeBinaryArray]]  # rows, and a text of each

COLUMN = "sample_id"  # of a list of ids
# Held out unless the user says otherwise: this share and at most `MOST`; of few pairs `FEW`, or the
# share `LARGEST_USUAL` of them.
SHARE, MOST, FEW, LARGEST_USUAL = 0.02, 5000, 100, 0.1
# A caption or image file that more rows share than this part of what is wanted is not held out.
LARGEST = 0.25
# Rows that are drawn for each one that is wanted, since some share an image. Where less than
# `ENOUGH` of what is wanted is left of them, more are drawn.
DRAWN, ENOUGH = (1.25, 10.0, 80.0), 0.9
PASSES = 8  # over the data; groups of which a pass still finds more rows are not held out
CHUNK, THREADS = 64, 32  # images that a thread reads at a time, and threads
READ_AT_ONCE = 1 << 16  # rows of which images are compared at a time
PAGE = 4096  # bytes of an image that are compared before all of it is
BEGINNING = 1 << 14  # bytes of an image that tell whether all of it is read
LOOKED_AT = 64  # image files of a source that tell whether it is the same as before
# Among at most this many rows images are compared by thumbnails, too: 3 kB and 0.3 ms each, longer
# for large ones. Saved again, as a JPEG of quality 75 or at half the size, an image differs from
# itself by less than `NEAR` of its contrast; another drawing of the same emoji differs by more.
COMPARED, SIDE, NEAR = 50_000, 16, 0.05
FLAT = 4  # of 255: images of less contrast are compared by their bytes alone
# Part of the name of every file of rows; change it when the choice changes. Where the file of
# `FORM_1_0` is still there, its rows stay held out, so that runs of version 1.0 can go on.
FORM, FORM_1_0 = 4, 3


def choose_share(pairs: int) -> float:
    """The share to hold out of this many pairs unless the user says otherwise."""
    return max(SHARE, min(LARGEST_USUAL, FEW / max(1, pairs)))


def hold_out_rows(
    sources: Sources, *, share: float, most: int = MOST, folder: Path, before: Sequence[Before] = ()
) -> Rows:
    """The rows to hold out of sources that follow each other, sorted.

    They are the pairs whose ids have the lowest hashes, so they are the same for every seed, and
    mostly the same after pairs are added. The choice is kept in `folder`: for large data it takes
    minutes, since images of equal size are compared.

    Args:
        share: Share of all pairs to hold out, in [0, 1); fewer if many share a caption.
        most: Hold out no more pairs than this.
        before: What the model was trained on before, of which nothing is held out. All that was
            held out then, still is.

    Raises:
        ValueError: The folder cannot be written, and the choice is not in it.
    """
    # Ids decide, which begin with these names.
    named = [(identify_rows(s), s.prefix, "" if s.id_column else s.name) for s in sources]
    facts = {"form": FORM, "share": share, "most": most, "sources": named}
    if before:
        facts["before"] = [[identify_rows(pairs), rows.tolist()] for pairs, rows in before]
    wanted = min(most, round(share * sum(map(len, sources))))

    def compute(copies: "_Copies") -> Rows:
        rows: Rows = np.array([], np.int64)
        for factor in DRAWN:
            number = min(copies.total, round(factor * wanted))
            rows = _choose(copies, number, wanted)
            if len(rows) >= ENOUGH * wanted or number == copies.total:
                break
        return rows

    return _compute_once(facts, folder, sources, before, compute)


def count_shared(
    measured: Sources, before: Sequence[Before], *, folder: Path
) -> tuple[int, int, int]:
    """How many pairs that evaluate a model were looked at (at most `MOST`), and how many of these
    have an image that it was trained on, or a caption."""
    facts = {
        "form": FORM,
        "measured": [*map(identify_rows, measured)],
        "before": [[identify_rows(pairs), rows.tolist()] for pairs, rows in before],
    }

    def compute(copies: "_Copies") -> Rows:
        rows = np.arange(copies.total)[:: -(-copies.total // MOST)]

        def have_trained(match: _Match) -> Mask:
            is_trained = np.zeros(match.number, bool)
            for keys, others in match.matches:
                is_trained[keys[copies.are_trained(others)]] = True
            return np.isin(rows, match.rows[is_trained[match.keys]])

        by_caption = have_trained(copies.match_texts(rows, read_captions))
        by_name = have_trained(copies.match_texts(rows, read_image_names))
        by_content = have_trained(copies.match_contents(rows))
        by_image = by_name | by_content | have_trained(copies.match_thumbnails(rows))
        return np.array([len(rows), by_image.sum(), by_caption.sum()])

    looked, images, captions = _compute_once(facts, folder, measured, before, compute).tolist()
    return looked, images, captions


def identify_rows(source: ImageTextPairs) -> str:
    """Identifies the pairs of a source, by size and time of some of its image files, too."""
    rows = evenly_spaced(len(source), LOOKED_AT, seed=0)
    files = [file_status(source.where(row)) for row in rows]
    return digest({"rows": source.rows_key, "files": files})


def read_captions(source: ImageTextPairs) -> tuple[Rows, pa.LargeBinaryArray]:
    """The row and the normalised text of each caption."""
    owners, texts = [np.array([], np.int64)], [pa.array([], pa.large_binary())]
    for name in source.caption_columns:
        counts, flat = flat_texts(source.select_column(name).combine_chunks())
        rows = np.arange(len(source))
        owners.append(rows if counts is None else np.repeat(rows, counts.fill_null(0)))
        texts.append(normalise_texts(flat))
    return np.concatenate(owners), pa.concat_arrays(texts)


def read_image_names(source: ImageTextPairs) -> tuple[Rows, pa.LargeBinaryArray]:
    """The row and the path or URL of each image that is a file; null for the others."""
    if (names := source.image_names()) is None:
        return np.array([], np.int64), pa.array([], pa.large_binary())
    # Other folders may have files of the same names.
    parts = (pa.scalar(source.root, names.type), names, pa.scalar("/", names.type))
    below = pc.binary_join_element_wise(*parts)
    names = pc.if_else(pc.match_substring(names, "://"), names, below)
    return np.arange(len(source)), names.combine_chunks()


def count_repeated_images(pairs: ImageTextPairs, rows: Iterable[int]) -> int:
    """How many of the rows have the image of another one, which counts once.

    Images in files are compared by name, others by their bytes if they begin as another one.
    """
    looks: tuple[Callable[[int], str | bytes], ...] = (
        lambda row: pairs.image_name(row) or pairs.read_encoded(row, slice(0, BEGINNING)),
        lambda row: pairs.image_name(row) or checksum(pairs.read_encoded(row)),
    )
    alike, groups = [*rows], 0
    for look in looks:
        equal: dict[str | bytes, list[int]] = {}
        for row in alike:
            with suppress(BadSample):
                equal.setdefault(look(row), []).append(row)
        repeats = [same for same in equal.values() if len(same) > 1]
        alike, groups = [row for same in repeats for row in same], len(repeats)
    return len(alike) - groups


class _Match(NamedTuple):
    """Which rows have a text or image of some rows. Texts and images have numbers, the keys."""

    number: int  # of keys
    rows: Rows  # that were asked for, each as often as it has keys
    keys: Rows  # of each of these
    matches: Iterable[tuple[Rows, Rows]]  # keys and rows, some at a time: all that have these keys


class _Copies:
    """Finds rows of sources, and of what a model was trained on before, that share something."""

    def __init__(self, sources: Sources, before: Sequence[Before]) -> None:
        self.drawn_from = sources
        self.sources = [*sources, *(pairs for pairs, _ in before)]
        # Rows are numbered over all of these, one after the other: `total` are to be drawn from.
        self.starts = [*accumulate(map(len, self.sources), initial=0)]
        self.total = self.starts[len(sources)]
        starts = self.starts[len(sources) :]
        held = [start + rows for start, (_, rows) in zip(starts, before, strict=False)]
        self.held = np.concatenate([np.array([], np.int64), *held])  # out of what was trained on
        self.unread = set[int]()  # rows whose images are there and cannot be read

    def locate(self, row: int) -> tuple[ImageTextPairs, int]:
        """The source that has a row, and the number of the row there."""
        number = bisect_right(self.starts, row) - 1
        return self.sources[number], row - self.starts[number]

    def are_trained(self, rows: Rows) -> Mask:
        """Whether a model was trained on these rows before."""
        return (rows >= self.total) & ~np.isin(rows, self.held)

    def match_texts(self, rows: Rows, read: Texts) -> _Match:
        """Rows with an equal caption or name of an image file."""
        owners, texts, first = [np.array([], np.int64)], [pa.array([], pa.large_binary())], 0
        for source, some in split_by_source(self.sources, rows):
            positions, of_source = read(source.subset(some))
            owners.append(first + some[positions])
            texts.append(of_source)
            first += len(source)
        of_rows = pa.concat_arrays(texts)
        vocabulary = pc.unique(of_rows)
        vocabulary = vocabulary.filter(pc.greater(pc.binary_length(vocabulary), 0))

        def find() -> Iterator[tuple[Rows, Rows]]:
            first = 0
            progress = Progress("comparing texts of pairs", self.starts[-1], quiet=True)
            for source in self.sources:
                for part in source.split_into_blocks():
                    positions, texts = read(part)
                    keys = _positions(texts, vocabulary)
                    is_known = keys >= 0
                    yield keys[is_known], first + positions[is_known]
                    first += len(part)
                    progress.update(first)

        keys = _positions(of_rows, vocabulary)
        is_known = keys >= 0
        return _Match(
            number=len(vocabulary),
            rows=np.concatenate(owners)[is_known],
            keys=keys[is_known],
            matches=find() if len(vocabulary) else (),
        )

    def match_contents(self, rows: Rows) -> _Match:
        """Rows with an image of the same bytes, which are read where size and a page are equal."""
        rows = rows[self.sizes[rows] >= 0]
        sizes, pages = np.unique(self.sizes[rows]), self._hash_images(rows, page=True)
        progress = Progress("comparing images with those held out", len(self.sizes), quiet=True)
        alike, pages_alike = [rows], [pages]
        for first in range(0, len(self.sizes) if len(rows) else 0, READ_AT_ONCE):
            is_likely = np.isin(self.sizes[first : first + READ_AT_ONCE], sizes)
            likely = np.setdiff1d(first + np.flatnonzero(is_likely), rows, assume_unique=True)
            of_likely = self._hash_images(likely, page=True)
            is_equal = np.isin(of_likely, pages)
            alike.append(likely[is_equal])
            pages_alike.append(of_likely[is_equal])
            progress.update(first + READ_AT_ONCE)
        _, number, count = np.unique(
            np.concatenate(pages_alike), return_inverse=True, return_counts=True
        )
        same_page = np.concatenate(alike)[count[number] > 1]
        contents, keys = np.unique(self._hash_images(same_page, page=False), return_inverse=True)
        is_asked = np.isin(same_page, rows)
        return _Match(len(contents), same_page[is_asked], keys[is_asked], [(keys, same_page)])

    def match_thumbnails(self, rows: Rows) -> _Match:
        """Rows with an image that looks nearly the same."""
        keys, others = [np.array([], np.int64)], [np.array([], np.int64)]
        for start in range(0, len(rows) if len(self.thumbnails) else 0, CHUNK):
            some = self.thumbnails[rows[start : start + CHUNK]]
            one, other = np.nonzero(some @ self.thumbnails.T > 1 - NEAR**2 / 2)
            keys.append(start + one)
            others.append(other)
        matches = [(np.concatenate(keys), np.concatenate(others))]
        return _Match(len(rows), rows, np.arange(len(rows)), matches)

    @cached_property
    def sizes(self) -> npt.NDArray[np.int32]:
        """Bytes of each image; -1 where that is unknown."""
        sizes, first = np.empty(self.starts[-1], np.int32), 0
        progress = Progress("looking at the sizes of images", len(sizes), quiet=True)
        for source in self.sources:
            for part in source.split_into_blocks():
                sizes[first : first + len(part)] = part.image_sizes()
                first += len(part)
                progress.update(first)
        return sizes

    @cached_property
    def thumbnails(self) -> npt.NDArray[np.float32]:
        """Thumbnails of all images, of mean 0 and norm 1; 0 without contrast, and for what cannot
        be read or is behind a URL. None at all if there are too many."""
        number = self.starts[-1] if self.starts[-1] <= COMPARED else 0
        looks = np.zeros((number, 3 * SIDE**2), np.float32)

        def look(row: int) -> None:
            source, position = self.locate(row)
            with suppress(ValueError):
                encoded = b"" if is_url(source.where(position)) else source.read_encoded(position)
                pixels = show(encoded, at_least=4 * SIDE)
                thumbnail = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
                levels = np.asarray(thumbnail, np.float32).ravel()
                if levels.std() >= FLAT:
                    looks[row] = (levels - levels.mean()) / (levels.std() * len(levels) ** 0.5)

        progress = Progress("comparing thumbnails", len(looks), quiet=True)
        for first in range(0, len(looks), BLOCK):
            with ThreadPool(count_cores()) as pool:
                pool.map(look, range(first, min(first + BLOCK, len(looks))), CHUNK)
            progress.update(first + BLOCK)
        return looks

    def _hash_images(self, rows: Rows, *, page: bool) -> Rows:
        """A hash of each row's image, or of its size and a page; below zero if it is unread."""
        hashes = -1 - rows

        def read(number: int) -> None:
            row = int(rows[number])
            (source, position), size = self.locate(row), int(self.sizes[row])
            first = max(0, (size - PAGE) // 2)
            part = slice(first, min(size, first + PAGE)) if page else None
            try:
                hashes[number] = hash_content(b"%d " % size + source.read_encoded(position, part))
            except BadSample:
                self.unread.add(row)

        with ThreadPool(THREADS) as pool:  # many, since they wait for a disk
            pool.map(read, range(len(rows)), CHUNK)
        return hashes


def _choose(copies: _Copies, number: int, wanted: int) -> Rows:
    """The rows to hold out, of `number` with the lowest hashes and all that shares with them."""
    drawn = _draw(copies.drawn_from, number)
    # Groups that were held out before may be larger than this share allows.
    largest = max(1, round(wanted * LARGEST), len(copies.held))
    limit = max(wanted, len(copies.held))
    rows = new = np.union1d(drawn, copies.held)
    edges, barred = np.zeros((2, 0), np.int64), np.array([], np.int64)
    for _ in range(PASSES):
        for match, most in (
            (copies.match_texts(new, read_captions), largest),
            (copies.match_texts(new, read_image_names), largest),
            (copies.match_contents(new), limit),
            (copies.match_thumbnails(new), limit),
        ):
            more, common = _connect(copies, match, most)
            edges, barred = np.hstack([edges, more]), np.union1d(barred, common)
        before, rows = rows, np.union1d(rows, edges)
        groups = connect_rows(rows, edges)
        sizes = np.bincount(groups[rows < copies.total], minlength=len(rows))
        is_barred = np.isin(groups, groups[np.isin(rows, barred)]) | (sizes[groups] > limit)
        new = rows[~is_barred & ~np.isin(rows, before)]
        if not len(new):
            break
    is_barred |= np.isin(groups, groups[np.isin(rows, new)])
    # What was held out before comes first, then what has the lowest hash.
    positions = np.searchsorted(rows, np.concatenate([copies.held, drawn]))
    in_order = groups[positions[~is_barred[positions]]]
    in_order = in_order[np.sort(np.unique(in_order, return_index=True)[1])]
    were_held = np.isin(in_order, groups[np.isin(rows, copies.held)])
    most = max(wanted, int(sizes[in_order[were_held]].sum()))
    chosen = in_order[np.cumsum(sizes[in_order]) <= most]
    held_out: Rows = rows[np.isin(groups, chosen) & (rows < copies.total)]
    return held_out


def _draw(sources: Sources, number: int) -> Rows:
    """The rows whose ids have the lowest hashes, in the order of these."""
    rows, hashes, first = np.array([], np.int64), np.array([], np.uint64), 0
    for position, source in enumerate(sources):
        beginning = hashlib.blake2b(b"%d/" % position, digest_size=8)
        ids = (name.encode("utf-8", "surrogatepass") for name in source.sample_ids())
        while block := [*islice(ids, BLOCK)]:
            digests = []
            for sample_id in block:
                state = beginning.copy()  # in half the time of a new one
                state.update(sample_id)
                digests.append(state.digest())
            hashes = np.concatenate([hashes, np.frombuffer(b"".join(digests), "<u8")])
            rows = np.concatenate([rows, np.arange(first, first + len(block))])
            order = np.argsort(hashes, kind="stable")[:number]
            rows, hashes, first = rows[order], hashes[order], first + len(block)
    return rows


def _connect(copies: _Copies, match: _Match, most: int) -> tuple[Rows, Rows]:
    """Edges `(2, n)`: the first row that was asked for with a key, and each row that has it. And
    the rows that were asked for with a key that bars them, since more than `most` rows of the
    sources have it, or one that was trained on."""
    counts, is_barred = np.zeros(match.number, np.int64), np.zeros(match.number, bool)
    edges = [np.zeros((2, 0), np.int64)]
    first = np.zeros(match.number, np.int64)
    first[match.keys[::-1]] = match.rows[::-1]
    for keys, rows in match.matches:
        is_barred[keys[copies.are_trained(rows)]] = True
        counts += np.bincount(keys[rows < copies.total], minlength=match.number)
        is_barred |= counts > most
        edges.append(np.stack([keys, rows])[:, ~is_barred[keys]])
    keys, rows = np.hstack(edges)
    is_left = ~is_barred[keys]
    barred = match.rows[is_barred[match.keys]]
    return np.stack([first[keys[is_left]], rows[is_left]]), barred


def connect_rows(rows: Rows, edges: Rows) -> Rows:
    """A number for each of the rows, which are sorted: equal where edges connect them."""
    from scipy.sparse import coo_array  # here, since training imports this file
    from scipy.sparse.csgraph import connected_components

    one, other = np.searchsorted(rows, edges)
    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(rows), len(rows)))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def _positions(texts: pa.LargeBinaryArray, vocabulary: pa.LargeBinaryArray) -> Rows:
    """Where each text is among those that are known; -1 if it is none of them."""
    positions = pc.index_in(texts, vocabulary).fill_null(-1)
    return np.asarray(positions.to_numpy(zero_copy_only=False), np.int64)


def _compute_once(
    facts: dict[str, Any],
    folder: Path,
    sources: Sources,
    before: Sequence[Before],
    compute: Callable[[_Copies], Rows],
) -> Rows:
    """Rows that were computed earlier for the same facts, or are now, by one process."""
    path, former = (folder / f"{digest({**facts, 'form': form})}.npz" for form in (FORM, FORM_1_0))
    for cached in (path, former):
        if (rows := _read_rows(cached)) is not None:  # also from a cache that is read-only
            return rows
    copies = _Copies(sources, before)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with in_turn(path):  # one process chooses, the others wait for it
            if (rows := _read_rows(path)) is None:
                rows = compute(copies)
                if not copies.unread:  # or a disk may fail for a while
                    with replacing(path) as temporary, temporary.open("wb") as file:
                        np.savez(file, rows=rows)
            return rows
    except OSError as error:
        raise explain_unwritable(folder, error) from error


def _read_rows(path: Path) -> Rows | None:
    """Rows that were kept; None if they are missing or damaged, which the checksum in it shows."""
    try:
        with np.load(path) as arrays:
            rows: Rows = arrays["rows"]
            return rows
    except Exception:  # what NumPy and `zipfile` raise for a damaged file has no common class
        return None


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Selects the samples to use: with ids in `only`, if there are such, and not in `without`."""

    ids: Mapping[str, frozenset[str]]  # by the name of the setting
    paths: Mapping[str, str]  # of their files

    @property
    def settings(self) -> str:
        return " and ".join(f"data.{name}" for name in self.ids)

    @cached_property
    def keys(self) -> dict[str, str]:
        """Identifies the ids of each setting, in whatever order and form a file holds them."""
        return {
            f"data.{name}": checksum(json.dumps(sorted(ids)).encode())
            for name, ids in self.ids.items()
        }

    def keeps(self, sample_id: str) -> bool:
        is_used = "only" not in self.ids or sample_id in self.ids["only"]
        return is_used and sample_id not in self.ids.get("without", ())

    def select(self, sources: Sequence[ImageTextPairs]) -> list[ImageTextPairs]:
        """The selected rows of each source; the first one's notes say what was left out. Raises
        `ValueError` if no sample is left at all."""
        named = [source.prefix_ids() for source in sources] if len(sources) > 1 else sources
        left, unknown = list[ImageTextPairs](), {name: set(ids) for name, ids in self.ids.items()}
        for source, pairs in zip(sources, named, strict=True):
            rows = list[int]()
            for row, sample_id in enumerate(pairs.sample_ids()):
                for ids in unknown.values():
                    ids.discard(sample_id)
                if self.keeps(sample_id):
                    rows.append(row)
            left.append(source.subset(np.array(rows, np.int64)))
        used, total = sum(map(len, left)), sum(map(len, sources))
        if not used:
            example = visible(named[0].sample_id(0)[:80])
            raise ValueError(
                f"{self.settings}: no sample is left of {total:,}; ids of this data look like "
                f"'{example}'"
            )
        notes = [f"{self.settings}: {used:,} of {total:,} samples are used"]
        notes += [
            f"data.{name}: {self.paths[name]}: {len(ids):,} of {len(self.ids[name]):,} ids are of "
            f"no sample, such as '{visible(min(ids)[:60])}'"
            for name, ids in unknown.items()
            if ids
        ]
        left[0].notes = [*left[0].notes, *notes]
        return left


def read_chosen(data: DataConfig) -> Chosen | None:
    """The lists that the settings name; None if there are none; raises as `read_ids`."""
    settings = {"only": data.only, "without": data.without}
    paths = {name: path for name, path in settings.items() if path is not None}
    ids = {name: read_ids(name, path) for name, path in paths.items()}
    return Chosen(ids=ids, paths=paths) if paths else None


def read_ids(setting: str, path: str) -> frozenset[str]:
    """Sample ids from a JSON file (a list of ids, or of objects with a `sample_id`) or a CSV file
    (a column `sample_id`, or a single one without a header); raises `ValueError` for another."""
    try:
        text = read_local(path, encoding="utf-8-sig")
        is_json = text.lstrip().startswith(("[", "{")) or path.lower().endswith(".json")
        entries = json.loads(text) if is_json else _read_csv_column(text)
        if not isinstance(entries, list) or not entries:
            raise ValueError("it needs to be a list of ids, or of objects with a sample_id")
        ids = [entry.get(COLUMN) if isinstance(entry, dict) else entry for entry in entries]
        for number, value in enumerate(ids, 1):
            if not isinstance(value, str | int) or value == "":  # a column may hold whole numbers
                raise ValueError(f"entry {number} has no {COLUMN}")
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"data.{setting}: {path}: {describe_error(error)}") from None
    return frozenset(map(str, ids))


def _read_csv_column(text: str) -> list[str]:
    """The cells of the column of ids, empty where a row has another length than the header."""
    first = next(filter(str.strip, text.splitlines()), "")
    separator = next((mark for mark in "\t,;" if mark in first), ",")
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header, *rows = [row for row in lines if any(map(str.strip, row))] or [[]]
    names = [cell.strip() for cell in header]
    if len(names) > 1 and COLUMN not in names:
        raise ValueError(f"it has no column {COLUMN}, only {visible(', '.join(names)[:80])}")
    if COLUMN not in names:
        return [cell for row in (names, *rows) for cell in row[:1]]
    column = names.index(COLUMN)
    return [row[column] if len(row) == len(names) else "" for row in rows]
