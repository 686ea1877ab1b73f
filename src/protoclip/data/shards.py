"""Tar shards by name, and local ones as pairs that are read in any order.

Each shard is indexed once: where its pictures are, their captions and ids. A picture is then a
range of bytes of the tar, so nothing is unpacked. A shard that is added or changed is indexed
alone; the others' rows are copied from their own indexes into that of the whole set.
"""

import glob
import io
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from braceexpand import braceexpand

from protoclip.data.access import (
    NOTHING_MORE,
    Access,
    is_url,
    list_urls,
    open_local,
    reason_of,
    require_allowed,
)
from protoclip.data.index import (
    ArrowIndex,
    build_index,
    cache_folder,
    digest,
    fingerprint,
)
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.tars import (
    COMPRESSED,
    MAX_MEMBER_BYTES,
    TEXTS,
    ShardFault,
    group_id,
    read_groups,
    read_members,
    sample_facts,
    shard_stem,
    split_name,
)
from protoclip.progress import Progress

# Part of every index's key: an index of another form is built again.
INDEX_FORM = "tar shards, 1"
# Fewer new shards than this are indexed in this process.
PARALLEL_FROM = 8
ROWS = pa.schema(
    [
        ("sample_id", pa.string()),
        ("caption", pa.list_(pa.binary())),  # as stored; decoded, and refused, on access
        ("offset", pa.int64()),  # both null where there is no picture
        ("size", pa.int64()),
    ]
)
SET_ROWS = ROWS.append(pa.field("shard", pa.dictionary(pa.int32(), pa.string())))


def expand_shards(pattern: str | Sequence[str], access: Access = NOTHING_MORE) -> list[str]:
    """The shards that a pattern, or each of several, names: sorted, each once.

    Args:
        pattern: A path or URL with `{00000..00331}` for a range, `{a,b}` for alternatives, and `*`
            where the files can be listed (not of a web server); a folder or a URL that ends in
            `/`, for its `*.tar`; or `pipe:COMMAND`, in which braces work too.
        access: What the user allows.

    Raises:
        ValueError: Nothing matches, a local file is missing, or a location is not allowed.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    found = sorted({shard for each in patterns for shard in _expand(each, access)})
    if not found:
        raise ValueError(f"{', '.join(patterns) or 'no pattern'}: no tar shard matches")
    return found


def _expand(pattern: str, access: Access) -> Iterator[str]:
    if Path(pattern).exists():
        names = [pattern]
    else:
        try:
            names = list(braceexpand(pattern))
        except ValueError:
            raise ValueError(f"{pattern}: the braces do not pair up") from None
    for name in names:
        try:
            require_allowed(name, access)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if name.startswith("pipe:"):
            yield name
        elif is_url(name):
            yield from _listed(name, access) if "*" in name or name.endswith("/") else [name]
        else:
            path = Path(name).expanduser()
            if path.is_dir():
                yield from map(str, path.glob("*.tar"))
            elif path.exists():
                yield str(path)
            elif re.search(r"[*?[]", name):
                yield from glob.glob(str(path))  # noqa: PTH207 (an absolute pattern)
            else:
                raise ValueError(f"{name}: no such file")


def _listed(pattern: str, access: Access) -> list[str]:
    try:
        return list_urls(f"{pattern}*.tar" if pattern.endswith("/") else pattern, access)
    except Exception as error:  # every file system has errors of its own
        raise ValueError(f"{pattern}: cannot be listed ({reason_of(error)})") from None


def check_stems(shards: Sequence[str]) -> None:
    """Raises `ValueError` where two shards would give their samples the same ids."""
    known: dict[str, str] = {}
    for shard in shards:
        other = known.setdefault(shard_stem(shard), shard)
        if other != shard:
            raise ValueError(
                f"{shard}: has the file name of {other}, and sample ids start with it; rename "
                "one, or list them as two [[data.sources]], each with a name of its own"
            )


def open_shards(
    pattern: str | Sequence[str],
    *,
    caption_key: str | Sequence[str] | None = None,
    name: str | None = None,
    cache: Path | None = None,
) -> ImageTextPairs:
    """Local tar shards as pairs in any order, indexed first where they are new.

    What an index noted, such as shards that are cut short, is in `.index.facts["notes"]`.

    Args:
        pattern: See `expand_shards`.
        caption_key: Key of the `.json` members that holds the caption, or several; the `.txt` if
            unset, or without one the first of `tars.CAPTION_KEYS` there is.
        name: What messages call the source; the pattern if unset.
        cache: Folder for indexes; the user's cache folder if unset.

    Raises:
        ValueError: A shard is missing, remote, compressed or no tar; two samples share an id;
            there is no sample.
    """
    # Commands are refused because they are remote, whether or not they are allowed.
    shards = expand_shards(pattern, Access(commands=True))
    remote = next((s for s in shards if is_url(s) or s.startswith("pipe:")), None)
    if remote is not None:
        raise ValueError(f"{remote}: only local shards can be indexed; stream it, or copy it here")
    check_stems(shards)
    index = index_shards(shards, caption_keys=key_list(caption_key), folder=cache)
    named = name or (pattern if isinstance(pattern, str) else f"{shards[0]} and others")
    return ImageTextPairs(index, name=named)


def key_list(caption_key: str | Sequence[str] | None) -> list[str] | None:
    return [caption_key] if isinstance(caption_key, str) else list(caption_key or []) or None


def index_shards(
    shards: Sequence[str], *, caption_keys: Sequence[str] | None, folder: Path | None
) -> ArrowIndex:
    """The index of a set of local shards, built from one index a shard."""
    paths = [str(Path(shard).resolve()) for shard in shards]
    with ThreadPoolExecutor(16) as pool:  # waits for disks
        prints = list(pool.map(fingerprint, paths))
    settings = {"form": INDEX_FORM, "caption_keys": caption_keys}
    keys = [digest({**settings, "shard": found}) for found in prints]
    whole = digest({**settings, "shards": keys})
    build = partial(_combine, paths, keys, caption_keys, folder)
    return build_index(whole, SET_ROWS, build, folder=folder)


def _combine(
    paths: list[str],
    keys: list[str],
    caption_keys: Sequence[str] | None,
    folder: Path | None,
    facts: dict[str, Any],
) -> Iterator[pa.RecordBatch]:
    """The rows of every shard, with the shard's path beside them."""
    place = folder or cache_folder() / "index"
    index_one = partial(index_shard, caption_keys=caption_keys, folder=folder)
    pairs = list(zip(paths, keys, strict=True))
    missing = [pair for pair in pairs if not (place / f"{pair[1]}.arrow").exists()]
    if missing:
        _index_all(index_one, missing)
    found: list[dict[str, Any]] = []
    # A name is stored once, and a row has its number. One file is opened at a time: there may be
    # more shards than a process may have open files.
    names = pa.array(paths, pa.string())
    for number, pair in enumerate(pairs):
        index = index_one(pair)
        found.append({"shard": pair[0], **index.facts})
        for batch in index.table.to_batches():
            rows = pa.array(np.full(len(batch), number, dtype=np.int32))
            shard = pa.DictionaryArray.from_arrays(rows, names)
            yield pa.RecordBatch.from_arrays([*batch.columns, shard], schema=SET_ROWS)
    if any(each["named"] for each in found):
        _refuse_repeated(
            paths[0], lambda: (index_one(pair).table["sample_id"].to_pylist() for pair in pairs)
        )
    facts["notes"] = _notes(found)


def _index_all(
    index_one: Callable[[tuple[str, str]], ArrowIndex], missing: list[tuple[str, str]]
) -> None:
    """Index shards, on all cores where there are many."""
    if len(missing) < PARALLEL_FROM:
        for pair in missing:
            index_one(pair)
        return
    progress = Progress(f"Indexing {len(missing)} shards", len(missing))
    pool: Executor
    if "fork" in multiprocessing.get_all_start_methods():
        # Forked, as a loader's workers are: a fresh process would first import PyTorch.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        pool = ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("fork"))
    else:
        pool = ThreadPoolExecutor()
    with pool:
        for done, _ in enumerate(pool.map(index_one, missing), 1):
            progress.update(done)


def index_shard(
    pair: tuple[str, str], *, caption_keys: Sequence[str] | None, folder: Path | None
) -> ArrowIndex:
    """The index of one shard, given its path and the key of its index."""
    path, key = pair

    def build(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        with open_local(path) as file:
            if any(file.peek(6).startswith(magic) for magic in COMPRESSED):
                raise ValueError(f"{path}: is compressed; stream it, or unpack it once (gunzip)")
            try:
                batch = _rows(path, file, caption_keys, facts)
            except ShardFault as fault:
                raise ValueError(f"{path}: {fault}") from None
        _refuse_repeated(path, lambda: [batch["sample_id"].to_pylist()])
        yield batch

    return build_index(key, ROWS, build, folder=folder)


def _rows(
    path: str, file: io.BufferedIOBase, caption_keys: Sequence[str] | None, facts: dict[str, Any]
) -> pa.RecordBatch:
    stem, size = shard_stem(path), Path(path).stat().st_size
    facts.update(named=0, fault="", without_image=0, without_caption=0)
    rows: list[tuple[str, list[bytes], int | None, int | None]] = []
    for group in read_groups(read_members(file, _is_text, size=size)):
        if group.fault:
            facts["fault"] = f"{group.fault} after {len(rows)} samples"
            break
        sample_id, captions = sample_facts(group, stem, caption_keys)
        image = group.image if group.image and group.image.size <= MAX_MEMBER_BYTES else None
        facts["named"] += sample_id != group_id(group, stem)
        facts["without_image"] += image is None
        facts["without_caption"] += not any(text.strip() for text in captions)
        place = (None, None) if image is None else (image.offset, image.size)
        rows.append((sample_id, captions, *place))
    arrays = [pa.array([row[i] for row in rows], f.type) for i, f in enumerate(ROWS)]
    return pa.RecordBatch.from_arrays(arrays, schema=ROWS)


def _is_text(name: str) -> bool:
    return split_name(name)[1] in TEXTS


def _refuse_repeated(where: str, sample_ids: Callable[[], Iterable[list[str]]]) -> None:
    """Raises `ValueError` where ids are not unique; compares hashes, for their little memory."""
    hashes = [np.fromiter(map(hash, some), np.int64, len(some)) for some in sample_ids()]
    values, counts = np.unique(np.concatenate([*hashes, np.empty(0, np.int64)]), return_counts=True)
    suspects = set(values[counts > 1].tolist())
    if not suspects:
        return
    found = Counter(each for some in sample_ids() for each in some if hash(each) in suspects)
    repeated = [each for each, count in found.items() if count > 1]
    if repeated:
        raise ValueError(
            f"{where}: {len(repeated)} sample ids come more than once, such as '{repeated[0]}'; "
            "keys must differ, and the files of a sample follow each other (tar --sort=name)"
        )


def _notes(found: list[dict[str, Any]]) -> list[str]:
    """What a user should know of a set of shards."""
    notes = []
    for count, what in (("without_image", "picture"), ("without_caption", "caption")):
        if number := sum(each[count] for each in found):
            notes.append(f"{number} samples without a {what}")
    if cut := [each for each in found if each["fault"]]:
        notes.append(
            f"{len(cut)} shards broken off, such as {cut[0]['shard']}: {cut[0]['fault']}; what "
            "follows in them is lost, at least one sample each"
        )
    return notes
