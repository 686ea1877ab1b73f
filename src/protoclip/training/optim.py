"""The optimizer: AdamW, without weight decay where it does not belong; a rate for each tower."""

from collections.abc import Mapping

import torch
from torch import nn


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and filters, not to gains, biases, temperatures."""
    return parameter.ndim >= 2 and not name.endswith("logit_scale")


def adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scales: Mapping[str, float] | None = None,
    weight_decays: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """Fused AdamW over all parameters, in groups with and without weight decay.

    Args:
        model: Whose parameters are trained.
        learning_rate, betas, eps, weight_decay: AdamW's.
        scales: Prefixes of parameter names that have groups of their own, and the factor of each to
            the learning rate; kept as the group's `scale`.
        weight_decays: Prefixes of parameter names that have a weight decay of their own.
    """
    scales, weight_decays = scales or {}, weight_decays or {}
    groups = []
    remaining = dict(model.named_parameters())
    for prefix in dict.fromkeys([*scales, *weight_decays, ""]):
        named = {n: remaining.pop(n) for n in list(remaining) if n.startswith(prefix)}
        # Single numbers are no_sync, since FSDP2 leaves them whole.
        for decayed, single in ((True, False), (False, False), (False, True)):
            parameters = [
                p for n, p in named.items() if decays(n, p) == decayed and (p.ndim == 0) == single
            ]
            decay = weight_decays.get(prefix, weight_decay) if decayed else 0.0
            scale = scales.get(prefix, 1.0)
            groups.append({"params": parameters, "weight_decay": decay, "scale": scale})
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group its own multiple of a rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
