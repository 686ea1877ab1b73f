"""A stream that passes a frozen encoder once, as shards are read that no disk can keep.

Each shard is read front to back. The features of its images go to a store, and its ids and captions
into a table. Whoever asked reads this table then, whose pairs have no images any more.
"""

import json
import shutil
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from protoclip.data.access import GO_ON, MISSING, is_url
from protoclip.data.pairs import LOST, BadSample, ImageTextPairs, Pairs, Sample, SampleStream
from protoclip.data.shards import MAX_FAILED, Item, ShardStream, shard_facts, shard_stem
from protoclip.data.sources import mix_pairs
from protoclip.distributed.collectives import (
    raise_on_all_ranks,
    rank,
    rank0_first,
    require_shared,
    world_size,
)
from protoclip.encode.encoder import Encoder
from protoclip.encode.engine import accelerate
from protoclip.encode.run import Prepared, Unit, encode_into, prepare_sample, read_ahead
from protoclip.encode.store import Store, hash_ids
from protoclip.files import (
    checksum,
    file_checksum,
    lock_path,
    read_sealed,
    replacing,
    seal,
    to_json,
    write_atomically,
)
from protoclip.progress import Progress
from protoclip.terminal import without_secrets

FOLDER, NOTES, TABLE, FACTS, BAD = "streams", "shards", "pairs.arrow", "facts.json", "bad.jsonl"
SCHEMA = pa.schema(
    {"sample_id": pa.string(), "image": pa.string(), "captions": pa.list_(pa.string())}
)
USUAL_SHARD = 1000  # samples of a shard, where nothing says how many it has
WAIT = 3600.0  # seconds for another process that reads the stream or adds to the store


class StreamPairs(ImageTextPairs):
    """The pairs of a stream that has passed: ids, captions, and the keys of images in the store."""

    def __init__(self, folder: Path, stream: ShardStream) -> None:
        facts, path = read_sealed(folder / FACTS), folder / TABLE
        if not path.is_file() or file_checksum(path) != facts["table"]:
            raise ValueError(
                f"{path}: damaged (its checksum differs); delete {folder}, and give the command "
                "again"
            )
        super().__init__(
            pa.ipc.open_file(pa.memory_map(str(path))).read_all(),
            name=stream.name,
            table_key=facts["table"],
            notes=[*stream.notes, *facts["notes"]],
            caption_columns=("captions",),
            id_column="sample_id",
            needs_captions=stream.needs_captions,
        )
        self.bad_file = folder / BAD

    def image_key(self, row: int) -> str:
        return str(self._cell("image", row))

    def image_name(self, row: int) -> str | None:
        return None

    def where(self, row: int) -> str:
        return self.name

    def read_encoded(self, row: int, part: slice | None = None) -> bytes:
        raise self._bad(row, "its image came with a stream, which is not kept")


def read_skipped(pairs: Pairs) -> list[dict[str, str]]:
    """The samples of streams that could not be read, with their ids as these pairs have them."""
    skipped = []
    for source in pairs.sources:
        if isinstance(source, StreamPairs) and source.bad_file.is_file():
            for entry in map(json.loads, source.bad_file.read_text("utf-8").splitlines()):
                skipped.append({**entry, "sample_id": source.prefix + entry["sample_id"]})
    return skipped


def encode_stream(
    stream: SampleStream,
    root: Path,
    encoder: Encoder,
    store: Store,
    *,
    batch_size: int,
    max_bad_share: float = 1.0,
    threads: int | None = None,
    number: int | None = None,
) -> Pairs:
    """The pairs of a stream of tar shards, or of a mixture of some. All ranks call it.

    Ranks share the shards; after an interruption the same call goes on with those that are missing.

    Args:
        root: Folder of the tables.
        encoder: What encodes the images; one of texts leaves them unread.
        store: Where features of images go; for captions alone one in memory.
        max_bad_share: Share of the pairs, and of the shards, that may be bad.
        number: How many samples of each source are read; unset, all.
    """

    tables = list[ImageTextPairs]()
    for source in stream.sources:
        facts = {
            "format": 2,
            **rank0_first(source.fingerprint),
            "number": len(source.shards),
            "captions": source.caption_keys,
            "chosen": [source.prefix, source.chosen.keys] if source.chosen else None,
            "half": store.folder and store.folder.name,
            **({} if number is None else {"samples": number}),
        }
        if remote := [without_secrets(shard) for shard in source.shards if is_url(shard)]:
            # The fingerprint knows no more of them than their file names.
            facts["remote"] = checksum(to_json(remote).encode())
        folder = root / FOLDER / checksum(to_json(facts).encode())
        with ExitStack() as stack:
            if (pairs := open_table(folder, source, store)) is None:  # reading disturbs nobody
                for place in filter(None, (folder, store.folder)):
                    lock = lock_path(place, way_out=f"name another by {store.setting}", wait=WAIT)
                    rank0_first(partial(stack.enter_context, lock))
                pairs = open_table(folder, source, store)
            if pairs is None:
                read_shards(
                    source, folder, encoder, store, batch_size, max_bad_share, threads, number
                )
                rank0_first(partial(write_table, source, folder, max_bad_share, number))
                pairs = open_table(folder, source, store)
        assert pairs is not None
        tables.append(pairs)
    return tables[0] if len(tables) == 1 else mix_pairs(tables)


def open_table(folder: Path, stream: ShardStream, store: Store) -> StreamPairs | None:
    """The pairs, if all shards have passed and the store has their images. Collective."""
    if not rank0_first((folder / FACTS).is_file):
        return None
    require_shared(folder / FACTS, by=store.setting)
    pairs = raise_on_all_ranks(lambda: StreamPairs(folder, stream))
    parts = pairs.table.column("image").chunks if store.folder else []
    # Names take memory, so they are compared a part at a time.
    has_images = rank0_first(lambda: all(store.has(hash_ids(p.to_pylist())).all() for p in parts))
    return pairs if has_images else None


# Of a shard: its `number` and `key`, the `ids` and `captions` of good samples, and the `bad` ones.
Note = dict[str, Any]
# A sample of a shard; None at the shard's end.
Read = tuple[Note, Item | None]


def read_shards(
    stream: ShardStream,
    folder: Path,
    encoder: Encoder,
    store: Store,
    batch_size: int,
    max_bad_share: float,
    threads: int | None,
    number: int | None,
) -> None:
    """Read the shards that have no note, and encode the images that the store lacks. Collective."""

    def count_samples() -> dict[int, int]:
        """How many samples each shard has that was read to its end."""
        (folder / NOTES).mkdir(parents=True, exist_ok=True)
        notes = map(read_sealed, (folder / NOTES).glob("*.json"))
        return {n["number"]: len(n["ids"]) + len(n["bad"]) for n in notes if not is_lost(n)}

    sizes = rank0_first(count_samples)
    number_of_shards, ranks = len(stream.shards), world_size()
    progress = Progress("read shards", number_of_shards) if rank() == 0 else None
    ended = list[Note]()
    store.open()
    store.has(hash_ids([""]))  # or threads would sort it at once

    def read_units(share: Iterator[int]) -> Iterator[list[Read]]:
        """Samples of shards, in units that end with their shard."""
        read = 0
        for at in share:
            if number is not None and read >= number / ranks:
                return
            if at in sizes:
                read += sizes[at]
                continue
            shard, unit = stream.shards[at], list[Read]()
            # A shard as it is now, wherever it lies. What is behind URLs is taken to stay.
            facts = [shard] if is_url(shard) else [shard_stem(shard), *shard_facts(shard, True)]
            key = checksum(to_json(facts).encode())
            note = {"number": at, "key": key, "ids": [], "captions": [], "bad": []}
            for item in stream.read(shard):
                read += 1
                unit.append((note, item))
                if len(unit) == batch_size:
                    yield unit
                    unit = []
            yield [*unit, (note, None)]

    def prepare(read: Read) -> Prepared:
        note, item = read
        if isinstance(item, BadSample):
            raise item
        if item is None or encoder.reads == "text":
            return 0, None
        hashes = hash_ids([f"{note['key']} {item.sample_id}"])
        return int(hashes[0]), None if store.has(hashes)[0] else prepare_sample(encoder, item)

    def read_share(share: Iterator[int]) -> Generator[Unit, None, None]:
        """Inputs, and the note of a shard that ended with them; refuses a stream of lost shards."""
        lost, last = 0, -1
        for unit in read_ahead(read_units(share), prepare, threads):
            inputs = list[Prepared]()
            for (note, item), made in unit:
                if isinstance(made, BadSample):
                    note["bad"].append(vars(made))
                elif isinstance(item, Sample):
                    note["ids"].append(item.sample_id)
                    note["captions"].append(item.captions)
                    if made[1] is not None:
                        inputs.append(made)
            note, item = unit[-1][0]
            if item is not None:
                yield inputs, None
                continue
            at = note["number"]
            # Those that are read again need not be neighbours.
            is_next = at == last + ranks
            is_gone = is_lost(note) and not note["ids"] and is_url(stream.shards[at])
            lost, last = ((lost + 1 if is_next else 1), at) if is_gone else (0, last)
            reason = note["bad"][-1]["reason"] if lost else ""
            # A pattern may name some more shards than there are.
            is_allowed = reason.startswith(MISSING) and lost <= max_bad_share * number_of_shards
            if lost >= MAX_FAILED and not is_allowed:
                raise ValueError(
                    f"{stream.name}: {lost} shards in a row without a usable sample; "
                    f"the last is {note['bad'][-1]['where']}: {reason}; {GO_ON}"
                )
            yield inputs, note

    def note_ended(notes: list[Note]) -> None:
        ended.extend(notes)
        if progress and notes:
            progress.update(max(note["number"] for note in notes) + 1)

    def write_notes() -> None:
        """Rank 0 writes, so hosts need not see each other's files."""

        def write() -> None:
            for note in ended:
                path = folder / NOTES / f"{note['number']:06d}.json"
                write_atomically(path, to_json(seal(note)), durable=True)

        rank0_first(write)
        ended.clear()

    encoder = accelerate(encoder, number or USUAL_SHARD * number_of_shards)
    shards = range(number_of_shards)
    encode_into(store, encoder, shards, read_share, after=note_ended, written=write_notes)


def is_lost(note: Note) -> bool:
    return any(entry["reason"].endswith(LOST) for entry in note["bad"])


def write_table(
    stream: ShardStream, folder: Path, max_bad_share: float, number: int | None
) -> None:
    """Write the table of all shards, unless too much of the stream is bad."""
    paths = sorted((folder / NOTES).glob("*.json"))

    def notes() -> Iterator[dict[str, Any]]:  # one is in memory at a time
        return map(read_sealed, paths)

    hashes = np.concatenate([hash_ids(note["ids"]) for note in notes()])
    is_new = np.zeros(len(hashes), bool)
    is_new[np.unique(hashes, return_index=True)[1]] = True
    repeated = ~is_new
    if number is not None:
        is_new[np.flatnonzero(is_new)[number:]] = False
    good, bad, start = int(is_new.sum()), list[BadSample](), 0
    with replacing(folder / TABLE) as temporary, pa.ipc.new_file(str(temporary), SCHEMA) as table:
        for note in notes():
            end = start + len(note["ids"])
            ids, captions = ([*compress(note[n], is_new[start:end])] for n in ("ids", "captions"))
            images = [f"{note['key']} {sample_id}" for sample_id in ids]
            columns = {"sample_id": ids, "image": images, "captions": captions}
            table.write_table(pa.table(columns, schema=SCHEMA))
            bad += [BadSample(**entry) for entry in note["bad"]]
            again = compress(note["ids"], repeated[start:end])
            reason = "the same sample id as in a shard before"
            bad += [BadSample(sample_id, stream.name, reason) for sample_id in again]
            start = end
    broken, said = [sample for sample in bad if sample.reason.endswith(LOST)], list[str]()
    for some, total, what in (
        (bad, good + len(bad), "pairs cannot be used"),
        (broken, len(paths), "shards were not read to their end"),
    ):
        if some:
            message = f"{stream.name}: {len(some):,} of {total:,} {what}, such as {some[0]}"
            if len(some) > max_bad_share * total:
                raise ValueError(
                    f"{message}; that is more than data.max_bad_share ({max_bad_share:g}) allows; "
                    "mend or leave out what is bad, or raise it"
                )
            said.append(f"{message}; they are left out")
    if not good:
        raise ValueError(f"{stream.name}: holds no pair")
    write_atomically(folder / BAD, "".join(to_json(vars(sample)) + "\n" for sample in bad))
    facts = {"notes": said, "table": file_checksum(folder / TABLE)}
    write_atomically(folder / FACTS, to_json(seal(facts)), durable=True)
    shutil.rmtree(folder / NOTES, ignore_errors=True)
