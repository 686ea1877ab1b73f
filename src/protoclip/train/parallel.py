"""One model in several processes, by PyTorch's own means, applied from outside."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from protoclip.distributed import world_size
from protoclip.models.protoclip import Embeddings
from protoclip.models.sync_batch_norm import has_own_statistics


def distribute(model: nn.Module) -> nn.Module:
    """The model as a stage trains it: itself, or with gradients that are means over processes.

    To be called whenever parameters were frozen or freed, since DDP looks at that once.
    """
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    with warnings.catch_warnings():
        # torch 2.13 renames `broadcast_buffers`; versions before do not know the new name.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            # Where processes normalise each by its own batch, the first one's statistics are kept.
            broadcast_buffers=has_own_statistics(model),
            gradient_as_bucket_view=True,
        )


def apart(module: nn.Module) -> Callable[[], AbstractContextManager[object]]:
    """A context in which gradients add up in each process, to be made means at a later one."""
    return module.no_sync if isinstance(module, DistributedDataParallel) else nullcontext


def reach_everything(embeddings: Embeddings) -> torch.Tensor:
    """Zero, computed from all that the model gives, so that every parameter has a gradient.

    A loss of weight 0 leaves a head or a temperature out, and DDP would wait for it.
    """
    parts = [value.sum() for value in vars(embeddings).values() if value is not None]
    return 0.0 * torch.stack(parts).sum()
