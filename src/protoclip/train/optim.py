"""The optimizer: AdamW, without weight decay where it does not belong."""

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
) -> torch.optim.AdamW:
    """Fused AdamW over all parameters, in two groups: with and without weight decay."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)
