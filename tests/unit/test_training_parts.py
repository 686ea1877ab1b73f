"""Stages, schedules, optimizer groups and precision."""

import math
from dataclasses import replace

import pytest
import torch

from protoclip.config import ImageTowerConfig
from protoclip.models import loading
from protoclip.testing import tiny_model
from protoclip.training.optim import adamw
from protoclip.training.precision import autocast, grad_scaler, resolve
from protoclip.training.schedule import Schedule, warm_up_cosine
from protoclip.training.stages import (
    CONTRASTIVE,
    LOCKED_IMAGE,
    PROTOTYPICAL,
    WARM_UP,
    Plan,
    Stage,
    enter_stage,
)


def test_the_schedule_is_linear_then_cosine() -> None:
    """Equal to the formula, step by step, to 1e-9: the peak is reached and the end is near zero."""
    peak, warm_up, total = 3e-3, 10, 100
    for step in range(total):
        if step < warm_up:
            expected = peak * (step + 1) / warm_up
        else:
            expected = 0.5 * peak * (1 + math.cos(math.pi * (step - 10) / 90))
        ours = warm_up_cosine(step, peak=peak, warm_up=warm_up, total=total)
        assert ours == pytest.approx(expected, abs=1e-9)
    assert warm_up_cosine(9, peak=1.0, warm_up=10, total=100) == 1.0
    assert warm_up_cosine(99, peak=1.0, warm_up=10, total=100) < 1e-3


def test_the_locked_stage_has_a_schedule_of_its_own() -> None:
    """It starts low, reaches its own peak and comes down, whatever the main cosine ended at."""
    schedule = Schedule(
        peak=1e-3, warm_up=10, main_steps=100, locked_peak=5e-4, locked_warm_up=2, locked_steps=20
    )
    main = [schedule.learning_rate(step) for step in range(100)]
    locked = [schedule.learning_rate(step) for step in range(100, 120)]
    assert main[-1] < 1e-6
    assert locked[0] == pytest.approx(2.5e-4)
    assert max(locked) == pytest.approx(5e-4)
    assert locked[-1] < 1e-5
    assert sum(locked) / 20 > 2e-4


def test_a_warm_up_longer_than_the_run_is_cut() -> None:
    """A short run still reaches its peak and comes down."""
    rates = [warm_up_cosine(step, peak=1.0, warm_up=1000, total=10) for step in range(10)]
    assert max(rates) == 1.0
    assert rates[-1] < 0.2


def test_decay_spares_gains_biases_and_temperatures() -> None:
    """Each parameter is in one group; vectors and temperatures do not decay."""
    model = loading.model(tiny_model(), seed=0)
    optimizer = adamw(model, learning_rate=1.0, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    decayed, vectors, numbers = (
        {id(p) for p in group["params"]} for group in optimizer.param_groups
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0, 0.0]
    spared = vectors | numbers
    assert len(numbers) == 2
    assert len(decayed) + len(vectors) + len(numbers) == len(decayed | spared)
    for name, parameter in model.named_parameters():
        is_vector = name.endswith("bias") or "logit_scale" in name or parameter.ndim < 2
        assert id(parameter) in (spared if is_vector else decayed), name


def test_building_leaves_every_generator_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the CPU, and of GPUs, which `torch.manual_seed` seeds too, maybe later."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    state = torch.get_rng_state()
    loading.model(tiny_model(), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert seeded == []


def test_the_plan_orders_the_stages() -> None:
    """Warm-up, prototypical, locked image; without prototypes it is CLIP with the same lock."""
    plan = Plan(num_episodes=6, warm_up=2, locked_image=1, prototypical=True)
    stages = [plan.stage(i) for i in range(6)]
    assert stages == [WARM_UP, WARM_UP, PROTOTYPICAL, PROTOTYPICAL, PROTOTYPICAL, LOCKED_IMAGE]
    clip = Plan(num_episodes=3, warm_up=1, locked_image=1, prototypical=False)
    assert [clip.stage(i) for i in range(3)] == [CONTRASTIVE, CONTRASTIVE, LOCKED_IMAGE]


def test_the_locked_stage_fixes_the_image_tower() -> None:
    """No gradients and no BatchNorm statistics move in the image tower; the text tower trains."""
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


def test_leaving_the_locked_stage_unlocks() -> None:
    """Stages set everything they depend on: nothing of the stage before remains."""
    model = loading.model(tiny_model(), seed=0)
    enter_stage(model, LOCKED_IMAGE)
    enter_stage(model, PROTOTYPICAL)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    """A renamed tower must not train on unnoticed."""
    model = loading.model(tiny_model(), seed=0)
    with pytest.raises(AssertionError, match="no parameter matches"):
        enter_stage(model, Stage(name="typo", frozen=("towers\\.vision\\.",)))


def test_heads_start_equal_and_scales_stay_in_range() -> None:
    """Image and text heads begin with the same weights; both scales are clamped to [1, 100]."""
    model = loading.model(tiny_model(), seed=0)
    for a, b in zip(model.image_head.parameters(), model.text_head.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a is not b
    for low in (True, False):
        with torch.no_grad():
            model.towers.logit_scale.fill_(-3.0 if low else 9.0)
            model.prototype_logit_scale.fill_(-3.0 if low else 9.0)
        model.clamp_scales()
        for parameter in (model.towers.logit_scale, model.prototype_logit_scale):
            assert parameter.exp().item() == pytest.approx(1.0 if low else 100.0, rel=1e-5)


def test_embeddings_have_unit_norm_and_encoders_agree() -> None:
    """Features and projections lie on the sphere; encode_* with normalize equals forward."""
    model = loading.model(tiny_model(), seed=0).eval()
    images, tokens = torch.randn(3, 3, 32, 32), torch.randint(1, 99, (3, 8))
    out = model(images, tokens)
    rows = (out.image_features, out.text_features, out.image_projections, out.text_projections)
    for features in rows:
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model.encode_image(images, normalize=True), out.image_features)
    torch.testing.assert_close(model.encode_text(tokens, normalize=True), out.text_features)
    raw = model.encode_text(tokens)
    torch.testing.assert_close(torch.nn.functional.normalize(raw, dim=1), out.text_features)
    assert model(images, tokens, project=False).image_projections is None


def test_weights_are_a_function_of_the_seed() -> None:
    """Equal seeds build equal models, others build others, and the global state is left alone."""
    state = torch.get_rng_state()
    first, second, other = (loading.model(tiny_model(), seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_precision_is_as_asked_and_only_as_asked() -> None:
    """fp32 opens no autocast, bf16 and fp16 do, and fp16 alone scales its loss."""
    cpu = torch.device("cpu")
    matrix = torch.randn(4, 4)
    with autocast("fp32", cpu)():
        assert (matrix @ matrix).dtype == torch.float32
    with autocast("bf16", cpu)():
        assert (matrix @ matrix).dtype == torch.bfloat16
    assert resolve("fp32", cpu) == "fp32"
    assert resolve("auto", cpu) in ("fp32", "bf16")
    with autocast("fp16", cpu)():
        assert (matrix @ matrix).dtype == torch.float16
    assert resolve("fp16", cpu) == "fp16"
    assert [grad_scaler(p, cpu).is_enabled() for p in ("fp32", "bf16", "fp16")] == [0, 0, 1]


def test_a_vision_transformer_reads_pictures_of_the_size_asked_for() -> None:
    """timm builds it for 224 pixels; a size that its patches do not divide is refused."""
    config = replace(tiny_model(), image=ImageTowerConfig(name="vit_tiny_patch16_224", size=48))
    built = loading.model(config, seed=0)
    assert built.encode_image(torch.zeros(2, 3, 48, 48)).shape == (2, 16)
    odd = replace(config, image=replace(config.image, size=40))
    with pytest.raises(ValueError, match=r"model\.image\.size: 40 is no multiple of the 16 pixels"):
        loading.model(odd, seed=0)
