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
    """See `log_sum_exp`. The gradient is the mean key under the softmax; one pass gives both."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor) -> Tensor:
        log_sums, means = attend(queries, keys, keys)
        ctx.save_for_backward(means)
        return log_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (means,) = ctx.saved_tensors
        return gradient.unsqueeze(1) * means, None


def log_sum_exp(queries: Float[Tensor, "b p"], keys: Float[Tensor, "n p"]) -> Float[Tensor, " b"]:
    """`logsumexp(queries @ keys.T, 1)` and its gradient for the queries; keys are constants."""
    log_sums: Tensor = LogSumExp.apply(queries, keys.detach())  # type: ignore[no-untyped-call]
    return log_sums
