"""The image tower alone, in the folder `timm`: `timm.create_model("local-dir:FOLDER/timm")`.

Its outputs are the image features: if timm's model has no layer for the projection into the joint
space, that becomes its classifier.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from timm.models import byobnet, save_for_hf, vision_transformer
from torch import Tensor

from protoclip.export.open_clip import Features, Source, Unavailable
from protoclip.models.open_clip import has_quick_gelu
from protoclip.models.opening import misfits

FOLDER = "timm"
CROP_MODES = {"shortest": "center", "squash": "squash"}  # timm's, by open_clip's resize_mode
# timm's names of CLIP's ResNets, by the blocks of their stages.
RESNETS = {
    (3, 4, 6, 3): "resnet50_clip",
    (3, 4, 23, 3): "resnet101_clip",
    (4, 6, 10, 6): "resnet50x4_clip",
    (6, 8, 18, 8): "resnet50x16_clip",
    (3, 15, 36, 10): "resnet50x64_clip",
}


def write_model(source: Source, folder: Path) -> str:
    """Write `config.json` and `model.safetensors`; returns timm's name of the model.

    Only for towers that `closed_formats` does not rule out.
    """
    config, visual = source.open_clip_config, source.towers.visual
    if isinstance(visual, TimmModel):
        name, arguments = trunk_arguments(source)
        model = add_projection(source, name, arguments)
    else:
        name, arguments = find_arguments(source)
        model = timm.create_model(name, num_classes=int(config["embed_dim"]), **arguments)
        convert: Any = byobnet if isinstance(visual, ModifiedResNet) else vision_transformer
        weights = {f"visual.{key}": value for key, value in visual.state_dict().items()}
        weights = convert.checkpoint_filter_fn(weights, model)
        if wrong := misfits(model, weights):
            raise Unavailable(f"it is not timm's {name}, by {len(wrong)} tensors as {wrong[0]}")
        model.load_state_dict(weights)
    settings, side = source.preprocessing, source.image_size
    if settings["resize_mode"] not in CROP_MODES:
        raise Unavailable(f"timm does not resize images as it does ({settings['resize_mode']})")
    data = {
        # timm's own entries are about the weights that it publishes.
        **{"tag": "", "origin_url": "", "license": source.license},
        **{"input_size": [3, side, side], "test_input_size": [3, side, side], "test_crop_pct": 1.0},
        "mean": list(settings["mean"]),
        "std": list(settings["std"]),
        "interpolation": settings["interpolation"],
        "crop_pct": 1.0,
        "crop_mode": CROP_MODES[settings["resize_mode"]],
    }
    save_for_hf(
        model.eval(),
        str(folder / FOLDER),
        model_config={"pretrained_cfg": data},
        model_args=arguments,
        safe_serialization=True,
    )
    (folder / FOLDER / "README.md").unlink(missing_ok=True)
    return name


def embed_samples(folder: Path, images: Float[Tensor, "n 3 h w"]) -> Features:
    """Image features that timm computes from the folder; there is no text tower."""
    model: Any = timm.create_model(f"local-dir:{folder / FOLDER}", pretrained=True).eval()
    with torch.inference_mode():
        return {"image": model(images)}


def trunk_arguments(source: Source) -> tuple[str, dict[str, Any]]:
    """The name and arguments with which timm builds the trunk of an image tower."""
    vision, trunk = source.open_clip_config["vision_cfg"], source.towers.visual.trunk
    name, pool = vision["timm_model_name"], vision.get("timm_pool", "avg")
    base: dict[str, Any] = {"global_pool": pool} if pool else {}
    if (
        hasattr(trunk, "set_input_size")
        and source.image_size != trunk.default_cfg["input_size"][-1]
    ):
        base["img_size"] = source.image_size
    # With another pooling, timm's transformers move their last normalisation behind it unless
    # they are told not to; open_clip sets the pooling of a model that is built.
    for more in ({}, {"fc_norm": False}):
        arguments = {**base, **more}
        try:
            model = timm.create_model(name, num_classes=trunk.num_classes, **arguments)
        except TypeError:
            continue
        if not misfits(model, trunk.state_dict()):
            return name, arguments
    raise Unavailable(f"timm does not build {name} as open_clip changed it")


def add_projection(source: Source, name: str, arguments: Mapping[str, Any]) -> Any:
    """The trunk with the projection as its classifier."""
    visual = source.towers.visual
    if not len(visual.head):
        return visual.trunk
    projection = visual.head.proj
    model: Any = timm.create_model(name, num_classes=projection.out_features, **arguments)
    classifier = model.get_classifier()
    model.load_state_dict(visual.trunk.state_dict(), strict=False)
    with torch.no_grad():
        classifier.weight.copy_(projection.weight)
        classifier.bias.zero_()
        if projection.bias is not None:
            classifier.bias.copy_(projection.bias)
    return model


def find_arguments(source: Source) -> tuple[str, dict[str, Any]]:
    """timm's name and arguments of an image tower that is open_clip's own."""
    visual, side = source.towers.visual, source.image_size
    if isinstance(visual, ModifiedResNet):
        stages = tuple(len(getattr(visual, f"layer{number}")) for number in (1, 2, 3, 4))
        if stages not in RESNETS:
            raise Unavailable(f"timm has no CLIP ResNet of {stages} blocks")
        name = RESNETS[stages]
        usual: Any = timm.get_pretrained_cfg(name)
        return name, {} if side == usual.input_size[-1] else {"img_size": side}
    block = visual.transformer.resblocks[0]
    kind = "clip_quickgelu" if has_quick_gelu(visual) else "clip"
    return f"vit_base_patch32_{kind}_224", {
        "img_size": side,
        "patch_size": visual.patch_size[0],
        "embed_dim": block.attn.embed_dim,
        "depth": len(visual.transformer.resblocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.c_fc.out_features / block.attn.embed_dim,
    }
