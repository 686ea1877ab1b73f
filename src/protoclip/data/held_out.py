"""Pairs that are held out of training, to judge a model by.

Pairs that share a caption or an image stay together: all of them are held out, or none. So the
model has seen nothing of what it is judged by. Captions are equal as `groups.normalised` has them.
Images are equal by their bytes and, among at most `COMPARED`, by what they show.
"""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from protoclip.data.access import digest, is_url
from protoclip.data.content import flat_texts
from protoclip.data.decode import decode
from protoclip.data.groups import normalised_texts, number_of
from protoclip.data.index import unwritable
from protoclip.data.pairs import (
    BLOCK,
    MAX_IMAGE_PIXELS,
    BadSample,
    ImageTextPairs,
    file_status,
    image_fields,
    lengths_of,
    local_files,
    names_of_files,
)
from protoclip.data.sampler import evenly_spaced
from protoclip.data.view import AllBut, PairsView, Rows, whole
from protoclip.distributed.cores import cores
from protoclip.files import in_turn, replacing
from protoclip.progress import Progress

Hashes = npt.NDArray[np.uint64]
Thumbnails = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Groups = npt.NDArray[np.signedinteger[Any]]  # a number for each row
Columns = Callable[[ImageTextPairs], list[pa.ChunkedArray]]
Keys = Iterable[tuple[Rows, npt.NDArray[Any]]]  # rows, and a key of each
Sources = Sequence[ImageTextPairs]
Before = tuple[ImageTextPairs, Rows]  # what a model was trained on, and the rows held out of it

SHARE, MOST = 0.02, 5000  # held out unless the user says otherwise: this share, at most so many
# A group of pairs that share a caption is not held out if it is larger than this share of what is
# wanted.
LARGEST = 0.25
CHUNK, THREADS = 64, 32  # images that a thread reads at a time, and threads
PAGE = 4096  # bytes of an image that are compared before all of it is
LOOKED_AT = 64  # image files of a source that tell whether it is the same as before
SPARE = 1.25  # pairs that are looked at for each that is wanted, since some share an image
ENOUGH = 0.9  # of what is wanted; below it copies of images are looked for
ROUNDS = 3  # of looks at copies, whose captions bring rows with images of their own
# Among at most this many rows images are compared by thumbnails, too: 3 kB and 0.3 ms each, longer
# for large ones. Saved again, as a JPEG of quality 75 or at half the size, an image differs from
# itself by less than `NEAR` of its contrast; another drawing of the same emoji differs by more.
COMPARED, SIDE, NEAR = 50_000, 16, 0.05
FLAT = 4  # of 255: images of less contrast are compared by their bytes alone
# Part of the name of every file of rows. Change it when the choice changes.
FORM = 3


def held_out_rows(
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
    total = sum(map(len, sources))
    # Ids decide, which begin with these names.
    named = [(key_of(s), s.prefix, "" if s.id_column else s.name) for s in sources]
    known = {"form": FORM, "share": share, "most": most, "sources": named}
    if before:
        known["before"] = _facts(before)
    wanted = min(most, round(share * total))
    return _kept(known, folder, lambda unread: _choose(sources, total, wanted, before, unread))


def shared(judging: Sources, before: Sequence[Before], *, folder: Path) -> tuple[int, int, int]:
    """Of how many pairs that judge a model it was trained on the image, and on a caption.

    Returns:
        How many pairs were looked at (of many, `MOST`), of how many of these the image was trained
        on, and of how many a caption.
    """
    known = {"form": FORM, "judging": [*map(key_of, judging)], "before": _facts(before)}

    def count(unread: set[int]) -> Rows:
        total = sum(map(len, judging))
        sources, trained, held = _with_before(judging, before)
        rows = np.arange(total)[:: -(-total // MOST)]
        rest = np.setdiff1d(np.arange(total), rows)
        ignored = np.concatenate([rest, held])
        looks = _looks(sources)
        images, _, others = _contents_like(sources, looks, rows, ignored=ignored, unread=unread)

        def has_trained_text(columns_of: Columns) -> Mask:
            owners, keys = map(np.concatenate, zip(*_keys(sources, columns_of), strict=True))
            return np.isin(rows, owners[np.isin(keys, keys[trained[owners]])])

        has_trained_image = np.isin(images, others) | has_trained_text(urls_of)
        return np.array([len(rows), has_trained_image.sum(), has_trained_text(captions_of).sum()])

    looked, images, captions = _kept(known, folder, count).tolist()
    return looked, images, captions


def _facts(before: Sequence[Before]) -> list[list[Any]]:
    return [[key_of(pairs), rows.tolist()] for pairs, rows in before]


def key_of(source: ImageTextPairs) -> str:
    """Identifies the pairs of a source, without a look at each of its image files.

    Of some files size and time count, so that a folder whose images were all made anew is noticed.
    """
    rows = evenly_spaced(len(source), min(LOOKED_AT, len(source)), seed=0)
    files = [file_status(source.where(row)) for row in rows]
    return digest({"rows": source.rows_key, "files": files})


def _kept(known: dict[str, Any], folder: Path, compute: Callable[[set[int]], Rows]) -> Rows:
    """What was computed for the same facts before, or is now; one process does. It is not kept if
    `compute` adds images that it cannot read to the set: a disk may fail for a while."""
    path = folder / f"{digest(known)}.npz"
    if (rows := _read_rows(path)) is not None:  # also from a cache that is read-only
        return rows
    unread = set[int]()
    of_data: OSError | None = None  # which is not the cache's
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with in_turn(path):  # one process chooses, the others wait for it
            if (rows := _read_rows(path)) is None:
                for left in folder.glob(f".{path.name}.*.tmp"):  # of a process that was killed
                    left.unlink(missing_ok=True)
                try:
                    rows = compute(unread)
                except OSError as error:
                    of_data = error
                    raise
                if not unread:
                    with replacing(path) as temporary, temporary.open("wb") as file:
                        np.savez(file, rows=rows)
            return rows
    except OSError as error:
        if error is of_data:
            raise
        raise unwritable(folder, error) from error


def _read_rows(path: Path) -> Rows | None:
    """Rows that were kept; None if they are missing or damaged, which the checksum in it shows."""
    try:
        with np.load(path) as kept:
            rows: Rows = kept["rows"]
            return rows
    except Exception:  # what NumPy and `zipfile` raise for a damaged file has no common class
        return None


def _choose(
    sources: Sources, total: int, wanted: int, before: Sequence[Before], unread: set[int]
) -> Rows:
    everything, trained, held = _with_before(sources, before)
    keys = [_keys(everything, columns_of) for columns_of in (captions_of, names_of)]
    group = _components(keys, len(trained))  # of each row
    unshared = ~_is_among(group, group[trained])
    held_before = _is_among(group, group[held]) & unshared
    candidates = unshared & ~held_before
    held_before[total:] = candidates[total:] = False
    still_wanted = max(0, round(wanted * SPARE) - int(held_before.sum()))
    largest = min(max(1, round(wanted * LARGEST)), still_wanted)
    sizes = np.zeros(len(group), np.int32)
    np.add.at(sizes, group[:total], 1)
    lowest = _lowest(sources, candidates & (sizes <= largest)[group], still_wanted)
    drawn = _is_among(group, _first(group[lowest], sizes, still_wanted))
    del sizes
    looks = _looks(everything)
    contents_like = partial(_contents_like, everything, looks, ignored=held, unread=unread)

    def apart(chosen: Rows) -> Rows:
        """Those of the chosen rows whose images no row has that is left to train on."""
        images, _, others = contents_like(chosen)
        positions = np.arange(len(chosen))
        keys = [[(positions, group[chosen])], [(positions, images)]]
        together = _components(keys, len(chosen))
        unshared_images = ~np.isin(together, together[np.isin(images, others)])
        chosen, together = chosen[unshared_images], together[unshared_images]
        most = max(wanted, int(np.isin(together, together[held_before[chosen]]).sum()))
        view = whole(sources)
        ids = (f"{view.source_of(row)}/{view.sample_id(row)}" for row in chosen.tolist())
        hashes = _hashes(each.encode("utf-8", "surrogatepass") for each in ids)
        hashes = np.where(held_before[chosen], 0, hashes)  # their groups come first
        in_order = together[np.argsort(hashes, kind="stable")]
        rows: Rows = chosen[np.isin(together, _first(in_order, np.bincount(together), most))]
        return rows

    chosen = np.flatnonzero(held_before | (candidates & drawn))
    rows = apart(chosen)
    # Most images have copies in rows that were not drawn. Where few have, the choice stays what it
    # was before copies were looked for.
    for _ in range(ROUNDS if len(rows) < ENOUGH * wanted else 0):
        # Copies bring their whole groups, whose images may have copies in turn.
        images, others, images_of_others = contents_like(chosen)
        copies = others[np.isin(images_of_others, images) & candidates[others]]
        more = np.flatnonzero(candidates & _is_among(group, group[copies]))
        chosen = np.union1d(chosen, more)
    return apart(chosen) if len(rows) < ENOUGH * wanted else rows


def _with_before(
    sources: Sources, before: Sequence[Before]
) -> tuple[list[ImageTextPairs], Mask, Rows]:
    """The sources and those of before; whether each row was trained on; rows held out before."""
    view = PairsView([(pairs, AllBut(len(pairs), rows)) for pairs, rows in before])
    first, everything = sum(map(len, sources)), [*sources, *view.sources]
    held = first + view.left_out
    trained = np.arange(sum(map(len, everything))) >= first
    trained[held] = False
    return everything, trained, held


def _hashes(texts: Iterable[bytes], beginning: bytes = b"") -> Hashes:
    """Eight bytes of BLAKE2b of each text behind this beginning."""
    begun, digests = hashlib.blake2b(beginning, digest_size=8), []
    for text in texts:
        state = begun.copy()  # in half the time of a new one
        state.update(text)
        digests.append(state.digest())
    return np.frombuffer(b"".join(digests), "<u8")


def _lowest(sources: Sources, candidates: Mask, number: int) -> Rows:
    """The candidates whose ids have the lowest hashes, in the order of these."""
    rows, hashes, first = np.array([], np.int64), np.array([], np.uint64), 0
    for name, source in enumerate(sources):
        ids = (each.encode("utf-8", "surrogatepass") for each in source.sample_ids())
        while block := [*islice(ids, BLOCK)]:
            more = np.flatnonzero(candidates[first : first + len(block)])
            rows = np.concatenate([rows, first + more])
            hashes = np.concatenate([hashes, _hashes(block, b"%d/" % name)[more]])
            order = np.argsort(hashes, kind="stable")[:number]
            rows, hashes, first = rows[order], hashes[order], first + len(block)
    return rows


def _is_among(group: Groups, some: Groups) -> Mask:
    """Whether the group of each row is one of some."""
    marks = np.zeros(len(group), bool)
    marks[some] = True
    return marks[group]


def _first(groups: Groups, sizes: Groups, wanted: int) -> Groups:
    """The first of the groups in this order, which have at most `wanted` rows together; one that
    alone has more is passed over."""
    in_order = groups[np.sort(np.unique(groups, return_index=True)[1])]
    in_order = in_order[sizes[in_order] <= wanted]
    return in_order[np.cumsum(sizes[in_order]) <= wanted]


def _in_blocks(sources: Sources, label: str) -> Iterator[tuple[int, ImageTextPairs]]:
    """Some rows of the sources at a time, with the number of the first."""
    progress, first = Progress(label, sum(map(len, sources))), 0
    for source in sources:
        for part in source.in_blocks():
            yield first, part
            first += len(part)
            if progress.total > BLOCK:
                progress.update(first)


def _keys(sources: Sources, columns_of: Columns) -> Keys:
    """A hash of each text in some columns of the sources, and the rows that the texts are of."""
    yield np.array([], np.int64), np.array([], np.uint64)
    for first, part in _in_blocks(sources, "comparing texts of pairs"):
        for column in columns_of(part):
            counts, texts = flat_texts(column.combine_chunks())
            times = 1 if counts is None else counts.fill_null(0)
            rows = np.repeat(np.arange(first, first + len(part)), times)
            is_caption = columns_of is captions_of
            contents = normalised_texts(texts) if is_caption else texts.to_pylist()
            has_text = np.fromiter(map(bool, contents), bool, len(contents))
            yield rows[has_text], _hashes(filter(None, contents))


def _components(kinds: Sequence[Keys], total: int, edges: Groups | None = None) -> Groups:
    """A number for each row below `total`; rows with an equal key of one kind, or that an edge
    connects, share it, directly or through others.

    A row and what is left of its key have eight bytes together, which are sorted where they are. Of
    ten million rows 40 bits of the key are left, so that some fifty get a false companion.
    """
    bits = max(1, (total - 1).bit_length())
    neighbours = [np.zeros((2, 0), np.int32) if edges is None else edges]
    for keys in kinds:
        packed = array("Q")
        for rows, values in keys:
            spread = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # to the upper bits
            packed.frombytes((spread >> bits << bits | rows.astype(np.uint64)).tobytes())
        in_order = np.frombuffer(packed, np.uint64)
        in_order.sort()
        for start in range(0, len(in_order), BLOCK):
            part = in_order[start : start + BLOCK + 1]
            equal = np.flatnonzero(part[1:] ^ part[:-1] < 2**bits)
            neighbours.append((part[[equal, equal + 1]] & (2**bits - 1)).astype(np.int32))
    edges, group = np.hstack(neighbours), np.arange(total, dtype=np.int32)
    while True:
        ends = group[edges]
        differ = ends[0] != ends[1]
        if not differ.any():
            return group
        edges, ends = edges[:, differ], ends[:, differ]
        np.minimum.at(group, ends.max(axis=0), ends.min(axis=0))
        while ((lower := group[group]) != group).any():
            group = lower


def captions_of(source: ImageTextPairs) -> list[pa.ChunkedArray]:
    return [source.kept(source.checked.column(name)) for name in source.caption_columns]


def names_of(source: ImageTextPairs) -> list[pa.ChunkedArray]:
    """Paths and URLs of images: other folders may have files of the same names."""
    if (names := image_names(source)) is None:
        return []
    parts = (pa.scalar(source.root, names.type), names, pa.scalar("/", names.type))
    below = pc.binary_join_element_wise(*parts)
    return [pc.if_else(pc.match_substring(names, "://"), names, below)]


def urls_of(source: ImageTextPairs) -> list[pa.ChunkedArray]:
    """The names of images that are URLs, and so name the same image in any source."""
    return [pc.if_else(pc.match_substring(n, "://"), n, None) for n in names_of(source)]


def _contents_like(
    sources: Sources, looks: Thumbnails, chosen: Rows, *, ignored: Rows, unread: set[int]
) -> tuple[Groups, Rows, Groups]:
    """A number of each chosen row's image; the other rows that may hold an equal one, and theirs.

    Only files of equal size can hold equal bytes: among usual photographs a sixth have the size of
    one of a few thousand. Of these a page from the middle is read, and whole files only if pages
    are equal too. What cannot be read equals nothing, and is added to `unread` if it is there; rows
    that are `ignored` have no part in it.
    """
    parts = _in_blocks(sources, "looking at the sizes of images")
    sizes = np.concatenate([image_sizes(part) for _, part in parts])
    blocks = [sizes[first : first + BLOCK] for first in range(0, len(sizes), BLOCK)]
    likely = np.concatenate([np.isin(part, sizes[chosen]) & (part >= 0) for part in blocks])
    alike = _alike(looks, chosen)
    likely[alike[1]] = True
    likely[chosen] = likely[ignored] = False
    rows = np.concatenate([chosen, np.flatnonzero(likely)])
    pages = _contents(sources, sizes, rows, unread, page=True)
    _, number, count = np.unique(pages, return_inverse=True, return_counts=True)
    same_page = (count[number] > 1) & np.isin(number, number[: len(chosen)])
    contents = -1 - rows
    contents[same_page] = _contents(sources, sizes, rows[same_page], unread, page=False)
    order = np.argsort(rows)
    edges = order[np.searchsorted(rows, alike[:, np.isin(alike[1], rows)], sorter=order)]
    images = _components([[(np.arange(len(rows)), contents)]], len(rows), edges)
    return images[: len(chosen)], rows[len(chosen) :], images[len(chosen) :]


def _alike(looks: Thumbnails, chosen: Rows) -> Rows:
    """Each chosen row with each row that has nearly the same thumbnail, as two rows of numbers."""
    pairs = [np.zeros((2, 0), np.int64)]
    for start in range(0, len(chosen) if len(looks) else 0, CHUNK):
        some = chosen[start : start + CHUNK]
        one, other = np.nonzero(looks[some] @ looks.T > 1 - NEAR**2 / 2)
        pairs.append(np.stack([some[one], other]))
    return np.hstack(pairs)


def _looks(sources: Sources) -> Thumbnails:
    """Thumbnails of all images, of mean 0 and norm 1; 0 without contrast, and for what cannot be
    read or is behind a URL. None at all if there are too many."""
    pairs = whole(sources)
    looks = np.zeros((len(pairs) if len(pairs) <= COMPARED else 0, 3 * SIDE**2), np.float32)

    def look(row: int) -> None:
        with suppress(ValueError):
            encoded = b"" if is_url(pairs.where(row)) else pairs.encoded(row)
            pixels = decode(encoded, max_pixels=MAX_IMAGE_PIXELS, at_least=4 * SIDE)
            thumbnail = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            levels = np.asarray(thumbnail, np.float32).ravel()
            if levels.std() >= FLAT:
                looks[row] = (levels - levels.mean()) / (levels.std() * len(levels) ** 0.5)

    _in_threads("comparing thumbnails", look, np.arange(len(looks)), threads=cores())
    return looks


def _contents(sources: Sources, sizes: Groups, rows: Rows, unread: set[int], page: bool) -> Rows:
    """A hash of each row's image, or of its size and a page; below zero for what cannot be read."""
    pairs = whole(sources)

    def content(row: int) -> int:
        (source, number), size = pairs.locate(row), int(sizes[row])
        first = max(0, (size - PAGE) // 2)
        part = slice(first, min(size, first + PAGE)) if page else None
        try:
            if size >= 0:  # else it is missing, or behind a URL; `names_of` has equal ones
                return number_of(b"%d " % size + source.encoded(number, part))
        except BadSample:
            unread.add(row)
        return -1 - row

    return np.array(_in_threads("comparing images with the held-out ones", content, rows), np.int64)


def _in_threads(
    label: str, work: Callable[[int], Any], rows: Rows, threads: int = THREADS
) -> list[Any]:
    """What comes of the work on each row; by default most of it waits for the disk."""
    done: list[Any] = []
    progress = Progress(label, len(rows))
    with ThreadPoolExecutor(threads) as pool:
        parts = np.array_split(rows, max(1, len(rows) // CHUNK))
        for part in pool.map(lambda some: [*map(work, some.tolist())], parts):
            done += part
            if len(rows) > CHUNK:
                progress.update(len(done))
    return done


def image_names(source: ImageTextPairs, table: pa.Table | None = None) -> pa.ChunkedArray | None:
    """The file or URL of each image, null where the table holds the image itself; None if it holds
    all, or they are in shards. Of the whole `table` that is checked, or of this one of its rows."""
    if source.in_ranges:
        return None
    images = (source.checked if table is None else table).column(source.image_column)
    names = names_of_files(images)
    return None if names is None else source.kept(names)


def images_of_several_classes(source: ImageTextPairs) -> int:
    """How many images have other classes in other rows."""
    classes = source.kept(source.checked.column(str(source.class_column)))
    names = image_names(source)
    if names is None or "list" in str(classes.type):
        return 0
    columns = {"image": names, "class": classes.cast(pa.large_string())}
    table = pa.table(columns).filter(pc.is_valid(names))
    counts = table.group_by("image").aggregate([("class", "count_distinct")]).column(1)
    return int(np.count_nonzero(counts.to_numpy() > 1))


def image_sizes(source: ImageTextPairs) -> Groups:
    """Bytes of each image as stored; -1 where that is unknown without reading it (URLs)."""
    table = source.checked
    if source.in_ranges:
        return _numbers(source.kept(table.column("size")))
    sizes = np.full(len(source), -1, np.int32)
    encoded, _ = image_fields(table.column(source.image_column))
    if encoded is not None:
        sizes = _numbers(source.kept(lengths_of(encoded)))
    if (names := image_names(source)) is not None:
        sizes[names.is_valid().to_numpy()] = -1
        is_file = pc.invert(pc.match_substring(names, "://")).fill_null(False)
        paths = local_files(names.filter(is_file), source.root)
        for row, path in zip(np.flatnonzero(is_file), paths, strict=True):
            if path is not None:
                with suppress(OSError, ValueError):  # a path may hold a zero byte
                    sizes[row] = min(os.stat(path).st_size, 2**31 - 1)  # noqa: PTH116 (of millions)
    return sizes


def _numbers(column: pa.ChunkedArray) -> Groups:
    """As 32 bits, to be written to."""
    numbers: Groups = pc.fill_null(column.cast(pa.int32(), safe=False), -1).to_numpy().copy()
    return numbers
