"""FLOPs of a forward pass, counted on the meta device, without weights and without a batch.

The share of a card's peak that a run reaches is computed from them in `training/throughput.py`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from protoclip.models.loading import context_length
from protoclip.models.protoclip import image_size
from protoclip.models.start import Start


@dataclass(frozen=True, kw_only=True)
class Forward:
    """FLOPs of one forward pass of one sample, and the parameters of both towers."""

    image: float
    text: float
    heads: float  # both
    parameters: int


def forward_flops(start: Start) -> Forward:
    """Count the FLOPs of a start's towers at its sizes. Matrix products and convolutions count."""
    model = start.build(on_meta=True)
    pair: Any = model.towers
    size = image_size(pair)
    length = pair.context_length if hasattr(pair, "context_length") else context_length(start)
    if start.model.name is None and start.model.start is None:
        size, length = start.sizes.values()
    samples = 2  # BatchNorm needs more than one

    def counted(part: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[Tensor, float]:
        with FlopCounterMode(display=False) as counter:
            return part(inputs), counter.get_total_flops() / samples

    # Text towers of transformers skip what needs values only if their tensors are fake, which makes
    # each operation ten times as slow.
    of_transformers = any(part.__module__.startswith("transformers") for part in pair.modules())
    fake = FakeTensorMode(allow_non_fake_inputs=True) if of_transformers else nullcontext()
    with torch.device("meta"), fake:
        features, image = counted(model.encode_image, torch.empty(samples, 3, size, size))
        tokens = torch.ones(samples, length, dtype=torch.long)
        _, text = counted(model.encode_text, tokens)
        _, head = counted(model.image_head, features)
    parameters = sum(p.numel() for p in pair.parameters())
    return Forward(image=image, text=text, heads=2 * head, parameters=parameters)
