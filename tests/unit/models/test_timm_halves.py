"""Image models of timm: which can be towers, and where the projection becomes the classifier."""

import pytest
import timm
import torch
from torch import nn

from protoclip.config import ImageTowerConfig, ModelConfig
from protoclip.models.formats import closed_formats
from protoclip.models.resolve import resolve_start


def test_a_model_without_a_feature_of_the_image_is_refused_in_one_line(monkeypatch):
    """As timm's encoders of language models, which give features of places alone."""
    name = "resnet14t"  # which no other test asks for: what it gives is remembered
    monkeypatch.setattr(timm, "create_model", lambda *words, **more: nn.Conv2d(3, 8, 8))
    line = rf"^model.image.name: {name} gives no feature .*; choose another, such as resnet10t"
    with pytest.raises(ValueError, match=line):
        resolve_start(ModelConfig(image=ImageTowerConfig(name=name)))


@pytest.mark.parametrize("name", ["levit_128s", "resnetv2_18"])
def test_timm_takes_no_projection_where_it_has_no_linear_classifier(name):
    """Which towers without weights tell."""
    start = resolve_start(ModelConfig(image=ImageTowerConfig(name=name, size=224)))
    built = start.build(on_meta=True).towers
    assert next(built.parameters()).device == torch.device("meta")
    reasons = closed_formats(built, start.open_clip_config)
    assert reasons == {"timm": f"timm's {name} has no linear classifier to take the projection"}
