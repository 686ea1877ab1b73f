"""One model on several ranks: DDP copies it to each; FSDP2 shards what is too large for one."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._pytree import tree_leaves

from protoclip.distributed.collectives import (
    all_gather_object,
    all_reduce,
    broadcast,
    open_background,
    rank,
    world_size,
)

# Lists of a transformer's layers in open_clip, timm and `transformers`.
LAYERS = ("resblocks", "blocks", "layers", "layer")
FORWARDS = ("encode_image", "encode_text", "embeddings")  # that are called besides `forward`
# Whole tensors on the CPU of rank 0; on the devices one at a time.
WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: nn.Module, device: torch.device, *, gathered: torch.dtype | None = None) -> None:
    """Shard the parameters of a model on the meta device over the ranks (FSDP2), in place.

    Load its weights with `load_whole` next, before an optimizer is made. A transformer gathers
    layer by layer. FSDP2 does not shard scalars, so they stay whole.

    Args:
        gathered: Type in which layers gather their parameters and compute; unset, that of the
            parameters, in which shards and sums of gradients stay.
    """
    open_background()  # for its checkpoints, which all ranks write
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = MixedPrecisionPolicy()
    if gathered is not None:
        policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32)
        for part in [part for part in model.modules() if isinstance(part, _BatchNorm)]:
            fully_shard(part, mesh=mesh)  # its weights have the type of its statistics
    # From the inside out, as FSDP2 wants it: some towers have lists within lists.
    for name, part in reversed([*model.named_modules()]):
        lists = isinstance(part, nn.ModuleList | nn.Sequential)
        if lists and name.rpartition(".")[2] in LAYERS:
            for layer in part.children():
                fully_shard(layer, mesh=mesh, mp_policy=policy)
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=scalars)
    model.to_empty(device=device)
    for method in FORWARDS:
        register_fsdp_forward_method(model, method)


def load_whole(model: nn.Module, whole: nn.Module | None) -> None:
    """Load a sharded model from the whole model of rank 0. Other ranks pass None."""
    load_weights(model, whole.state_dict() if whole is not None else {})
    buffers = dict(whole.named_buffers()) if whole is not None else {}
    for name, buffer in model.named_buffers():  # some, such as masks, are in no state dict
        if name in buffers:
            buffer.copy_(buffers[name])
        broadcast(buffer)


def distribute(model: nn.Module, *, broadcast_buffers: bool = True) -> nn.Module:
    """The module to train: the model, or DDP around it. Call again after freezing parameters.

    `broadcast_buffers` copies rank 0's to all ranks before each step, unless all compute the same.
    """
    if world_size() == 1 or isinstance(model, FSDPModule):
        return model
    device = next(model.parameters()).device
    ids = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        # torch 2.13 renamed `broadcast_buffers`; earlier versions do not have the new name.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            model, ids, broadcast_buffers=broadcast_buffers, gradient_as_bucket_view=True
        )


def is_sharded(model: object) -> bool:
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Let go of the whole parameters that FSDP keeps after a forward pass without a backward pass.
    Until then the model shows these copies as its parameters, so freezing them does nothing."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def no_sync(module: nn.Module) -> Callable[[], AbstractContextManager[object]]:
    """Makes a context that accumulates local gradients; a later backward pass averages them."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync

    if not isinstance(module, FSDPModule):
        return nullcontext

    @contextmanager
    def unreduced() -> Iterator[None]:
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)

    return unreduced


def measure_unhidden(module: nn.Module) -> float:
    """How long a step waits for the average of gradients when its backward pass is over, as DDP
    itself measures it in the first ten steps, and in each hundredth."""
    if not isinstance(module, DistributedDataParallel):
        return 0.0
    facts: dict[str, Any] = module._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    names = ("backward_comm_time", "backward_compute_comm_overlap_time")
    whole, hidden = (float(facts.get(name, 0)) for name in names)  # nanoseconds
    return max(0.0, whole - hidden) / 1e9


def reach_everything(output: object, *unused: nn.Module) -> Tensor:
    """Zero, computed from all of a model's output and from modules that have no part in it.

    DDP would wait for a parameter that no loss reaches.
    """
    parts = [value.sum() for value in tree_leaves(output) if value is not None]
    parts += [p.sum() for module in unused for p in module.parameters() if p.requires_grad]
    return 0.0 * torch.stack(parts).sum()


def clip_gradients(model: nn.Module, most: float) -> Tensor:
    """Scale the whole gradient down to a norm of at most `most`, in place; returns its norm before.

    The norm is on the model's device, and 0 where no parameter has a gradient. FSDP2 does not
    average the gradients of scalars, so that happens here.
    """
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if not trained:
        return torch.zeros((), device=next(model.parameters()).device)
    if not isinstance(model, FSDPModule):
        return torch.nn.utils.clip_grad_norm_(trained, most)
    sharded = [parameter for parameter in trained if isinstance(parameter, DTensor)]
    scalars = [parameter for parameter in trained if not isinstance(parameter, DTensor)]
    for parameter in scalars:
        assert parameter.grad is not None
        parameter.grad = all_reduce(parameter.grad) / world_size()
    groups = [group for group in (sharded, scalars) if group]
    norms = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm: Tensor = torch.stack(whole).norm()
    for group in groups:
        clip_grads_with_norm_(group, most, norm)
    return norm


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's whole weights on rank 0; empty on other ranks. Collective."""
    return clone_and_free(states.get_model_state_dict(model, options=WHOLE))


def clone_and_free(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Copies, since on a CPU these are the live tensors. Each original is freed once copied."""
    return {name: tensors.pop(name).detach().clone() for name in list(tensors)}


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of what this rank saves: `gather_weights`, or its parts of a sharded
    model's.

    Parts are DTensors, and no rank gathers them; what is not sharded is the same on all ranks.
    """
    if not is_sharded(model):
        return gather_weights(model)
    reshard(model)
    return {name: cpu_copy(value) for name, value in model.state_dict().items()}


def copy_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies on the CPU of what this rank saves of the optimizer, as `name/moment`: all of it on
    rank 0, or its parts as in `copy_weights`. Collective."""
    if not is_sharded(model):
        whole: dict[str, Any] = states.get_optimizer_state_dict(model, optimizer, options=WHOLE)
        state = whole.get("state", {})
        return clone_and_free(
            {f"{name}/{key}": state[name].pop(key) for name in state for key in [*state[name]]}
        )
    reshard(model)
    return {
        f"{name}/{moment}": cpu_copy(value)
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def cpu_copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def are_parts(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are parts of a sharded model's tensors; the same on all ranks."""
    return any(isinstance(value, DTensor) for value in tensors.values())


def make_parts(
    model: nn.Module, moments: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A sharded model's weights and moments for this rank to read its parts into, on its device.

    `moments` have the shapes and types of all moments, by the names of `copy_moments`.
    """
    reshard(model)
    weights = {name: torch.empty_like(value) for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    state = {}
    for key, like in moments.items():
        parameter = parameters[key.rpartition("/")[0]].detach()
        if like.ndim:  # in the parameter's order in memory, through which fused AdamW walks
            state[key] = torch.zeros_like(parameter, dtype=like.dtype)
        else:
            state[key] = torch.zeros((), dtype=like.dtype, device=parameter.device)
    return weights, state


def load_weights(model: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Load whole weights, which only rank 0 needs to hold, or each rank's parts. Collective."""
    reshard(model)
    if are_parts(whole):
        for name, value in model.state_dict().items():
            value.copy_(whole[name])
        return
    options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=world_size() > 1)
    states.set_model_state_dict(model, dict(whole), options=options)


def load_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]
) -> None:
    """Load what `copy_moments` returned, which only rank 0 needs to hold, or each rank's parts.

    Collective.
    """
    reshard(model)
    optimizer.state.clear()
    parameters, have_parts = dict(model.named_parameters()), are_parts(moments)
    facts = {key: (value.shape, value.dtype) for key, value in moments.items()}
    for key, (shape, dtype) in (facts if have_parts else all_gather_object(facts)[0]).items():
        name, _, moment = key.rpartition("/")
        parameter = parameters[name].detach()
        if have_parts or rank() == 0:
            value = moments[key].to(parameter.device)
        else:
            value = torch.empty(shape, dtype=dtype, device=parameter.device)
        if not have_parts and value.ndim and isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        elif not have_parts:
            broadcast(value)
            if value.ndim:  # fused AdamW walks through memory in the parameter's order
                value = torch.empty_like(parameter, dtype=dtype).copy_(value)
        optimizer.state[parameters[name]][moment] = value
