"""Pairs that are held out of training, to judge a model by.

Pairs that share a caption or an image (its bytes) stay together: all of them are held out, or none.
So the model has seen nothing of what it is judged by.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from protoclip.data.access import digest
from protoclip.data.index import unwritable
from protoclip.data.pairs import (
    BadSample,
    ImageTextPairs,
    cells_of,
    file_status,
    image_fields,
    lengths_of,
    local_files,
    names_of_files,
)
from protoclip.data.sampler import evenly_spaced
from protoclip.data.view import AllBut, PairsView, Rows, whole
from protoclip.files import in_turn, replacing
from protoclip.progress import Progress

Hashes = npt.NDArray[np.uint64]
Columns = Callable[[ImageTextPairs], list[pa.ChunkedArray]]
Before = tuple[ImageTextPairs, Rows]  # what a model was trained on, and the rows held out of it

SHARE, MOST = 0.02, 5000  # held out unless the user says otherwise: this share, at most so many
# A group of pairs that share a caption is not held out if it is larger than this share of what is
# wanted.
LARGEST = 0.25
CHUNK, THREADS = 64, 32  # images that a thread reads at a time, and threads
PAGE = 4096  # bytes of an image that are compared before all of it is
LOOKED_AT = 64  # image files of a source that tell whether it is the same as before
STEP = 100_000  # sizes between lines of progress
SPARE = 1.25  # pairs that are looked at for each that is wanted, since some share an image
ENOUGH = 0.9  # of what is wanted; below it copies of images are looked for
ROUNDS = 3  # of looks at copies, whose captions bring rows with images of their own
# Part of the name of every file of rows. Change it when the choice changes.
FORM = 2


def held_out_rows(
    sources: Sequence[ImageTextPairs],
    *,
    share: float,
    most: int = MOST,
    folder: Path,
    before: Sequence[Before] = (),
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
    return _kept(known, folder, lambda: _choose(sources, total, wanted, before))


def shared(
    judging: Sequence[ImageTextPairs], before: Sequence[Before], *, folder: Path
) -> tuple[int, int, int]:
    """Of how many pairs that judge a model it was trained on the image, and on a caption.

    Returns:
        How many pairs were looked at (of many, `MOST`), of how many of these the image was trained
        on, and of how many a caption.
    """
    known = {"form": FORM, "judging": [*map(key_of, judging)], "before": _facts(before)}

    def count() -> Rows:
        total = sum(map(len, judging))
        sources, trained, held = _with_before(judging, before)
        rows = np.arange(total)[:: -(-total // MOST)]
        rest = np.setdiff1d(np.arange(total), rows)
        _, equal = _images(sources, rows, ignored=np.concatenate([rest, held]))
        same = [
            np.isin(rows, owners[np.isin(keys, keys[np.isin(owners, trained)])])
            for owners, keys in (_keys(sources, urls_of), _keys(sources, captions_of))
        ]
        return np.array([len(rows), (equal | same[0]).sum(), same[1].sum()])

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


def _kept(known: dict[str, Any], folder: Path, compute: Callable[[], Rows]) -> Rows:
    """What was computed for the same facts before, or is now; one process does."""
    path = folder / f"{digest(known)}.npz"
    if (rows := _read_rows(path)) is not None:  # also from a cache that is read-only
        return rows
    of_data: OSError | None = None  # which is not the cache's
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with in_turn(path):  # one process chooses, the others wait for it
            if (rows := _read_rows(path)) is None:
                for left in folder.glob(f".{path.name}.*.tmp"):  # of a process that was killed
                    left.unlink(missing_ok=True)
                try:
                    rows = compute()
                except OSError as error:
                    of_data = error
                    raise
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
    sources: Sequence[ImageTextPairs], total: int, wanted: int, before: Sequence[Before]
) -> Rows:
    hashes = np.fromiter(map(_hash, _ids(sources)), np.uint64, total)
    everything, trained, held = _with_before(sources, before)
    groups = _groups(everything)
    group = groups[:total]  # of each row
    unshared = ~np.isin(group, groups[trained])
    held_before = np.isin(group, groups[held]) & unshared
    hashes[held_before] = 0  # their groups come first
    candidates = np.flatnonzero(unshared & ~held_before)
    still_wanted = max(0, round(wanted * SPARE) - int(held_before.sum()))
    largest = max(1, round(wanted * LARGEST))
    lowest = _lowest(hashes[candidates], group[candidates], still_wanted, largest=largest)
    chosen = np.concatenate([np.flatnonzero(held_before), candidates[lowest]])

    def apart(chosen: Rows) -> Rows:
        """Those of the chosen rows whose images no row has that is left to train on."""
        images, seen_in_training = _images(everything, chosen, ignored=held)
        together = _components([group[chosen], images])
        unshared_images = ~np.isin(together, together[seen_in_training])
        chosen, together = chosen[unshared_images], together[unshared_images]
        most = max(wanted, int(np.isin(together, together[held_before[chosen]]).sum()))
        rows: Rows = np.sort(chosen[_lowest(hashes[chosen], together, most, largest=most)])
        return rows

    rows = apart(chosen)
    # Most images have copies in rows that were not drawn. Where few have, the choice stays what it
    # was before copies were looked for.
    if len(rows) < ENOUGH * wanted:
        rows = apart(_with_copies(everything, chosen, candidates, group, ignored=held))
    return rows


def _with_copies(
    sources: Sequence[ImageTextPairs],
    chosen: Rows,
    candidates: Rows,
    group: Rows,
    *,
    ignored: Rows,
) -> Rows:
    """The chosen rows, and those of the candidates that have the image of one, each with its whole
    group, whose images may have copies in turn."""
    for _ in range(ROUNDS):
        rows, contents = _contents_like(sources, chosen, ignored=ignored)
        images, others = np.split(contents, [len(chosen)])
        copies = rows[len(chosen) :][np.isin(others, images)]
        copies = copies[np.isin(copies, candidates)]
        groups = candidates[np.isin(group[candidates], group[copies])]
        grown = np.union1d(chosen, groups)
        if len(grown) == len(chosen):
            break
        chosen = grown
    return chosen


def _with_before(
    sources: Sequence[ImageTextPairs], before: Sequence[Before]
) -> tuple[list[ImageTextPairs], Rows, Rows]:
    """The sources and those of before; of the latter, the rows trained on and those held out."""
    view = PairsView([(pairs, AllBut(len(pairs), rows)) for pairs, rows in before])
    first, everything = sum(map(len, sources)), [*sources, *view.sources]
    held = first + view.left_out
    trained = np.setdiff1d(np.arange(first, sum(map(len, everything))), held)
    return everything, trained, held


def _hash(text: str | bytes) -> int:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _ids(sources: Sequence[ImageTextPairs]) -> Iterator[str]:
    for number, source in enumerate(sources):
        yield from (f"{number}/{sample_id}" for sample_id in source.sample_ids())


def _groups(sources: Sequence[ImageTextPairs]) -> Rows:
    """A number for each row; rows that share a caption or an image's name share it."""
    rows, keys = _keys(sources, lambda source: [*captions_of(source), *names_of(source)])
    return _components([keys], rows=rows, total=sum(map(len, sources)))


def _keys(sources: Sequence[ImageTextPairs], columns_of: Columns) -> tuple[Rows, Rows]:
    """A hash of each text in some columns of the sources, and the rows that the texts are of."""
    rows, keys = [np.array([], np.int64)], [np.array([], np.int64)]
    first = 0
    for source in sources:
        for column in columns_of(source):
            start = first
            for chunk in column.iterchunks():
                texts = [(start + cell, hash(text)) for cell, text in _present(chunk)]
                rows.append(np.array([row for row, _ in texts], np.int64))
                keys.append(np.array([key for _, key in texts], np.int64))
                start += len(chunk)
        first += len(source)
    return np.concatenate(rows), np.concatenate(keys)


def _components(keys: Sequence[Rows], *, rows: Rows | None = None, total: int = 0) -> Rows:
    """A number for each row; rows with an equal key, directly or through others, share it.

    Each array of `keys` has the keys of `rows`; of all rows in their order, if unset.
    """
    # Here, since every command imports this file, and SciPy takes a quarter of a second to import.
    from scipy.sparse import bmat, coo_array, hstack
    from scipy.sparse.csgraph import connected_components

    if rows is None:
        rows, total = np.arange(len(keys[0])), len(keys[0])
    edges = coo_array((total, 0), dtype=np.int8)
    for values in keys:
        _, key, count = np.unique(values, return_inverse=True, return_counts=True)
        shared = count[key] > 1
        rows_and_keys = (rows[shared], key[shared])
        more = coo_array((np.ones(shared.sum(), np.int8), rows_and_keys), (total, len(count)))
        edges = hstack([edges, more])
    whole = bmat([[None, edges], [edges.T, None]]) if edges.nnz else coo_array((total, total))
    groups: Rows = connected_components(whole, directed=False)[1][:total].astype(np.int64)
    return groups


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


def _present(column: pa.Array) -> Iterator[tuple[int, str]]:
    """The texts that a column's cells hold, each with the number of its cell."""
    for number, cell in enumerate(cells_of(column)):
        for text in cell if isinstance(cell, list) else [cell]:
            decoded = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
            if decoded and decoded.strip():
                yield number, decoded.strip()


def _lowest(hashes: Hashes, groups: Rows, wanted: int, *, largest: int) -> Rows:
    """The rows of the groups with the lowest hashes, at most `wanted`; no group above `largest`."""
    order = np.argsort(hashes, kind="stable")
    _, first, group, sizes = np.unique(
        groups[order], return_index=True, return_inverse=True, return_counts=True
    )
    by_hash = np.argsort(first)  # groups in the order of their lowest hash
    fitting = by_hash[sizes[by_hash] <= largest]
    taken = fitting[np.cumsum(sizes[fitting]) <= wanted]
    rows: Rows = order[np.isin(group, taken)]
    return rows


def _images(
    sources: Sequence[ImageTextPairs], chosen: Rows, *, ignored: Rows
) -> tuple[Rows, npt.NDArray[np.bool_]]:
    """Of each chosen row, a hash of its image, and whether a row that is not chosen has it too."""
    _, contents = _contents_like(sources, chosen, ignored=ignored)
    images, others = np.split(contents, [len(chosen)])
    return images, np.isin(images, others)


def _contents_like(
    sources: Sequence[ImageTextPairs], chosen: Rows, *, ignored: Rows
) -> tuple[Rows, Rows]:
    """The chosen rows, then the others that may hold an equal image; and a hash of each one's.

    Only files of equal size can hold equal images: among usual photographs a sixth have the size of
    one of a few thousand. Of these a page from the middle is read, and whole files only if pages
    are equal too. What cannot be read equals nothing; rows that are `ignored` have no part in it.
    """
    sizes = np.concatenate([image_sizes(source) for source in sources])
    likely = np.isin(sizes, sizes[chosen]) & (sizes >= 0)
    likely[chosen] = likely[ignored] = False
    rows = np.concatenate([chosen, np.flatnonzero(likely)])
    pages = _contents(sources, sizes, rows, page=True)
    _, number, count = np.unique(pages, return_inverse=True, return_counts=True)
    alike = (count[number] > 1) & np.isin(number, number[: len(chosen)])
    contents = -1 - rows
    contents[alike] = _contents(sources, sizes, rows[alike], page=False)
    return rows, contents


def _contents(sources: Sequence[ImageTextPairs], sizes: Rows, rows: Rows, *, page: bool) -> Rows:
    """A hash of each row's image, or of its size and a page; below zero for what cannot be read."""
    pairs = whole(sources)

    def content(row: int) -> int:
        (source, number), size = pairs.locate(row), int(sizes[row])
        if size < 0:  # behind a URL; `_groups` knows equal ones
            return -1 - row
        first = max(0, (size - PAGE) // 2)
        part = slice(first, min(size, first + PAGE)) if page else None
        try:
            encoded = source.encoded(number, part)
        except BadSample:
            return -1 - row
        return _hash(b"%d " % size + encoded) >> 1

    def contents(of: Rows) -> list[int]:
        return [content(row) for row in of.tolist()]

    hashes: list[int] = []
    progress = Progress("comparing images with the held-out ones", len(rows))
    with ThreadPoolExecutor(THREADS) as pool:  # most of the time goes into waiting for the disk
        for part in pool.map(contents, np.array_split(rows, max(1, len(rows) // CHUNK))):
            hashes += part
            if len(rows) and (page or len(rows) > CHUNK):
                progress.update(len(hashes))
    return np.array(hashes, np.int64)


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


def image_sizes(source: ImageTextPairs) -> Rows:
    """Bytes of each image as stored; -1 where that is unknown without reading it (URLs)."""
    table = source.checked
    if source.in_ranges:
        return _numbers(source.kept(table.column("size")))
    sizes = np.full(len(source), -1, np.int64)
    encoded, _ = image_fields(table.column(source.image_column))
    if encoded is not None:
        sizes = _numbers(source.kept(lengths_of(encoded)))
    if (names := image_names(source)) is not None:
        sizes[names.is_valid().to_numpy()] = -1
        progress = Progress(f"looking at the images of {source.name}", len(source))
        for row, path in enumerate(local_files(names, source.root)):
            if path is not None:
                with suppress(OSError, ValueError):  # a path may hold a zero byte
                    sizes[row] = os.stat(path).st_size  # noqa: PTH116 (of millions)
            if len(source) > STEP and (row % STEP == 0 or row == len(source) - 1):
                progress.update(row + 1)
    return sizes


def _numbers(column: pa.ChunkedArray) -> Rows:
    numbers: Rows = pc.fill_null(column.cast(pa.int64()), -1).to_numpy().copy()  # to be written to
    return numbers
