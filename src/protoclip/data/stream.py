"""Tar shards read from front to back, without end: local or remote, compressed or not.

The order is a pure function of the seed and the shards, and known to the sample, so a run goes on
where it was interrupted: by the landmark of a block of samples, without reading what came before.
"""

import io
import subprocess
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from queue import SimpleQueue
from threading import Event, Semaphore, Thread, current_thread
from typing import Any, TypeVar

from protoclip.data.access import (
    NOTHING_MORE,
    READ_BYTES,
    Access,
    open_file,
    reason_of,
    require_allowed,
)
from protoclip.data.index import digest
from protoclip.data.pairs import BadSample, Sample, clean_captions
from protoclip.data.sampler import BLOCK_STREAM, SHARD_STREAM, generator
from protoclip.data.shards import check_stems, expand_shards, key_list
from protoclip.data.tars import (
    COMPRESSED,
    IMAGES,
    TEXTS,
    Group,
    group_id,
    read_groups,
    read_members,
    sample_facts,
    shard_stem,
    split_name,
)

T = TypeVar("T")
# The number of the first sample in the stream, and the samples as they lie.
Block = tuple[int, list[Sample | BadSample]]

# Pictures that a block holds at most, in bytes; two blocks are in memory.
BLOCK_BYTES = 1 << 28
# So many different shards in a row without a sample end a stream.
MAX_FAILED = 32
# Seconds that a closed stream waits for a read that is under way.
CLOSE_SECONDS = 2.0


class ShardStream:
    """Image-text pairs from tar shards, in one endless order; see `pairs.SampleStream`.

    Each pass over the shards has its own permutation of them, and the endless sequence of shards is
    dealt to the processes in turn: together they see every sample once a pass. Within a process the
    samples are permuted in blocks.

    Args:
        pattern: See `shards.expand_shards`.
        seed: Names the order.
        rank, world_size: This process among all, which share one seed.
        shuffle: Samples of a block; fewer where they hold more than `BLOCK_BYTES`.
        caption_key: See `shards.open_shards`.
        name: What messages call the source; the pattern if unset.
        access: What the user allows.

    Raises:
        ValueError: No shard, two of one name, or one that may not be read.
    """

    def __init__(
        self,
        pattern: str | Sequence[str],
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: int = 4096,
        caption_key: str | Sequence[str] | None = None,
        name: str | None = None,
        access: Access = NOTHING_MORE,
    ) -> None:
        if shuffle < 1:
            raise ValueError(
                f"data.shuffle_buffer: {shuffle} is not a number of samples; 1 keeps the order"
            )
        self.shards = expand_shards(pattern, access)
        self.access = access
        check_stems(self.shards)
        self._name = name or (pattern if isinstance(pattern, str) else f"{pattern[0]} and others")
        self.seed, self.rank, self.world_size, self.shuffle = seed, rank, world_size, shuffle
        self.caption_keys = key_list(caption_key)
        # First sample of a block -> which of this process's shards it is in, and its place there.
        self._landmarks: dict[int, tuple[int, int]] = {0: (0, 0)}

    @property
    def name(self) -> str:
        return self._name

    def samples(self, first: int = 0) -> Iterator[Sample | BadSample]:
        """The stream from sample number `first` on, bad samples counted too.

        A thread reads ahead of use, by a block. It ends when the iterator is closed or dropped.

        Raises:
            ValueError: No shard can be read, on iteration.
        """
        start = max(number for number in list(self._landmarks) if number <= first)
        with closing(read_ahead(partial(self._blocks, start), slots=2)) as blocks:
            for start, block in blocks:
                if start + len(block) <= first:
                    continue
                # No other block, of this process or another, has this number.
                draw = generator(self.seed, BLOCK_STREAM, start * self.world_size + self.rank)
                order = draw.permutation(len(block))[max(0, first - start) :]
                left = [block[place] for place in order[::-1]]
                block.clear()
                while left:
                    yield left.pop()

    def landmark(self, first: int) -> dict[str, Any]:
        """What another process needs to know to start near `first`, as JSON-able facts."""
        number = max(number for number in list(self._landmarks) if number <= first)
        shard, place = self._landmarks[number]
        facts = {"sample": number, "shard": shard, "place": place}
        return {**facts, "rank": [self.rank, self.world_size], "stream": self._identity()}

    def learn(self, landmark: Mapping[str, Any]) -> None:
        """Take over a landmark. That of another rank is of no use, and is passed over.

        Raises:
            ValueError: It is of other shards, or in another order.
        """
        if landmark["stream"] != self._identity():
            raise ValueError(
                f"{self.name}: the shards, the seed or data.shuffle_buffer are not those of the "
                "interrupted run, so the stream cannot go on; restore them, or start anew"
            )
        if landmark["rank"] == [self.rank, self.world_size]:
            self._landmarks[int(landmark["sample"])] = (landmark["shard"], landmark["place"])

    def _identity(self) -> str:
        stems = [shard_stem(shard) for shard in self.shards]
        order = {"seed": self.seed, "shuffle": self.shuffle, "block_bytes": BLOCK_BYTES}
        return digest({"shards": stems, "captions": self.caption_keys, **order})

    def _blocks(self, start: int, stopped: Event) -> Generator[Block, None, None]:
        """Blocks in the order read, each with the number of its first sample."""
        block: list[Sample | BadSample] = []
        held = turn = 0
        for shard, place, item in self._items(*self._landmarks[start]):
            if stopped.is_set():
                return
            # No block holds samples of two passes, or a pass would end before all were seen.
            before, turn = turn, (shard * self.world_size + self.rank) // len(self.shards)
            if block and turn != before:
                number = len(block)
                yield start, block
                start, block, held = start + number, [], 0
            if not block:
                self._landmarks[start] = (shard, place)
            block.append(item)
            held += len(item.image) if isinstance(item, Sample) else 0
            if len(block) == self.shuffle or held >= BLOCK_BYTES:
                number = len(block)
                yield start, block
                start, block, held = start + number, [], 0

    def _items(self, turn: int, skip: int) -> Iterator[tuple[int, int, Sample | BadSample]]:
        """Samples from place `skip` of this process's shard number `turn` on, as they lie."""
        failed: set[str] = set()
        while True:
            shard = self._shard(turn * self.world_size + self.rank)
            failed.add(shard)
            reason = "it holds no sample"
            for place, item in enumerate(read_shard(shard, self.caption_keys, self.access)):
                if isinstance(item, Sample):
                    failed.clear()
                else:
                    reason = item.reason
                if place >= skip:
                    yield turn, place, item
            if len(failed) >= min(len(self.shards), MAX_FAILED):
                raise ValueError(
                    f"{self.name}: {len(failed)} shards in a row without a sample that can be "
                    f"used; the last is {shard}: {reason}"
                )
            turn, skip = turn + 1, 0

    def _shard(self, position: int) -> str:
        """The shard at a position of the endless sequence of all processes."""
        turn, place = divmod(position, len(self.shards))
        order = generator(self.seed, SHARD_STREAM, turn).permutation(len(self.shards))
        return self.shards[int(order[place])]


def read_ahead(
    make: Callable[[Event], Generator[T, None, None]], *, slots: int
) -> Generator[T, None, None]:
    """Run an iterator in a thread, `slots - 1` items ahead of use.

    Closing or dropping the result ends the thread; what the iterator raises is raised here.

    Args:
        make: The iterator, given an event that says to stop in the middle of an item.
        slots: Items in memory, the one in use included.
    """
    stopped, free = Event(), Semaphore(slots)
    ready: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            with closing(make(stopped)) as items:
                while free.acquire() and not stopped.is_set():
                    ready.put((next(items), None))
        except BaseException as error:
            ready.put((None, error))

    thread = Thread(target=run, name="protoclip-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
            item = None
            free.release()
    finally:
        stopped.set()
        free.release()
        if thread is not current_thread():  # where the thread's garbage collection dropped us
            thread.join(CLOSE_SECONDS)


def read_shard(
    shard: str, caption_keys: Sequence[str] | None, access: Access = NOTHING_MORE
) -> Iterator[Sample | BadSample]:
    """The samples of one shard, in order. What is wrong with it is a bad sample, not an error."""
    stem, seen = shard_stem(shard), set[str]()
    try:
        with open_shard(shard, access) as file:
            for number, group in enumerate(read_groups(read_members(file, _is_used))):
                if group.fault:
                    group.fault += f" after {number} samples; what follows is lost, at least 1"
                yield _sample(group, shard, stem, caption_keys, seen)
    except FileNotFoundError:
        yield BadSample(stem, shard, "no such file")
    except Exception as error:  # file systems, commands and decompressors have errors of their own
        yield BadSample(stem, shard, reason_of(error))


def _is_used(name: str) -> bool:
    return split_name(name)[1] in IMAGES | TEXTS


def _sample(
    group: Group, shard: str, stem: str, caption_keys: Sequence[str] | None, seen: set[str]
) -> Sample | BadSample:
    if group.fault:
        return BadSample(group_id(group, stem), shard, group.fault)
    sample_id, captions = sample_facts(group, stem, caption_keys)
    if sample_id in seen:
        return BadSample(sample_id, shard, "the same sample id as one before it in the shard")
    seen.add(sample_id)
    if group.image is None or group.image.data is None:
        return BadSample(sample_id, shard, "no image")
    try:
        texts = clean_captions(captions)
    except ValueError as error:
        return BadSample(sample_id, shard, str(error))
    return Sample(sample_id=sample_id, image=group.image.data, captions=texts, where=shard)


@contextmanager
def open_shard(shard: str, access: Access) -> Iterator[io.BufferedIOBase]:
    """A shard's bytes in order, uncompressed: a file, a URL or the output of `pipe:COMMAND`."""
    with _opened(shard, access) as file:
        start = file.peek(6)
        reader = next((r for magic, r in COMPRESSED.items() if start.startswith(magic)), None)
        yield file if reader is None else reader(file)


@contextmanager
def _opened(shard: str, access: Access) -> Iterator[io.BufferedReader]:
    require_allowed(shard, access)
    if shard.startswith("pipe:"):
        command: Any = _Command(shard.removeprefix("pipe:"))
        with io.BufferedReader(command, READ_BYTES) as output:
            yield output
    else:
        with open_file(shard, access) as file:
            yield file


class _Command(io.RawIOBase):
    """What a command writes; its end is an `OSError` if the command failed."""

    def __init__(self, command: str) -> None:
        self.process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, bufsize=0)
        assert isinstance(self.process.stdout, io.RawIOBase)
        self.output: io.RawIOBase = self.process.stdout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        number = self.output.readinto(buffer) or 0
        if number == 0 and (status := self.process.wait()):
            raise OSError(f"the command ended with status {status}")
        return number

    def close(self) -> None:
        if not self.closed:
            self.output.close()  # a command that is still writing ends here
            self.process.terminate()
            self.process.wait()
        super().close()
