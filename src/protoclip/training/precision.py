"""Loss scaling; the precision of forward passes is in `models/precision.py`."""

import torch

from protoclip.models.precision import Precision
from protoclip.models.precision import autocast as autocast
from protoclip.models.precision import resolve as resolve


def grad_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for fp16; for other precisions a scaler that changes nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
