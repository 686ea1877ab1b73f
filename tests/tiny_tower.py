"""A timm image tower of 3,000 parameters, which runs in tests/fixtures have."""

from typing import Any

from timm.models import build_model_with_cfg, register_model
from timm.models.resnet import BasicBlock, ResNet


@register_model
def fixture_resnet(pretrained: bool = False, **kwargs: Any) -> ResNet:
    stem = {"stem_type": "deep", "stem_width": 4}
    sizes = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8], **stem}
    return build_model_with_cfg(
        ResNet, "fixture_resnet", pretrained, block=BasicBlock, **sizes, **kwargs
    )
