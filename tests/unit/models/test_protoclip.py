"""The model: its weights, its outputs, and what it reads."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from protoclip.config import (
    Config,
    ImageTowerConfig,
    ModelConfig,
    ParallelConfig,
)
from protoclip.data.captions import trim_padding
from protoclip.models import loading
from protoclip.models.checkpoint import write_checkpoint
from protoclip.models.start import resolve_start
from testing import build_model, tiny_model
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
    """timm builds it for 224 pixels. A size that its patches do not divide is refused."""
    config = replace(tiny_model(), image=ImageTowerConfig(name="vit_tiny_patch16_224", size=48))
    built = build_model(config, seed=0)
    assert built.encode_image(torch.zeros(2, 3, 48, 48)).shape == (2, 16)
    odd = replace(config, image=replace(config.image, size=40))
    with pytest.raises(ValueError, match=r"model\.image\.size: 40 is no multiple of the 16 pixels"):
        build_model(odd, seed=0)


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
