"""Models of open_clip: their names and published weights, and towers built of a configuration.

A configuration is the content of an `open_clip_config.json`: `model_cfg` and `preprocess_cfg`.
"""

import difflib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import open_clip
from open_clip.model import resize_pos_embed, resize_text_pos_embed, set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from safetensors import safe_open
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from protoclip.data.transforms import LibraryTransform, OfMiddle, PillowTransform
from protoclip.files import require_regular
from protoclip.models import text_models
from protoclip.models.opening import ImageTransform, Misfit, examples_of, hub_name
from protoclip.models.protoclip import image_normalisation
from protoclip.models.timm import require_image_name, require_multiple, set_input_size

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
    require_fitting_size(image_size, vision, name)
    if image_size is not None:
        vision["image_size"] = image_size
    if context_length is not None:
        text["context_length"] = context_length
    if "timm_model_name" in vision:
        require_image_name(vision["timm_model_name"])
        vision["timm_model_pretrained"] = False
    if text.get("hf_model_name"):
        text["hf_model_pretrained"] = pretrained_text
        # open_clip would offer to run code.
        of_text = text_models.transformers_config(text["hf_model_name"])
        if context_length:
            text_models.require_length(context_length, of_text, name)
    is_custom = settings.pop("custom_text", False) or "hf_model_name" in text
    kind: Any = open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
    kind = open_clip.CoCa if is_custom and "multimodal_cfg" in settings else kind
    built = kind(**settings).float()
    images = merge_preprocess_dict(asdict(PreprocessCfg()), dict(preprocessing))
    set_model_preprocess_cfg(built, {**images, "size": built.visual.image_size})
    set_trunk_size(built, image_size, name)
    return built


def require_fitting_size(size: int | None, vision: Mapping[str, Any], name: str) -> None:
    """Refuse an image size that the patches of an image tower of open_clip do not divide."""
    if size is not None:
        # open_clip's ResNets halve the image five times before they attend to what is left.
        stride = 32 if isinstance(vision.get("layers"), list) else 1
        require_multiple(size, vision.get("patch_size") or stride, name)


def set_trunk_size(built: Any, size: int | None, name: str) -> None:
    """Set the image size of a model of open_clip where its image tower is timm's; None for none."""
    if size is not None and hasattr(built.visual, "trunk"):
        set_input_size(built.visual.trunk, size, name)


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


def load_file(built: nn.Module, file: Path, name: str) -> None:
    """Give towers the weights of a file of open_clip's.

    Raises:
        Misfit: Tensors of a safetensors file are of another shape, which open_clip would list.
    """
    if file.suffix == ".safetensors":
        require_regular(file)
        shapes = {key: [*value.shape] for key, value in built.state_dict().items()}
        with safe_open(file, "pt") as stored:
            # Names that the model does not have may be of an older version, which open_clip reads.
            both = shapes.keys() & stored.keys()
            wrong = [key for key in both if stored.get_slice(key).get_shape() != shapes[key]]
        if wrong := sorted(key for key in wrong if "positional_embedding" not in key):
            raise Misfit(f"does not fit {name}: {examples_of(wrong)}")
    open_clip.load_checkpoint(built, str(file))


def image_transform(built: Any) -> ImageTransform:
    """What open_clip does to an image, so that its numbers come back; the usual case is ours."""
    settings = PreprocessCfg(**built.visual.preprocess_cfg)
    sides = settings.size if isinstance(settings.size, tuple | list) else [settings.size]
    usual = (settings.resize_mode, settings.interpolation) == ("shortest", "bicubic")
    if usual and len(set(sides)) == 1:
        mean, std = image_normalisation(built)
        return PillowTransform(size=sides[0], mean=mean, std=std)
    apply = image_transform_v2(settings, is_train=False)
    if settings.resize_mode != "squash":
        apply = OfMiddle(apply)
    return LibraryTransform(settings=str(settings), apply=apply)
