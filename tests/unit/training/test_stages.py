"""Stages, the learning-rate schedule, and precision."""

import math

import pytest
import torch

from protoclip.models import loading
from protoclip.testing import tiny_model
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
    """Equal to the formula at every step to 1e-9. It reaches the peak and ends near zero."""
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


def test_the_locked_stage_has_its_own_schedule() -> None:
    """It starts low, reaches its own peak and comes down."""
    schedule = Schedule(peak=1e-3, warm_up=10, main_steps=100, locked_peak=5e-4, locked_steps=20)
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


def test_the_plan_orders_the_stages() -> None:
    """Warm-up, prototypical, locked image. Without prototypes it is CLIP, with the same lock."""
    plan = Plan(num_episodes=6, warm_up=2, locked_image=1, prototypical=True)
    stages = [plan.stage(i) for i in range(6)]
    assert stages == [WARM_UP, WARM_UP, PROTOTYPICAL, PROTOTYPICAL, PROTOTYPICAL, LOCKED_IMAGE]
    clip = Plan(num_episodes=3, warm_up=1, locked_image=1, prototypical=False)
    assert [clip.stage(i) for i in range(3)] == [CONTRASTIVE, CONTRASTIVE, LOCKED_IMAGE]


def test_the_locked_stage_fixes_the_image_tower() -> None:
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


def test_leaving_the_locked_stage_unlocks() -> None:
    """Nothing of the stage before remains."""
    model = loading.model(tiny_model(), seed=0)
    enter_stage(model, LOCKED_IMAGE)
    enter_stage(model, PROTOTYPICAL)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    """So that a renamed tower cannot train by mistake."""
    model = loading.model(tiny_model(), seed=0)
    with pytest.raises(AssertionError, match="no parameter matches"):
        enter_stage(model, Stage(name="typo", frozen=("towers\\.vision\\.",)))


def test_precision_is_as_asked_and_only_as_asked() -> None:
    """fp32 opens no autocast, bf16 and fp16 do, and only fp16 scales its loss."""
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
