"""Which rows form an episode, and the random draws that go with it, as pure functions.

Everything here depends on (seed, episode) alone: not on a global generator, not on what ran before,
not on the number of processes or workers.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

# Streams of random numbers; a stream never shares numbers with another.
ROWS_STREAM, VIEW_STREAM, PERMUTATION_STREAM = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Episode:
    """The `m` pairs drawn for one round: `rows` of the source, in the order they are trained."""

    index: int
    rows: Int[Tensor, " m"]


def generator(seed: int, stream: int, episode: int) -> np.random.Generator:
    """A counter-based generator at the start of its own sequence for (seed, stream, episode)."""
    # The highest counter word separates episodes by 2^192 draws.
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, episode]))


def view_draws(seed: int, episode: int, size: int, width: int) -> Float[Tensor, "m r"]:
    """`width` uniform numbers in [0, 1) for the training view of each of an episode's samples."""
    draws = generator(seed, VIEW_STREAM, episode).random((size, width), dtype=np.float32)
    return torch.from_numpy(draws)


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
    """Draws episodes from a source of `num_samples` rows.

    With replacement each row of an episode is drawn on its own (the paper's way). Without, the
    episodes cut one endless stream of permutations: each turn over the data holds every row once.

    Args:
        num_samples: Rows in the source.
        episode_size: Rows `m` of an episode.
        seed: Names the whole sequence of episodes.
        replacement: Draw with replacement.

    Raises:
        ValueError: No sample, no episode size, or an episode larger than the data without
            replacement.
    """

    def __init__(
        self, num_samples: int, episode_size: int, *, seed: int, replacement: bool = True
    ) -> None:
        if num_samples < 1 or episode_size < 1:
            raise ValueError(f"cannot draw episodes of {episode_size} from {num_samples} samples")
        if not replacement and episode_size > num_samples:
            raise ValueError(
                f"episodes.size: {episode_size} is larger than the {num_samples} training samples; "
                "lower it, or set episodes.replacement = true"
            )
        self.num_samples = num_samples
        self.episode_size = episode_size
        self.seed = seed
        self.replacement = replacement

    def episode(self, index: int) -> Episode:
        """The episode of that number: the same one whenever and wherever it is asked for."""
        if self.replacement:
            rows = generator(self.seed, ROWS_STREAM, index).integers(
                0, self.num_samples, self.episode_size
            )
        else:
            stream = np.arange(index * self.episode_size, (index + 1) * self.episode_size)
            turns, within = np.divmod(stream, self.num_samples)
            rows = np.concatenate(
                [
                    permute(within[turns == turn], self.num_samples, seed=self.seed, turn=int(turn))
                    for turn in range(int(turns[0]), int(turns[-1]) + 1)
                ]
            )
        return Episode(index=index, rows=torch.from_numpy(rows))
