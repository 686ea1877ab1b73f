"""The device of a command other than training, with torch set up for it.

Whether a machine has such a device is told by `distributed/collectives.py`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `--help` does without
    import torch


def open_device(name: str = "auto") -> "torch.device":
    """The device that `--device` names, with torch set up for it; importing torch takes a second.

    Raises:
        ValueError: It cannot be used.
    """
    import torch

    from protoclip.distributed import collectives

    torch.set_flush_denormal(True)  # CPUs are very slow with the denormals of soft targets
    return collectives.device(name, setting="device" if name == "auto" else "--device")
