"""The numerical precision of forward passes: autocast and loss scaling."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]
Autocast = Callable[[], AbstractContextManager[object]]


def resolve(name: Literal["auto"] | Precision, device: torch.device) -> Precision:
    """The precision that `auto` means on a device: bf16 where the hardware computes it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        # Older cards only imitate bf16, slower than fp32.
        return "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    # A private function, which another version of torch may lack.
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if device.type == "cpu" and native() else "fp32"


def autocast(precision: Precision, device: torch.device) -> Autocast:
    """A function that makes the context for a forward pass; for fp32 the context does nothing.

    Every forward pass needs a context of its own: the cache of cast weights is wrong when passes
    with and without gradients share one.
    """
    if precision == "fp32":
        return nullcontext
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return partial(torch.autocast, device.type, dtype=dtype)


def grad_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for fp16; for other precisions a scaler that changes nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
