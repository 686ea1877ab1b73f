"""Imports of the libraries that a command needs, which are most of its start, and its device.

Each command names its libraries itself; here is what makes their import quicker.
"""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `--help` does without
    import torch


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import within it what a command needs; that takes a sixth less time.

    PyTorch and the libraries around it make half a million objects that stay. Python's cyclic
    collector would go through them again and again while they come, and later at each full
    collection. So it rests here, and leaves them alone afterwards. In a process that has PyTorch
    already it goes on, since what else is there may be garbage.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if "triton" in sys.modules:  # what is left of it at the end, it complains of in many lines
            atexit.register(gc.unfreeze)


def open_device(name: str = "auto") -> "torch.device":
    """The device that `--device` names, with torch set up for it; importing torch takes a second.

    Raises:
        ValueError: It cannot be used.
    """
    import torch

    from protoclip.distributed import collectives

    torch.set_flush_denormal(True)  # CPUs are very slow with the denormals of soft targets
    return collectives.device(name, setting="device" if name == "auto" else "--device")
