"""A stream that passes the frozen image half once, as `align` takes shards that it cannot keep.

Each shard is read front to back. The features of its images go to the store, as those of other
pairs do (see `halves.py`), and its ids and captions into a table there. From then on the run reads
this table, whose pairs have no images any more.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from protoclip.data import access
from protoclip.data.access import is_url
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
from protoclip.data.view import mix_pairs
from protoclip.distributed import collectives
from protoclip.distributed.collectives import (
    raise_on_all_ranks,
    rank,
    rank0_first,
    require_shared,
    world_size,
)
from protoclip.encode import store
from protoclip.encode.halves import SETTING, WAIT, ImageHalf
from protoclip.encode.run import Prepared, Round, encode_into
from protoclip.encode.store import Store, hash_ids
from protoclip.files import (
    checksum,
    file_checksum,
    left_by_killed,
    locked,
    read_sealed,
    replacing,
    sealed,
    to_json,
    write_atomically,
)
from protoclip.progress import Progress
from protoclip.terminal import without_secrets

TABLE, FOLDER, NOTES = "pairs.arrow", "streams", "shards"
SCHEMA = pa.schema(
    {"sample_id": pa.string(), "image": pa.string(), "captions": pa.list_(pa.string())}
)
PATIENCE = 3600.0  # seconds for another process that adds to the store of a half
WAY_OUT = "name another folder by align.features"
AGAIN = "and give the command again"


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


def encode_stream(
    stream: SampleStream,
    half: ImageHalf,
    root: Path,
    *,
    batch_size: int,
    max_bad_share: float,
    threads: int | None = None,
) -> Pairs:
    """The pairs of a stream of tar shards, or of a mixture of some. All ranks call it.

    Ranks share the shards; after an interruption the same call goes on with those that are missing.

    Args:
        half: The frozen image half.
        root: Folder of the stores.
        max_bad_share: Share of the pairs, and of the shards, that may be bad.

    Raises:
        ValueError: The stores cannot be used or are damaged, or too much is bad.
    """
    tables = []
    for source in stream.sources:
        assert isinstance(source, ShardStream)  # there are no other streams
        reading = StreamPass(source, half, root, max_bad_share)
        tables.append(reading.pairs(batch_size, threads))
    return tables[0] if len(tables) == 1 else mix_pairs(tables)


@dataclass
class ShardNote:
    """What a shard holds besides features: ids and captions of good samples, and the bad ones.

    Attributes:
        key: Names the shard as it is now.
        began: When its reading began, in seconds of the monotonic clock.
    """

    number: int
    key: str
    began: float
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    bad: list[dict[str, str]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        facts = {"key": self.key, "ids": [*self.captions], "bad": self.bad}
        facts["captions"] = [*self.captions.values()]
        write_atomically(path, to_json(sealed(facts)), durable=True)


# A sample of a shard; None at the shard's end.
Read = tuple[ShardNote, Item | None]


class StreamPass:
    """One pass of the image half over a stream, which ends with a table in the store.

    While it lasts, the folder of the table has a note of each shard that was read.
    """

    def __init__(
        self, stream: ShardStream, half: ImageHalf, root: Path, max_bad_share: float
    ) -> None:
        self.stream, self.half, self.max_bad_share = stream, half, max_bad_share
        facts = {
            "format": 2,
            **rank0_first(stream.fingerprint),
            "number": len(stream.shards),
            "captions": stream.caption_keys,
            "chosen": [stream.prefix, stream.chosen.keys] if stream.chosen else None,
            "half": half.folder.name,
        }
        if (max_pixels := half.max_pixels) != MAX_IMAGE_PIXELS:
            facts["max_pixels"] = max_pixels  # larger images are bad
        if remote := [without_secrets(shard) for shard in stream.shards if is_url(shard)]:
            # The fingerprint knows no more of them than their file names.
            facts["remote"] = checksum(to_json(remote).encode())
        self.folder = root / FOLDER / checksum(to_json(facts).encode())
        self.failed, self.lost, self.last = 0, 0.0, 0

    def pairs(self, batch_size: int, threads: int | None) -> PassedPairs:
        """The pairs of the stream, once all its shards are read."""
        if (pairs := self._find()) is not None:  # disturbs nobody
            return pairs
        with ExitStack() as stack:
            lock = locked(self.folder, way_out=WAY_OUT, wait=WAIT)
            rank0_first(lambda: stack.enter_context(lock))
            if (pairs := self._find(removes=True)) is not None:
                return pairs
            self._encode(batch_size, threads)
            rank0_first(self._finish)
            pairs = self._find()
            assert pairs is not None
            return pairs

    def _find(self, *, removes: bool = False) -> PassedPairs | None:
        """The pairs, if all shards have passed and the stores have their images. Collective.

        Where a store lacks images, the table is removed if asked. Raises `ValueError` if more is
        bad than is allowed now.
        """
        if not rank0_first(lambda: "rows" in store.read_facts(self.folder)):
            return None
        require_shared(self.folder / store.FACTS, by=SETTING)
        pairs = raise_on_all_ranks(self._read)
        images = Store(self.half.folder, setting=SETTING)

        def has_images() -> bool:
            shards = pairs.table.column("image").chunks  # one at a time, since names take memory
            hashes = hash_ids(name for shard in shards for name in shard.to_pylist())
            has_all = bool(images.has(hashes).all())
            if removes and not has_all:
                shutil.rmtree(self.folder)  # they were deleted since
            return has_all

        return pairs if rank0_first(has_images) else None

    def _read(self) -> PassedPairs:
        facts = store.read_facts(self.folder)
        for some, number, told in facts.get("left_out", []):
            self._require_few(some, number, told)
        path = self.folder / TABLE
        if not path.is_file() or file_checksum(path) != facts["table"]:
            raise ValueError(
                f"{path}: damaged (its checksum differs); delete {self.folder}, {AGAIN}"
            )
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        # What says that a stream is read in order is not true of its table.
        notes = [note for note in self.stream.notes if not note.startswith("episodes.replacement")]
        notes += facts["notes"]
        return PassedPairs(table, name=self.stream.name, key=facts["table"], notes=notes)

    def _note(self, number: int) -> Path:
        return self.folder / NOTES / f"{number:06d}.json"

    def _encode(self, batch_size: int, threads: int | None) -> None:
        """Read the shards that have no note, and encode the images that the stores lack."""
        missing = rank0_first(self._missing)
        self.last = -1
        images, encoder = Store(self.half.folder, setting=SETTING), self.half.encoder
        share = missing[rank() :: world_size()]
        progress = Progress("embed a shard", len(share))
        pending, ended = list[ShardNote](), 0

        def prepare(read: Read) -> Prepared:
            note, item = read
            if item is None:
                return 0, None
            if isinstance(item, BadSample):
                raise item
            name = f"{note.key} {item.sample_id}"
            hashes = hash_ids([name])
            if images.has(hashes)[0]:
                return int(hashes[0]), None
            try:
                return int(hashes[0]), encoder.prepare(item)
            except ValueError as error:
                raise BadSample(item.sample_id, item.where, str(error)) from error

        def count(made: Round) -> None:
            nonlocal ended
            for (note, item), outcome in made.items:
                if item is None:
                    self._require_patience(note)
                    pending.append(note)
                    ended += 1
                    if rank() == 0:
                        progress.update(ended)
                elif isinstance(outcome, BadSample):
                    note.bad.append(vars(outcome))
                else:
                    assert not isinstance(item, BadSample)
                    note.captions[item.sample_id] = item.captions

        def write_notes() -> None:
            for note in pending:
                note.write(self._note(note.number))
            pending.clear()

        with ExitStack() as stack:
            # A run over other data that encodes with this half is waited for.
            lock = locked(self.half.folder, way_out=WAY_OUT, wait=PATIENCE)
            rank0_first(lambda: stack.enter_context(lock))
            images.open()
            images.has(hash_ids([""]))  # or threads would sort it at once
            encode_into(
                images,
                encoder,
                self._units(share, batch_size),
                prepare,
                threads=threads,
                after=count,
                written=write_notes,
            )

    def _missing(self) -> list[int]:
        """The shards that have no note yet. Those that broke off are read again."""
        (self.folder / NOTES).mkdir(parents=True, exist_ok=True)
        for left in left_by_killed(self.folder):
            left.unlink(missing_ok=True)
        has_note = {int(path.stem) for path in (self.folder / NOTES).glob("*.json")}
        for number in [*has_note]:
            if any(entry["reason"].endswith(LOST) for entry in self._read_note(number)["bad"]):
                has_note.discard(number)
        return [n for n in range(len(self.stream.shards)) if n not in has_note]

    def _read_note(self, number: int) -> dict[str, Any]:
        try:
            return read_sealed(self._note(number))
        except ValueError as error:
            raise ValueError(f"{error}; delete {self.folder}, {AGAIN}") from error

    def _units(self, shards: Sequence[int], size: int) -> Iterator[list[Read]]:
        """The samples of shards, in units that end with their shard."""
        for number in shards:
            shard, began = self.stream.shards[number], time.monotonic()
            note = ShardNote(number, key_of(shard), began)
            unit = list[Read]()
            for item in self.stream.read(shard):
                unit.append((note, item))
                if len(unit) == size:
                    yield unit
                    unit = []
            yield [*unit, (note, None)]

    def _require_patience(self, note: ShardNote) -> None:
        """End the pass after as many lost shards in a row as end a stream.

        Only remote ones count: then it is the network, or the store. The same command reads them
        again. It reads no others then, so it counts only those that are neighbours in the rank's
        share of all. Those that the store does not have end nothing that `max_bad_share` would not
        refuse in the end.
        """
        shard = self.stream.shards[note.number]
        reasons = [entry["reason"] for entry in note.bad if entry["reason"].endswith(LOST)]
        if note.captions or not reasons or not is_url(shard):
            self.failed, self.lost = 0, 0.0
            return
        if note.number != self.last + world_size():
            self.failed, self.lost = 0, 0.0
        self.failed, self.last = self.failed + 1, note.number
        self.lost += time.monotonic() - note.began
        is_allowed = reasons[-1].startswith(access.MISSING) and not self._is_too_much(
            self.failed, len(self.stream.shards)
        )
        if (self.failed >= MAX_FAILED and not is_allowed) or self.lost > access.PATIENCE_SECONDS:
            raise ValueError(
                f"{self.stream.name}: {self.failed} shards in a row without a sample that can be "
                f"used; the last is {without_secrets(shard)}: {reasons[-1]}; {access.GO_ON}"
            )

    def _is_too_much(self, bad: int, number: int) -> bool:
        return bad > self.max_bad_share * number

    def _require_few(self, some: int, number: int, told: str) -> None:
        if self._is_too_much(some, number):
            raise ValueError(
                f"{self.stream.name}: {told}; that is more than data.max_bad_share "
                f"({self.max_bad_share:g}) allows; mend or leave out what is bad, or raise it"
            )

    def _finish(self) -> None:
        """Write the table of all shards, unless too much of the stream is bad."""
        numbers = range(len(self.stream.shards))
        deadline = time.monotonic() + collectives.UNSEEN
        while not all(self._note(number).is_file() for number in numbers):
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{self.folder}: not all shards are there; name a place that all hosts share "
                    f"by {SETTING}, {AGAIN}"
                )
            time.sleep(0.1)
        bad, parts = list[BadSample](), []
        for note in map(self._read_note, numbers):  # one is in memory at a time
            bad += [BadSample(**entry) for entry in note["bad"]]
            parts.append(hash_ids(note["ids"]))
        hashes = np.concatenate(parts)
        is_new = np.zeros(len(hashes), bool)
        is_new[np.unique(hashes, return_index=True)[1]] = True
        news = np.split(is_new, np.cumsum([len(part) for part in parts])[:-1])
        for number, new in zip(numbers, news, strict=True):
            again = [] if new.all() else compress(self._read_note(number)["ids"], ~new)
            shard, reason = self.stream.shards[number], "the same sample id as in a shard before"
            bad += [BadSample(sample_id, shard, reason) for sample_id in again]
        broken = [each for each in bad if each.reason.endswith(LOST)]
        good, left_out = int(is_new.sum()), list[tuple[int, int, str]]()
        for some, total, what in (
            (bad, good + len(bad), "pairs cannot be used"),
            (broken, len(numbers), "shards were not read to their end"),
        ):
            if some:
                told = f"{len(some):,} of {total:,} {what}, such as {some[0]}"
                self._require_few(len(some), total, told)
                left_out.append((len(some), total, told))
        if not good:
            raise ValueError(f"{self.stream.name}: holds no pair")
        path = self.folder / TABLE
        with replacing(path) as temporary, pa.ipc.new_file(str(temporary), SCHEMA) as table:
            for note, new in zip(map(self._read_note, numbers), news, strict=True):
                ids, captions = ([*compress(note[name], new)] for name in ("ids", "captions"))
                images = [f"{note['key']} {sample_id}" for sample_id in ids]
                columns = {"sample_id": ids, "image": images, "captions": captions}
                table.write_table(pa.table(columns, schema=SCHEMA))
        said = [f"{self.stream.name}: {told}; they are left out" for *_, told in left_out]
        facts = {"rows": good, "notes": said, "left_out": left_out, "table": file_checksum(path)}
        write_atomically(self.folder / store.FACTS, to_json(sealed(facts)), durable=True)
        shutil.rmtree(self.folder / NOTES, ignore_errors=True)


def key_of(shard: str) -> str:
    """Names a shard as it is now, wherever it lies. What is behind URLs is taken to stay."""
    facts = [shard] if is_url(shard) else [shard_stem(shard), *shard_facts(shard, is_read=True)]
    return checksum(to_json(facts).encode())
