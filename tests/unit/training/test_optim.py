"""Stages, precision, learning rates, and the settings that a configuration leaves open."""

import math
import tomllib
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch

from protoclip.config import (
    Config,
    EpisodeConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PrototypeConfig,
    TeacherConfig,
)
from protoclip.models import loading
from protoclip.testing import tiny_config, tiny_model
from protoclip.training.optim import (
    optim_settings,
    optimizer,
    resolved,
    schedule,
    set_learning_rate,
    warm_up_cosine,
)
from protoclip.training.precision import autocast, grad_scaler, resolve
from protoclip.training.stages import (
    CONTRASTIVE,
    LOCKED_IMAGE,
    PROTOTYPICAL,
    WARM_UP,
    enter_stage,
    stage_of,
)


def named(name: str | None, *, batch: int = 512, steps: int = 1000, **optim: object) -> Config:
    """A run of two episodes with this many steps together."""
    return Config(
        model=ModelConfig(name=name),
        episodes=EpisodeConfig(size=steps // 2 * batch, count=2, batch_size=batch),
        optim=OptimConfig(**optim),
    )


def test_small_towers_get_what_suits_the_emoji():
    """The values that the bundled recipes were measured with, at any batch and without a note."""
    expected = {"learning_rate": 2e-3, "warm_up_steps": 50, "locked_learning_rate": 2e-4}
    expected |= {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2, "heads_weight_decay": 0.2}
    expected |= {"heads_lr_scale": 0.01}
    for batch in (64, 4096):
        assert optim_settings(named(None, batch=batch)) == (expected, [])
    lower, _ = optim_settings(named(None, weight_decay=0.1))
    assert lower["heads_weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["EVA02-B-16", "swin_base_patch4_window7_224"], ((0.9, 0.98), 1e-6, 0.2)),
        (["RN50", "convnext_base"], ((0.9, 0.999), 1e-8, 0.1)),
    ],
)
def test_a_named_model_gets_the_usual_values(names, expected):
    """They depend on the kind of image tower, as the README says."""
    for name in names:
        settings, _ = optim_settings(named(name))
        assert (settings["betas"], settings["eps"], settings["weight_decay"]) == expected
        assert settings["heads_weight_decay"] == 0


def test_heads_of_a_named_model_learn_as_fast_as_the_paper_has_it_with_extraction():
    """And as the recipes have it. A queue needs slow heads."""
    queue = PrototypeConfig(source="queue")
    for changes, scale in (
        ({}, 1.0),
        ({"prototypes": queue}, 0.01),
        ({"teacher": TeacherConfig(features="emoji")}, 0.01),
        ({"optim": OptimConfig(heads_lr_scale=0.3), "prototypes": queue}, 0.3),
    ):
        settings, _ = optim_settings(replace(named("RN50"), **changes))
        assert settings["heads_lr_scale"] == scale
    checked = 0
    for recipe in Path(__file__).parents[3].glob("recipes/*.toml"):
        config = Config.from_dict(tomllib.loads(recipe.read_text(encoding="utf-8")))
        if scale := config.optim.heads_lr_scale:
            unset = replace(config, optim=replace(config.optim, heads_lr_scale=None))
            assert optim_settings(unset)[0]["heads_lr_scale"] == scale, recipe
            checked += 1
    assert checked == 6


@pytest.mark.parametrize(
    ("batch", "steps", "rate", "warm_up"),
    [
        (64, 100_000, 6.25e-5, 7812),  # 500,000 samples
        (1000, 100_000, 5e-4, 2000),  # 2%
        (1000, 1000, 5e-4, 100),  # a tenth of a short run
        (1000, 4, 5e-4, 1),
    ],
)
def test_the_rate_grows_with_the_batch_and_the_warm_up_with_the_run(batch, steps, rate, warm_up):
    settings, _ = optim_settings(named("ViT-B-32", batch=batch, steps=steps))
    assert settings["learning_rate"] == pytest.approx(rate)
    assert settings["locked_learning_rate"] == pytest.approx(rate / 10)
    assert settings["warm_up_steps"] == warm_up


def test_what_is_set_counts_and_what_is_not_gets_a_note():
    """Zeros count as set."""
    settings, notes = optim_settings(named("ViT-B-32"))
    assert "optim.learning_rate = 0.0005, from ViT-B-32 at batch 512" in notes
    assert len(notes) == len(settings)
    own = {"learning_rate": 2e-3, "warm_up_steps": 0, "locked_learning_rate": 0.0}
    own |= {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.0, "heads_weight_decay": 0.3}
    own |= {"heads_lr_scale": 0.2}
    for name in (None, "ViT-B-32", "RN50"):
        assert optim_settings(named(name, **own)) == (own, [])
    settings, notes = optim_settings(named("ViT-B-32", learning_rate=1e-4))
    assert settings["locked_learning_rate"] == pytest.approx(1e-5)
    assert not any("optim.learning_rate" in note for note in notes)


@pytest.mark.parametrize("heads_decay", [0.2, 0.3])
def test_parameters_have_the_decay_and_rate_of_their_part(heads_decay):
    """Gains, biases and scales have no decay, and temperatures keep the common rate."""
    scales = {"image_lr_scale": 0.1, "text_lr_scale": 0.5, "heads_lr_scale": 0.05}
    settings = OptimConfig(**scales, heads_weight_decay=heads_decay)
    config = replace(tiny_config(out="unused"), optim=settings)
    model = loading.model(config.model, seed=0)
    model.add_logit_bias()
    adamw = optimizer(config, model)
    set_learning_rate(adamw, 2.0)
    groups = {id(p): group for group in adamw.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(groups)
    for name, parameter in model.named_parameters():
        rate, decay = 2.0, 0.2
        if name.startswith(("image_head.", "text_head.")):
            rate, decay = 0.1, heads_decay
        elif name.startswith("towers.visual."):
            rate = 0.2
        elif name.startswith("towers.") and not name.startswith("towers.logit_"):
            rate = 1.0
        group = groups.pop(id(parameter))
        assert group["lr"] == pytest.approx(rate), name
        assert group["weight_decay"] == (decay if parameter.ndim >= 2 else 0.0), name
        # FSDP2 needs scalars apart.
        assert len({p.ndim == 0 for p in group["params"]}) == 1
    assert not groups


def test_the_locked_stage_has_its_own_cosine_unless_its_rate_is_zero():
    """It starts low, reaches its own peak and comes down. Else one cosine covers the whole run."""
    config = named(None, steps=100, warm_up_steps=10, locked_learning_rate=5e-4)
    config = replace(config, episodes=replace(config.episodes, locked_image=1))
    rates = [schedule(config)(step) for step in range(100)]
    assert rates[49] < 1e-5
    assert rates[50] == pytest.approx(2.5e-4)
    assert max(rates[50:]) == pytest.approx(5e-4)
    assert rates[99] < 1e-5
    one = schedule(replace(config, optim=replace(config.optim, locked_learning_rate=0.0)))
    rates = [one(step) for step in range(100)]
    assert rates[55] == pytest.approx(1e-3)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)


def test_models_with_a_logit_bias_get_the_sigmoid_loss():
    """All of open_clip's, and no other model, unless a setting says so. CoCas are refused."""
    for name in (None, *open_clip.list_models()):
        if name is not None and name.startswith("coca"):
            continue
        sigmoid = name is not None and "siglip" in name.lower()
        config, notes = resolved(named(name))
        assert config.loss.instance == ("sigmoid" if sigmoid else "info_nce"), name
        assert any("loss.instance = sigmoid" in note for note in notes) == sigmoid
    for instance in ("info_nce", "sigmoid"):
        for name in ("RN50", "ViT-B-16-SigLIP"):
            config = replace(named(name), loss=LossConfig(instance=instance))
            assert resolved(config)[0].loss == config.loss


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
    stages = [stage_of(config, index) for index in range(4)]
    assert stages == [WARM_UP, PROTOTYPICAL, PROTOTYPICAL, LOCKED_IMAGE]
    clip = replace(config, loss=LossConfig(prototypical=0.0))
    stages = [stage_of(clip, index) for index in range(4)]
    assert stages == [CONTRASTIVE] * 3 + [LOCKED_IMAGE]


def test_the_locked_stage_fixes_the_image_tower():
    """Neither weights nor BatchNorm statistics of the image tower move; the text tower trains."""
    model = loading.model(tiny_model(), seed=0)
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
        assert resolve(name, cpu) == name
        assert grad_scaler(name, cpu).is_enabled() == (name == "fp16")
    assert resolve("auto", cpu) in ("fp32", "bf16")


def test_cards_that_imitate_bf16_train_in_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda imitated=True: imitated)
    assert resolve("auto", torch.device("cuda")) == "fp16"
