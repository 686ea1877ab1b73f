"""What `[parallel]` and the towers' own rates do to one process."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from protoclip.config import (
    Config,
    ImageTowerConfig,
    OptimConfig,
    ParallelConfig,
)
from protoclip.models import loading
from protoclip.models.protoclip import ProtoCLIP
from protoclip.testing import tiny_config, tiny_model
from protoclip.training.build import rate_scales
from protoclip.training.optim import adamw, set_learning_rate


def gradients(config: Config) -> tuple[dict[str, Tensor], int]:
    """Gradients of a sum of features, and how often a layer of the image tower was computed."""
    model = loading.model(config.model, seed=0)
    loading.parallelise(config, model)
    layer, calls = model.towers.visual.trunk.blocks[0], []
    layer.register_forward_pre_hook(lambda *given: calls.append(1))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 48, 48, generator=generator)
    output = model(images, torch.ones(3, 8, dtype=torch.long))
    (output.image_features[0] @ output.text_features[1]).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, len(calls)


def test_activations_computed_again_give_the_same_gradients() -> None:
    """A transformer's layer runs once more in the backward pass."""
    config = tiny_config(out="unused")
    image = ImageTowerConfig(name="vit_tiny_patch16_224", size=48)
    config = replace(config, model=replace(tiny_model(), image=image))
    expected, once = gradients(config)
    again = replace(config, parallel=ParallelConfig(activation_checkpointing=True))
    found, twice = gradients(again)
    assert (once, twice) == (1, 2)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def rates(model: ProtoCLIP, config: Config) -> dict[str, float]:
    optimizer = adamw(
        model,
        learning_rate=1.0,
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=0.2,
        scales=rate_scales(config),
    )
    set_learning_rate(optimizer, 2.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_towers_and_heads_may_have_learning_rates_of_their_own() -> None:
    """Temperatures keep the common one, and every parameter is in one group."""
    optim = OptimConfig(image_lr_scale=0.1, text_lr_scale=0.5, heads_lr_scale=0.05)
    config = replace(tiny_config(out="unused"), optim=optim)
    model = loading.model(config.model, seed=0)
    found = rates(model, config)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, rate in found.items():
        if name.startswith("towers.visual."):
            assert rate == pytest.approx(0.2), name
        elif name.startswith("towers.") and name != "towers.logit_scale":
            assert rate == pytest.approx(1.0), name
        elif name.startswith(("image_head.", "text_head.")):
            assert rate == pytest.approx(0.1), name
        else:
            assert rate == pytest.approx(2.0), name
    alike = replace(config, optim=OptimConfig(heads_lr_scale=1.0))
    assert set(rates(model, alike).values()) == {2.0}
