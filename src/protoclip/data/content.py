"""Fingerprints: facts about a source, which a run that goes on compares with those it began with.

A source's `fingerprint` has hashes of its columns, by `hash_of`; here is also how facts are
compared.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from protoclip.files import checksum

Facts = dict[str, Any]
Parts = tuple[bytes, bytes, memoryview | bytes]  # see `text_parts`
FORM = 1  # changes when rows are hashed in another way
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


def content(samples: Any, *, encoded: Any = None) -> list[Facts]:
    """The fingerprint of each source of the samples, and which of their rows are left out.

    Args:
        encoded: What is left of the samples where frozen encoders encoded all of them.
    """
    facts = [source.fingerprint() for source in samples.sources]
    if len(facts) > 1:  # sample ids begin with the name
        facts = [{"name": s.name, **f} for s, f in zip(samples.sources, facts, strict=True)]
    for name, pairs in (("held_out", samples), ("encoded", encoded)):
        if pairs is not None:  # no fact at all would mean that it is not known
            left_out = pairs.left_out.astype("<i8").tobytes()
            facts[0][name] = checksum(left_out) if left_out else ""
    return facts


def difference(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str | None:
    """What differs, in a few words; None if nothing does. A fact that is unknown equals any."""
    if len(before) != len(now):
        return f"{len(before)} sources before, {len(now)} now"
    for number, (old, new) in enumerate(zip(before, now, strict=True)):
        owner = f" of '{new.get('name', number)}'" if len(now) > 1 else ""
        if is_stream(old) and "rows" in new:
            return f"a stream{owner} before, pairs in any order now; set data.read = streaming"
        if "rows" in old and is_stream(new):
            return f"pairs in any order{owner} before, a stream now"
        for name, word in WORDS.items():
            one, other = old.get(name), new.get(name)
            if one is None or other is None or one == other:
                continue
            if name == "shards" and one == new.get("names"):  # up to version 1.0.0, of a store
                continue
            if name == "sample" and all(a == b for a, b in zip(one, other, strict=True) if a and b):
                continue
            if name in ("name", "rows"):
                return f"{word}{owner}: {one} before, {other} now"
            return f"other {word}{owner}"
    return None


def is_stream(facts: Mapping[str, Any]) -> bool:
    return "shards" in facts or "names" in facts


def flat_texts(values: pa.Array) -> tuple[pa.Array | None, pa.LargeBinaryArray]:
    """How many texts each cell holds, if cells are lists; and the texts, as bytes."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    counts = None
    if "list" in str(values.type).partition("<")[0]:
        counts = pc.list_value_length(values)
        values = values.flatten()
    if not ("binary" in str(values.type) or pa.types.is_null(values.type)):
        values = values.cast(pa.large_string())  # whole numbers, too
    return counts, values.cast(pa.large_binary())


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
