"""What a source holds, in a few facts: a run that goes on compares them with those it began with.

Ids, captions and images' names or sizes are hashed whole, in the order of the rows, which decides
what a step sees: once for a table, since that takes seconds at ten million rows. Of the images
themselves a few are read, each time.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from protoclip.data.access import digest, is_url
from protoclip.data.index import index_folder
from protoclip.data.pairs import (
    BadSample,
    ImageTextPairs,
    Pairs,
    SampleStream,
    flat_texts,
    image_fields,
    lengths_of,
)
from protoclip.data.sampler import evenly_spaced
from protoclip.data.shards import shard_stem
from protoclip.data.stream import ShardStream
from protoclip.files import (
    checksum,
    open_local,
    read_sealed,
    sealed,
    to_json,
    write_atomically,
)

Facts = dict[str, Any]
Parts = tuple[bytes, bytes, memoryview | bytes]  # see `text_parts`
FORM = 1  # changes when rows are hashed in another way
IMAGES = 64  # of each source that are read
SHARDS, BLOCK = 1000, 1 << 14  # of each stream that are read, and how many bytes of a part
# What each fact is called in messages, the most telling first. `sample` is one image each.
WORDS = {
    "name": "name",
    "rows": "number of rows",
    "names": "shards",  # by file name, wherever they lie
    "shards": "shards",
    "ids": "sample ids, or their order",
    "captions": "captions",
    "images": "images",
    "classes": "classes",
    "sample": "images",
    "held_out": "pairs that are held out, as by another run.guard or run.evaluate_every",
    "encoded": "pairs whose images can be read",
    "features": "features",
    "weights": "weights",
}


def content(
    samples: Pairs | SampleStream, *, encoded: Pairs | SampleStream | None = None
) -> list[Facts]:
    """The facts of each source of the samples, as JSON values.

    What is behind URLs is taken to stay, and of local shards of a stream a few parts are compared.

    Args:
        encoded: What is left of the samples where frozen halves encoded all of them.
    """
    sources = samples.sources
    facts = [of_pairs(s) if isinstance(s, ImageTextPairs) else of_stream(s) for s in sources]
    if len(facts) > 1:  # sample ids begin with the name
        facts = [{"name": s.name, **of_one} for s, of_one in zip(sources, facts, strict=True)]
    for name, pairs in (("held_out", samples), ("encoded", encoded)):
        if pairs is not None:  # no fact at all would mean that it is not known
            left_out = pairs.left_out.astype("<i8").tobytes() if isinstance(pairs, Pairs) else b""
            facts[0][name] = checksum(left_out) if left_out else ""
    return facts


def difference(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str | None:
    """What differs, in a few words; None if nothing does. A fact that is unknown equals any."""
    if len(before) != len(now):
        return f"{len(before)} sources before, {len(now)} now"
    for number, (old, new) in enumerate(zip(before, now, strict=True)):
        of = f" of '{new.get('name', number)}'" if len(now) > 1 else ""
        if is_stream(old) and "rows" in new:
            return f"a stream{of} before, pairs in any order now; set data.read = streaming"
        if "rows" in old and is_stream(new):
            return f"pairs in any order{of} before, a stream now"
        for name, word in WORDS.items():
            one, other = old.get(name), new.get(name)
            if one is None or other is None or one == other:
                continue
            if name == "shards" and one == new.get("names"):  # up to version 1.0.0, of a store
                continue
            if name == "sample" and all(a == b for a, b in zip(one, other, strict=True) if a and b):
                continue
            if name in ("name", "rows"):
                return f"{word}{of}: {one} before, {other} now"
            return f"other {word}{of}"
    return None


def is_stream(facts: Mapping[str, Any]) -> bool:
    return "shards" in facts or "names" in facts


def facts_that_may_move(facts: Facts, source: Any) -> Facts:
    """A source's facts, less what differs when shards move between a disk and a store.

    What is in a store is known by the names of its shards alone.
    """
    if not isinstance(source, ShardStream):
        return facts
    names = hash_of_shards([[shard_stem(shard), []] for shard in source.shards])
    is_on_disk = not any(map(is_url, source.shards))
    kept = {name: fact for name, fact in facts.items() if is_on_disk or name != "shards"}
    return {**kept, "names": names}


def of_pairs(pairs: ImageTextPairs) -> Facts:
    """The facts of pairs in a table."""
    rows = evenly_spaced(len(pairs), min(IMAGES, len(pairs)), seed=0)
    return {**facts_of_rows(pairs), "sample": [image_hash(pairs, row) for row in rows]}


def facts_of_rows(pairs: ImageTextPairs) -> Facts:
    """The facts of all rows; of a table that has a key they are kept beside its index."""
    if not pairs.table_key:
        return hash_rows(pairs)
    named = "" if pairs.id_column else pairs.name  # of which ids are made that no column has
    key = {"content": FORM, "rows": pairs.rows_key, "name": named, "class": pairs.class_column}
    path = index_folder() / f"{digest(key)}.json"
    with suppress(OSError, ValueError):
        return read_sealed(path)
    facts = hash_rows(pairs)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_json(sealed(facts)))
    return facts


def hash_rows(pairs: ImageTextPairs) -> Facts:
    table = pairs.checked

    def hash_columns(*names: str) -> str:
        return hash_of([pairs.kept(table.column(name)) for name in names])

    return {
        "rows": len(pairs),
        "ids": hash_columns(pairs.id_column) if pairs.id_column else f"{pairs.name}/row",
        "captions": hash_columns(*pairs.caption_columns),
        # Shards may lie anywhere.
        "images": hash_columns("size") if pairs.in_ranges else hash_images(pairs, table),
        **({} if pairs.class_column is None else {"classes": hash_columns(pairs.class_column)}),
    }


def hash_images(pairs: ImageTextPairs, table: pa.Table) -> str:
    """Of images in files their names count, of others their number of bytes: none is read."""
    encoded, names = image_fields(table.column(pairs.image_column))
    if encoded is None:
        return hash_of([pairs.kept(names)])
    lengths = lengths_of(encoded)
    if names is not None:
        lengths = pc.coalesce(lengths, lengths_of(names))
    return hash_of([pairs.kept(lengths)], length_parts)


def image_hash(pairs: ImageTextPairs, row: int) -> str:
    """Of an image as it is stored; nothing where it is behind a URL, or cannot be read now."""
    try:
        return "" if is_url(pairs.where(row)) else checksum(pairs.encoded(row))
    except BadSample:
        return ""


def repeated_images(pairs: ImageTextPairs, rows: Iterable[int]) -> int:
    """How many of the rows have the image of another one, which counts once.

    Images in files, or behind URLs, are compared by name, and others by their bytes, of which
    little is read: all of an image only where another one begins as it does.
    """

    def beginning(row: int) -> str | bytes | None:
        if (name := pairs.image_file(row)) is not None:
            return name
        if pairs.in_ranges and is_url(pairs.where(row)):
            return None
        return pairs.encoded(row, slice(0, BLOCK))

    def whole(row: int) -> str | bytes | None:
        return pairs.image_file(row) or checksum(pairs.encoded(row))

    alike, groups = [*rows], 0
    for look in (beginning, whole):
        equal: dict[Any, list[int]] = {}
        for row in alike:
            with suppress(BadSample):
                if (key := look(row)) is not None:
                    equal.setdefault(key, []).append(row)
        kept = [same for same in equal.values() if len(same) > 1]
        alike, groups = [row for same in kept for row in same], len(kept)
    return len(alike) - groups


def of_stream(stream: Any) -> Facts:
    """The facts of a stream: its shards."""
    if not isinstance(stream, ShardStream):
        return {}
    number = len(stream.shards)
    read = {stream.shards[n] for n in evenly_spaced(number, min(SHARDS, number), 0)}
    shards = [[shard_stem(shard), shard_facts(shard, shard in read)] for shard in stream.shards]
    return {"shards": hash_of_shards(shards)}


def hash_of_shards(shards: Sequence[Sequence[Any]]) -> str:
    """A hash of the name of each shard, and of what `shard_facts` says of it."""
    return checksum(to_json(shards).encode())


def shard_facts(path: str, is_read: bool) -> list[Any]:
    """Bytes of a local shard, and a hash of both ends and the middle; nothing of another."""
    try:
        with open_local(path) as file:
            size = os.fstat(file.fileno()).st_size
            parts = b""
            for start in (0, size // 2, max(0, size - BLOCK)) if is_read else ():
                file.seek(start)
                parts += file.read(BLOCK)
    except (OSError, ValueError):
        return []
    return [size, checksum(parts)]


def text_parts(values: pa.Array) -> Parts:
    """The lengths of lists, the lengths of texts, and the texts: each goes on in the next chunk."""
    counts, texts = flat_texts(values)
    many = b"" if counts is None else numbers(counts)
    return many, numbers(pc.binary_length(texts)), bytes_of(texts)


def length_parts(lengths: pa.Array) -> Parts:
    """The same of encoded images of these lengths; their bytes do not count."""
    return b"", numbers(lengths), b""


def hash_of(
    columns: Sequence[pa.ChunkedArray], parts_of: Callable[[pa.Array], Parts] = text_parts
) -> str:
    """A hash of columns' values in order, however they are stored and divided into chunks."""
    whole = hashlib.blake2b(digest_size=16)
    for column in columns:
        kinds = [hashlib.blake2b(digest_size=16) for _ in range(3)]
        for chunk in column.iterchunks():
            for kind, part in zip(kinds, parts_of(chunk), strict=True):
                kind.update(part)
        for kind in kinds:
            whole.update(kind.digest())
    return whole.hexdigest()


def numbers(values: pa.Array) -> bytes:
    """Whole numbers as bytes; -1 for null."""
    whole: bytes = pc.fill_null(values, -1).to_numpy(zero_copy_only=False).astype("<i4").tobytes()
    return whole


def bytes_of(values: pa.LargeBinaryArray) -> memoryview | bytes:
    """The bytes of all values, one after the other."""
    _, offsets, data = values.buffers()
    if data is None or not len(values):
        return b""
    first, last = np.frombuffer(offsets, np.int64)[[values.offset, values.offset + len(values)]]
    return memoryview(data)[first:last]
