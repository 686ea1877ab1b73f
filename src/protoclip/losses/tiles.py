"""Softmaxes over many classes, tile by tile: the matrix of all rows times all classes never exists.

A running maximum and sum join the tiles, as in FlashAttention (Dao et al. 2022). All of it is plain
torch, exact to rounding in any floating dtype, and its time is that of the matrix products.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 512
# Scores of a tile. On a CPU one of 1 MB stays in cache; a GPU is only busy with larger ones.
CPU_SCORES, GPU_SCORES = 2**18, 2**23
# exp(-60) is nothing beside 1, in float64 and a million times over too. Smaller exponentials end as
# denormals, which many CPUs handle far more slowly than other numbers.
LEAST_EXPONENT = -60.0


def shape(rows: Float[Tensor, "b _"]) -> tuple[int, int]:
    """Rows and columns of a tile."""
    height = min(ROWS, max(1, len(rows)))
    scores = CPU_SCORES if rows.device.type == "cpu" else GPU_SCORES
    return height, max(1, scores // height)


@cache
def onednn_linear() -> Callable[[Tensor, Tensor], Tensor] | None:
    """oneDNN's `x @ w.T` of float32, or `None` where torch has no such entry point.

    torch's own products go through MKL, which reaches half of oneDNN's speed on AMD CPUs. The
    entry point is private to torch, so it is tried before it is trusted.
    """
    probe = torch.arange(6.0).view(2, 3)
    try:
        linear = torch.ops.mkldnn._linear_pointwise
        works = torch.equal(linear(probe, probe, None, "none", [], ""), probe @ probe.T)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return (lambda x, w: linear(x, w, None, "none", [], "")) if works else None


def scores(x: Float[Tensor, "r d"], w: Float[Tensor, "c d"]) -> Float[Tensor, "r c"]:
    """`x @ w.T`, a new tensor, in the fastest way there is."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and (linear := onednn_linear()):
        return linear(x, w)
    return x @ w.T


def exponential(x: Tensor) -> Tensor:
    """`exp` of what is at most about 0, in place and free of denormals."""
    return x.clamp_(min=LEAST_EXPONENT).exp_()


def log_sum(tile: Float[Tensor, "r c"], dim: int) -> Float[Tensor, " _"]:
    """Log-sum-exp along a dimension."""
    peak = tile.amax(dim, keepdim=True)
    return exponential(tile - peak).sum(dim).log_() + peak.squeeze(dim)


def widened(*tensors: Tensor) -> list[Tensor]:
    """All in one floating dtype: float32, or the widest of theirs."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def without_autocast(x: Tensor) -> torch.autocast:
    """Keeps autocast from rounding scores of up to 100 to the three digits of bfloat16."""
    return torch.autocast(x.device.type, enabled=False)


@torch.no_grad()
def attend(
    queries: Float[Tensor, "b q"], keys: Float[Tensor, "n q"], values: Float[Tensor, "n p"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b p"]]:
    """Log-sum-exp of each query's scores, and the mean value under their softmax; no gradient.

    Args:
        queries: One row a query; scores are inner products, so any scale belongs in here.
        keys: One row a class.
        values: What to average, one row a class.

    Returns:
        `logsumexp(queries @ keys.T)` and `softmax(queries @ keys.T) @ values`.
    """
    height, width = shape(queries)
    log_sums, means = [], []
    with without_autocast(queries):
        for rows in torch.split(queries, height):
            peak = rows.new_full((len(rows), 1), float("-inf"))
            total = rows.new_zeros(len(rows), 1)
            weighted = rows.new_zeros(len(rows), values.shape[1])
            for key, value in zip(
                torch.split(keys, width), torch.split(values, width), strict=True
            ):
                tile = scores(rows, key)
                higher = torch.maximum(peak, tile.amax(1, keepdim=True))
                shares = exponential(tile.sub_(higher))
                shrink = (peak - higher).exp_()
                total.mul_(shrink).add_(shares.sum(1, keepdim=True))
                weighted.mul_(shrink).add_(scores(shares, value.T))
                peak = higher
            log_sums.append((peak + total.log()).squeeze(1))
            means.append(weighted.div_(total))
    return torch.cat(log_sums), torch.cat(means)


class LogSumExp(torch.autograd.Function):
    """See `log_sum_exp`. One pass gives it and its gradient for the queries, their mean key under
    the softmax; where keys have a gradient, their scores are computed once more for it."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor) -> Tensor:
        log_sums, means = attend(queries, keys, keys)
        again = (queries, keys, log_sums) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(means, *again)
        return log_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        means, *again = ctx.saved_tensors
        to_keys = given_to_keys(gradient, *again) if again else None
        return gradient.unsqueeze(1) * means, to_keys


def given_to_keys(
    weights: Float[Tensor, " b"],
    queries: Float[Tensor, "b p"],
    keys: Float[Tensor, "n p"],
    log_sums: Float[Tensor, " b"],
) -> Float[Tensor, "n p"]:
    """`softmax(queries @ keys.T).T @ (weights * queries)`, from the log-sum-exp of each query."""
    height, width = shape(queries)
    given = torch.zeros_like(keys)
    with without_autocast(queries):
        for rows, log_sum_, weight in zip(
            *(torch.split(each, height) for each in (queries, log_sums, weights)), strict=True
        ):
            weighted = (weight.unsqueeze(1) * rows).T
            for key, to in zip(torch.split(keys, width), torch.split(given, width), strict=True):
                shares = exponential(scores(rows, key).sub_(log_sum_.unsqueeze(1)))
                to += scores(shares.T, weighted)
    return given


def log_sum_exp(queries: Float[Tensor, "b p"], keys: Float[Tensor, "n p"]) -> Float[Tensor, " b"]:
    """`logsumexp(queries @ keys.T, 1)` with gradients for queries and keys, tile by tile."""
    log_sums: Tensor = LogSumExp.apply(queries, keys)  # type: ignore[no-untyped-call]
    return log_sums
