"""LoRA: which layers get adapters, that all of them train, and that they merge."""

from dataclasses import replace
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from protoclip.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from protoclip.models import layers
from protoclip.models.protoclip import ProtoCLIP
from protoclip.training.optim import PROTOTYPICAL, enter_stage
from testing import build_model, tiny_model
from tiny_hugging_face import save_dual_encoder, save_siglip
from tiny_starts import save_encoders

OWN = {
    "ViT": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    # Its pooling reads the weights of linear layers, and calls none of them.
    "ResNet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
}
TEXT = {"context_length": 8, "width": 32, "heads": 2, "layers": 1}
TOKENS = torch.randint(1, 9, (3, 8), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))

# What the note says of each image tower.
TOWERS = {
    "ViT": "4 linear and 2 fused attention",
    "ResNet": "19 convolutional",
    "test_vit": "24 linear",
    "test_resnet": "15 convolutional",
    # Of its fused queries, keys and values it reads the weight alone.
    "eva02_tiny_patch14_224": "36 linear",
}


def config_of(name: str, patch: pytest.MonkeyPatch) -> ModelConfig:
    if name in OWN:
        config = {"embed_dim": 16, "vision_cfg": OWN[name], "text_cfg": TEXT}
        patch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
        return replace(tiny_model(), name="tiny", image=ImageTowerConfig(), text=TextTowerConfig())
    size = 28 if name.startswith("eva") else 32
    return replace(tiny_model(), image=ImageTowerConfig(name=name, size=size))


def with_adapters(model: ProtoCLIP, **settings: Any) -> str:
    usual: dict[str, Any] = {"tokens": TOKENS[:1], "seed": 3}
    (note,) = layers.add_adapters(model, 4, **{**usual, **settings})
    return note


def features(model: ProtoCLIP) -> tuple[Tensor, Tensor]:
    size = model.towers.visual.image_size
    size = size if isinstance(size, int) else size[0]
    images = torch.nn.functional.interpolate(IMAGES, size=(size, size))
    return model.encode_image(images), model.encode_text(TOKENS)


# Models of `transformers` to start from, and what the note says of their image towers.
STARTS = {
    "SigLIP": (save_siglip, "8 linear and 1 fused attention"),
    "dual encoder": (save_dual_encoder, "8 linear"),
}


@pytest.mark.parametrize("name", [*TOWERS, "BERT", *STARTS])
def test_adapters_train_and_merge(name, monkeypatch, tmp_path):
    """At first they change no bit. All of them train, nothing else of the towers does but scales,
    and merged into the plain model they compute what they computed beside it."""
    if name == "BERT":
        config = save_encoders(tmp_path, size=32)
        expected = "6 linear layers of the text tower"
    elif name in STARTS:
        save, kinds = STARTS[name]
        config = ModelConfig(start=f"hf:{save(tmp_path)}")
        expected = f"{kinds} layers of the image tower"
    else:
        config = config_of(name, monkeypatch)
        expected = f"{TOWERS[name]} layers of the image tower"
    model, plain = (build_model(config, seed=0) for _ in range(2))
    before = [part.clone() for part in features(model.eval())]
    state = torch.get_rng_state()
    note = with_adapters(model, new_projections=config.projections_are_new)
    assert torch.equal(torch.get_rng_state(), state)
    assert expected in note
    assert all(map(torch.equal, features(model), before))
    base = {k: v.clone() for k, v in model.state_dict().items() if layers.ADDED not in k}
    enter_stage(model, replace(PROTOTYPICAL, model=replace(config, lora=4)))
    model.eval()  # BatchNorm statistics stay
    for parameter_name, parameter in model.named_parameters():
        if ".lora_B." in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    for part in features(model):
        part.square().sum().backward()
    trained = {n for n, p in model.towers.named_parameters() if p.requires_grad}
    assert trained == {
        n
        for n, _ in model.towers.named_parameters()
        if layers.ADDED in n
        or n.startswith("logit_")
        or (config.projections_are_new and n.startswith(("visual.head.", "text.proj.")))
    }
    idle = {n for n, p in model.towers.named_parameters() if n in trained and p.grad is None}
    assert idle == {n for n in trained if n.startswith("logit_")}
    with torch.inference_mode():
        features(model)  # as extraction and evaluation do
    weights = model.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in base.items())
    merged, rest = layers.merge_adapters(model, weights)
    plain.load_state_dict(merged)
    for found, given, first in zip(features(plain.eval()), features(model), before, strict=True):
        torch.testing.assert_close(found, given, atol=1e-5, rtol=1e-4)
        assert not torch.equal(given, first)
    again = layers.unmerge_adapters(model, merged, rest)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[key], value) for key, value in weights.items())


def test_a_locked_tower_and_a_new_projection_get_no_adapters(tmp_path):
    config = save_encoders(tmp_path, size=32)
    model = build_model(config, seed=0)
    note = with_adapters(model, locked=["image"], new_projections=True)
    assert "image tower" not in note
    adapted = [name for name, _ in layers.list_adapted_layers(model)]
    assert len(adapted) == 6
    assert not [name for name in adapted if "visual" in name or name.endswith("text.proj")]
    model = build_model(config, seed=0)
    with_adapters(model)
    assert {"towers.visual.head.proj", "towers.text.proj"} <= {
        n for n, _ in layers.list_adapted_layers(model)
    }
