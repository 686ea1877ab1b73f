"""One model in several processes, by PyTorch's own means, applied from outside.

DDP keeps a copy of the model in each process. FSDP2 spreads parameters, gradients and moments over
the processes, for towers that are too large for one device.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from protoclip.distributed.collectives import (
    all_gather_object,
    all_reduce,
    broadcast,
    rank,
    world_size,
)
from protoclip.models.batch_norm import has_own_statistics
from protoclip.models.protoclip import Embeddings, ProtoCLIP

# What open_clip and timm call the layers of a transformer.
LAYERS = ("resblocks", "blocks")
# Whole tensors on the CPU of the first process; one at a time on every device.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: ProtoCLIP, device: torch.device) -> None:
    """Spread the parameters of a model without weights over the processes (FSDP2), in place.

    They have to be loaded then, before an optimizer is made for them. The layers of transformers
    are gathered one at a time, the rest together; the temperatures, which are single numbers, stay
    whole.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    for name, part in model.towers.named_modules():
        if name.rpartition(".")[2] in LAYERS:
            for layer in part.children():
                fully_shard(layer, mesh=mesh)
    whole = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    fully_shard(model, mesh=mesh, ignored_params=whole)
    model.to_empty(device=device)
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)


def distribute(model: nn.Module) -> nn.Module:
    """The model as a stage trains it: itself, or with gradients that are means over processes.

    To be called whenever parameters were frozen or freed, since DDP looks at that once; FSDP2 looks
    each time.
    """
    if world_size() == 1 or isinstance(model, FSDPModule):
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


def agree_on_statistics(model: nn.Module) -> None:
    """Take over the first process's BatchNorm statistics, which DDP does before each step alone."""
    if has_own_statistics(model):
        for buffer in model.buffers():
            broadcast(buffer)


def no_sync(module: nn.Module) -> Callable[[], AbstractContextManager[object]]:
    """A context in which gradients add up in each process, to be made means at a later one."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync

    @contextmanager
    def unreduced() -> Iterator[None]:
        assert isinstance(module, FSDPModule)
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)

    return unreduced if isinstance(module, FSDPModule) else nullcontext


def reach_everything(embeddings: Embeddings) -> Tensor:
    """Zero, computed from all that the model gives, so that every parameter has a gradient.

    A loss of weight 0 leaves a head or a temperature out, and DDP would wait for it.
    """
    parts = [value.sum() for value in vars(embeddings).values() if value is not None]
    return 0.0 * torch.stack(parts).sum()


def clip_gradients(model: nn.Module, most: float) -> Tensor:
    """Scale the whole gradient down to a norm, in place; returns the norm that it had.

    Gradients that FSDP2 leaves to each process, those of the temperatures, become means first.
    """
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if not isinstance(model, FSDPModule):
        return torch.nn.utils.clip_grad_norm_(trained, most)
    spread = [parameter for parameter in trained if isinstance(parameter, DTensor)]
    whole = [parameter for parameter in trained if not isinstance(parameter, DTensor)]
    for parameter in whole:
        assert parameter.grad is not None
        parameter.grad = all_reduce(parameter.grad) / world_size()
    norms = [
        full(get_total_norm([parameter.grad for parameter in group if parameter.grad is not None]))
        for group in (spread, whole)
        if group
    ]
    norm: Tensor = torch.stack(norms).norm()
    for group in (spread, whole):
        clip_grads_with_norm_(group, most, norm)
    return norm


def full(value: Tensor) -> Tensor:
    """A tensor as it is on one process; with FSDP2 collected from all, which all have to call."""
    whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return whole


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's weights, whole, in the first process; nothing in others. All call it."""
    found: dict[str, Any] = get_model_state_dict(model, options=WHOLE)
    return copies(found)


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The same of what an optimizer keeps of each parameter, as `name/moment`."""
    found: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    state = found.get("state", {})
    return copies(
        {f"{name}/{key}": state[name].pop(key) for name in state for key in [*state[name]]}
    )


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, each made as its original is let go of: what was on the CPU are the live tensors."""
    return {name: tensors.pop(name).detach().clone() for name in list(tensors)}


def load_weights(model: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Load weights that the first process alone has to hold. All call it."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world_size() > 1)
    set_model_state_dict(model, dict(whole), options=options)


def load_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, whole: Mapping[str, Tensor]
) -> None:
    """Load what `moments` gave, which the first process alone has to hold. All call it."""
    known: set[str] = set(all_gather_object([*whole])[0])
    # torch makes moments for every parameter first, by a step of rate 0.
    options = StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=world_size() > 1, strict=False
    )
    state: dict[str, Any] = {}
    for key, value in whole.items():
        name, _, moment = key.rpartition("/")
        state.setdefault(name, {})[moment] = value
    given: dict[str, Any] = {}
    if rank() == 0:
        given = {**get_optimizer_state_dict(model, optimizer), "state": state}
    set_optimizer_state_dict(model, optimizer, given, options=options)
    for name, parameter in model.named_parameters():
        if f"{name}/step" not in known:
            optimizer.state.pop(parameter, None)  # it has not been trained yet
            continue
        for moment, value in optimizer.state[parameter].items():
            if value.ndim and not isinstance(value, DTensor):
                # Fused AdamW walks through memory, so moments need their parameter's order there.
                optimizer.state[parameter][moment] = torch.empty_like(parameter).copy_(value)


def spread(model: ProtoCLIP, whole: ProtoCLIP | None) -> None:
    """Give a sharded model all that the first process's model holds; others have none of it."""
    load_weights(model, whole.state_dict() if whole is not None else {})
    own = dict(whole.named_buffers()) if whole is not None else {}
    for name, buffer in model.named_buffers():  # some, such as masks, are in no state dict
        if name in own:
            buffer.copy_(own[name])
        broadcast(buffer)
