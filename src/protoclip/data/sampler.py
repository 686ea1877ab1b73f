"""Which rows form an episode, and the random draws that go with it, as pure functions.

Everything here depends on (seed, episode) alone: not on a global generator, not on what ran before,
not on the number of processes or workers.
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

# Streams of random numbers; a stream never shares numbers with another.
ROWS_STREAM, TRANSFORM_STREAM, PERMUTATION_STREAM, CAPTION_STREAM, ORDER_STREAM = range(5)
SHARD_STREAM, BLOCK_STREAM, EXTRACTION_STREAM = 5, 6, 7


@dataclass(frozen=True, kw_only=True)
class Episode:
    """The `m` pairs drawn for one round: `rows` of the source, in the order they are trained."""

    index: int
    rows: Int[Tensor, " m"]


def generator(seed: int, stream: int, episode: int) -> np.random.Generator:
    """A counter-based generator at the start of its own sequence for (seed, stream, episode)."""
    # The highest counter word separates episodes by 2^192 draws.
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, episode]))


def transform_draws(
    seed: int, episode: int, size: int, width: int, stream: int = TRANSFORM_STREAM
) -> Float[Tensor, "m r"]:
    """`width` uniform numbers in [0, 1) for the training view of each of an episode's samples."""
    draws = generator(seed, stream, episode).random((size, width), dtype=np.float32)
    return torch.from_numpy(draws)


def caption_draws(seed: int, episode: int, size: int) -> npt.NDArray[np.float32]:
    """A uniform number in [0, 1) for each of an episode's samples, which picks its caption."""
    return generator(seed, CAPTION_STREAM, episode).random(size, dtype=np.float32)


def permute(
    index: npt.NDArray[np.int64], size: int, *, seed: int, turn: int
) -> npt.NDArray[np.int64]:
    """Image of each index under a pseudo-random permutation of [0, size), without a table of it.

    A four-round Feistel network over the smallest even number of bits that holds `size`, walked
    along its cycle until the value falls below `size` (Black and Rogaway, 2002). Constant memory.

    Args:
        index: Values in [0, size).
        size: Size of the permuted range.
        seed, turn: Name the permutation; each turn over the data has its own.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = generator(seed, PERMUTATION_STREAM, turn).integers(0, 2**63, 4, dtype=np.uint64)

    def encrypt(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = value >> np.uint64(half), value & mask
        for key in keys:
            # SplitMix64's finaliser as the round function: cheap, and every bit depends on all.
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        return (left << np.uint64(half)) | right

    value = encrypt(index.astype(np.uint64))
    outside = np.flatnonzero(value >= size)
    while len(outside):
        value[outside] = encrypt(value[outside])
        outside = outside[value[outside] >= size]
    return value.astype(np.int64)


class EpisodeSampler:
    """Draws episodes from one or several sources of rows, numbered one after the other.

    With replacement each row of an episode is drawn on its own (the paper's way). Without, the
    episodes cut one endless stream of permutations: each turn over the data holds every row once.
    With weights, each source has its share of an episode: of the draws with replacement, by
    expectation; without, exactly (to a row), each source going through its own permutations.

    Args:
        num_samples: Rows in the source, or in each of several.
        episode_size: Rows `m` of an episode.
        seed: Names the whole sequence of episodes.
        replacement: Draw with replacement.
        weights: Relative share of each source. Unset: every row counts the same.

    Raises:
        ValueError: No sample, no episode size, a weight that is not positive, or an episode larger
            than the data without replacement and weights.
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
        sizes = [num_samples] if isinstance(num_samples, int) else list(num_samples)
        if min(sizes) < 1 or episode_size < 1:
            raise ValueError(f"cannot draw episodes of {episode_size} from {num_samples} samples")
        if weights is not None and (len(weights) != len(sizes) or not min(weights) > 0):
            raise ValueError(f"weights: {list(weights)} need to be above 0, one for each source")
        if not replacement and weights is None and episode_size > sum(sizes):
            raise ValueError(
                f"episodes.size: {episode_size} is larger than the {sum(sizes)} training samples; "
                "lower it, or set episodes.replacement = true"
            )
        # Without weights several sources are one long source.
        self.sizes = np.array(sizes if weights is not None else [sum(sizes)])
        self.first_rows = np.cumsum(self.sizes) - self.sizes
        shares = np.ones(1) if weights is None else np.asarray(weights, dtype=np.float64)
        self.bounds = np.cumsum(shares) / shares.sum()
        self.episode_size = episode_size
        self.seed = seed
        self.replacement = replacement

    def episode(self, index: int) -> Episode:
        """The episode of that number: the same one whenever and wherever it is asked for."""
        rows = self._drawn(index) if self.replacement else self._dealt(index)
        return Episode(index=index, rows=torch.from_numpy(rows))

    def _drawn(self, index: int) -> npt.NDArray[np.int64]:
        draws = generator(self.seed, ROWS_STREAM, index)
        if len(self.sizes) == 1:
            return draws.integers(0, self.sizes[0], self.episode_size)
        source = np.searchsorted(self.bounds, draws.random(self.episode_size), side="right")
        rows: npt.NDArray[np.int64] = self.first_rows[source] + draws.integers(
            0, self.sizes[source]
        )
        return rows

    def _dealt(self, index: int) -> npt.NDArray[np.int64]:
        counts = np.diff(np.rint(self.episode_size * self.bounds).astype(np.int64), prepend=0)
        rows = np.concatenate(
            [
                first + self._turns(int(size), index * int(count), int(count), source)
                for source, (first, size, count) in enumerate(
                    zip(self.first_rows, self.sizes, counts, strict=True)
                )
            ]
        )
        if len(self.sizes) > 1:
            rows = rows[generator(self.seed, ORDER_STREAM, index).permutation(len(rows))]
        return rows

    def _turns(self, size: int, start: int, count: int, source: int) -> npt.NDArray[np.int64]:
        """Rows `start` to `start + count` of a source's endless stream of permutations."""
        turns, within = np.divmod(np.arange(start, start + count), size)
        # Turns of different sources have different numbers, hence different permutations.
        return np.concatenate(
            [np.zeros(0, dtype=np.int64)]
            + [
                permute(
                    within[turns == turn],
                    size,
                    seed=self.seed,
                    turn=int(turn) * len(self.sizes) + source,
                )
                for turn in np.unique(turns)
            ]
        )


def episodes(config: Config, samples: Pairs | SampleStream) -> Callable[[int], Episode]:
    """Which samples form the episode of a number.

    Raises:
        ValueError: An episode is larger than the data without replacement.
    """
    size = config.episodes.size
    if isinstance(samples, SampleStream):
        # Rows of a stream's episode are numbers in the stream.
        return lambda index: Episode(
            index=index, rows=torch.arange(index * size, (index + 1) * size)
        )
    weights = [entry.weight for entry in config.data.sources if entry.weight is not None]
    sources = getattr(samples, "sources", [samples])
    return EpisodeSampler(
        [len(source) for source in sources],
        size,
        seed=config.run.seed,
        replacement=config.episodes.replacement,
        weights=weights or None,
    ).episode
