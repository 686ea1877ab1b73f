"""A stream that passes the frozen image half once, as `align` takes shards that it cannot keep.

Each shard is read front to back. The features of its images go to the store, as those of other
pairs do (see `halves.py`), and its ids and captions into a table there. From then on the run reads
this table, whose pairs have no images any more.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import compress, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from protoclip.data import access
from protoclip.data.access import begun, is_url
from protoclip.data.pairs import (
    LOST,
    MAX_IMAGE_PIXELS,
    BadSample,
    ImageTextPairs,
    Pairs,
    SampleStream,
)
from protoclip.data.shards import shard_stem
from protoclip.data.stream import MAX_FAILED, Item, ShardStream, shard_facts
from protoclip.data.view import mixed_pairs
from protoclip.distributed.collectives import (
    raise_on_all_ranks,
    rank0_first,
    require_shared,
    world_size,
)
from protoclip.encode import store
from protoclip.encode.encoder import encode_images
from protoclip.encode.halves import WAIT, ImageHalf, opened, segment_facts
from protoclip.encode.parts import (
    FOLDERS,
    PARTS,
    Encode,
    Part,
    Show,
    claim,
    encode_missing,
    parts_of,
    read_note,
    read_part,
)
from protoclip.encode.rows import view_id
from protoclip.encode.store import Hashes, Segments, hash_ids
from protoclip.files import (
    checksum,
    file_checksum,
    locked,
    replacing,
    sealed,
    to_json,
    write_atomically,
)
from protoclip.terminal import without_secrets

TABLE, FOLDER = "pairs.arrow", "streams"
SCHEMA = pa.schema(
    {"sample_id": pa.string(), "image": pa.string(), "captions": pa.list_(pa.string())}
)
AHEAD = 8  # batches of a shard that are read while as many are encoded
PATIENCE = 3600.0  # seconds for another process at the end
WAY_OUT = "name another folder by align.features"


class PassedPairs(ImageTextPairs):
    """The pairs of a stream that has passed: ids, captions, and the keys of images in the store."""

    def __init__(self, table: pa.Table, *, name: str, key: str, notes: Sequence[str]) -> None:
        columns = {"caption_columns": ("captions",), "id_column": "sample_id"}
        super().__init__(table, name=name, table_key=key, notes=notes, **columns)  # type: ignore[arg-type]

    def image_key(self, row: int) -> str:
        return str(self.value("image", row))

    def image_file(self, row: int) -> None:
        return None

    def where(self, row: int) -> str:
        return self.name

    def encoded(self, row: int, part: slice | None = None) -> bytes:
        raise self._bad(row, "its image came with a stream, which is not kept")


def passed(
    stream: SampleStream,
    halves: Sequence[ImageHalf],
    root: Path,
    *,
    batch_size: int,
    max_bad_share: float,
    threads: int | None = None,
) -> Pairs:
    """The pairs of a stream of tar shards, or of a mixture of some. All ranks call it.

    Ranks share the shards; after an interruption the same call goes on with those that are missing.

    Args:
        halves: The image half for each view of an image.
        root: Folder of the store.
        max_bad_share: Share of the pairs, and of the shards, that may be bad.

    Raises:
        ValueError: The store cannot be used or is damaged, or too much is bad.
    """
    tables = []
    for source in stream.sources:
        assert isinstance(source, ShardStream)  # there are no other streams
        tables.append(
            _passed(
                source,
                halves,
                root,
                batch_size=batch_size,
                max_bad_share=max_bad_share,
                threads=threads,
            )
        )
    return tables[0] if len(tables) == 1 else mixed_pairs(tables)


def _passed(
    stream: ShardStream,
    halves: Sequence[ImageHalf],
    root: Path,
    *,
    batch_size: int,
    max_bad_share: float,
    threads: int | None,
) -> PassedPairs:
    settings = {
        "samples": len(stream.shards),  # a part is a shard
        "part_rows": 1,
        **rank0_first(stream.fingerprint),
        "captions": stream.caption_keys,
        "chosen": [stream.prefix, stream.chosen.keys] if stream.chosen else None,
        "halves": [half.folder.name for half in halves],
    }
    if (max_pixels := halves[0].encoder.max_pixels) != MAX_IMAGE_PIXELS:
        settings["max_pixels"] = max_pixels  # larger images are bad
    if remote := [without_secrets(shard) for shard in stream.shards if is_url(shard)]:
        # The fingerprint knows no more of them than their file names.
        settings["remote"] = checksum(to_json(remote).encode())
    working = root / FOLDER / checksum(to_json(settings).encode())
    if (pairs := _kept(working, stream, halves, max_bad_share)) is not None:  # disturbs nobody
        return pairs
    with ExitStack() as stack:
        lock = locked(working, way_out=WAY_OUT, wait=WAIT)
        rank0_first(lambda: stack.enter_context(lock))
        rank0_first(lambda: _drop_broken(working))
        if (pairs := _kept(working, stream, halves, max_bad_share, removes=True)) is not None:
            return pairs
        stored = [opened(half.folder, half.encoder.width) for half in halves]
        encode_missing(
            _until_out_of_patience(
                stream,
                partial(_encode_shard, stream, halves, stored, batch_size, threads),
                max_bad_share,
            ),
            stream.shards,
            lambda: claim(working, settings, name=working),
            working,
            settings,
            label="a shard",
        )
        for view, half in enumerate(halves):
            _add(half, view, working)
        rank0_first(lambda: _finish(stream, working, settings, max_bad_share))
        pairs = _kept(working, stream, halves, max_bad_share)
        assert pairs is not None
        return pairs


def _drop_broken(working: Path) -> None:
    """Shards that were not read to their end are read again, unless the run went on without."""
    if "rows" not in store.read_facts(working):
        for file in parts_of(working):
            if any(entry["reason"].endswith(LOST) for entry in read_note(file)["bad"]):
                file.unlink()


def _kept(
    working: Path,
    stream: ShardStream,
    halves: Sequence[ImageHalf],
    max_bad_share: float,
    *,
    removes: bool = False,
) -> PassedPairs | None:
    """The pairs, if all shards have passed and the store has their images. Collective.

    Where the store lacks images, what was written of the pass is removed if asked. Raises
    `ValueError` if more is bad than is allowed now.
    """

    def read() -> PassedPairs:
        facts = store.read_facts(working)
        for some, number, told in facts.get("left_out", []):
            _require_few(stream, some, number, told, max_bad_share)
        path = working / TABLE
        if not path.is_file() or file_checksum(path) != facts["table"]:
            raise ValueError(
                f"{path}: damaged (its checksum differs); delete {working}, and give the command "
                "again"
            )
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        # What says that a stream is read in order is not true of its table.
        notes = [note for note in stream.notes if not note.startswith("episodes.replacement")]
        return PassedPairs(
            table, name=stream.name, key=facts["table"], notes=[*notes, *facts["notes"]]
        )

    if not rank0_first(lambda: "rows" in store.read_facts(working)):
        return None
    require_shared(working / store.FACTS, by=FOLDERS)
    pairs = raise_on_all_ranks(read)
    stored = [opened(half.folder, half.encoder.width) for half in halves]

    def has_images() -> bool:
        shards = pairs.table.column("image").chunks  # one at a time, since names take memory
        for view, of_view in enumerate(stored):
            names = (view_id(name, view) for shard in shards for name in shard.to_pylist())
            if (of_view.find(hash_ids(names)) < 0).any():
                if removes:
                    shutil.rmtree(working)  # they were deleted since
                return False
        return True

    return pairs if rank0_first(has_images) else None


def _key_of(shard: str) -> str:
    """Names a shard as it is now, wherever it lies.

    What is behind URLs, or a command gives, is taken to stay.
    """
    facts = [shard] if is_url(shard) else [shard_stem(shard), *shard_facts(shard, is_read=True)]
    return checksum(to_json(facts).encode())


def _until_out_of_patience(stream: ShardStream, encode: Encode, max_bad_share: float) -> Encode:
    """`encode`, which ends the pass after as many lost shards in a row as end a stream.

    Only remote ones count: then it is the network, or the store. The same command reads them again.
    It reads no others then, so it counts only those that are neighbours in the rank's share of all.
    Those that the store does not have end nothing that `max_bad_share` would not refuse in the end.
    """
    failed, lost = 0, 0.0  # shards in a row, and the seconds that they took
    last = 0  # the number of the last of them

    def encode_one(items: Sequence[Any], show: Show) -> Part:
        nonlocal failed, lost, last
        number, began = items[0], time.monotonic()
        shard = stream.shards[number]
        part = encode(items, show)
        reasons = [entry["reason"] for entry in part.bad if entry["reason"].endswith(LOST)]
        if part.ids or not reasons or not is_url(shard):
            failed, lost = 0, 0.0
            return part
        if number != last + world_size():
            failed, lost = 0, 0.0
        failed, lost, last = failed + 1, lost + time.monotonic() - began, number
        is_allowed = reasons[-1].startswith(access.MISSING) and not _is_too_much(
            failed, len(stream.shards), max_bad_share
        )
        if (failed >= MAX_FAILED and not is_allowed) or lost > access.PATIENCE_SECONDS:
            raise ValueError(
                f"{stream.name}: {failed} shards in a row without a sample that can be used; the "
                f"last is {without_secrets(shard)}: {reasons[-1]}; {access.GO_ON}"
            )
        return part

    return encode_one


def _is_too_much(bad: int, number: int, max_bad_share: float) -> bool:
    return bad > max_bad_share * number


def _encode_shard(
    stream: ShardStream,
    halves: Sequence[ImageHalf],
    stored: Sequence[Segments],
    batch_size: int,
    threads: int | None,
    items: Sequence[Any],
    show: Show,
) -> Part:
    """The ids and captions of a shard, and the features of images that the store lacks."""
    shard = stream.shards[items[0]]
    key = _key_of(shard)
    captions: dict[str, tuple[str, ...]] = {}
    bad: list[dict[str, str]] = []
    new: list[str] = []
    rows = [[torch.zeros(0, half.encoder.width)] for half in halves]
    for chunk in _chunks(stream.read(shard), AHEAD * batch_size):
        bad += [vars(item) for item in chunk if isinstance(item, BadSample)]
        samples = {
            f"{key} {item.sample_id}": item for item in chunk if not isinstance(item, BadSample)
        }
        known = np.ones(len(samples), bool)
        for view, of in enumerate(stored):
            known &= of.find(hash_ids(view_id(name, view) for name in samples)) >= 0
        unknown = [name for name, is_known in zip(samples, known, strict=True) if not is_known]
        for view, half in enumerate(halves):
            named = [replace(samples[n], sample_id=view_id(n, view)) for n in unknown]
            ids, features, wrong = encode_images(
                half.encoder, stream, named, batch_size, lambda done: None, threads
            )
            rows[view].append(features)
            if not view:  # what cannot be decoded, none of its views can
                unknown = ids
                bad += [
                    entry | {"sample_id": samples[entry["sample_id"]].sample_id} for entry in wrong
                ]
                for entry in wrong:
                    del samples[entry["sample_id"]]
        new += unknown
        captions |= {sample.sample_id: sample.captions for sample in samples.values()}
    arrays = {
        f"view{view}": store.to_half(torch.cat(of_view).numpy(), new, name="the image half")
        for view, of_view in enumerate(rows)
    }
    values = {"captions": [*captions.values()], "new": new, "shard": key}
    return Part(ids=[*captions], bad=bad, arrays=arrays, values=values)


def _chunks(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Items some at a time, which a thread reads while those before are used."""

    def following() -> list[Item]:
        return [*islice(items, size)]

    coming = begun(following, name="protoclip-shard")
    while chunk := coming.result():
        coming = begun(following, name="protoclip-shard")
        yield chunk


def _add(half: ImageHalf, view: int, working: Path) -> None:
    """Add the features in the parts to the store of a half, but for those it has. Collective."""

    def write(stored: Segments) -> None:
        files = parts_of(working)
        parts = [hash_ids(view_id(name, view) for name in read_note(file)["new"]) for file in files]
        lacking = [stored.find(part) < 0 for part in parts]
        new = np.concatenate([part[lacks] for part, lacks in zip(parts, lacking, strict=True)])
        if not len(new):
            return
        facts = segment_facts(half.encoder, new)
        out = half.folder / facts["ids"]
        claim(out, facts, name=out)
        blocks = (
            read_part(file)[1][f"view{view}"][lacks]
            for file, lacks in zip(files, lacking, strict=True)
            if lacks.any()
        )
        store.write_folder(out, new, blocks, facts)
        shutil.rmtree(out / PARTS, ignore_errors=True)

    with ExitStack() as stack:
        # All is encoded, so a run over other data that encodes with this half is waited for.
        lock = locked(half.folder, way_out=WAY_OUT, wait=PATIENCE)
        rank0_first(lambda: stack.enter_context(lock))
        stored = opened(half.folder, half.encoder.width)
        rank0_first(lambda: write(stored))


def _require_few(
    stream: ShardStream, some: int, number: int, told: str, max_bad_share: float
) -> None:
    if _is_too_much(some, number, max_bad_share):
        raise ValueError(
            f"{stream.name}: {told}; that is more than data.max_bad_share ({max_bad_share:g}) "
            "allows; mend or leave out what is bad, or raise it"
        )


def _finish(
    stream: ShardStream, working: Path, settings: dict[str, Any], max_bad_share: float
) -> None:
    """Write the table of all parts, unless too much of the stream is bad."""
    files = parts_of(working)  # one is in memory at a time
    bad, parts = list[BadSample](), list[Hashes]()
    for note in map(read_note, files):
        bad += [BadSample(**entry) for entry in note["bad"]]
        parts.append(hash_ids(note["ids"]))
    hashes = np.concatenate(parts)
    is_new = np.zeros(len(hashes), bool)
    is_new[np.unique(hashes, return_index=True)[1]] = True
    of_parts = np.split(is_new, np.cumsum([len(part) for part in parts])[:-1])
    for shard, file, new in zip(stream.shards, files, of_parts, strict=True):
        again = [] if new.all() else [*compress(read_note(file)["ids"], ~new)]
        bad += [BadSample(each, shard, "the same sample id as in a shard before") for each in again]
    broken = [each for each in bad if each.reason.endswith(LOST)]
    good, left_out = int(is_new.sum()), list[tuple[int, int, str]]()
    for some, number, what in (
        (bad, good + len(bad), "pairs cannot be used"),
        (broken, len(files), "shards were not read to their end"),
    ):
        if not some:
            continue
        told = f"{len(some):,} of {number:,} {what}, such as {some[0]}"
        _require_few(stream, len(some), number, told, max_bad_share)
        left_out.append((len(some), number, told))
    if not good:
        raise ValueError(f"{stream.name}: holds no pair")
    path = working / TABLE
    with replacing(path) as temporary, pa.ipc.new_file(str(temporary), SCHEMA) as table:
        for note, new in zip(map(read_note, files), of_parts, strict=True):
            ids, captions = ([*compress(note[name], new)] for name in ("ids", "captions"))
            images = [f"{note['shard']} {sample_id}" for sample_id in ids]
            columns = {"sample_id": ids, "image": images, "captions": captions}
            table.write_table(pa.table(columns, schema=SCHEMA))
    said = [f"{stream.name}: {told}; they are left out" for *_, told in left_out]
    facts = {**settings, "rows": good, "notes": said, "left_out": left_out}
    facts["table"] = file_checksum(path)
    write_atomically(working / store.FACTS, to_json(sealed(facts)), durable=True)
    shutil.rmtree(working / PARTS, ignore_errors=True)
