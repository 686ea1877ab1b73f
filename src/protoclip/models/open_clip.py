"""Models of open_clip: names, published weights, towers of a configuration, and tokenizers.

A configuration is the content of an `open_clip_config.json`: `model_cfg` and `preprocess_cfg`. Also
which formats of `protoclip export` can hold towers of open_clip, and why the others cannot.
"""

import difflib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from typing import Any, Literal

import open_clip
import timm
import torch
from open_clip.model import resize_pos_embed, resize_text_pos_embed, set_model_preprocess_cfg
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from open_clip.transformer import QuickGELU
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from protoclip.data.bands import Bands
from protoclip.data.transforms import LibraryTransform, MiddleTransform, PillowTransform
from protoclip.models.joined import AUTO, PLAIN, JoinedImageTower, can_join, place_encoders
from protoclip.models.opening import ImageTransform, RememberingTokenizer, Tokenizer, hub_name
from protoclip.models.protoclip import image_input, image_size
from protoclip.models.timm import require_image_name, require_multiple, set_input_size
from protoclip.models.transformers import (
    OPEN_CLIP_KINDS,
    TextTower,
    padded_tokenizer,
    require_length,
    transformers_config,
)

TowerKind = Literal["transformer", "convolutional"]

FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
# Parts of the names of timm's transformers among open_clip's image towers.
TIMM_TRANSFORMERS = ("vit", "eva", "swin", "deit", "beit", "cait", "xcit", "hiera", "pit_")
TIMM_CONVOLUTIONAL = ("fastvit", "repvit")


def find_config(name: str, setting: str = "model.name") -> dict[str, Any]:
    """open_clip's configuration of a model; raises `ValueError` if there is no such model."""
    names = {names.lower(): names for names in open_clip.list_models()}
    if name not in names.values():
        near = difflib.get_close_matches(name.lower(), names, n=4, cutoff=0.3)
        closest = ", ".join(names[one] for one in near) or "none"
        raise ValueError(f"{setting}: open_clip has no model '{name}'; the closest: {closest}")
    config: dict[str, Any] = open_clip.get_model_config(name)
    return config


def find_weights(name: str, tag: str, setting: str = "model.pretrained") -> dict[str, Any]:
    """What open_clip knows of a model's weights; raises `ValueError` if there are none."""
    published: dict[str, Any] = open_clip.get_pretrained_cfg(name, tag)
    if not published:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"{setting}: open_clip has no weights '{tag}' for {name}; it has {tags}")
    return published


def tower_kind(vision: Mapping[str, Any]) -> TowerKind:
    """The kind of an image tower, by open_clip's `vision_cfg`."""
    if "timm_model_name" not in vision:
        transformer = isinstance(vision["layers"], int)
    else:
        name = vision["timm_model_name"]
        transformer = any(part in name for part in TIMM_TRANSFORMERS)
        transformer &= not name.startswith(TIMM_CONVOLUTIONAL)
    return "transformer" if transformer else "convolutional"


def text_repository(config: Mapping[str, Any]) -> str | None:
    """Where on the hub the text tower or tokenizer of a model is.

    "" if it is in a folder, and None if it is not of Hugging Face.
    """
    text = config["text_cfg"]
    name = text.get("hf_model_name") or text.get("hf_tokenizer_name")
    return hub_name(name) if name else None


def build_towers(
    config: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    *,
    image_size: int | None,
    context_length: int | None,
    name: str,
    pretrained_text: bool = False,
) -> Any:
    """Towers with new weights.

    Args:
        config: The `model_cfg`.
        preprocessing: The `preprocess_cfg`.
        image_size, context_length: Sizes in place of those of `config`.
        name: What messages call the model.
        pretrained_text: Whether a Hugging Face text tower gets its published weights.

    Raises:
        ValueError: The towers cannot have such sizes, or timm has no such model.
    """
    settings = deepcopy(dict(config))
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    if image_size is not None:
        # open_clip's ResNets halve the image five times before they attend to what is left.
        stride = 32 if isinstance(vision.get("layers"), list) else 1
        require_multiple(image_size, vision.get("patch_size") or stride, name)
        vision["image_size"] = image_size
    if context_length is not None:
        text["context_length"] = context_length
    if "timm_model_name" in vision:
        require_image_name(vision["timm_model_name"])
        vision["timm_model_pretrained"] = False
    if text.get("hf_model_name"):
        text["hf_model_pretrained"] = pretrained_text
        # open_clip would offer to run code.
        of_text = transformers_config(text["hf_model_name"])
        if context_length:
            require_length(context_length, of_text, text["hf_model_name"])
    is_custom = settings.pop("custom_text", False) or "hf_model_name" in text
    kind: Any = open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
    kind = open_clip.CoCa if is_custom and "multimodal_cfg" in settings else kind
    image_layers, text_layers = (part.pop("joined_layers", PLAIN) for part in (vision, text))
    if is_ours := text.get("hf_pooler_type") in TextTower.poolers:
        settings["text_cfg"] = {"width": 8, "heads": 1, "layers": 1}  # replaced below
    built = kind(**settings)
    if is_ours:
        built.text = TextTower(text, settings["embed_dim"], text_layers)
    if image_layers != PLAIN and can_join(built.visual.trunk):
        built.visual = JoinedImageTower(built.visual, image_layers, settings["embed_dim"])
    elif image_layers not in (PLAIN, AUTO):
        raise ValueError(f"model.image.joined_layers: timm lists no layers of {name}; leave it out")
    built.float()
    images = merge_preprocess_dict(asdict(PreprocessCfg()), dict(preprocessing))
    set_model_preprocess_cfg(built, {**images, "size": built.visual.image_size})
    set_trunk_size(built, image_size, name)
    return built


def set_trunk_size(built: Any, size: int | None, name: str) -> None:
    """Set the image size of a model of open_clip where its image tower is timm's; None for none."""
    for encoder in place_encoders(built.visual).values():
        if size is not None and hasattr(encoder, "trunk"):
            set_input_size(encoder.trunk, size, name)


def set_bands(built: Any, bands: Bands, name: str) -> None:
    """Let an image tower, of a model with that name, read images that are not 8-bit RGB.

    Its first convolution gets the channels. Weights of RGB, those that it has and those that it is
    given, are widened as timm does: they come again in turn, or are added up for a single channel.
    """
    visual, channels = built.visual, bands.channels
    visual.bands = bands
    if channels == 3:
        return
    tower = getattr(visual, "trunk", visual)
    first = str(getattr(tower, "pretrained_cfg", {}).get("first_conv", "conv1"))
    layer: Any = dict(tower.named_modules()).get(first)
    if not (isinstance(layer, nn.Conv2d) and (layer.in_channels, layer.groups) == (3, 1)):
        raise ValueError(
            f"model.image.channels: {name} cannot read images of {channels} channels; choose an "
            "image tower that begins with a convolution of RGB, such as resnet10t or RN50"
        )

    def widen(_: Any, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
        weight = state.get(f"{prefix}weight")
        if weight is not None and weight.shape[1] == 3:
            state[f"{prefix}weight"] = adapt_input_conv(channels, weight)

    layer.register_load_state_dict_pre_hook(widen)  # type: ignore[no-untyped-call]
    layer.weight = nn.Parameter(adapt_input_conv(channels, layer.weight.detach()))
    layer.in_channels = channels
    for statistic in ("image_mean", "image_std"):
        values = getattr(visual, statistic)
        if len(values) != channels:
            setattr(visual, statistic, (sum(values) / len(values),) * channels)


def interpolate_positions(weights: dict[str, Tensor], model: Any) -> None:
    """Bring open_clip's position embeddings to the sizes of a model, in place.

    Those of timm's towers are timm's to bring: `set_input_size`.
    """
    resize_pos_embed(weights, model)
    resize_text_pos_embed(weights, model)
    pool, name = getattr(model.visual, "attnpool", None), "visual.attnpool.positional_embedding"
    if pool is not None and name in weights:
        side = round((len(pool.positional_embedding) - 1) ** 0.5)
        weights[name] = resample_abs_pos_embed(weights[name][None], [side, side])[0]


def image_transform(built: Any) -> ImageTransform:
    """What open_clip does to an image, so that its numbers come back; the usual case is ours."""
    settings = PreprocessCfg(**built.visual.preprocess_cfg)
    sides = settings.size if isinstance(settings.size, tuple | list) else [settings.size]
    usual = (settings.resize_mode, settings.interpolation) == ("shortest", "bicubic")
    if usual and len(set(sides)) == 1:
        return PillowTransform(**{**image_input(built), "size": sides[0]})
    apply = image_transform_v2(settings, is_train=False)
    if settings.resize_mode != "squash":
        apply = MiddleTransform(apply)
    return LibraryTransform(settings=str(settings), apply=apply)


def open_clip_tokenizer(
    text: Mapping[str, Any], *, context_length: int | None = None, source: str | None = None
) -> Tokenizer:
    """The tokenizer of an open_clip model, by its `text_cfg`; CLIP's if that names none.

    A Hugging Face tokenizer is read from `source`, if given, and otherwise by its name.
    """
    length = context_length or text.get("context_length") or DEFAULT_CONTEXT_LENGTH
    settings = text.get("tokenizer_kwargs") or {}
    tokenizer: Tokenizer
    if text.get("hf_pooler_type") in TextTower.poolers:
        padded = padded_tokenizer(source or text["hf_tokenizer_name"], length, masked=True)
        padded.tokenizer.padding_side = "right"  # those of causal models pad before a text
        tokenizer = padded
    elif text.get("hf_tokenizer_name"):
        tokenizer = HFTokenizer(
            source or text["hf_tokenizer_name"],
            context_length=length,
            tokenizer_mode=text.get("tokenizer_mode"),
            trust_remote_code=False,
            **settings,
        )
    elif settings:
        tokenizer = open_clip.SimpleTokenizer(context_length=length, **settings)
    else:
        tokenizer = clip_tokenizer(length)
    return RememberingTokenizer(tokenizer)


@cache
def clip_tokenizer(context_length: int) -> Tokenizer:
    """CLIP's tokenizer, built once: reading its merges takes a tenth of a second."""
    tokenizer: Tokenizer = open_clip.SimpleTokenizer(context_length=context_length)
    return tokenizer


def closed_formats(built: Any, config: Mapping[str, Any]) -> dict[str, str]:
    """Why formats of an export cannot hold towers, by format; `config` is open_clip's of them.

    `align` asks before it trains, of towers without weights, and `export` before it writes.
    """
    visual, text, vision = built.visual, getattr(built, "text", built), config["vision_cfg"]
    reasons: dict[str, str] = {}
    if hasattr(visual, "bands"):
        reason = "it reads 8-bit RGB alone; onnx holds models of other images"
        return dict.fromkeys(["open_clip", "hf", "timm"], reason)
    joined = [tower for tower in (visual, text) if len(getattr(tower, "given", ())) > 1]
    if joined:
        reason = (
            "only onnx holds towers that join layers or encoders; for open_clip and timm align one "
            "encoder a side with model.image.joined_layers and model.text.joined_layers = plain"
        )
        return dict.fromkeys(["open_clip", "hf"] + ["timm"] * (visual in joined), reason)
    trunk: Any = getattr(visual, "trunk", None)
    size = image_size(built)
    if hasattr(trunk, "set_input_size") and size != (usual := trunk.default_cfg["input_size"][-1]):
        # open_clip hands no image size to timm.
        name = vision["timm_model_name"]
        reasons["open_clip"] = f"it builds {name} for images of {usual} pixels alone, not {size}"
    kind = getattr(getattr(text, "config", None), "model_type", None)
    if kind is not None and (kind not in OPEN_CLIP_KINDS or isinstance(text, TextTower)):
        reasons["open_clip"] = f"it knows no text models of kind {kind}"
    has_image = is_plain_vit(visual) or has_linear_projection(visual, vision)
    has_text = kind is None and is_clip_text(text)
    if not (has_image and has_text) or getattr(built, "logit_bias", None) is not None:
        reasons["hf"] = (
            "transformers needs CLIP's text tower, CLIP's or timm's image tower with a linear "
            "projection, and no logit bias"
        )
    if not isinstance(visual, TimmModel):
        in_timm = isinstance(visual, ModifiedResNet) or is_plain_vit(visual)
    else:  # without a projection, the classifier projects
        in_timm = not len(visual.head) or (
            isinstance(getattr(visual.head, "proj", None), nn.Linear)
            and has_linear_classifier(vision["timm_model_name"])
        )
    if not in_timm:
        reasons["timm"] = "timm has no such tower with a linear classifier to take the projection"
    return reasons


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
