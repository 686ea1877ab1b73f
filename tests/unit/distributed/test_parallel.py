"""What `[parallel]` and the towers' own rates do to one process."""

from dataclasses import replace

import torch
from torch import Tensor

from protoclip.config import Config, ImageTowerConfig, ParallelConfig
from protoclip.models import loading
from protoclip.testing import tiny_config, tiny_model


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


def test_activations_computed_again_give_the_same_gradients():
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
