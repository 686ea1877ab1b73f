"""Image towers of timm: one of 3,000 parameters, which runs in tests/fixtures have, and a ViT."""

from typing import Any

from timm.models import build_model_with_cfg, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import test_vit as vit_of_six_blocks


@register_model
def fixture_resnet(pretrained: bool = False, **kwargs: Any) -> ResNet:
    stem = {"stem_type": "deep", "stem_width": 4}
    sizes = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8], **stem}
    return build_model_with_cfg(
        ResNet, "fixture_resnet", pretrained, block=BasicBlock, **sizes, **kwargs
    )


@register_model
def one_block(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """timm's test_vit with one block of its six, since each is compiled anew."""
    return vit_of_six_blocks(pretrained, **{"depth": 1, **kwargs})
