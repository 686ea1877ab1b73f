"""Principal component analysis of more rows than fit into memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from protoclip.distributed.collectives import all_gather_object


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """A projection onto the axes of largest variance.

    Attributes:
        mean: Of the rows it was fitted to.
        axes: Of unit norm, by falling variance; the largest coordinate of each is positive.
        variance_kept: Share of the rows' variance that lies along these axes, in [0, 1].
    """

    mean: Float[np.ndarray, " q"]
    axes: Float[np.ndarray, "r q"]
    variance_kept: float

    def __call__(self, features: Float[np.ndarray, "n q"]) -> Float[np.ndarray, "n r"]:
        reduced: npt.NDArray[np.float64] = (features.astype(np.float64) - self.mean) @ self.axes.T
        return reduced


def fit_reduction(
    blocks: Iterable[npt.NDArray[np.floating]], width: int, *, sharded: bool = False
) -> Reduction:
    """Exact PCA in one pass, from the sums of all rows and of their outer products, in float64.

    Args:
        blocks: Rows `(n, q)`, some at a time; at least one.
        width: Axes to keep, at most `q`.
        sharded: The blocks are this process's share, which may be none; all processes get the
            PCA of all rows.
    """
    gather = all_gather_object if sharded else lambda value: [value]
    remaining = iter(blocks)
    first = next(remaining, None)
    # Sums of squares lose digits far from zero; the mean of some rows is near enough.
    means = gather(None if first is None else first.astype(np.float64).mean(axis=0))
    origin = next(mean for mean in means if mean is not None)
    count, total, outer = 0, np.zeros_like(origin), np.zeros((len(origin),) * 2)
    for block in chain([] if first is None else [first], remaining):
        rows = block.astype(np.float64) - origin
        count, total, outer = count + len(rows), total + rows.sum(0), outer + rows.T @ rows
    count, total, outer = (sum(parts) for parts in zip(*gather((count, total, outer)), strict=True))
    shift = total / count
    variances, vectors = np.linalg.eigh(outer / count - np.outer(shift, shift))
    axes = vectors.T[::-1][:width]
    largest = np.abs(axes).argmax(axis=1)
    # An axis has no sign of its own.
    axes = axes * np.sign(axes[np.arange(len(axes)), largest])[:, None]
    whole = max(float(variances.sum()), np.finfo(np.float64).tiny)
    return Reduction(
        mean=origin + shift,
        axes=axes,
        variance_kept=float(np.clip(variances[::-1][:width].sum() / whole, 0, 1)),
    )
