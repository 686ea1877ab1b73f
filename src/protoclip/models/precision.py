"""How forward passes compute: their numerical precision, and the choice of convolutions.

The losses choose their own precision, in `losses/tiles.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


def autocast_on_card(name: Literal["auto"] | Precision, device: torch.device) -> Autocast:
    """Autocast without training: as in training on a card, else fp32."""
    return autocast(resolve(name, device), device) if device.type == "cuda" else nullcontext


def autocast_encoding(name: Literal["auto"] | Precision, device: torch.device) -> Autocast:
    """Autocast for encoding with a frozen model."""
    return autocast(resolve_encoding(name, device), device)


def resolve_encoding(name: Literal["auto"] | Precision, device: torch.device) -> Precision:
    """The precision that `auto` means in encoding: that of `autocast_on_card`."""
    return resolve(name, device) if name != "auto" or device.type == "cuda" else "fp32"


@contextmanager
def measure_convolutions(device: torch.device) -> Iterator[None]:
    """On a card, cuDNN tries its convolutions on each new shape and takes the fastest.

    This pays if shapes stay. PyTorch's determinism is left as the user set it.
    """
    before = torch.backends.cudnn.benchmark
    if device.type == "cuda" and not torch.backends.cudnn.deterministic:
        torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def grad_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for fp16; for other precisions a scaler that changes nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
