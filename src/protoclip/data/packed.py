"""Several tensors in one block of bytes, so that one copy brings them to another device.

What is in the block of a batch is decided in `loader.py`, which copies the images beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

ALIGNMENT = 16  # bytes; every data type may be read at a multiple of its own size


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Tensors by name in one block. `layout` has the data type, shape and first byte of each.

    >>> packed = Packed.of({"position": torch.arange(2), "draws": torch.tensor([[0.5]])})
    >>> packed.unpack(torch.device("cpu"))
    {'position': tensor([0, 1]), 'draws': tensor([[0.5000]])}
    """

    block: UInt8[Tensor, " n"]
    layout: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Packed":
        """Pack tensors that are on the CPU."""
        layout, end = [], 0
        for name, tensor in tensors.items():
            layout.append((name, tensor.dtype, tuple(tensor.shape), end))
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        block = torch.zeros(end, dtype=torch.uint8)
        packed = cls(block=block, layout=tuple(layout))
        for name, view in packed._views(block).items():
            view.copy_(tensors[name])
        return packed

    def unpack(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors on a device, after at most one copy. They share memory with each other."""
        return self._views(self.block.to(device, non_blocking=self.block.is_pinned()))

    def send(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors on a device; no one waits for the copy to a card."""
        return (self.pin_memory() if device.type == "cuda" else self).unpack(device)

    def pin_memory(self, device: str | None = None) -> "Packed":
        """The same in page-locked memory; `DataLoader` calls it."""
        return Packed(block=self.block.pin_memory(), layout=self.layout)

    def _views(self, block: Tensor) -> dict[str, Tensor]:
        views = {}
        for name, dtype, shape, first in self.layout:
            size = dtype.itemsize
            for length in shape:
                size *= length
            views[name] = block[first : first + size].view(dtype).view(shape)
        return views
