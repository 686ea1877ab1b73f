"""The optimizer and its learning rate, stages, and precision."""

import math
from dataclasses import replace

import open_clip
import pytest
import torch

from protoclip.config import (
    Config,
    EpisodeConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
)
from protoclip.models.protoclip import autocast, grad_scaler, resolve_precision
from protoclip.training.optim import (
    LOCKED_IMAGE,
    PROTOTYPICAL,
    enter_stage,
    find_stage,
    layer_distances,
    make_optimizer,
    make_schedule,
    warm_up_cosine,
)
from protoclip.training.plan import resolve_settings
from protoclip.training.presets import choose_optimizer, fill
from testing import build_model, tiny_config, tiny_model


def short(**optim: object) -> Config:
    """A run of 100 steps of a small model, with its optimizer's defaults."""
    episodes = EpisodeConfig(size=50 * 16, count=2, batch_size=16, locked_image=1)
    config = replace(tiny_config(out="unused"), episodes=episodes, optim=OptimConfig(**optim))
    return replace(config, optim=fill(config.optim, choose_optimizer(config, None)))


@pytest.mark.parametrize("heads_decay", [0.2, 0.3])
def test_parameters_have_the_decay_and_rate_of_their_part(heads_decay):
    """Gains, biases and scales have no decay, and temperatures keep the common rate."""
    scales = {"image_lr_scale": 0.1, "heads_lr_scale": 0.05}
    config = short(**scales, heads_weight_decay=heads_decay)
    model = build_model(config.model, seed=0)
    model.add_logit_bias()
    adamw = make_optimizer(config, model)
    groups = {id(p): group for group in adamw.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(groups)
    for name, parameter in model.named_parameters():
        scale, decay = 1.0, 0.2
        if name.startswith(("image_head.", "text_head.")):
            scale, decay = 0.05, heads_decay
        elif name.startswith("towers.visual."):
            scale = 0.1
        group = groups.pop(id(parameter))
        assert group["scale"] == pytest.approx(scale), name
        assert group["weight_decay"] == (decay if parameter.ndim >= 2 else 0.0), name
        # FSDP2 needs scalars apart.
        assert len({p.ndim == 0 for p in group["params"]}) == 1
    assert not groups


def test_the_locked_stage_has_its_own_cosine_unless_its_rate_is_zero():
    """It starts low, reaches its own peak and comes down. Else one cosine covers the whole run."""
    config = short(warm_up_steps=10, locked_learning_rate=5e-4)
    rates = [make_schedule(config)(step) for step in range(100)]
    assert rates[49] < 1e-5
    assert rates[50] == pytest.approx(2.5e-4)
    assert max(rates[50:]) == pytest.approx(5e-4)
    assert rates[99] < 1e-5
    one = make_schedule(replace(config, optim=replace(config.optim, locked_learning_rate=0.0)))
    rates = [one(step) for step in range(100)]
    assert rates[55] == pytest.approx(1e-3)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)


def test_models_with_a_logit_bias_get_the_sigmoid_loss():
    """All of open_clip's, and no other model, unless a setting says so. CoCas are refused."""
    for name in (None, *open_clip.list_models()):
        if name is not None and name.startswith("coca"):
            continue
        sigmoid = name is not None and "siglip" in name.lower()
        outlined = resolve_settings(Config(model=ModelConfig(name=name)))
        assert outlined.config.loss.instance == ("sigmoid" if sigmoid else "info_nce"), name
        assert any("loss.instance = sigmoid" in note for note in outlined.notes) == sigmoid
    for instance in ("info_nce", "sigmoid"):
        for name in ("RN50", "ViT-B-16-SigLIP"):
            config = Config(model=ModelConfig(name=name), loss=LossConfig(instance=instance))
            assert resolve_settings(config).config.loss.instance == instance


def test_the_schedule_is_linear_then_cosine():
    """Equal to the formula at every step. A short run still reaches its peak and comes down."""
    for step in range(100):
        expected = (
            (step + 1) / 10 if step < 10 else 0.5 + 0.5 * math.cos(math.pi * (step - 10) / 90)
        )
        assert warm_up_cosine(step, peak=1.0, warm_up=10, total=100) == pytest.approx(expected)
    rates = [warm_up_cosine(step, peak=1.0, warm_up=1000, total=10) for step in range(10)]
    assert max(rates) == 1.0
    assert rates[-1] < 0.2


def test_the_order_of_the_stages():
    """Warm-up, prototypical, locked image. Without prototypes it is CLIP, with the same lock."""
    config = Config(episodes=EpisodeConfig(count=4, warm_up=1, locked_image=1))
    stages = [find_stage(config, index).name for index in range(4)]
    assert stages == ["warm-up", "prototypical", "prototypical", "locked image"]
    clip = replace(config, loss=LossConfig(prototypical=0.0))
    stages = [find_stage(clip, index).name for index in range(4)]
    assert stages == ["contrastive"] * 3 + ["locked image"]


def test_the_locked_stage_fixes_the_image_tower():
    """Neither weights nor BatchNorm statistics of the image tower move; the text tower trains."""
    model = build_model(tiny_model(), seed=0)
    enter_stage(model, LOCKED_IMAGE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out = model(torch.randn(4, 3, 32, 32), torch.randint(1, 99, (4, 8)), project=False)
    (out.image_features * out.text_features).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)
    changed = {
        name for name, tensor in model.state_dict().items() if (tensor != before[name]).any()
    }
    assert changed
    assert not {name for name in changed if name.startswith(("towers.visual", "image_head"))}
    assert any(name.startswith("towers.transformer") for name in changed)
    enter_stage(model, PROTOTYPICAL)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_precision_is_as_asked_and_only_as_asked():
    """fp32 opens no autocast, bf16 and fp16 do, and only fp16 scales its loss."""
    cpu, matrix = torch.device("cpu"), torch.randn(4, 4)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with autocast(name, cpu)():
            assert (matrix @ matrix).dtype == dtype
        assert resolve_precision(name, cpu) == name
        assert grad_scaler(name, cpu).is_enabled() == (name == "fp16")
    assert resolve_precision("auto", cpu) in ("fp32", "bf16")


def test_cards_that_imitate_bf16_train_in_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda imitated=True: imitated)
    assert resolve_precision("auto", torch.device("cuda")) == "fp16"


@pytest.mark.parametrize(
    ("image", "behind", "last"),
    [("test_convnext", "head.norm", "stages.3"), ("test_vit", "norm", "blocks.5")],
)
def test_what_is_behind_the_last_stage_keeps_the_whole_rate(image, behind, last):
    """Or counts to it, where timm groups it so."""
    config = replace(tiny_model(), image=replace(tiny_model().image, name=image))
    distances = layer_distances(build_model(config, seed=0))
    trunk = "towers.visual.trunk."
    learning_rates = {
        part: {d for name, d in distances.items() if name.startswith(f"{trunk}{part}.")}
        for part in (behind, last)
    }
    assert learning_rates[last] == {1}
    assert learning_rates[behind] == ({0} if image == "test_convnext" else {1})
