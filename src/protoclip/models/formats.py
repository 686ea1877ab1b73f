"""Which formats of `protoclip export` can hold towers of open_clip, and why the others cannot.

`align` asks before it trains, of towers without weights, and `export` before it writes. What shows
in the tokenizer alone, or once a library has built the model, is for `export` to tell.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import open_clip
import timm
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU
from torch import nn

from protoclip.models.text_models import OPEN_CLIP_KINDS


def closed_formats(built: Any, config: Mapping[str, Any]) -> dict[str, str]:
    """Why formats cannot hold towers, by format; `config` is open_clip's of them."""
    reasons = {name: find_obstacle(name, built, config) for name in OBSTACLES}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def find_obstacle(name: str, built: Any, config: Mapping[str, Any]) -> str | None:
    """Why a format cannot hold towers, if it cannot."""
    return OBSTACLES[name](built, config["vision_cfg"]) if name in OBSTACLES else None


def find_open_clip_obstacle(built: Any, vision: Mapping[str, Any]) -> str | None:
    trunk: Any = getattr(built.visual, "trunk", None)
    if hasattr(trunk, "set_input_size"):
        # open_clip hands no image size to timm.
        usual, size = trunk.default_cfg["input_size"][-1], built.visual.image_size
        sides = {size} if isinstance(size, int) else {*size}
        if sides != {usual}:
            read = " x ".join(map(str, sides))
            return (
                f"it builds {vision['timm_model_name']} for images of {usual} pixels alone, and "
                f"this model reads {read}"
            )
    kind = getattr(getattr(getattr(built, "text", None), "config", None), "model_type", None)
    if kind is not None and kind not in OPEN_CLIP_KINDS:
        return f"it knows no text models of kind {kind}"
    return None


def find_hf_obstacle(built: Any, vision: Mapping[str, Any]) -> str | None:
    visual, text = built.visual, getattr(built, "text", built)
    if hasattr(text, "config"):
        return "no dual encoder of Hugging Face's transformers pools tokens as its text half"
    if not is_plain_vit(visual) and not has_linear_projection(visual, vision):
        kind = type(visual).__name__
        return f"no model of transformers has its image tower ({kind}) and projection"
    if not is_clip_text(text):
        return "no model of transformers has its text tower"
    if getattr(built, "logit_bias", None) is not None:
        return "no model of transformers with such towers has a logit bias"
    return None


def find_timm_obstacle(built: Any, vision: Mapping[str, Any]) -> str | None:
    visual = built.visual
    if not isinstance(visual, TimmModel):
        is_known = isinstance(visual, ModifiedResNet) or is_plain_vit(visual)
        return None if is_known else f"timm has no {type(visual).__name__}"
    if not len(visual.head):  # the classifier projects
        return None
    if not isinstance(getattr(visual.head, "proj", None), nn.Linear):
        return "its projection is no linear layer"
    if not has_linear_classifier(name := vision["timm_model_name"]):
        return f"timm's {name} has no linear classifier to take the projection"
    return None


OBSTACLES = {
    "open_clip": find_open_clip_obstacle,
    "hf": find_hf_obstacle,
    "timm": find_timm_obstacle,
}


@cache
def has_linear_classifier(name: str) -> bool:
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=1)
    return isinstance(model.get_classifier(), nn.Linear)


def has_quick_gelu(module: nn.Module) -> bool:
    return any(isinstance(part, QuickGELU) for part in module.modules())


def plain_blocks(transformer: Any) -> bool:
    """Whether a transformer of open_clip has CLIP's own blocks, which other libraries have too."""
    return all(
        type(block) is open_clip.transformer.ResidualAttentionBlock
        and isinstance(block.ls_1, nn.Identity)
        and type(block.mlp.gelu) in (nn.GELU, QuickGELU)
        for block in transformer.resblocks
    )


def is_plain_vit(visual: nn.Module) -> bool:
    """Whether an image tower is CLIP's vision transformer."""
    return (
        isinstance(visual, open_clip.transformer.VisionTransformer)
        and plain_blocks(visual.transformer)
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and not visual.final_ln_after_pool
        and not isinstance(visual.ln_pre, nn.Identity)
        and visual.patch_size[0] == visual.patch_size[1]
    )


def has_linear_projection(visual: nn.Module, vision: Mapping[str, Any]) -> bool:
    """Whether an image tower is timm's, with a projection without bias behind it."""
    projection = getattr(getattr(visual, "head", None), "proj", None)
    return (
        isinstance(visual, TimmModel)
        and vision.get("timm_pool", "avg") not in ("abs_attn", "rot_attn")
        and isinstance(projection, nn.Linear)
        and projection.bias is None
    )


def is_clip_text(text: Any) -> bool:
    """Whether a text tower is CLIP's."""
    return (
        getattr(text, "pool_type", getattr(text, "text_pool_type", None)) == "argmax"
        and text.attn_mask is not None
        and matrix(text.text_projection) is not None
        and getattr(text, "cls_emb", None) is None
        and plain_blocks(text.transformer)
    )


def matrix(projection: Any) -> Any:
    """The matrix of a projection, `(width, d)`; None if it is more than that."""
    if isinstance(projection, nn.Linear):
        return projection.weight.T if projection.bias is None else None
    return projection
