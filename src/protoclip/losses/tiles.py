"""Softmaxes over many classes, tile by tile, without the matrix of all rows times all classes.

A running maximum and sum join the tiles, as in FlashAttention (Dao et al. 2022). It is plain torch,
exact to rounding in any floating dtype, and takes the time of its matrix products.
"""

from collections.abc import Callable, Iterator
from functools import cache, reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from protoclip.losses.positives import Groups

ROWS = 512
# Scores of a tile. 1 MB stays in the cache of a CPU; a GPU needs more to be busy.
CPU_SCORES, GPU_SCORES = 2**18, 2**23
# A million times exp(-60) is nothing beside 1. Smaller exponentials become slow denormals.
LEAST_EXPONENT = -60.0


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


def widened(*tensors: Tensor) -> list[Tensor]:
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
    too, less the mean key of its group. If keys need a gradient, the backward pass computes the
    scores again."""

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
