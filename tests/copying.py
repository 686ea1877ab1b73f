"""Counts copies to a device without one."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Copies(TorchDispatchMode):
    """Collects the operations that bring a tensor from the CPU to `meta`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        # A single number travels with the kernel that uses it.
        from_cpu = any(one.device.type == "cpu" and one.dim() for one in given)
        if from_cpu and any(one.device.type == "meta" for one in made):
            self.names.append(str(func))
        return result
