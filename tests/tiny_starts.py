"""Tiny models of open_clip and two encoders with random weights, to start from."""

import json
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import save_file

from protoclip.config import HeadConfig, ImageTowerConfig, ModelConfig, TextTowerConfig
from tiny_hugging_face import save_bert

HEADS = HeadConfig(hidden_dim=32, projection_dim=8)
VIT = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
TEXT = {"context_length": 12, "width": 32, "heads": 2, "layers": 1}
CLIP = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}


def save_open_clip(folder: Path, config: dict[str, Any] = CLIP, **preprocessing: Any) -> Path:
    """A folder in open_clip's format."""
    folder.mkdir(parents=True)
    content = {"model_cfg": config, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    with torch.random.fork_rng():
        model = open_clip.create_model(f"local-dir:{folder}")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def save_encoders(folder: Path, image: str = "test_vit", *, size: int | None = None) -> ModelConfig:
    """A timm image tower and a BERT, whose weights are in files."""
    folder.mkdir(exist_ok=True)
    weights = folder / f"{image}.safetensors"
    save_file(timm.create_model(image).state_dict(), weights)
    return ModelConfig(
        embed_dim=16,
        image=ImageTowerConfig(name=image, weights=str(weights), size=size),
        text=TextTowerConfig(name=str(save_bert(folder / "bert")), context_length=20),
        heads=HEADS,
    )
