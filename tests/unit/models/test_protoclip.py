"""The model: its weights, outputs and inputs; adapters of LoRA; towers of several layers."""

from dataclasses import asdict, replace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from protoclip.config import Config, ImageTowerConfig, ModelConfig, ParallelConfig, TextTowerConfig
from protoclip.data.captions import trim_padding
from protoclip.models import layers, loading
from protoclip.models.checkpoint import write_checkpoint
from protoclip.models.joined import JoinedImageTower, shortlist
from protoclip.models.projections import FrozenEncoders
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.start import resolve_start
from protoclip.training.optim import PROTOTYPICAL, enter_stage
from testing import build_model, tiny_model
from tiny_hugging_face import save_bert, save_dual_encoder, save_siglip
from tiny_starts import save_encoders


def test_weights_are_a_function_of_the_seed(monkeypatch):
    """No global generator changes; `torch.manual_seed` would seed those of GPUs too."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    state = torch.get_rng_state()
    first, second, other = (build_model(tiny_model(), seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert seeded == []
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_heads_start_equal_and_scales_stay_in_range():
    """Heads begin with the same weights. The scale of the sigmoid loss alone has no limits."""
    model = build_model(tiny_model(), seed=0)
    for a, b in zip(model.image_head.parameters(), model.text_head.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a is not b
    for given, clamped in ((-3.0, 1.0), (9.0, 100.0)):
        for parameter in (model.towers.logit_scale, model.prototype_logit_scale):
            parameter.detach().fill_(given)
            model.clamp_scales(torch.tensor(True))
            assert parameter.exp().item() == pytest.approx(clamped, rel=1e-5)
    model.towers.logit_scale.detach().fill_(5.0)
    model.clamp_scales(torch.tensor(True), sigmoid=True)
    assert model.towers.logit_scale.item() == 5.0


def test_only_a_model_of_the_sigmoid_loss_has_a_logit_bias(tmp_path):
    """It starts with scale 10 and bias -10, and comes back from a checkpoint with what it learned.
    One that has a bias keeps what it has."""
    config = tiny_model()
    model = build_model(config, seed=0)
    plain = model.state_dict()
    assert model(torch.zeros(2, 3, 32, 32), torch.ones(2, 8, dtype=torch.long)).logit_bias is None
    model.add_logit_bias()
    assert model.state_dict().keys() - plain.keys() == {"towers.logit_bias"}
    assert model.towers.logit_scale.exp().item() == pytest.approx(10)
    assert model.towers.logit_bias.item() == -10
    for parameter in (model.towers.logit_bias, model.towers.logit_scale):
        parameter.detach().fill_(4.0)
    model.add_logit_bias()
    facts = {"model.json": {"model": asdict(config)}}
    write_checkpoint(tmp_path / "saved", {"model.safetensors": model.state_dict()}, facts)
    loaded, _, _ = loading.load(tmp_path / "saved")
    assert loaded.towers.logit_bias.item() == loaded.towers.logit_scale.item() == 4.0
    start = replace(config, start=str(tmp_path / "saved"))
    assert resolve_start(start).has_logit_bias
    (tmp_path / "saved" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged \("):
        assert resolve_start(start).has_logit_bias


def test_embeddings_have_unit_norm_and_encoders_agree():
    """Features and projections lie on the sphere; encode_* with normalize equals forward."""
    model = build_model(tiny_model(), seed=0).eval()
    images, tokens = torch.randn(3, 3, 32, 32), torch.randint(1, 99, (3, 8))
    out = model(images, tokens)
    for space in ("image_features", "text_features", "image_projections", "text_projections"):
        torch.testing.assert_close(getattr(out, space).norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model.encode_image(images, normalize=True), out.image_features)
    torch.testing.assert_close(model.encode_text(tokens, normalize=True), out.text_features)
    raw = model.encode_text(tokens)
    torch.testing.assert_close(torch.nn.functional.normalize(raw, dim=1), out.text_features)
    assert model(images, tokens, project=False).image_projections is None


def test_a_vision_transformer_reads_images_of_any_size_its_patches_divide():
    """timm builds it for 224 pixels."""
    config = replace(tiny_model(), image=ImageTowerConfig(name="vit_tiny_patch16_224", size=48))
    built = build_model(config, seed=0)
    assert built.encode_image(torch.zeros(2, 3, 48, 48)).shape == (2, 16)


def gradients(given: ModelConfig, *, again: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients of a sum of features, and how often a layer of the image tower was computed."""
    model = build_model(given, seed=0).train()
    config = Config(model=given, parallel=ParallelConfig(activation_checkpointing=again))
    loading.parallelise(config, model, torch.device("cpu"))
    layer, calls = model.towers.visual.trunk.blocks[0], []
    layer.register_forward_pre_hook(lambda *given: calls.append(1))
    torch.manual_seed(0)
    images, length = torch.randn(3, 3, 48, 48), given.text.context_length
    output = model(images, torch.randint(5, 30, (3, length)))
    (output.image_features[0] @ output.text_features[1]).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, len(calls)


@pytest.mark.parametrize("kind", ["small text tower", "encoders"])
def test_activations_computed_again_give_the_same_gradients(kind, tmp_path):
    """With the same dropout. A transformer's layer runs once more in the backward pass."""
    model = save_encoders(tmp_path, size=48)
    if kind != "encoders":
        image = ImageTowerConfig(name="vit_tiny_patch16_224", size=48)
        model = replace(tiny_model(), image=image)
    (expected, once), (found, twice) = (gradients(model, again=again) for again in (False, True))
    assert (once, twice) == (1, 2)
    assert any(name.startswith(("towers.text.", "towers.transformer.")) for name in expected)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", ["small text tower", "encoders"])
def test_padding_that_no_caption_of_a_batch_needs_changes_nothing(kind, tmp_path):
    """Features and gradients are those of tokens of the whole length."""
    given = save_encoders(tmp_path, size=32) if kind == "encoders" else tiny_model()
    model = build_model(given, seed=0).eval()
    tokens = resolve_start(given).tokenizer()(["a dog", "red"])
    short = trim_padding(tokens)
    assert model.ignores_padding
    assert short.shape[1] < tokens.shape[1]
    weights = [one for name, one in model.named_parameters() if ".visual." not in name]

    def computed(tokens: Tensor) -> list[Tensor]:
        features = model.encode_text(tokens)
        gradients = torch.autograd.grad(features.square().sum(), weights, allow_unused=True)
        return [features, *(one for one in gradients if one is not None)]

    found = computed(short)
    assert len(found) > 10
    torch.testing.assert_close(found, computed(tokens), atol=1e-4, rtol=1e-4)


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


LARGER = torch.linspace(-2, 2, 2 * 3 * 64 * 64).view(2, 3, 64, 64)


def with_layers(section, image: str | None, text: str | None):
    """The settings with these layers."""
    towers = {
        "image": replace(section.image, joined_layers=image),
        "text": replace(section.text, joined_layers=text),
    }
    return replace(section, **towers)


@pytest.mark.parametrize(
    ("name", "module"),
    [("test_resnet", "layer2"), ("test_efficientnet", "blocks.2"), ("test_vit", "blocks.3")],
)
@torch.no_grad()
def test_layers_are_means_over_places_of_what_blocks_give(name, module, tmp_path):
    """By hooks on timm's own model. The last layer comes first, as timm pools it."""
    section = save_encoders(tmp_path, name, size=64)
    section = with_layers(section, "last+3" if name != "test_vit" else "last+4", "plain")
    tower = FrozenEncoders(build_model(section, seed=0).towers).eval().visual
    assert isinstance(tower, JoinedImageTower)
    seen = []
    tower.trunk.get_submodule(module).register_forward_hook(lambda *given: seen.append(given[2]))
    last = F.normalize(tower.trunk(LARGER), dim=1)
    maps = seen[0][:, 1:].mean(1) if seen[0].ndim == 3 else seen[0].mean((2, 3))
    features = tower(LARGER)
    torch.testing.assert_close(features[:, : last.shape[1]], last)
    (span,) = tower.columns(tower.chosen[1:])
    torch.testing.assert_close(features[:, slice(*span)], F.normalize(maps, dim=1))


@torch.no_grad()
def test_layers_of_a_text_are_pooled_as_the_last_one(tmp_path):
    """With padding left out, and states as `transformers` gives them."""
    section = save_encoders(tmp_path)
    bert = save_bert(tmp_path / "deep", num_hidden_layers=3)
    section = replace(section, text=replace(section.text, name=str(bert)))
    section = with_layers(section, "plain", "last+1")
    start = resolve_start(section)
    tower = FrozenEncoders(build_model(section, seed=0).towers).eval().text
    tokens = start.tokenizer()(["a cat"])
    (mask,) = tokens >= 0
    model = transformers.BertModel.from_pretrained(bert).eval()
    states = model(tokens[:, mask], output_hidden_states=True).hidden_states
    wanted = [F.normalize(states[layer].mean(1), dim=1) for layer in (3, 2, 1)]
    assert tower.given == [0, 2, 1]
    torch.testing.assert_close(tower(tokens), torch.cat(wanted, dim=1))


def test_a_choice_keeps_the_weights_of_its_columns(tmp_path):
    model = build_model(
        with_layers(save_encoders(tmp_path, "test_resnet", size=64), "auto", "plain"), seed=0
    )
    tower = model.towers.visual
    before, (first, last) = tower.head.proj.weight.clone(), tower.columns([4])[0]
    tower.choose([0, 4])
    assert tower.head.proj.weight[:, -(last - first) :].equal(before[:, first:last])
    features = torch.randn(2, sum(tower.widths))
    kept = torch.cat([features[:, : tower.widths[0]], features[:, first:last]], dim=1)
    torch.testing.assert_close(tower.head(features), kept @ tower.head.proj.weight.T)


def test_the_short_list_is_the_last_the_one_before_and_two_thirds():
    assert [shortlist(depth) for depth in (1, 2, 6, 7, 12)] == [
        [0],
        [0, 1],
        [0, 5, 4],
        [0, 6, 5],
        [0, 11, 8],
    ]
