"""Which pairs of a batch are positives of each other: those that match in a key.

A key is an integer that equal captions, equal images or equal classes share.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protoclip.distributed import collectives
from protoclip.prototypes.kmeans import segment_sum

# What other pairs of a group are: negatives as all others, no part of the loss, or positives.
Positives = Literal["pair", "masked", "shared"]
HIDDEN = -1e30  # a logit that has no share; finite, since a tile may have no other


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The keys of the rows and columns of a batch's logits. Row `r` pairs with column `first + r`,
    if there is one.

    Two pairs match if any of their keys is equal. That is not transitive, and need not be: image i
    and text j belong together because the data hold i with the text of j, or with j's image. What
    hangs together by a third pair, as all images do that share "a photo" with another, does not.
    """

    rows: Int[Tensor, "b k"]
    columns: Int[Tensor, "n k"]
    first: int = 0

    def others(self, tile: Float[Tensor, "r c"], top: int, left: int) -> Bool[Tensor, "r c"]:
        """Which logits of a tile, whose first row and column are given, are of another pair of the
        row's group."""
        rows = self.rows[top : top + len(tile)]
        columns = self.columns[left : left + tile.shape[1]]
        same = rows[:, :1] == columns[:, 0]
        for key in range(1, rows.shape[1]):
            same |= rows[:, key, None] == columns[:, key]
        same.diagonal(self.first + top - left).fill_(False)
        return same

    def hide(self, tile: Float[Tensor, "r c"], top: int = 0, left: int = 0) -> Float[Tensor, "r c"]:
        """The tile, with no share for other pairs of a row's group; in place."""
        return tile.masked_fill_(self.others(tile, top, left), HIDDEN)

    def passed_on(self) -> "Groups":
        """The groups of the same rows, and of the columns of the rank before. Collective."""
        columns = collectives.pass_on(self.columns)
        return Groups(rows=self.rows, columns=columns, first=self.first + len(columns))

    def gathered(self) -> "Groups":
        """The groups of the same rows, and of the columns of all ranks. Collective."""
        columns = collectives.all_gather_with_gradient(self.columns)
        return Groups(rows=self.rows, columns=columns, first=collectives.rank() * len(self.rows))

    def sums(
        self, features: Float[Tensor, "n d"]
    ) -> tuple[Float[Tensor, "b d"], Int[Tensor, " b"]]:
        """The sum over each row's group, itself included, of features of the columns; and how many
        there are.

        Those that match in any key, by inclusion and exclusion: those by the caption, plus those by
        the image, minus those by both. So there is no matrix of all rows times all columns.
        """
        own = slice(self.first, self.first + len(self.rows))
        sums, counts = features.new_zeros(()), self.columns.new_zeros(())
        for sign, segments in self._segments():
            sizes = torch.zeros_like(segments).index_add(0, segments, torch.ones_like(segments))
            sums = sums + sign * segment_sum(features, segments, sizes)[segments[own]]
            counts = counts + sign * sizes[segments[own]]
        return sums, counts

    def _segments(self) -> Iterator[tuple[int, Int[Tensor, " n"]]]:
        """Every set of keys: its sign, and numbers below `n`, equal for columns that match in all
        of these keys."""
        numbers = [numbered(key) for key in self.columns.T.contiguous()]
        for size in range(1, len(numbers) + 1):
            for chosen in combinations(numbers, size):
                segments, *more = chosen
                for number in more:
                    segments = numbered(segments * len(number) + number)
                yield (-1) ** (size + 1), segments


def groups_of(groups: Tensor | None, pairs: int) -> Groups | None:
    """The groups of a batch of pairs on one rank, by one key each `(b,)` or several `(b, k)`.

    Raises:
        ValueError: They are no integers, or not as many as there are pairs.
    """
    if groups is None:
        return None
    if len(groups) != pairs or groups.is_floating_point():
        what = f"{groups.dtype} of shape {tuple(groups.shape)}"
        raise ValueError(f"groups: {what} for {pairs} pairs; give an integer, or several, for each")
    keys = groups.reshape(pairs, -1)
    return Groups(rows=keys, columns=keys)


def numbered(keys: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """A number below `n` for each key; as `unique` gives, but without waiting for the device."""
    return torch.searchsorted(keys.sort().values, keys)


def mean_positives(groups: Int[Tensor, "n k"]) -> Float[Tensor, ""]:
    """How many other pairs of the batch match a pair, on average."""
    ones = torch.ones(len(groups), 1, device=groups.device)
    _, counts = Groups(rows=groups, columns=groups).sums(ones)
    return counts.float().mean() - 1
