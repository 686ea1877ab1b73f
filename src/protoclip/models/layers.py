"""Layers that a run changes: LoRA adapters in the towers, and BatchNorm over all ranks.

LoRA (Hu et al. 2021, arXiv 2106.09685) is by `peft`. A layer with weight W gets two matrices of
rank r, A and B, and computes with W + B A. Only A and B train; B starts at 0, so that nothing
changes at first. A model with adapters has other names of parameters than the plain one:
checkpoints hold the plain one, with W + B A in place of W.

Which layers keep their BatchNorm statistics in a stage is decided in `training/optim.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from timm.layers import norm_act
from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from protoclip.distributed.collectives import all_gather_with_gradient, world_size
from protoclip.models.protoclip import (
    PROJECTIONS,
    ProtoCLIP,
    evaluation_mode,
    image_shape,
    seed_weights,
)

ADAPTER = "default"  # peft's name of the only adapter
# What peft adds to the names of parameters.
WRAPPED, ADDED = ".base_layer.", ".lora_"
FUSED = "in_proj_weight"  # queries, keys and values of torch's attention in one matrix
KINDS = ("linear", "fused attention", "convolutional")


def add_adapters(
    model: ProtoCLIP,
    rank: int,
    *,
    tokens: Int[Tensor, "1 c"],
    locked: Sequence[str] = (),
    new_projections: bool = False,
    seed: int,
) -> list[str]:
    """Add adapters to the layers of the towers that `peft` can adapt, in place.

    These are the linear layers, with torch's attention through its fused matrix, and in a tower
    without any the convolutions. A layer whose weight is used without its forward pass would not
    be adapted, so one pass over `tokens` and an image finds those that are called. The scale of
    B A is 1. With `new_projections` the projections into the joint space train as a whole.

    Returns:
        A note on what is adapted, and how many parameters of the towers train.

    Raises:
        ValueError: peft is not installed, or a tower has no layer that it can adapt.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("model.lora: pip install 'protoclip[finetune]' first") from None
    new = PROJECTIONS if new_projections else ()
    chosen: dict[str, str] = {}
    parts = []
    called = {n: k for n, k in adaptable(model, tokens).items() if not f"{n}.".startswith(new)}
    for tower in ("image", "text"):
        if tower in locked:
            continue
        layers = {n: k for n, k in called.items() if n.startswith("visual.") == (tower == "image")}
        inner = [kind for n, kind in layers.items() if not f"{n}.".startswith(PROJECTIONS)]
        if {*inner} - {"convolutional"}:
            layers = {n: kind for n, kind in layers.items() if kind != "convolutional"}
        if not layers:
            raise ValueError(
                f"model.lora: peft can adapt no layer of the {tower} tower; leave model.lora out, "
                f"or lock that tower: model.locked = ['{tower}']"
            )
        kinds = [*layers.values()]
        counts = [f"{kinds.count(kind)} {kind}" for kind in KINDS if kind in kinds]
        parts.append(f"{' and '.join(counts)} layers of the {tower} tower")
        chosen |= layers
    settings: Any = {
        "r": rank,
        "lora_alpha": rank,
        # peft adapts all layers whose names end so; with "towers." only one does.
        "target_modules": [f"towers.{n}" for n, k in chosen.items() if k != "fused attention"],
        "target_parameters": [
            f"towers.{n}.{FUSED}" for n, k in chosen.items() if k == "fused attention"
        ],
    }
    whole = sum(parameter.numel() for parameter in model.towers.parameters())
    with seed_weights(seed):
        inject_adapter_in_model(LoraConfig(**settings), model)
    model.requires_grad_(True)  # peft decides what trains; here stages do
    added = [p for name, p in model.towers.named_parameters() if ADDED in name]
    return [
        f"model.lora = {rank}: adapters for {', and for '.join(parts)}; "
        f"{sum(p.numel() for p in added):,} parameters train beside the towers' {whole:,}"
    ]


@torch.no_grad()
def adaptable(model: ProtoCLIP, tokens: Int[Tensor, "1 c"]) -> dict[str, str]:
    """The layers of the towers that peft can adapt, and the kind of each, by name."""
    called: set[str] = set()
    hooks = [
        part.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, part in model.towers.named_modules()
    ]
    shape, parameter = image_shape(model.towers), next(model.parameters())
    try:
        with evaluation_mode(model):
            model.encode_image(parameter.new_zeros(1, *shape))
            model.encode_text(tokens.to(parameter.device))
    finally:
        for hook in hooks:
            hook.remove()
    kinds = {name: kind_of(part) for name, part in model.towers.named_modules() if name in called}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def kind_of(layer: nn.Module) -> str | None:
    """The kind of a layer that peft can adapt; others compute something of their own."""
    if isinstance(layer, nn.MultiheadAttention):
        return "fused attention" if layer.in_proj_weight is not None else None
    if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
        return "linear"
    if isinstance(layer, nn.Conv2d) and type(layer).forward is nn.Conv2d.forward:
        plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        return "convolutional" if plain else None
    return None


def list_adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of a model that have adapters, by name."""
    if any(ADDED in name for name, _ in model.named_parameters()):
        from peft.tuners.lora import LoraLayer

        for name, part in model.named_modules():
            if isinstance(part, LoraLayer):
                yield name, part


def has_adapters(model: object) -> bool:
    return isinstance(model, nn.Module) and any(ADDED in n for n, _ in model.named_parameters())


def plain_name(name: str) -> str:
    """The name that a parameter has in the model without adapters."""
    return name.replace(WRAPPED, ".")


def drop_adapters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of the plain model, without the adapters: not merged."""
    return {plain_name(name): value for name, value in weights.items() if ADDED not in name}


@torch.no_grad()
def merge_adapters(
    model: nn.Module, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the plain model with W + B A for W, and W, A and B of each adapted layer.

    `weights` are whole copies of the model's, by whose names the second are; none on ranks that do
    not save.
    """
    plain = drop_adapters(weights)
    rest: dict[str, Tensor] = {}
    for name, layer in list_adapted_layers(model) if weights else ():
        matrix = f"{name}{WRAPPED}{getattr(layer, 'parameter_name', 'weight')}"
        added = [key for key in weights if key.startswith(f"{name}{ADDED}")]
        rest |= {key: weights[key] for key in (matrix, *added)}
        change = layer.get_delta_weight(ADAPTER).to(weights[matrix])
        plain[plain_name(matrix)] = weights[matrix] + change
    return plain, rest


def unmerge_adapters(
    model: nn.Module, plain: Mapping[str, Tensor], rest: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights that `merge_adapters` was called with; empty if `plain` is."""
    if not plain:
        return {}
    names = model.state_dict()
    return {n: rest[n].cpu() if n in rest else plain[plain_name(n)] for n in names}


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
            if isinstance(layer, norm_act.SyncBatchNormAct):  # its `act` was last, and is printed
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
