"""Frozen models of one modality: teachers, the towers of a model, and the two sides of `align`.

Each is an `Encoder`. The loop that passes items through it is in `run.py`.
"""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from protoclip.config import EngineName
from protoclip.data.captions import trim_padding
from protoclip.data.decode import decode
from protoclip.data.pairs import Sample
from protoclip.data.transforms import EvaluationTransform, PillowTransform
from protoclip.files import checksum
from protoclip.models.loading import Pooling, open_frozen_encoder
from protoclip.models.opening import TELLING, Tokenizer
from protoclip.models.projections import FrozenEncoders
from protoclip.models.protoclip import Autocast, autocast, evaluation_mode, resolve_encoding
from protoclip.terminal import without_secrets

EXAMPLES = ("a photo of a red dog", "two words")  # texts that tell models apart
RAMP = np.arange(96 * 64 * 3, dtype=np.uint8).reshape(64, 96, 3)  # an image that does
BATCH_NORM = re.compile(r"(?:Sync)?BatchNorm(Act)?(?:\dd)?")  # how layers of any kind are printed
# What a text model's configuration says of its files, and nothing of what it computes.
FILE_SETTINGS = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}


@dataclass(kw_only=True)
class Encoder:
    """A frozen model of one modality."""

    module: Any  # on its device
    device: torch.device
    reads: Literal["image", "text"]
    prepare: Callable[[Sample], Any]  # to a tensor, or captions; raises `ValueError` for a bad one
    collate: Callable[[list[Any]], Any]  # to a batch on the device
    forward: Callable[[Any], Tensor]  # of a batch, to features of any norm
    examples: Sequence[Any]  # inputs that tell one model from another
    facts: Callable[[], str]  # what the inputs depend on
    unit_norm: bool = True  # bring features to norm 1
    autocast: Autocast = nullcontext  # makes the context of forward passes
    name: str = "the model"  # for messages
    engine: EngineName = "auto"  # of forward passes on a CPU

    def encode(self, inputs: list[Any]) -> Float[Tensor, "b q"]:
        """Features in float32 on the CPU, in evaluation mode."""
        with evaluation_mode(self.module):
            with self.autocast():
                features = self.forward(self.collate(inputs))
            features = features.float()
            return (F.normalize(features, dim=-1) if self.unit_norm else features).cpu()

    @cached_property
    def width(self) -> int:
        return self.encode([*self.examples]).shape[1]

    def key(self, weights: str | None = None) -> str:
        """Identifies the model, and how it reads images or captions.

        Weights alone do not: activations and numbers of heads have none. So the structure counts
        too, and the features of examples, to three digits, since more depend on hardware.

        Args:
            weights: Their `checksum`, if it is known.
        """
        values = self.encode([*self.examples])[:, :16].flatten().tolist()
        first = " ".join(f"{value:.3g}" for value in values)
        facts = f"{self.reads} {print_layers(self.module)} {self.facts()}"
        facts += "" if self.autocast is nullcontext else repr(self.autocast)
        facts = re.sub(r" at 0x[0-9a-f]+", "", facts)  # functions show their address in memory
        return checksum(f"{weights or self.checksum()} {facts} {first}".encode())

    def checksum(self, *, without: str | None = None) -> str:
        """A checksum of the weights, except those with these letters in their names."""
        weights = sorted(self.module.state_dict().items())
        weights = [(name, w) for name, w in weights if without is None or without not in name]
        raw = ((name, value.cpu().reshape(-1).view(torch.uint8)) for name, value in weights)
        return checksum(
            "".join(name + checksum(one.numpy().tobytes()) for name, one in raw).encode()
        )


def print_layers(module: object) -> str:
    """A model as it is printed, with BatchNorm over ranks as over one.

    In evaluation both compute the same, so features of either are found by both.
    """
    return BATCH_NORM.sub(r"BatchNorm\g<1>2d", repr(module))


def open_encoder(
    teacher: str, *, modality: str, pooling: Pooling, device: torch.device, setting: str = ""
) -> Encoder:
    """Open a frozen model on a device; the arguments are those of `open_frozen_encoder`."""
    opened = open_frozen_encoder(teacher, modality=modality, pooling=pooling, setting=setting)
    module = freeze(opened.module, device)
    settings: dict[str, Any] = {"name": without_secrets(teacher)}
    settings["autocast"] = autocast(resolve_encoding("auto", device), device)
    if opened.prepare is None:
        return text_encoder(
            module, device, opened.collate, opened.forward, facts=pooling, **settings
        )
    return image_encoder(module, device, opened.forward, opened.prepare, **settings)


def freeze(module: Any, device: torch.device) -> Any:
    """A model in float32 for evaluation alone, on the device, where convolutions are fast."""
    module = module.float().eval().requires_grad_(False)
    return module.to(device, memory_format=torch.channels_last)


def text_encoder(
    module: Any,
    device: torch.device,
    tokenizer: Callable[[list[str]], Any],
    forward: Callable[[Any], Tensor],
    *,
    facts: str = "",
    ignores_padding: bool | None = None,
    examples: Sequence[str] = EXAMPLES,
    **settings: Any,
) -> Encoder:
    """The encoder of a frozen text model; `facts` tell it from others, besides the `settings`.

    Padding is cut where the model ignores it; unset, the module says whether it does.
    """
    if ignores_padding is None:
        ignores_padding = getattr(module, "ignores_padding", False)

    def collate(texts: list[str]) -> Any:
        batch = tokenizer(texts)
        return (trim_padding(batch) if ignores_padding else batch).to(device)

    def describe() -> str:
        batch = tokenizer([*EXAMPLES, TELLING])
        values = {"tokens": batch} if isinstance(batch, Tensor) else batch
        return f"{facts} { ({name: value.tolist() for name, value in values.items()}) }"

    return Encoder(
        module=module,
        device=device,
        reads="text",
        prepare=lambda sample: sample.captions,
        collate=collate,
        forward=forward,
        examples=examples,
        facts=describe,
        **settings,
    )


def image_encoder(
    module: Any,
    device: torch.device,
    forward: Callable[[Tensor], Tensor],
    transform: Callable[[Image.Image], Tensor],
    **settings: Any,
) -> Encoder:
    """The encoder of a frozen image model. Our own transforms finish on its device."""
    ours = transform if isinstance(transform, EvaluationTransform | PillowTransform) else None
    if ours is None:
        examples = [transform(Image.fromarray(RAMP))]
    else:
        shape = (ours.size, ours.size, len(ours.mean))
        ramp = torch.arange(math.prod(shape), dtype=torch.int64).remainder(256).to(torch.uint8)
        examples = [ramp.view(shape)]

    def collate(images: list[Tensor]) -> Tensor:
        batch = torch.stack(images).to(device, non_blocking=True)
        return batch if ours is None else ours.finish(batch, torch.zeros(len(batch), 0))

    given: dict[str, Any] = {"facts": lambda: str(transform), **settings}
    return Encoder(
        module=module,
        device=device,
        reads="image",
        prepare=lambda sample: prepare_image(sample.image, transform),
        collate=collate,
        forward=forward,
        examples=examples,
        **given,
    )


def prepare_image(image: bytes | Image.Image, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """What `image_encoder` takes: the bytes of a crop `(s, s, c)` for one of our own transforms.

    Raises `ValueError` for bytes that are no image.
    """
    if isinstance(transform, EvaluationTransform):
        box = partial(transform.box, draws=np.zeros(0, np.float32))
        pixels = transform.crop(image, box, transform.size)
        return torch.from_numpy(np.require(pixels, requirements="W"))
    if isinstance(image, bytes):
        image = Image.fromarray(decode(image))
    return transform.pixels(image) if isinstance(transform, PillowTransform) else transform(image)


def text_side(encoders: FrozenEncoders, tokenizer: Tokenizer, *, autocast: Autocast) -> Encoder:
    """The text side of `align`. Features have any norm: its projection reads them so."""
    settings = encoders.text.config.to_dict() if hasattr(encoders.text, "config") else {}
    settings = {name: settings[name] for name in sorted(settings.keys() - FILE_SETTINGS)}
    return text_encoder(
        encoders.text,
        device_of(encoders),
        tokenizer,
        encoders.encode_text,
        facts=f"{type(encoders.pooler).__name__} {settings}",
        ignores_padding=encoders.ignores_padding,
        examples=EXAMPLES[:1],
        unit_norm=False,
        autocast=autocast,
        name="the text encoder",
    )


def text_sides(encoders: FrozenEncoders, tokenizer: Any, **settings: Any) -> list[Encoder]:
    """The text side of `align`, or each of the encoders that it joins, as if it were alone."""
    parts = encoders.split("text")
    reads = tokenizer.tokenizer.parts if len(parts) > 1 else [tokenizer]
    return [text_side(*part, **settings) for part in zip(parts, reads, strict=True)]


def image_side(
    encoders: FrozenEncoders, transform: EvaluationTransform, **settings: Any
) -> Encoder:
    """The image side of `align`. Features have any norm: its projection reads them so."""
    name = getattr(encoders.visual, "pretrained_cfg", {}).get("architecture")
    return image_encoder(
        encoders.visual,
        device_of(encoders),
        encoders.encode_image,
        transform,
        facts=lambda: f"{name} {transform}",
        unit_norm=False,
        name="the image encoder",
        **settings,
    )


def image_sides(
    encoders: FrozenEncoders, transform: EvaluationTransform, **settings: Any
) -> list[Encoder]:
    """The image side of `align`, or each of the encoders that it joins, as if it were alone."""
    parts, reads = encoders.split("visual"), [transform]
    if len(parts) > 1:
        own = [{"mean": p.visual.image_mean, "std": p.visual.image_std} for p in parts]
        reads = [replace(transform, **channels) for channels in own]
    return [image_side(*part, **settings) for part in zip(parts, reads, strict=True)]


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
