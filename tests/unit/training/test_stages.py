"""Stages, the learning-rate schedule, and precision."""

import math
from dataclasses import replace

import pytest
import torch

from protoclip.config import Config, EpisodeConfig, LossConfig
from protoclip.models import loading
from protoclip.testing import tiny_model
from protoclip.training.optim import warm_up_cosine
from protoclip.training.precision import autocast, grad_scaler, resolve
from protoclip.training.stages import (
    CONTRASTIVE,
    LOCKED_IMAGE,
    PROTOTYPICAL,
    WARM_UP,
    enter_stage,
    stage_of,
)


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
    """Neither weights nor BatchNorm statistics of the image tower move; the text tower trains.
    The next stage unlocks both."""
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
