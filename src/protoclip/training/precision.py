"""Numerical precision of forward passes: what was asked for, and nothing else."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]
Autocast = Callable[[], AbstractContextManager[object]]


def resolve(name: Literal["auto"] | Precision, device: torch.device) -> Precision:
    """The precision that `auto` stands for on a device: bf16 where it is computed natively."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    # A private function, so it may be missing in another version of torch.
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    if device.type == "cpu" and native():
        return "bf16"
    return "fp32"


def autocast(precision: Precision, device: torch.device) -> Autocast:
    """Makes the context for forward passes; for fp32 one that does nothing."""
    if precision == "fp32":
        return nullcontext
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    # The cache of cast weights goes stale between no-grad and grad passes of one context only;
    # each forward pass opens its own.
    return partial(torch.autocast, device.type, dtype=dtype)


def grad_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for fp16; a scaler that passes everything through otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
