"""Which pairs of a batch are positives of each other: those that match in a key.

A key is an integer that equal captions, equal images or equal classes share.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protoclip.distributed import collectives

# What pairs that match are: negatives as all others, no part of the loss, or positives.
Positives = Literal["pair", "masked", "shared"]
HIDDEN = -1e30  # a logit that has no share; finite, since a tile may have no other
EVERY = slice(0, None)  # row or column of the logits
ROWS = 512  # of the mask from which they are counted


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The keys of the rows and columns of a batch's logits. Row `r` pairs with column `first + r`,
    if there is one. A tile of the logits is named by the slices of its rows and columns.

    Two pairs match if any of their keys is equal. That is not transitive, and need not be: image i
    and text j belong together because the data hold i with the text of j, or with j's image. What
    hangs together by a third pair, as all images do that share "a photo" with another, does not.

    Attributes:
        shared: Whether pairs that match are positives; else they are masked.
    """

    rows: Int[Tensor, "b k"]
    columns: Int[Tensor, "n k"]
    first: int = 0
    shared: bool = True

    def same(self, i: slice, j: slice) -> Bool[Tensor, "r c"]:
        """Which rows and columns match. A pair matches itself."""
        rows, columns = self.rows[i], self.columns[j]
        same = rows[:, :1] == columns[:, 0]
        for key in range(1, rows.shape[1]):
            same |= rows[:, key, None] == columns[:, key]
        return same

    def others(self, i: slice, j: slice) -> Bool[Tensor, "r c"]:
        """As `same`, without the pairs themselves."""
        same = self.same(i, j)
        same.diagonal(self.first + i.start - j.start).fill_(False)
        return same

    def hide(self, tile: Float[Tensor, "r c"], i: slice, j: slice) -> Float[Tensor, "r c"]:
        """Mask the logits of other pairs that match, in place, unless positives are shared."""
        return tile if self.shared else tile.masked_fill_(self.others(i, j), HIDDEN)

    @cached_property
    def counts(self) -> Int[Tensor, " b"]:
        """How many columns each row matches, itself included."""
        parts = [slice(top, top + ROWS) for top in range(0, len(self.rows), ROWS)]
        return torch.cat([self.same(part, EVERY).sum(1) for part in parts])

    def targets(self, i: slice, j: slice, like: Tensor) -> Float[Tensor, "r c"]:
        """What the softmax of each row shall be: equal shares for all that it matches."""
        return self.same(i, j).to(like).div_(self.counts[i].unsqueeze(1))

    def both_targets(self, i: slice, j: slice, like: Tensor) -> Float[Tensor, "r c"]:
        """`targets` of rows, plus those of columns, of a batch on one rank."""
        shares = 1 / self.counts.to(like)
        return (shares[i].unsqueeze(1) + shares[j]).masked_fill_(~self.same(i, j), 0)

    def passed_on(self) -> "Groups":
        """The groups of the same rows, and of the columns of the rank before. Collective."""
        columns = collectives.pass_on(self.columns)
        first = self.first + len(columns)
        return Groups(rows=self.rows, columns=columns, first=first, shared=self.shared)

    def gathered(self) -> "Groups":
        """The groups of the same rows, and of the columns of all ranks. Collective."""
        columns = collectives.all_gather_with_gradient(self.columns)
        first = collectives.rank() * len(self.rows)
        return Groups(rows=self.rows, columns=columns, first=first, shared=self.shared)


def groups_of(groups: Tensor | None, pairs: int, positives: Positives) -> Groups | None:
    """The groups of a batch of pairs on one rank, by one key each `(b,)` or several `(b, k)`; none
    where all pairs are negatives of each other.

    Raises:
        ValueError: They are no integers, or not as many as there are pairs.
    """
    if groups is None or positives == "pair":
        return None
    if len(groups) != pairs or groups.is_floating_point():
        what = f"{groups.dtype} of shape {tuple(groups.shape)}"
        raise ValueError(f"groups: {what} for {pairs} pairs; give an integer, or several, for each")
    keys = groups.reshape(pairs, -1)
    return Groups(rows=keys, columns=keys, shared=positives == "shared")


def mean_positives(groups: Int[Tensor, "n k"]) -> Float[Tensor, ""]:
    """How many other pairs of the batch match a pair, on average."""
    return Groups(rows=groups, columns=groups).counts.float().mean() - 1
