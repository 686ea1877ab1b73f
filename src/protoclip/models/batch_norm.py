"""BatchNorm over the batches of all ranks, which normalise as one batch would.

Which layers keep their statistics in a stage is decided in `training/optim.py`.
"""

import re

import torch
from jaxtyping import Bool, Float
from timm.layers import norm_act
from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from protoclip.distributed.collectives import all_gather_with_gradient, broadcast, world_size


class SyncBatchNorm(_BatchNorm):
    """BatchNorm of any number of dimensions over ranks with equal batch sizes.

    torch's class of this name needs a card, where it takes less memory; this one is for others.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() >= 2

    def forward(self, input: Float[Tensor, "b c *_"]) -> Float[Tensor, "b c *_"]:
        if not self.training or world_size() == 1:
            return super().forward(input)
        return self._activate(self._normalise(input))

    def _activate(self, normalised: Tensor) -> Tensor:
        return normalised

    def _normalise(self, input: Float[Tensor, "b c *_"]) -> Float[Tensor, "b c *_"]:
        rows = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [0, *range(2, rows.dim())]
        shape = (1, -1, *[1] * (rows.dim() - 2))
        local_mean = rows.mean(dims)
        local_variance = (rows - local_mean.view(shape)).square().mean(dims)
        # One exchange: the mean and variance of the whole batch follow from those of the parts.
        gathered = all_gather_with_gradient(torch.stack([local_mean, local_variance])[None])
        means, variances = gathered.unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        if self.running_mean is not None and self.running_var is not None:
            assert self.momentum is not None and self.num_batches_tracked is not None  # noqa: PT018
            count = rows.numel() // len(mean) * len(means)
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach(), self.momentum)
            # Like torch, with the unbiased variance.
            self.running_var.lerp_(variance.detach() * count / max(1, count - 1), self.momentum)
        scale = (variance + self.eps).rsqrt() * self.weight
        return ((rows - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)).to(input)


class SyncBatchNormAct(SyncBatchNorm, BatchNormAct2d):
    """timm's BatchNorm, which also drops out and activates."""

    def _activate(self, normalised: Tensor) -> Tensor:
        activated: Tensor = self.act(self.drop(normalised))
        return activated


SYNCHRONISED = (SyncBatchNorm, nn.SyncBatchNorm)
SHOWN = re.compile(r"(?:Sync)?BatchNorm(Act)?(?:\dd)?")  # how layers of any kind are printed


def layers_of(model: object) -> str:
    """A model as it is printed, with BatchNorm over ranks as over one.

    In evaluation both compute the same, so features of either are found by both.
    """
    return SHOWN.sub(r"BatchNorm\g<1>2d", repr(model))


def synchronise(module: nn.Module, device: torch.device) -> int:
    """Turn every BatchNorm within a module into one over all ranks; returns the number of layers.

    On a card that is torch's, or timm's where a layer activates too; else our `SyncBatchNorm`.

    Raises:
        ValueError: A BatchNorm class computes something unknown.
    """
    layers = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    # Compare `forward` and not the class: subclasses that keep it compute the same.
    classes = {_BatchNorm.forward: SyncBatchNorm, BatchNormAct2d.forward: SyncBatchNormAct}
    for part in layers:
        if not isinstance(part, SYNCHRONISED) and type(part).forward not in classes:
            raise ValueError(
                f"parallel.sync_batch_norm: {type(part).__name__} layers cannot be synchronised; "
                "set it to false and parallel.strategy to ddp, or choose other towers"
            )
    if device.type == "cuda":
        convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        for layer in module.modules():
            if isinstance(layer, norm_act.SyncBatchNormAct):  # its `act` was last; see `layers_of`
                layer.add_module("act", layer._modules.pop("act"))
        return len(layers)
    for part in layers:
        if not isinstance(part, SYNCHRONISED):
            part.__class__ = classes[type(part).forward]
    return len(layers)


class Statistics:
    """Running statistics of a module's BatchNorm layers, which a step that is not taken puts back.

    Make one once the layers are in the modes that they train in. Without a layer in training mode
    it does nothing.
    """

    def __init__(self, module: nn.Module) -> None:
        layers = [p for p in module.modules() if isinstance(p, _BatchNorm) and p.training]
        buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        types = dict.fromkeys(buffer.dtype for buffer in buffers)
        self._groups = [[b for b in buffers if b.dtype == dtype] for dtype in types]
        self._kept = [flatten_buffers(group) for group in self._groups]

    @torch.no_grad()
    def update(self, taken: Bool[Tensor, ""]) -> None:
        """Keep what they are now if the step was taken, else put back what they were before it."""
        for number, group in enumerate(self._groups):
            # Few kernels for many layers, and none that the host waits for.
            values = torch.where(taken, flatten_buffers(group), self._kept[number])
            parts = torch.split(values, [buffer.numel() for buffer in group])
            pairs = zip(parts, group, strict=True)
            torch._foreach_copy_(group, [part.view_as(buffer) for part, buffer in pairs])
            self._kept[number] = values


def flatten_buffers(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.flatten() for buffer in buffers])


def has_own_statistics(module: nn.Module) -> bool:
    """Whether a BatchNorm keeps running statistics that differ between ranks."""
    return any(
        isinstance(part, _BatchNorm) and not isinstance(part, SYNCHRONISED)
        for part in module.modules()
    )


def agree_on_statistics(module: nn.Module) -> None:
    """Copy rank 0's statistics to all ranks if they can differ, as DDP does before each step."""
    if has_own_statistics(module):
        for buffer in module.buffers():
            broadcast(buffer)
