"""Tar shards as an endless stream, read front to back: local or remote, compressed or not.

The order is a pure function of the seed, the shards, and how many lanes they are dealt to: one for
each rank that a run begins with. Other ranks go on with the same lanes. The stream remembers in
which shard each block of samples begins, so a run resumes without reading what came before.
"""

import importlib
import io
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Event
from typing import Any

from protoclip.data.access import (
    GO_ON,
    PATIENCE_SECONDS,
    digest,
    is_url,
    open_file,
    reason_of,
    start_thread,
)
from protoclip.data.content import Facts
from protoclip.data.pairs import LOST, BadSample, Sample, SampleStream, clean_captions
from protoclip.data.sampler import BLOCK_STREAM, SHARD_STREAM, evenly_spaced, generator
from protoclip.data.shards import (
    COMPRESSED,
    ShardSample,
    expand_shards,
    read_samples,
    shard_stem,
)
from protoclip.data.split import Chosen, Keeps
from protoclip.files import checksum, open_local, to_json
from protoclip.terminal import without_secrets

Item = Sample | BadSample
# The number of the first sample, and the samples in the order they were read.
Block = tuple[int, list[Item]]
BLOCK_BYTES = 1 << 28  # a block ends when its images have as many; two blocks are in memory
SHARDS, PART = 1000, 1 << 14  # shards of which parts are read, and how many bytes of a part
MAX_FAILED = 32  # a stream ends after as many different shards in a row without a good sample


class ShardStream(SampleStream):
    """Image-text pairs from tar shards in one endless order; see `pairs.SampleStream`.

    Each pass over the shards permutes them. The endless sequence of shards is dealt to the lanes in
    turn, so all lanes together have every sample once a pass. Each lane shuffles its samples in
    blocks of `shuffle` samples, or fewer if they have more than `BLOCK_BYTES`. `seed` must be the
    same on all ranks. For the rest see `shards.expand_shards` and `shards.read_samples`.

    Raises `ValueError` as `expand_shards`.
    """

    notes: list[str]

    def __init__(
        self,
        pattern: str,
        *,
        seed: int,
        lanes: int = 1,
        shuffle: int = 4096,
        caption_keys: Sequence[str] | None = None,
        name: str | None = None,
        chosen: Chosen | None = None,
        needs_captions: bool = True,
    ) -> None:
        self.shards = expand_shards(pattern)
        self.name, self.notes = name or without_secrets(pattern), list[str]()
        self.seed, self.shuffle = seed, shuffle
        self.caption_keys = caption_keys and list(caption_keys)
        self.chosen, self.needs_captions = chosen, needs_captions
        self._usual = 0  # samples of the last shard that was read to its end
        self.prefix = ""  # with which `chosen` knows ids, in a mixture
        # Of each lane: first sample of a block -> which of the lane's shards holds it, and its
        # number there.
        self._blocks_at: list[dict[int, tuple[int, int]]] = [{0: (0, 0)} for _ in range(lanes)]

    @property
    def lanes(self) -> int:
        return len(self._blocks_at)

    def samples(self, first: int = 0, lane: int = 0) -> Iterator[Item]:
        """A lane from its sample number `first` on, where bad samples count too.

        Threads read one block ahead, until the iterator is closed or dropped. Iteration raises
        `ValueError` if no shard can be read.
        """
        stopped = Event()
        blocks = self._blocks(lane, self._block_before(first, lane), stopped)
        read_ahead = partial(start_thread, lambda: next(blocks), name="protoclip-read-ahead")
        ahead = read_ahead()
        try:
            while True:
                start, block = ahead.result()
                ahead = read_ahead()
                # No other block of any lane has this number.
                draw = generator(self.seed, BLOCK_STREAM, start * self.lanes + lane)
                order = draw.permutation(len(block))[max(0, first - start) :]
                left = [block[number] for number in order[::-1]]
                block.clear()  # samples are freed as they are used
                while left:
                    yield left.pop()
        finally:
            stopped.set()

    def state_dict(self, first: int, lane: int = 0) -> dict[str, Any]:
        """JSON values from which a lane resumes at its sample number `first`."""
        start = self._block_before(first, lane)
        shard, skip = self._blocks_at[lane][start]
        state = {"sample": start, "shard": shard, "place": skip, "stream": self._identity()}
        return {**state, "rank": [lane, self.lanes]}  # the rank that had it when the run began

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the lanes of a state, and make `samples` quick to start where it was taken.

        Raises `ValueError` if the state belongs to other shards or another order.
        """
        if state["stream"] != self._identity():
            raise ValueError(
                f"{self.name}: the shards, the seed or data.shuffle_buffer are not those of the "
                "interrupted run, so the stream cannot go on; restore them, or start anew"
            )
        lane, lanes = state["rank"]
        if lanes != self.lanes:
            self._blocks_at = [{0: (0, 0)} for _ in range(lanes)]
        self._blocks_at[lane][int(state["sample"])] = (state["shard"], state["place"])

    def fingerprint(self) -> Facts:
        """Hashes of the shards by their names, and of a few parts of those that are local files.

        Shards keep their `names` where they move between a disk and a store, of which no part is
        read.
        """
        number = len(self.shards)
        read = {self.shards[n] for n in evenly_spaced(number, min(SHARDS, number), 0)}
        parts = [[shard_stem(shard), shard_facts(shard, shard in read)] for shard in self.shards]
        return {"shards": hash_of_shards(parts)}

    def _identity(self) -> str:
        stems = [shard_stem(shard) for shard in self.shards]
        order = {"seed": self.seed, "shuffle": self.shuffle, "block_bytes": BLOCK_BYTES}
        chosen = self.chosen.keys if self.chosen else {}
        return digest({"shards": stems, "captions": self.caption_keys, **order, **chosen})

    def read(self, shard: str) -> Iterator[Item]:
        """The chosen samples of one shard, in order. Where it breaks off, the number of samples of
        the shard before tells about how many are lost."""
        number = 0
        for item in read_shard(shard, self.caption_keys, self.keeps, self.needs_captions):
            if isinstance(item, BadSample) and item.reason.endswith(LOST):
                if self._usual > number:
                    lost = f"(about {self._usual - number:,} samples) {LOST}"
                    item.reason = item.reason.removesuffix(LOST) + lost
                yield item
                return
            yield item
            number += 1
        self._usual = number

    def keeps(self, sample_id: str) -> bool:
        return self.chosen is None or self.chosen.keeps(self.prefix + sample_id)

    def _block_before(self, first: int, lane: int) -> int:
        return max(start for start in list(self._blocks_at[lane]) if start <= first)

    def _blocks(self, lane: int, start: int, stopped: Event) -> Iterator[Block]:
        block: list[Item] = []
        held = last_epoch = 0
        for shard, skip, item in self._items(lane, *self._blocks_at[lane][start], stopped):
            epoch = (shard * self.lanes + lane) // len(self.shards)
            # A block also ends with its pass, or a sample could come twice before another came.
            full = len(block) == self.shuffle or held >= BLOCK_BYTES or epoch != last_epoch
            if block and full:
                start += len(block)
                yield start - len(block), block
                block, held = [], 0
            if not block:
                self._blocks_at[lane][start] = (shard, skip)
            block.append(item)
            held += len(item.image) if isinstance(item, Sample) else 0
            last_epoch = epoch

    def _items(
        self, lane: int, number: int, skip: int, stopped: Event
    ) -> Iterator[tuple[int, int, Item]]:
        """Number of a lane's shard, number in it, and sample, from a sample of a shard on."""
        failed, lost = set[str](), 0.0  # shards in a row, and the seconds that they took
        # Any number of shards may hold none of the few samples that are chosen.
        most, reason = min(len(self.shards), MAX_FAILED), "it holds no sample"
        if self.chosen is not None:
            most, reason = len(self.shards), f"no sample is left by {self.chosen.settings}"
        while True:
            shard = self._shard(number * self.lanes + lane)
            failed.add(shard)
            began = time.monotonic()
            for number_in_shard, item in enumerate(self.read(shard)):
                if stopped.is_set():
                    return
                if isinstance(item, Sample):
                    failed.clear()
                    lost = 0.0
                else:
                    reason, lost = item.reason, lost + time.monotonic() - began
                if number_in_shard >= skip:
                    yield number, number_in_shard, item
                began = time.monotonic()
            if len(failed) >= most or (failed and lost > PATIENCE_SECONDS):
                raise ValueError(
                    f"{self.name}: {len(failed)} shards in a row without a sample that can be "
                    f"used; the last is {without_secrets(shard)}: {reason}"
                    f"{f'; {GO_ON}' if is_url(shard) else ''}"
                )
            number, skip = number + 1, 0

    def _shard(self, position: int) -> str:
        """The shard at a position in the endless sequence that all lanes share."""
        epoch, number = divmod(position, len(self.shards))
        order = generator(self.seed, SHARD_STREAM, epoch).permutation(len(self.shards))
        return self.shards[int(order[number])]


def read_shard(
    shard: str,
    caption_keys: Sequence[str] | None,
    keeps: Keeps = lambda sample_id: True,
    needs_captions: bool = True,
) -> Iterator[Item]:
    """The samples of one shard, in order. A shard that cannot be read ends with a bad sample.

    Samples that `keeps` refuses are passed over, but not the break of a shard.
    """
    stem, seen = shard_stem(shard), set[str]()
    try:
        with _open(shard) as file:
            for sample in read_samples(file, stem, caption_keys, stream=True):
                if sample.fault or keeps(sample.sample_id):
                    repeated = sample.sample_id in seen
                    yield _check_sample(sample, shard, repeated, needs_captions)
                seen.add(sample.sample_id)
    except Exception as error:  # file systems and decompressors have their own errors
        part = f" after {len(seen)} samples; the rest" if seen else "; all"
        yield BadSample(stem, shard, f"{reason_of(error)}{part} {LOST}")


def _check_sample(sample: ShardSample, shard: str, repeated: bool, needs_captions: bool) -> Item:
    again = "the same sample id as one before it in the shard" if repeated else ""
    reason = sample.fault or again
    image = sample.image.data if sample.image else None
    if not reason and image is not None:
        try:
            texts = clean_captions(sample.captions, needed=needs_captions)
            return Sample(sample_id=sample.sample_id, image=image, captions=texts, where=shard)
        except ValueError as error:
            reason = str(error)
    return BadSample(sample.sample_id, shard, reason or "no image")


@contextmanager
def _open(shard: str) -> Iterator[io.BufferedIOBase]:
    """The uncompressed bytes of a file or URL."""
    with open_file(shard) as file:
        start = file.peek(6)
        reader = next((r for magic, r in COMPRESSED.items() if start.startswith(magic)), None)
        yield importlib.import_module(reader).open(file) if reader else file


def hash_of_shards(shards: Sequence[Sequence[Any]]) -> str:
    """A hash of the name of each shard, and of what `shard_facts` says of it."""
    return checksum(to_json(shards).encode())


def shard_facts(path: str, is_read: bool) -> list[Any]:
    """Bytes of a local shard, and a hash of both ends and the middle; nothing of another."""
    try:
        with open_local(path) as file:
            size = os.fstat(file.fileno()).st_size
            parts = b""
            for start in (0, size // 2, max(0, size - PART)) if is_read else ():
                file.seek(start)
                parts += file.read(PART)
    except (OSError, ValueError):
        return []
    return [size, checksum(parts)]


def facts_that_may_move(facts: Facts, source: Any) -> Facts:
    """A source's facts, less what differs when shards move between a disk and a store.

    What is in a store is known by the names of its shards alone.
    """
    if not isinstance(source, ShardStream):
        return facts
    names = hash_of_shards([[shard_stem(shard), []] for shard in source.shards])
    is_on_disk = not any(map(is_url, source.shards))
    known_facts = {name: fact for name, fact in facts.items() if is_on_disk or name != "shards"}
    return {**known_facts, "names": names}
