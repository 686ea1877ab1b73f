"""LoRA (Hu et al. 2021, arXiv 2106.09685) by `peft`: small matrices train in place of the towers.

A layer with weight W gets two matrices of rank r, A and B, and computes with W + B A. Only A and B
train; B starts at 0, so that nothing changes at first. A model with adapters has other names of
parameters than the plain one: checkpoints hold the plain one, with W + B A in place of W.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from protoclip.models.protoclip import (
    PROJECTIONS,
    ProtoCLIP,
    evaluation_mode,
    image_size,
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
    be adapted, so one pass over a pair finds those that are called.

    Args:
        rank: Rank of each adapter. The scale of B A is 1.
        tokens: A caption for that pass.
        locked: Towers without adapters, of `image` and `text`.
        new_projections: The projections into the joint space train as a whole.
        seed: Of A. The global random state is not changed.

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
    called = adaptable(model, tokens)
    for tower in ("image", "text"):
        if tower in locked:
            continue
        of_image = tower == "image"
        layers = {n: k for n, k in called.items() if n.startswith("visual.") == of_image}
        layers = {n: k for n, k in layers.items() if not f"{n}.".startswith(new)}
        if any(k != "convolutional" and not is_projection(n) for n, k in layers.items()):
            layers = {n: k for n, k in layers.items() if k != "convolutional"}
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
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(**settings), model)
    model.requires_grad_(True)  # peft decides what trains; here stages do
    added = [p for name, p in model.towers.named_parameters() if ADDED in name]
    return [
        f"model.lora = {rank}: adapters for {', and for '.join(parts)}; "
        f"{sum(p.numel() for p in added):,} parameters train beside the towers' {whole:,}"
    ]


def is_projection(name: str) -> bool:
    return f"{name}.".startswith(PROJECTIONS)


@torch.no_grad()
def adaptable(model: ProtoCLIP, tokens: Int[Tensor, "1 c"]) -> dict[str, str]:
    """The layers of the towers that peft can adapt, and the kind of each, by name."""
    called: set[str] = set()
    hooks = [
        part.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, part in model.towers.named_modules()
    ]
    size, parameter = image_size(model.towers), next(model.parameters())
    try:
        with evaluation_mode(model):
            model.encode_image(parameter.new_zeros(1, 3, size, size))
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
    """The weights of the plain model with W + B A for W, and those that it takes to go on.

    Args:
        weights: Whole copies of the model's weights; empty on ranks that do not save.

    Returns:
        The merged weights, and by their names in `model` W, A and B of each adapted layer. Without
        adapters these are `weights`, and nothing.
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
