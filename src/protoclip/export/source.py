"""The model to export, and the properties that every format needs.

`models/start.py` finds the model that a reference names.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import open_clip
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from protoclip.data.transforms import EvaluationTransform, SquashTransform
from protoclip.models.formats import has_quick_gelu
from protoclip.models.opening import ImageTransform
from protoclip.models.protoclip import TowerPair
from protoclip.models.start import find_start
from protoclip.models.tokenizers import Tokenizer
from protoclip.models.transformers import HuggingFaceTowers


class Unavailable(ValueError):
    """A model cannot have a format; says why."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to export, in evaluation mode on the CPU.

    Attributes:
        checkpoint: The checkpoint folder of a model of ours.
        config: open_clip's description of the towers; None if they are of `transformers`.
        license: Of the weights, as the hub writes it.
    """

    reference: str
    checkpoint: Path | None
    model: TowerPair
    transform: ImageTransform
    tokenizer: Tokenizer
    config: Mapping[str, Any] | None
    license: str

    @property
    def towers(self) -> Any:
        return self.model.towers

    @property
    def open_clip_config(self) -> Mapping[str, Any]:
        """`config`; raises `Unavailable` if there is none."""
        if self.config is None:
            raise Unavailable("its towers are Hugging Face's, which this format cannot describe")
        return self.config

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizer of the library that made it."""
        return getattr(self.tokenizer, "tokenizer", self.tokenizer)

    @property
    def context_length(self) -> int:
        return int(self.tokenizer(["a"]).shape[1])

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images are prepared for the towers, in open_clip's words."""
        if isinstance(self.transform, EvaluationTransform):
            squashes = isinstance(self.transform, SquashTransform)
            return {
                "mean": list(self.transform.mean),
                "std": list(self.transform.std),
                "interpolation": "bicubic",
                "resize_mode": "squash" if squashes else "shortest",
            }
        names = ("mean", "std", "interpolation", "resize_mode", "fill_color")
        return {name: self.towers.visual.preprocess_cfg[name] for name in names}

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of an image as the model reads it."""
        return tuple(self.transform(Image.new("RGB", (64, 48))).shape)

    @property
    def image_size(self) -> int:
        """Height and width of an image; raises `Unavailable` if they differ."""
        _, height, width = self.image_shape
        if height != width:
            raise Unavailable(f"its images are {width} x {height} pixels, and not square")
        return height


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features that a library computes of the samples that check a format."""

    image: Float[Tensor, "n d"] | None = None
    text: Float[Tensor, "m d"] | None = None


def open_source(reference: str, *, license: str = "unknown") -> Source:
    """Load the model to export; raises as `protoclip.load`."""
    start = find_start(reference)
    model, transform, tokenizer = start.open()
    built: Any = model.towers
    config = None
    if not isinstance(built, HuggingFaceTowers):
        config = deepcopy(start.open_clip_config)
        assert config is not None
        size = built.visual.image_size
        config["vision_cfg"]["image_size"] = size if isinstance(size, int) else list(size)
        config["text_cfg"]["context_length"] = int(tokenizer(["a"]).shape[1])
        config["quick_gelu"] = has_quick_gelu(built)
        if (bias := getattr(built, "logit_bias", None)) is not None:
            config.setdefault("init_logit_bias", float(bias.detach()))
        if "timm_model_name" in config["vision_cfg"]:
            config["vision_cfg"]["timm_model_pretrained"] = False
        config["custom_text"] = not isinstance(built, open_clip.CLIP)
    return Source(
        reference=reference,
        checkpoint=start.checkpoint,
        model=model,
        transform=transform,
        tokenizer=tokenizer,
        config=config,
        license=license,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Use other libraries without the hub, their logs, their warnings and their progress bars."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, logging.root.manager.disable
    constants.HF_HUB_OFFLINE = True
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE, logging.root.manager.disable = before
