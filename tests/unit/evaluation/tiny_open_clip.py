"""A folder in open_clip's format with an untrained model of two small transformers."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 2},
}


def save_tiny_open_clip(folder: Path, *, seed: int = 0) -> Path:
    config = json.dumps({"model_cfg": MODEL, "preprocess_cfg": {}})
    (folder / "open_clip_config.json").write_text(config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = open_clip.create_model(f"local-dir:{folder}").state_dict()
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder
