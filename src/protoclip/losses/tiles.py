"""Softmaxes over many classes, tile by tile, without the matrix of all rows times all classes.

A running maximum and sum join the tiles, as in FlashAttention (Dao et al. 2022). It is plain torch,
exact to rounding in any floating dtype, and takes the time of its matrix products. `Groups` says
which pairs of a batch are positives of each other: those that match in a key, an integer that equal
captions, equal images or equal classes share.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from protoclip.distributed import collectives

# What pairs that match are: negatives as all others, no part of the loss, or positives.
Positives = Literal["pair", "masked", "shared"]
HIDDEN = -1e30  # a logit that has no share; finite, since a tile may have no other
EVERY = slice(0, None)  # row or column of the logits
ROWS = 512  # of a tile
# Scores of a tile. 1 MB stays in the cache of a CPU; a GPU needs more to be busy.
CPU_SCORES, GPU_SCORES = 2**18, 2**23
# A million times exp(-60) is nothing beside 1. Smaller exponentials become slow denormals.
LEAST_EXPONENT = -60.0


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The keys of the rows and columns of a batch's logits. Row `r` pairs with column `first + r`,
    if there is one. A tile of the logits is named by the slices of its rows and columns.

    Two pairs match if any of their keys is equal. That is not transitive, and need not be: image i
    and text j belong together because the data hold i with the text of j, or with j's image. What
    hangs together by a third pair, as all images do that share "a photo" with another, does not.
    """

    rows: Int[Tensor, "b k"]
    columns: Int[Tensor, "n k"]
    first: int = 0
    shared: bool = True  # whether pairs that match are positives; else they are masked

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

    def pass_on(self) -> "Groups":
        """The groups of the same rows, and of the columns of the rank before. Collective."""
        columns = collectives.pass_on(self.columns)
        first = self.first + len(columns)
        return Groups(rows=self.rows, columns=columns, first=first, shared=self.shared)

    def gather(self) -> "Groups":
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


def shape(rows: Float[Tensor, "b _"]) -> tuple[int, int]:
    """Rows and columns of a tile."""
    height = min(ROWS, max(1, len(rows)))
    scores = CPU_SCORES if rows.device.type == "cpu" else GPU_SCORES
    return height, max(1, scores // height)


def blocks(features: Float[Tensor, "b _"]) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile of a batch's logits."""
    height, width = shape(features)
    for top in range(0, len(features), height):
        for left in range(0, len(features), width):
            yield slice(top, top + height), slice(left, left + width)


def parts_of(rows: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Parts of so many rows, each with its slice."""
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        yield part, rows[part]


@cache
def onednn_linear() -> Callable[[Tensor, Tensor], Tensor] | None:
    """oneDNN's `x @ w.T` of float32, or `None` if torch has no such entry point.

    torch's own products use MKL, which on AMD CPUs has half its speed. The entry point is private
    to torch, so a small product checks it first.
    """
    probe = torch.arange(6.0).view(2, 3)
    try:
        linear = torch.ops.mkldnn._linear_pointwise
        works = torch.equal(linear(probe, probe, None, "none", [], ""), probe @ probe.T)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return (lambda x, w: linear(x, w, None, "none", [], "")) if works else None


def scores(x: Float[Tensor, "r d"], w: Float[Tensor, "c d"]) -> Float[Tensor, "r c"]:
    """`x @ w.T`, a new tensor, computed in the fastest way."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and (linear := onednn_linear()):
        return linear(x, w)
    return x @ w.T


def exponential(x: Tensor) -> Tensor:
    """`exp` of values up to about 0, in place and without denormals."""
    return x.clamp_(min=LEAST_EXPONENT).exp_()


def log_sum(tile: Float[Tensor, "r c"], dim: int) -> Float[Tensor, " _"]:
    """Log-sum-exp along a dimension."""
    peak = tile.amax(dim, keepdim=True)
    return exponential(tile - peak).sum(dim).log_() + peak.squeeze(dim)


def widen(*tensors: Tensor) -> list[Tensor]:
    """All in float32, or in the widest of their dtypes."""
    dtype = reduce(torch.promote_types, [tensor.dtype for tensor in tensors], torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


def without_autocast(x: Tensor) -> torch.autocast:
    """Keeps autocast from rounding scores of up to 100 to the three digits of bfloat16."""
    return torch.autocast(x.device.type, enabled=False)


@torch.no_grad()
def attend(
    queries: Float[Tensor, "b q"],
    keys: Float[Tensor, "n q"],
    values: Float[Tensor, "n p"],
    groups: Groups | None = None,
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b p"]]:
    """`logsumexp(queries @ keys.T, 1)` and `softmax(queries @ keys.T, 1) @ values`; no gradient.

    With `groups` that are masked, others of a query's group are left out.
    """
    height, width = shape(queries)
    log_sums, means = [], []
    with without_autocast(queries):
        for i, rows in parts_of(queries, height):
            peak = rows.new_full((len(rows), 1), float("-inf"))
            total = rows.new_zeros(len(rows), 1)
            weighted = rows.new_zeros(len(rows), values.shape[1])
            for j, key in parts_of(keys, width):
                tile = scores(rows, key)
                if groups is not None:
                    groups.hide(tile, i, j)
                higher = torch.maximum(peak, tile.amax(1, keepdim=True))
                shares = exponential(tile.sub_(higher))
                shrink = (peak - higher).exp_()
                total.mul_(shrink).add_(shares.sum(1, keepdim=True))
                weighted.mul_(shrink).add_(scores(shares, values[j].T))
                peak = higher
            log_sums.append((peak + total.log()).squeeze(1))
            means.append(weighted.div_(total))
    return torch.cat(log_sums), torch.cat(means)


class LogSumExp(torch.autograd.Function):
    """See `log_sum_exp`. Its gradient for a query is the mean key, which the forward pass computes
    too, less the mean key of its group. A gradient of keys needs the scores again."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, groups: Groups | None) -> Tensor:
        log_sums, means = attend(queries, keys, keys, groups)
        again = (queries, keys, log_sums) if ctx.needs_input_grad[1] else ()
        if groups is not None and groups.shared:
            of_group = torch.zeros_like(means)
            height, width = shape(queries)
            with without_autocast(queries):
                for i, _ in parts_of(queries, height):
                    for j, key in parts_of(keys, width):
                        of_group[i] += scores(groups.targets(i, j, key), key.T)
            log_sums = log_sums - (queries * of_group).sum(1)
            means -= of_group
        ctx.groups = groups
        ctx.save_for_backward(means, *again)
        return log_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (means, *again), groups = ctx.saved_tensors, ctx.groups
        to_queries = gradient.unsqueeze(1) * means
        if not again:
            return to_queries, None, None
        queries, keys, log_sums = again
        height, width = shape(queries)
        to_keys = torch.zeros_like(keys)
        with without_autocast(queries):
            for i, rows in parts_of(queries, height):
                weighted = (gradient[i].unsqueeze(1) * rows).T
                for j, key in parts_of(keys, width):
                    tile = scores(rows, key)
                    if groups is not None:
                        groups.hide(tile, i, j)
                    shares = exponential(tile.sub_(log_sums[i].unsqueeze(1)))
                    if groups is not None and groups.shared:
                        shares -= groups.targets(i, j, key)
                    to_keys[j] += scores(shares.T, weighted)
        return to_queries, to_keys, None


def log_sum_exp(
    queries: Float[Tensor, "b p"], keys: Float[Tensor, "n p"], groups: Groups | None = None
) -> Float[Tensor, " b"]:
    """`logsumexp(queries @ keys.T, 1)` with gradients for queries and keys.

    With `groups` others of a query's group are left out if they are masked; if they are shared, the
    mean score of the group is subtracted, which makes it a cross-entropy.
    """
    log_sums: Tensor = LogSumExp.apply(queries, keys, groups)  # type: ignore[no-untyped-call]
    return log_sums
