"""Which rows form an episode, what each rank takes for a batch, and the random draws.

Episodes and draws are pure functions of the seed and the number of the episode.

A stream is dealt to lanes, as many as the run had ranks when it began. A batch takes equally many
samples of each lane, one lane after the other, and any number of ranks shares it evenly.

A lane's part of a batch is cut into stretches with spare samples of their own, which their bad ones
take in turn. Only decoding shows which are bad. So a rank that begins amid a stretch has the
samples before its part too, and decodes them if one of its own is bad.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor

from protoclip.config import Config
from protoclip.data.pairs import BadSample, Pairs, Rows, Sample, SampleStream
from protoclip.distributed.collectives import all_gather_object
from protoclip.files import checksum

Item = Sample | BadSample  # what a stream gave
# Independent sequences of random numbers.
ROWS_STREAM, TRANSFORM_STREAM, PERMUTATION_STREAM, CAPTION_STREAM, ORDER_STREAM = range(5)
SHARD_STREAM, BLOCK_STREAM, EXTRACTION_STREAM = 5, 6, 7
PERMUTED_AT_ONCE = 2**16  # rows of an episode, few enough for a processor's caches
# Spare rows for each one of a batch that is bad. They are more than the spare samples of a stream,
# which travel to the workers with the batch: rows cost nothing until read.
SPARE_BATCHES = 4
# Spare samples that replace the bad ones of a stretch, as a share of it, and the least number.
SPARE_SAMPLES, MIN_SPARE = 0.25, 8
# The most samples of a stretch. Of more, a few bad ones in a row are less likely to use up the
# spare ones; of fewer, ranks that share a lane have fewer samples of each other.
MAX_STRETCH = 256


@dataclass(frozen=True, kw_only=True)
class Episode:
    """The `m` pairs drawn for one round: `rows` of the source in the order of training."""

    index: int
    rows: Int[Tensor, " m"] = field(compare=False)  # since they follow from the number


def generator(seed: int, stream: int, episode: int) -> np.random.Generator:
    """A generator with its own sequence for (seed, stream, episode)."""
    # The highest word of the counter separates episodes by 2^192 draws.
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, episode]))


def transform_draws(
    seed: int, episode: int, size: int, width: int, stream: int = TRANSFORM_STREAM
) -> npt.NDArray[np.float32]:
    """`width` uniform numbers in [0, 1) for the transform of each of an episode's samples."""
    return generator(seed, stream, episode).random((size, width), dtype=np.float32)


def caption_draws(seed: int, episode: int, size: int) -> npt.NDArray[np.float32]:
    """A uniform number in [0, 1) for each of an episode's samples, which picks its caption."""
    return generator(seed, CAPTION_STREAM, episode).random(size, dtype=np.float32)


def permute(index: Rows, size: int, *, seed: int, number: int) -> Rows:
    """Where pseudo-random permutation `number` of [0, size) sends each index, without a table.

    A four-round Feistel network over the smallest even number of bits that holds `size`, applied
    again until the value falls below `size` (Black and Rogaway, 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = generator(seed, PERMUTATION_STREAM, number).integers(0, 2**63, 4, dtype=np.uint64)

    def encrypt(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = value >> np.uint64(half), value & mask
        for key in keys:
            # The finaliser of SplitMix64: cheap, and every bit depends on all.
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        return (left << np.uint64(half)) | right

    value = encrypt(index.astype(np.uint64))
    while len(outside := np.flatnonzero(value >= size)):
        value[outside] = encrypt(value[outside])
    return value.astype(np.int64)


class EpisodeSampler:
    """Draws episodes from one source of rows, or from several whose rows follow each other.

    With replacement each row is drawn on its own (as in the paper). Without, episodes are cut from
    an endless sequence of permutations, so each pass over the data holds every row once. Weights
    give each source its share of an episode: in expectation with replacement, to a row without.
    """

    def __init__(
        self,
        num_samples: int | Sequence[int],
        episode_size: int,
        *,
        seed: int,
        replacement: bool = True,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.sizes = np.atleast_1d(num_samples)
        if weights is None:
            # Several sources are one long source.
            self.sizes, weights = self.sizes.sum(keepdims=True), [1.0]
            if not replacement and episode_size > self.sizes[0]:
                raise ValueError(
                    f"episodes.size: {episode_size} is larger than the {self.sizes[0]} training "
                    "samples; lower it, or set episodes.replacement = true"
                )
        self.first_rows = np.cumsum(self.sizes) - self.sizes
        self.bounds = np.cumsum(weights) / np.sum(weights)
        self.episode_size, self.seed, self.replacement = episode_size, seed, replacement

    def episode(self, index: int) -> Episode:
        """The episode with this number; the same one on every call."""
        rows = (
            self._draw_with_replacement(index)
            if self.replacement
            else self._draw_without_replacement(index)
        )
        return Episode(index=index, rows=torch.from_numpy(rows))

    def _draw_with_replacement(self, index: int) -> Rows:
        draws = generator(self.seed, ROWS_STREAM, index)
        if len(self.sizes) == 1:
            return draws.integers(0, self.sizes[0], self.episode_size)
        source = np.searchsorted(self.bounds, draws.random(self.episode_size), side="right")
        rows: Rows = self.first_rows[source]
        return rows + draws.integers(0, self.sizes[source])

    @property
    def counts(self) -> Rows:
        """How many rows of each source an episode takes without replacement."""
        ends: Rows = np.rint(self.episode_size * self.bounds).astype(np.int64)
        return np.diff(ends, prepend=0)

    def _draw_without_replacement(self, index: int) -> Rows:
        rows, done = np.empty(self.counts.sum(), np.int64), 0
        for source, (count, size) in enumerate(zip(self.counts, self.sizes, strict=True)):
            end = (index + 1) * count
            for first in range(index * count, end, PERMUTED_AT_ONCE):
                numbers = np.arange(first, min(first + PERMUTED_AT_ONCE, end))
                passes, within = np.divmod(numbers, size)
                for number in np.unique(passes):
                    # Every pass of every source has its own permutation.
                    name = int(number) * len(self.sizes) + source
                    now = passes == number
                    within[now] = permute(within[now], int(size), seed=self.seed, number=name)
                rows[done : done + len(within)] = within + self.first_rows[source]
                done += len(within)
        if len(self.sizes) > 1:
            rows = rows[generator(self.seed, ORDER_STREAM, index).permutation(len(rows))]
        return rows


def episodes(config: Config, samples: Pairs | SampleStream) -> Callable[[int], Episode]:
    """A function from the number of an episode to the episode; raises `ValueError` if there are too
    few pairs without replacement, or too few of a source with a weight."""
    size, batch_size = config.episodes.size, config.episodes.batch_size
    if isinstance(samples, SampleStream):
        # Here the rows are positions in the stream.
        return lambda index: Episode(index=index, rows=torch.arange(size) + index * size)
    parts = samples.parts
    weights = [entry.weight for entry in config.data.sources if entry.weight is not None]
    if config.run.overfit is not None:
        weights = []  # each pair once an episode
    left = sum(len(rows) for _, rows in parts)
    if not (weights or config.episodes.replacement) and batch_size > left:
        raise ValueError(
            f"episodes.batch_size: {batch_size} is larger than the {left} training samples; lower "
            "it, or set episodes.replacement = true"
        )
    for source, rows in parts:
        if weights and not len(rows):
            raise ValueError(
                f"data.sources: no pair of '{source.name}' is left to train on, but it has a "
                "weight; take it out, or, unless an earlier source has its images too, hold out "
                "fewer pairs (data.validation)"
            )
    sampler = EpisodeSampler(
        [len(rows) for _, rows in parts],
        size,
        seed=config.run.seed,
        replacement=config.episodes.replacement,
        weights=weights or None,
    )
    if not (config.episodes.replacement or sampler.counts.all()):
        source, _ = parts[int(np.flatnonzero(sampler.counts == 0)[0])]
        raise ValueError(
            f"data.sources: the weight of '{source.name}' is too small for a pair of it to be in "
            f"an episode of {size}; raise it or episodes.size, or set episodes.replacement = true"
        )
    return sampler.episode


def list_overlaps(part: int, parts: int, others: int) -> range:
    """Which of `others` equal parts of a batch share samples with one of its `parts`."""
    return range(part * others // parts, -(-(part + 1) * others // parts))


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Samples that follow each other in a batch, and spare ones that replace the bad of them."""

    before: list[Item]  # those with which the stretch begins and which other ranks have
    samples: list[Item]  # those of this rank, which follow
    spare: list[Item]  # from behind the batch in the lane; no other stretch has them
    lane: tuple[int, str] = (0, "")  # its number, and a checksum of the ids it gave for the batch

    def candidates(self, is_good: Callable[[Item], bool]) -> Iterator[Iterator[Item]]:
        """For each of this rank's samples: itself, and then its replacements, while there are some.

        To be used one after the other. Asking for a further candidate says that the last was bad.
        `is_good` is asked about samples of other ranks, once one of this rank's is bad.
        """
        before, spare = iter(self.before), iter(self.spare)

        def replacements() -> Iterator[Item]:
            for sample in before:
                any(map(is_good, chain([sample], spare)))  # to the first good one, and no further
            yield from spare

        return (chain([sample], replacements()) for sample in self.samples)


def share_batches(
    stream: SampleStream, batch: int, *, batch_size: int, rank: int, world_size: int
) -> Iterator[list[Stretch]]:
    """This rank's part of each batch of a run, from batch number `batch` on.

    `batch_size` is that of all ranks, a multiple of their number and of the lanes'.
    """
    share, per_lane = batch_size // world_size, batch_size // stream.lanes
    number = -(-per_lane // MAX_STRETCH)
    bounds = [per_lane * index // number for index in range(number + 1)]
    read = per_lane + number * max(MIN_SPARE, int(SPARE_SAMPLES * per_lane / number))
    lanes = list_overlaps(rank, world_size, stream.lanes)
    readers = {lane: stream.samples(batch * per_lane, lane) for lane in lanes}
    ahead: dict[int, list[Item]] = {lane: [] for lane in lanes}
    while True:
        stretches = []
        for lane in lanes:
            first = max(rank * share - lane * per_lane, 0)
            last = min((rank + 1) * share - lane * per_lane, per_lane)
            waiting = ahead[lane]
            waiting.extend(islice(readers[lane], read - len(waiting)))
            ids = "\n".join(item.sample_id for item in waiting).encode()
            for index, (begin, end) in enumerate(pairwise(bounds)):
                if first < end and begin < last:
                    since = max(begin, first)
                    stretches.append(
                        Stretch(
                            before=waiting[begin:since],
                            samples=waiting[since : min(end, last)],
                            # Dealt in turn, as what is bad often comes in a row.
                            spare=waiting[per_lane + index :: number],
                            lane=(lane, checksum(ids)),
                        )
                    )
            del waiting[:per_lane]  # the spare ones stay, since the next batch begins with them
        yield stretches


def require_equal_lanes(lanes: Set[tuple[int, str]]) -> None:
    """Raise on all ranks if two of them read other samples of one of the lanes. Collective."""
    lanes = frozenset[tuple[int, str]]().union(*all_gather_object(lanes))
    if len(lanes) > len({number for number, _ in lanes}):
        raise ValueError(
            "ranks that share a lane of the stream read other samples of it, since one of them "
            "lost a shard; go on with --resume auto"
        )


def spare_positions(
    position: npt.NDArray[np.int64], number: int, *, batch: int, size: int
) -> npt.NDArray[np.int64]:
    """Spare positions `(number, b)` for each of these positions of an episode: those of the same
    place in the batches that follow; once around, those of the next place."""
    batches, spare = -(-size // batch), np.arange(number)[:, None]
    around, turn = (spare, 0) if batches == 1 else np.divmod(spare, batches - 1)
    of_batch = (position // batch + 1 + turn) % batches
    in_batch = (position % batch + around + (batches == 1)) % min(batch, size)
    return np.asarray((of_batch * batch + in_batch) % size, dtype=np.int64)


def row_candidates(rows: Sequence[int], size: int) -> Iterator[Iterator[int]]:
    """For each of `size` positions: its row, its spare rows, then those of others, each once.

    Used as `Stretch.candidates`. `rows` has one for each position, then a spare one for each, ...
    """
    taken, failed = set[int](), set[int]()

    def candidates(number: int) -> Iterator[int]:
        for index in chain(range(number, len(rows), size), range(size, len(rows))):
            if index not in taken and rows[index] not in failed:
                taken.add(index)
                yield rows[index]
                failed.add(rows[index])  # since another one is asked for

    return map(candidates, range(size))
