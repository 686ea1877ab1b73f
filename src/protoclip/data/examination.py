"""Look at many samples on all cores: what each is, what identifies its content, what is bad."""

import hashlib
import io
import multiprocessing
import os
import signal
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from protoclip.data.access import Access
from protoclip.data.decode import READERS, decode, dimensions
from protoclip.data.mixture import MixedStreams, under
from protoclip.data.pairs import (
    BadSample,
    Pairs,
    Sample,
    SampleStream,
)
from protoclip.data.stream import ShardStream, read_shard

CountTokens = Callable[[list[str]], list[int]]
Item = int | Sample | BadSample
# Work for one call, and how far the whole is once it is done.
Chunk = tuple[Sequence[Item], int]

# Samples of a chunk, and bytes from which on it has fewer; chunks ahead of each worker.
CHUNK, CHUNK_BYTES, AHEAD = 64, 1 << 23, 3
# JPEGs are decoded as far as training with inputs of this size would.
DECODED_SIDE = 224
# Characters of a caption that are handed back.
CAPTION_LENGTH = 200


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def drawn(total: int, number: int, seed: int) -> npt.NDArray[np.int64]:
    """So many different numbers below `total`, in order: one from each of equal parts."""
    bounds = np.arange(number + 1, dtype=np.int64) * total // number
    return np.random.default_rng(seed).integers(bounds[:-1], bounds[1:])


def row_chunks(rows: int, samples: int | None, seed: int) -> tuple[Iterator[Chunk], int]:
    """Rows to read, and how many they are."""
    if samples is None or samples >= rows:
        firsts = range(0, rows, CHUNK)
        return ((range(n, min(n + CHUNK, rows)), min(n + CHUNK, rows)) for n in firsts), rows
    chosen = drawn(rows, samples, seed)
    firsts = range(0, samples, CHUNK)
    return ((c.tolist(), n + len(c)) for n in firsts for c in [chosen[n : n + CHUNK]]), samples


def stream_chunks(
    source: SampleStream, samples: int | None, seed: int
) -> tuple[Iterator[Chunk], int]:
    """Samples read here, and how many they are, or the number of shards where that is unknown."""
    streams = source.streams if isinstance(source, MixedStreams) else [source]
    mixed = isinstance(source, MixedStreams)
    shards = [
        (s, t.caption_keys, t.access, t.name if mixed else None)
        for t in streams
        if isinstance(t, ShardStream)
        for s in t.shards
    ]
    if samples is None:
        if not shards:
            raise ValueError(f"{source.name}: has no end; say how many samples to read")
        numbered = (
            (sample, number) for number, shard in enumerate(shards) for sample in of_shard(*shard)
        )
        return grouped(numbered), len(shards)
    if shards:
        each = max(CHUNK, -(-samples // len(shards)))
        chosen = drawn(len(shards), min(len(shards), -(-samples // each)), seed).tolist()
        found = (sample for n in chosen for sample in islice(of_shard(*shards[n]), each))
    else:
        found = (sample for sample in source.samples())
    return grouped(zip(found, range(1, samples + 1), strict=False)), samples


def of_shard(
    shard: str, caption_keys: Sequence[str] | None, access: Access, name: str | None
) -> Iterator[Sample | BadSample]:
    """A shard's samples, under the name of their source in a mixture."""
    found = read_shard(shard, caption_keys, access)
    return found if name is None else (under(name, item) for item in found)


def grouped(numbered: Iterable[tuple[Sample | BadSample, int]]) -> Iterator[Chunk]:
    """Samples in chunks of bounded number and bytes."""
    chunk: list[Sample | BadSample] = []
    held = done = 0
    for sample, done in numbered:
        chunk.append(sample)
        held += len(sample.image) if isinstance(sample, Sample) else 0
        if len(chunk) == CHUNK or held >= CHUNK_BYTES:
            yield chunk, done
            chunk, held = [], 0
    if chunk:
        yield chunk, done


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a worker found: counts by name and value, what identifies contents, and bad samples."""

    counts: dict[str, Counter[Any]]
    sample_ids: list[str]
    images: npt.NDArray[np.uint64]
    captions: list[str]
    texts: npt.NDArray[np.uint64]
    bad: list[BadSample]


@dataclass(frozen=True, kw_only=True)
class Examiner:
    """Looks at a chunk of samples; called in worker processes."""

    source: Pairs | None
    count_tokens: CountTokens
    max_pixels: int

    def __call__(self, chunk: Sequence[Item]) -> Facts:
        counts: dict[str, Counter[Any]] = defaultdict(Counter)
        good: list[Sample] = []
        bad: list[BadSample] = []
        for item in chunk:
            try:
                sample = self.sample(item)
                self.examine(sample, counts)
                good.append(sample)
            except BadSample as error:
                bad.append(error)
        captions = [caption for sample in good for caption in sample.captions]
        counts["tokens"].update(self.count_tokens(captions) if captions else [])
        return Facts(
            counts=dict(counts),
            sample_ids=[sample.sample_id for sample in good],
            images=hashes(sample.image for sample in good),
            captions=[caption[:CAPTION_LENGTH] for caption in captions],
            texts=hashes(caption.encode("utf-8", "surrogatepass") for caption in captions),
            bad=bad,
        )

    def sample(self, item: Item) -> Sample:
        if isinstance(item, BadSample):
            raise item
        if isinstance(item, Sample):
            return item
        assert self.source is not None
        return self.source.sample(item)

    def examine(self, sample: Sample, counts: dict[str, Counter[Any]]) -> None:
        """Count one sample; raises `BadSample` before it counts anything."""
        try:
            width, height = dimensions(sample.image, max_pixels=self.max_pixels)
            decode(sample.image, max_pixels=self.max_pixels, at_least=DECODED_SIDE)
        except ValueError as error:
            raise BadSample(sample.sample_id, sample.where, str(error)) from None
        reader = next(found for start, found in READERS if sample.image.startswith(start))
        header = reader(io.BytesIO(sample.image))
        values = {
            "width": width,
            "height": height,
            "shorter side": min(width, height),
            "format": header.format,
            "mode": header.mode,
            "kilobytes": round(len(sample.image) / 1000, 1),
            "captions": len(sample.captions),
        }
        for name, value in values.items():
            counts[name][value] += 1


def hashes(contents: Iterable[bytes]) -> npt.NDArray[np.uint64]:
    """Eight bytes for each content; two of a billion contents are confused with odds of 3%."""
    digests = [hashlib.blake2b(content, digest_size=8).digest() for content in contents]
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


# The examiner of a worker process.
_examiner: Examiner


def _start(examiner: Examiner) -> None:
    global _examiner
    _examiner = examiner
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the work


def _examine(chunk: Sequence[Item]) -> Facts:
    return _examiner(chunk)


def examined(
    examiner: Examiner, chunks: Iterable[Chunk], workers: int
) -> Iterator[tuple[Facts, int]]:
    """What is found in each chunk, in order."""
    if workers == 1:
        yield from ((examiner(items), done) for items, done in chunks)
        return
    # Forked where that exists, as a loader's workers are: a fresh process would import PyTorch.
    kinds = multiprocessing.get_all_start_methods()
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork" if "fork" in kinds else None),
        initializer=_start,
        initargs=(examiner,),
    )
    waiting: deque[tuple[Future[Facts], int]] = deque()
    try:
        for items, done in chunks:
            waiting.append((pool.submit(_examine, items), done))
            if len(waiting) > AHEAD * workers:
                future, done = waiting.popleft()
                yield future.result(), done
        while waiting:
            future, done = waiting.popleft()
            yield future.result(), done
    except BrokenProcessPool:
        raise ValueError(
            "data.workers: a worker process was killed, most often because memory ran out; "
            "use fewer"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
