"""Nearest rows by cosine: exact, or by an index of faiss where there are many rows.

Queries are encoded in `explorer.py`, and nearest centroids are found in `prototypes/nearest.py`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# With more rows than this an index pays, if faiss is installed.
EXACT_ROWS = 2_000_000
CHUNK_ELEMENTS = 20_000_000  # similarities that are held at a time
TRAINING_ROWS, PROBES = 100_000, 32  # of the index

NearestRows = tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]  # similarities, and rows


class Neighbours:
    """Finds the rows whose features are nearest to a query.

    Args:
        features: Rows of any norm, which may be mapped into memory.
        exact_rows: Rows up to which the search is exact. Beyond, an inverted file of faiss looks
            at some of the rows, where faiss is installed.
    """

    def __init__(self, features: Float[Tensor, "n d"], *, exact_rows: int = EXACT_ROWS) -> None:
        self.features = features
        norms = [chunk.norm(dim=1) for chunk in torch.split(features, 1 << 16)]
        self.norms = torch.cat(norms).clamp(min=1e-12)
        self._index = self._build() if len(features) > exact_rows else None

    @property
    def exact(self) -> bool:
        return self._index is None

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, rows: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Unit-norm features of some rows."""
        return self.features[rows] / self.norms[rows].unsqueeze(1)

    def search(self, queries: Float[Tensor, "b d"], number: int) -> NearestRows:
        """The `number` nearest rows of each query, the nearest first; fewer if there are fewer."""
        queries, number = F.normalize(queries.float(), dim=1), min(number, len(self))
        if self._index is not None:
            similarity, rows = self._index.search(queries.numpy(), number)
            return torch.from_numpy(similarity), torch.from_numpy(rows)
        best: NearestRows | None = None
        size = max(number, CHUNK_ELEMENTS // max(1, len(queries)))
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            similarity = queries @ self.features[part].float().T / self.norms[part]
            nearest = similarity.topk(min(number, similarity.shape[1]), dim=1)
            rows = nearest.indices + start
            if best is not None:
                joined = torch.cat([best[0], nearest.values], 1)
                top = joined.topk(min(number, joined.shape[1]), dim=1)
                best = top.values, torch.cat([best[1], rows], 1).gather(1, top.indices)
            else:
                best = nearest.values, rows
        assert best is not None
        return best

    def _build(self) -> Any:
        """An inverted file of faiss; None if it is not installed."""
        try:
            import faiss
        except ImportError:
            return None
        number, width = self.features.shape
        lists = int(4 * number**0.5)
        index = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT
        )
        index.nprobe = PROBES
        every = max(1, number // TRAINING_ROWS)
        index.train(self.rows(torch.arange(0, number, every)).numpy())
        for start in range(0, number, 1 << 16):
            index.add(self.rows(torch.arange(start, min(start + (1 << 16), number))).numpy())
        return index


def all_but_first(pairs: Iterable[Sequence[int]]) -> set[int]:
    """Of numbers that pairs join, directly or through others, all but the lowest of each group.

    >>> sorted(all_but_first([(0, 2), (1, 2), (5, 7)]))
    [1, 2, 7]
    """
    lower: dict[int, int] = {}  # one that each is joined to, up to the lowest

    def lowest(number: int) -> int:
        while number in lower:
            number = lower[number]
        return number

    for one, other in pairs:
        ends = {lowest(one), lowest(other)}
        if len(ends) == 2:
            lower[max(ends)] = min(ends)
    return {*lower}


def near_duplicates(
    neighbours: Neighbours, *, least: float, most: int, batch: int = 512
) -> tuple[Int[Tensor, "p 2"], Float[Tensor, " p"]]:
    """Pairs of rows whose cosine is at least `least`, the most similar first, at most `most`.

    Each row stands with its nearest other row only.
    """
    pairs, values = [], []
    for start in range(0, len(neighbours), batch):
        rows = torch.arange(start, min(start + batch, len(neighbours)))
        similarity, nearest = neighbours.search(neighbours.rows(rows), 2)
        is_self = nearest == rows.unsqueeze(1)
        # A row may not be among its two nearest, if it has many copies.
        column = is_self[:, 0].long().clamp(max=nearest.shape[1] - 1)
        other = nearest.gather(1, column.unsqueeze(1)).squeeze(1)
        value = similarity.gather(1, column.unsqueeze(1)).squeeze(1)
        near = (value >= least) & (other != rows) & (other >= 0)
        pairs.append(torch.stack([rows, other], 1)[near].sort(dim=1).values)
        values.append(value[near])
    all_pairs, all_values = torch.cat(pairs), torch.cat(values)
    _, first = np.unique(all_pairs.numpy(), axis=0, return_index=True)
    kept = torch.from_numpy(first)
    order = kept[all_values[kept].argsort(descending=True, stable=True)][:most]
    return all_pairs[order], all_values[order]
