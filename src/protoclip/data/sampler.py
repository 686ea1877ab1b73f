"""Which rows form an episode, and the random draws that go with it.

Everything here is a pure function of the seed and the number of the episode.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.config import Config
from protoclip.data.pairs import Pairs, SampleStream
from protoclip.data.pairs import evenly_spaced as evenly_spaced  # for others

Rows = npt.NDArray[np.int64]
# Independent sequences of random numbers.
ROWS_STREAM, TRANSFORM_STREAM, PERMUTATION_STREAM, CAPTION_STREAM, ORDER_STREAM = range(5)
SHARD_STREAM, BLOCK_STREAM, EXTRACTION_STREAM = 5, 6, 7
PERMUTED_AT_ONCE = 2**16  # rows of an episode, few enough for a processor's caches


@dataclass(frozen=True, kw_only=True)
class Episode:
    """The `m` pairs drawn for one round: `rows` of the source in the order of training."""

    index: int
    rows: Int[Tensor, " m"]


def generator(seed: int, stream: int, episode: int) -> np.random.Generator:
    """A generator with its own sequence for (seed, stream, episode)."""
    # The highest word of the counter separates episodes by 2^192 draws.
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, episode]))


def transform_draws(
    seed: int, episode: int, size: int, width: int, stream: int = TRANSFORM_STREAM
) -> Float[Tensor, "m r"]:
    """`width` uniform numbers in [0, 1) for the transform of each of an episode's samples."""
    draws = generator(seed, stream, episode).random((size, width), dtype=np.float32)
    return torch.from_numpy(draws)


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

    Raises `ValueError` if an episode is larger than the data without replacement and weights.
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
        rows = self._with_replacement(index) if self.replacement else self._without(index)
        return Episode(index=index, rows=torch.from_numpy(rows))

    def _with_replacement(self, index: int) -> Rows:
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

    def _without(self, index: int) -> Rows:
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
    """A function from the number of an episode to the episode.

    Raises:
        ValueError: As `EpisodeSampler` does; a batch is larger than the data without replacement; a
            source of which no pair is left has a weight, or one has too small a weight to be in an
            episode.
    """
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
