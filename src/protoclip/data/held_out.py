"""Pairs that are held out of training, to judge a model by.

Pairs that share a caption or an image (its bytes) stay together: all of them are held out, or none.
So the model has seen nothing of what it is judged by.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from scipy.sparse import bmat, coo_array, hstack
from scipy.sparse.csgraph import connected_components

from protoclip.data.access import digest, is_url, join
from protoclip.data.pairs import BadSample, ImageTextPairs, Pairs, Sample
from protoclip.files import replacing
from protoclip.progress import Progress

Rows = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

SHARE, MOST = 0.02, 5000  # held out unless the user says otherwise: this share, at most so many
# A group of pairs that share a caption is not held out if it is larger than this share of what is
# wanted.
LARGEST = 0.25
CHUNK = 1024  # images that threads compare at a time
SPARE = 1.25  # pairs that are looked at for each that is wanted, since some share an image
# Part of the name of every file of rows. Change it when the choice changes.
FORM = 1


class Rest:
    """The pairs of a source or mixture without those held out, in the same order, with their ids.

    `held_out` are sorted row numbers.
    """

    def __init__(self, pairs: Pairs, held_out: Rows) -> None:
        self.pairs, self.held_out, self.name = pairs, held_out, pairs.name
        self.notes = list(getattr(pairs, "notes", ()))
        # Row `r` of the rest is row `r` plus the count of these numbers that are at most `r`.
        self._before = held_out - np.arange(len(held_out))

    @property
    def sources(self) -> list[range]:
        """What is left of each part of a mixture, by its length: the sampler asks for that."""
        lengths = [len(source) for source in getattr(self.pairs, "sources", [self.pairs])]
        ends = np.cumsum([0, *lengths])
        held = np.diff(np.searchsorted(self.held_out, ends))
        return [range(number) for number in (np.diff(ends) - held).tolist()]

    def row(self, row: int) -> int:
        """The number that a row has in the whole source."""
        return row + int(np.searchsorted(self._before, row, side="right"))

    def __len__(self) -> int:
        return len(self.pairs) - len(self.held_out)

    def sample(self, row: int) -> Sample:
        return self.pairs.sample(self.row(row))

    def sample_id(self, row: int) -> str:
        return self.pairs.sample_id(self.row(row))

    def sample_captions(self, row: int) -> tuple[str, ...]:
        return self.pairs.sample_captions(self.row(row))

    def sample_ids(self) -> Iterator[str]:
        held_out = set(self.held_out.tolist())
        ids = enumerate(self.pairs.sample_ids())
        return (sample_id for row, sample_id in ids if row not in held_out)


def held_out_rows(
    sources: Sequence[ImageTextPairs], *, share: float, most: int = MOST, folder: Path
) -> Rows:
    """The rows to hold out of sources that follow each other, sorted.

    They are the pairs whose ids have the lowest hashes, so they are the same for every seed, and
    mostly the same after pairs are added. The choice is kept in `folder`: for large data it takes
    minutes, since images of equal size are compared.

    Args:
        share: Share of all pairs to hold out, in [0, 1); fewer if many share a caption.
        most: Hold out no more pairs than this.
    """
    total = sum(map(len, sources))
    wanted = min(most, round(share * total))
    known = {"form": FORM, "share": share, "most": most, "sources": [s.key for s in sources]}
    path = folder / f"{digest(known)}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # one process chooses, the others wait for it
        if (rows := _read_rows(path)) is None:
            for left in folder.glob(f".{path.name}.*.tmp"):  # of a process that was killed
                left.unlink(missing_ok=True)
            rows = _choose(sources, total, wanted)
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.savez(file, rows=rows)
        return rows


def _read_rows(path: Path) -> Rows | None:
    """Rows that were kept; None if they are missing or damaged, which the checksum in it shows."""
    try:
        with np.load(path) as kept:
            rows: Rows = kept["rows"]
            return rows
    except Exception:  # what NumPy and `zipfile` raise for a damaged file has no common class
        return None


def _choose(sources: Sequence[ImageTextPairs], total: int, wanted: int) -> Rows:
    hashes = np.fromiter(map(_hash, _ids(sources)), np.uint64, total)
    groups = _groups(sources, total)
    chosen = _lowest(hashes, groups, round(wanted * SPARE), largest=max(1, round(wanted * LARGEST)))
    images, elsewhere = _images(sources, chosen)
    together = _components([groups[chosen], images])
    own = ~np.isin(together, together[elsewhere])
    kept = _lowest(hashes[chosen[own]], together[own], wanted, largest=wanted)
    rows: Rows = np.sort(chosen[own][kept])
    return rows


def _hash(text: str | bytes) -> int:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _ids(sources: Sequence[ImageTextPairs]) -> Iterator[str]:
    for number, source in enumerate(sources):
        yield from (f"{number}/{sample_id}" for sample_id in source.sample_ids())


def _groups(sources: Sequence[ImageTextPairs], total: int) -> Rows:
    """A number for each row; rows that share a caption or an image's name share it."""
    rows: list[Rows] = []
    keys: list[npt.NDArray[np.int64]] = []
    first = 0
    for source in sources:
        for start, values in _texts(source):
            found = [(start + first + at, hash(text)) for at, text in values]
            rows.append(np.array([row for row, _ in found], np.int64))
            keys.append(np.array([key for _, key in found], np.int64))
        first += len(source)
    all_rows, all_keys = np.concatenate(rows), np.concatenate(keys)
    return _components([all_keys], rows=all_rows, total=total)


def _components(keys: Sequence[Rows], *, rows: Rows | None = None, total: int = 0) -> Rows:
    """A number for each row; rows with an equal key, directly or through others, share it.

    Each array of `keys` has the keys of `rows`; of all rows in their order, if unset.
    """
    if rows is None:
        rows, total = np.arange(len(keys[0])), len(keys[0])
    edges = coo_array((total, 0), dtype=np.int8)
    for values in keys:
        _, key, count = np.unique(values, return_inverse=True, return_counts=True)
        shared = count[key] > 1
        places = (rows[shared], key[shared])
        own = coo_array((np.ones(shared.sum(), np.int8), places), (total, len(count)))
        edges = hstack([edges, own])
    whole = bmat([[None, edges], [edges.T, None]]) if edges.nnz else coo_array((total, total))
    groups: Rows = connected_components(whole, directed=False)[1][:total].astype(np.int64)
    return groups


def _texts(source: ImageTextPairs) -> Iterator[tuple[int, Iterator[tuple[int, str]]]]:
    """The captions and names of images, in pieces: the first row, and (row in it, text)."""
    columns = [source.kept(source.checked.column(name)) for name in source.caption_columns]
    if (names := image_names(source)) is not None:
        columns.append(names)
    for column in columns:
        start = 0
        for chunk in column.iterchunks():
            yield start, _present(chunk.to_pylist())
            start += len(chunk)


def _present(cells: list[Any]) -> Iterator[tuple[int, str]]:
    """The texts that a column's cells hold, each with the number of its cell."""
    for number, cell in enumerate(cells):
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


def _images(sources: Sequence[ImageTextPairs], chosen: Rows) -> tuple[Rows, npt.NDArray[np.bool_]]:
    """Of each chosen row, a hash of its image, and whether a row that is not chosen has it too.

    Reads images of equal size only. What cannot be read equals nothing.
    """
    sizes = np.concatenate([image_sizes(source) for source in sources])
    likely = np.isin(sizes, sizes[chosen]) & (sizes >= 0)
    likely[chosen] = False
    rows = np.concatenate([chosen, np.flatnonzero(likely)])
    starts = np.cumsum([0, *map(len, sources)])

    def content(row: int) -> int:
        number = int(np.searchsorted(starts, row, side="right")) - 1
        if sizes[row] < 0:  # behind a URL; `_groups` knows equal ones
            return -1 - row
        try:
            encoded = sources[number].encoded(row - int(starts[number]))
        except BadSample:
            return -1 - row
        return _hash(encoded) >> 1

    found = np.empty(len(rows), np.int64)
    progress = Progress("comparing images with the held-out ones", len(rows))
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(rows), CHUNK):
            part = rows[first : first + CHUNK]
            found[first : first + CHUNK] = list(pool.map(content, part.tolist()))
            progress.update(first + len(part))
    images, others = np.split(found, [len(chosen)])
    return images, np.isin(images, others)


def image_names(source: ImageTextPairs) -> pa.ChunkedArray | None:
    """The file or URL of each image, null where the table holds the image itself; None if it holds
    all, or they are in shards."""
    values = source.checked.column(source.image_column)
    if "offset" in source.table.column_names:
        return None
    if pa.types.is_struct(values.type):
        parts = [values.type.field(i).name for i in range(values.type.num_fields)]
        names = pc.struct_field(values, "path") if "path" in parts else None
        if names is None or "bytes" not in parts:
            return names if names is None else source.kept(names)
        in_files = pc.is_null(pc.struct_field(values, "bytes"))
        return source.kept(pc.if_else(in_files, names, pa.scalar(None, names.type)))
    return source.kept(values) if "string" in str(values.type) else None


def image_sizes(source: ImageTextPairs) -> Rows:
    """Bytes of each image as stored; -1 where that is unknown without reading it (URLs)."""
    table = source.checked
    if "size" in table.column_names and "offset" in table.column_names:
        return _numbers(source.kept(table.column("size")))
    sizes = np.full(len(source), -1, np.int64)
    values = table.column(source.image_column)
    if pa.types.is_struct(values.type) and values.type.get_field_index("bytes") >= 0:
        values = pc.struct_field(values, "bytes")
    if "binary" in str(values.type):
        sizes = _numbers(source.kept(pc.binary_length(values)))
    if (names := image_names(source)) is not None:
        texts = (name for chunk in names.iterchunks() for name in chunk.to_pylist())
        for row, name in enumerate(texts):
            if name and not is_url(place := join(source.root, name)):
                with suppress(OSError):
                    sizes[row] = os.stat(place).st_size  # noqa: PTH116 (of millions)
    return sizes


def _numbers(column: pa.ChunkedArray) -> Rows:
    numbers: Rows = pc.fill_null(column, -1).to_numpy().astype(np.int64)
    return numbers
