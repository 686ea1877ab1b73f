"""PCA of a teacher's features, and whitening, which makes all directions count alike.

Directions in which features vary more count more in their distances, so K-means divides along these
first, and hardly by what only some samples have.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from protoclip.distributed import collectives

Features = npt.NDArray[np.floating]
ROWS_A_DIRECTION = 8  # fewest rows that a whitening is fitted to
LEAST_VARIANCE = 1e-6  # of the largest: directions with less are rounding errors


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """Moves features to mean 0, keeps some directions at equal variance, and scales to unit norm.

    So were features prepared for K-means in DeepCluster (Caron et al. 2018, arXiv 1807.05520).
    """

    mean: Float[Tensor, " q"]
    axes: Float[Tensor, "q w"]

    @classmethod
    def fit(cls, features: Float[Tensor, "n q"], width: int) -> "Whitening":
        """Whitening by the `width` directions in which these rows vary most, or by all there are.

        >>> rows = torch.tensor([[9.0, 1.0], [9.0, -1.0], [-9.0, 1.0], [-9.0, -1.0]])
        >>> (Whitening.fit(rows, 2)(rows) * 2**0.5).round().abs().tolist()[0]
        [1.0, 1.0]
        """
        rows = features.double().numpy()
        mean, axes, _ = fit_pca([rows], min(width, rows.shape[1]))
        variances = ((rows - mean) @ axes.T).var(0)
        kept = variances > LEAST_VARIANCE * variances.max()
        scaled = axes[kept].T / np.sqrt(variances[kept])
        return cls(mean=torch.from_numpy(mean).float(), axes=torch.from_numpy(scaled).float())

    def to(self, device: torch.device) -> "Whitening":
        return Whitening(mean=self.mean.to(device), axes=self.axes.to(device))

    def __call__(self, features: Float[Tensor, "n q"]) -> Float[Tensor, "n w"]:
        """These rows whitened. A row of NaN stays one."""
        return F.normalize((features - self.mean) @ self.axes)


def fit_pca(blocks: Iterable[Features], width: int) -> tuple[Features, Features, float]:
    """Exact PCA in one pass, by sums in float64.

    Returns the mean `(q,)`, the axes `(width, q)` by falling variance (the largest coordinate of
    each is positive), and the share of the variance along them.
    """
    count, total, outer = 0, cast(Any, 0), cast(Any, 0)
    for block in blocks:
        rows = block.astype(np.float64)
        count, total, outer = count + len(rows), total + rows.sum(0), outer + rows.T @ rows
    mean = total / count
    variances, vectors = np.linalg.eigh(outer / count - np.outer(mean, mean))
    axes = vectors.T[::-1][:width]
    axes = axes * np.sign(axes[np.arange(width), np.abs(axes).argmax(1)])[:, None]
    everything = max(float(variances.sum()), np.finfo(np.float64).tiny)
    return mean, axes, float(np.clip(variances[-width:].sum() / everything, 0, 1))


class Whitens(ABC):
    """Features by sample id, which are whitened when they are looked up, once `whiten` was called.

    Attributes:
        width: Of the features before.
        modality: What they were made of, `image` or `text`, where that is known.
    """

    width: int
    modality: str | None = None
    whitening: Whitening | None = None

    @abstractmethod
    def rows(self, sample_ids: Sequence[str]) -> Float[Tensor, "m q"]:
        """Features of these samples in this order; a row of NaN for one without."""

    @abstractmethod
    def sample(self) -> Features:
        """Some thousand of the features, evenly drawn."""

    def whiten(self, width: int) -> None:
        """Whiten what is looked up from now on, if it is wider. Collective.

        Rank 0 fits the whitening for all: processors may round differently, and the rows of all
        ranks are clustered together.
        """
        if self.width > width:
            self.whitening = collectives.rank0_first(lambda: self._fit_whitening(width))

    def _fit_whitening(self, width: int) -> Whitening | None:
        """The whitening of a sample of the rows; None if too few of them differ.

        Few different rows would lie equally far from each other along as many directions, so there
        are `ROWS_A_DIRECTION` times as many rows as directions.
        """
        rows = self.sample()
        width = min(width, len(np.unique(rows, axis=0)) // ROWS_A_DIRECTION)
        if not width:
            return None
        return Whitening.fit(torch.from_numpy(rows.astype(np.float32)), width)

    def whitened(self, rows: Float[Tensor, "m q"]) -> Float[Tensor, "m _"]:
        """These rows in float32, on their device; whitened if `whiten` was called."""
        if self.whitening is None:
            return rows.float()
        if self.whitening.mean.device != rows.device:  # moved once
            self.whitening = self.whitening.to(rows.device)
        return self.whitening(rows.float())
