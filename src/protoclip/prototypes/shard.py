"""Rows that are shared out over processes: which are here, and what is said of all of them.

Rows stay where they are. Sums, one number a row, and the few rows that centroids start from travel.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from protoclip.distributed import collectives


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The share of a set of rows that this process has; without `order`, all of them.

    With `order` every method is collective, except `find`: all processes call it, in the same
    order, and have the same bits afterwards.

    Attributes:
        order: Number of each row here among the rows of all processes.
        orders: The same of the rows of all processes, rank after rank.
    """

    order: Int[Tensor, " n"] | None = None
    orders: Int[Tensor, " m"] | None = None

    @classmethod
    def of(cls, positions: Int[Tensor, " n"], *, without_gaps: bool = False) -> "Shard":
        """The share whose rows are at these positions among those of all processes. Collective.

        Raises:
            ValueError: A position is there twice, here or in two processes, or `without_gaps` is
                asked for and they are not 0 to `m - 1`; raised in all.
        """
        positions = positions.long()
        everyones = collectives.all_gather(positions)
        ascending = everyones.sort().values
        twice = ascending[1:][ascending[1:] == ascending[:-1]]
        if len(twice):
            raise ValueError(f"positions: {int(twice[0])} is there more than once")
        numbers = torch.arange(len(ascending), device=ascending.device)
        if without_gaps and not torch.equal(ascending, numbers):
            raise ValueError(f"positions: need to be 0 to {len(numbers) - 1} without gaps")
        return cls(
            order=torch.searchsorted(ascending, positions),
            orders=torch.searchsorted(ascending, everyones),
        )

    @property
    def is_part(self) -> bool:
        """Whether the rows here are to be taken together with those of other processes."""
        return self.order is not None

    def total(self, values: Shaped[Tensor, "n *_"]) -> int:
        """Number of rows of all processes; `values` has one for each row here."""
        return len(values) if self.orders is None else len(self.orders)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over processes."""
        return collectives.all_reduce(values) if self.is_part else values

    def mean(self, features: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
        """Mean of all rows."""
        if not self.is_part:
            return features.mean(0)
        return self.sum(features.sum(0)) / self.total(features)

    def own(self, values: Shaped[Tensor, " m"]) -> Shaped[Tensor, " n"]:
        """Of one value for each row of all processes, those of the rows here."""
        return values if self.order is None else values[self.order.to(values.device)]

    def whole(self, values: Shaped[Tensor, " n"]) -> Shaped[Tensor, " m"]:
        """The values of all rows, in the order of their positions, from those of the rows here."""
        if self.orders is None:
            return values
        everyones = collectives.all_gather(values)
        whole = torch.empty_like(everyones)
        whole[self.orders] = everyones
        return whole

    def find(self, numbers: Int[Tensor, " k"]) -> tuple[Int[Tensor, " j"], Int[Tensor, " j"]]:
        """Which of the numbered rows are here, as places in `numbers`, and their places here."""
        if self.order is None or self.orders is None:
            return torch.arange(len(numbers), device=numbers.device), numbers
        places = torch.full_like(self.orders, -1)
        places[self.order] = torch.arange(len(self.order), device=places.device)
        wanted = places[numbers]
        asked = torch.nonzero(wanted >= 0).flatten()
        return asked, wanted[asked]

    def rows(
        self, features: Float[Tensor, "n d"], numbers: Int[Tensor, " k"]
    ) -> Float[Tensor, "k d"]:
        """The numbered rows, wherever they are."""
        asked, places = self.find(numbers)
        found = features.new_zeros(len(numbers), features.shape[1])
        found[asked] = features[places]
        return self.sum(found)


ALONE = Shard()
