"""The model to export, and the folder that open_clip reads as `local-dir:FOLDER`.

Once it is uploaded, open_clip reads that folder as `hf-hub:NAME`.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from protoclip.data.transforms import EvaluationTransform, SquashTransform
from protoclip.encode.engine import LEAST_OPSET
from protoclip.files import read_json, to_json
from protoclip.models.checkpoint import read_prototypes
from protoclip.models.open_clip import FILES, has_quick_gelu
from protoclip.models.opening import OPEN_CLIP_CONFIG, ImageTransform, Tokenizer
from protoclip.models.protoclip import TowerPair
from protoclip.models.start import find_start
from protoclip.models.transformers import HuggingFaceTowers

Features = dict[str, Tensor]  # of the samples that check a format, by modality


class Unavailable(ValueError):
    """A model cannot have a format; says why."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to export, in evaluation mode on the CPU."""

    reference: str
    checkpoint: Path | None  # the checkpoint folder of a model of ours
    model: TowerPair
    transform: ImageTransform
    tokenizer: Tokenizer
    # open_clip's description of the towers; None if they are of `transformers`.
    config: Mapping[str, Any] | None
    license: str  # of the weights, as the hub writes it
    opset: int  # of ONNX graphs

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

    def prepare(self, image: Image.Image) -> Tensor:
        """An image as the model reads it; the channels of RGB stand for bands, in turn."""
        if (bands := getattr(self.transform, "bands", None)) is None:
            return self.transform(image)
        colours = np.asarray(image.convert("RGB"))
        return self.transform(colours[..., np.arange(bands.channels) % 3])  # type: ignore[arg-type]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of an image as the model reads it."""
        return tuple(self.prepare(Image.new("RGB", (64, 48))).shape)

    @property
    def image_size(self) -> int:
        """Height and width of an image; raises `Unavailable` if they differ."""
        _, height, width = self.image_shape
        if height != width:
            raise Unavailable(f"its images are {width} x {height} pixels, and not square")
        return height


def open_source(reference: str, *, license: str = "unknown", opset: int = LEAST_OPSET) -> Source:
    """Load the model to export; raises as `protoclip.load`."""
    start = find_start(reference)
    # Projection heads read features of the norm that the run's towers give.
    if start.checkpoint is None or not read_prototypes(start.checkpoint):
        start = start.with_plain_towers()
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
        opset=opset,
    )


def write_model(source: Source, folder: Path) -> str:
    """Write `open_clip_config.json` and the weights; returns the name of the model's class."""
    config, built = source.open_clip_config, source.towers
    settings = {"model_cfg": dict(config), "preprocess_cfg": source.preprocessing}
    text = to_json(settings, indent=2)
    (folder / OPEN_CLIP_CONFIG).write_text(text + "\n", encoding="utf-8")
    weights = {name: tensor.contiguous() for name, tensor in built.state_dict().items()}
    save_file(weights, folder / FILES[0])
    if config["text_cfg"].get("hf_tokenizer_name"):
        # open_clip then looks for the tokenizer in the folder.
        source.text_tokenizer.tokenizer.save_pretrained(folder)
    if config["text_cfg"].get("hf_model_name"):
        built.text.config.save_pretrained(folder)
    if names_its_path(folder):
        point_to(folder, str(folder.absolute()))
    return type(built).__name__


def names_its_path(folder: Path) -> bool:
    """Whether open_clip finds a Hugging Face text tower by the path of a folder."""
    path = folder / OPEN_CLIP_CONFIG
    text = read_json(path)["model_cfg"]["text_cfg"] if path.is_file() else {}
    name = text.get("hf_model_name") or text.get("hf_tokenizer_name") or ""
    return bool(name) and (Path(name).is_absolute() or Path(name).exists())


def point_to(folder: Path, address: str) -> None:
    """Let open_clip find a Hugging Face text tower at the folder's path, or its name on the hub."""
    settings = read_json(folder / OPEN_CLIP_CONFIG)
    text = settings["model_cfg"]["text_cfg"]
    text |= dict.fromkeys({"hf_model_name", "hf_tokenizer_name"} & text.keys(), address)
    (folder / OPEN_CLIP_CONFIG).write_text(to_json(settings, indent=2) + "\n", encoding="utf-8")


def embed_samples(folder: Path, images: Float[Tensor, "n 3 h w"], captions: list[str]) -> Features:
    """Features that open_clip computes from the folder."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.inference_mode():
        return {
            "image": model.encode_image(images, normalize=False),
            "text": model.encode_text(tokenizer(captions), normalize=False),
        }
