"""Image and text towers and their tokenizers, built by open_clip and timm."""

from collections.abc import Callable
from typing import Any, Literal

import open_clip
import timm
import torch
from jaxtyping import Int
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from protoclip.config import SMALL_CONTEXT_LENGTH, SMALL_IMAGE_SIZE, ModelConfig

Tokenizer = Callable[[list[str]], Tensor]

# Parts of the names of timm's transformers among open_clip's image towers.
TIMM_TRANSFORMERS = ("vit", "eva", "swin")


def named_config(name: str) -> dict[str, Any]:
    """open_clip's configuration of a model; raises `ValueError` if there is no such model."""
    if name not in open_clip.list_models():
        raise ValueError(
            f"model.name: open_clip has no model '{name}'; "
            f"it has {len(open_clip.list_models())}, such as RN50, ViT-S-16, ViT-B-32"
        )
    config: dict[str, Any] = open_clip.get_model_config(name)
    return config


def tower_kind(name: str) -> Literal["transformer", "convolutional"]:
    """The kind of image tower of an open_clip model."""
    vision = named_config(name)["vision_cfg"]
    if "timm_model_name" not in vision:
        transformer = isinstance(vision["layers"], int)
    else:
        transformer = any(part in vision["timm_model_name"] for part in TIMM_TRANSFORMERS)
    return "transformer" if transformer else "convolutional"


def has_logit_bias(name: str) -> bool:
    """Whether the logits of an open_clip model have the bias of the sigmoid loss."""
    return named_config(name).get("init_logit_bias") is not None


def named_towers(
    name: str,
    *,
    pretrained: str | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
    weights: Literal["published", "new", "none"] = "published",
    quick_gelu: bool = False,
) -> nn.Module:
    """An open_clip model; sizes are the model's own unless given.

    Weights that are `published` are those of `pretrained`, if given; `new` ones are drawn; with
    `none` the model is on the meta device. It reads images normalised as `pretrained` needs, and
    has QuickGELU where `pretrained` was trained with it, or `quick_gelu` asks for it.

    Raises:
        ValueError: open_clip has no such model or weights, or the image size does not fit.
    """
    vision = named_config(name)["vision_cfg"]
    if image_size is not None:
        # open_clip's ResNets halve the image five times before they attend to what is left.
        stride = 32 if isinstance(vision.get("layers"), list) else 1
        require_multiple(image_size, vision.get("patch_size") or stride, name)
    preprocessing = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else None
    if pretrained and not preprocessing:
        known = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(
            f"model.pretrained: open_clip has no weights '{pretrained}' for {name}; "
            f"it has {', '.join(known) or 'none'}"
        )
    published = weights == "published"
    model: nn.Module = open_clip.create_model(
        name,
        pretrained=pretrained if published else None,
        pretrained_text=published,
        device="meta" if weights == "none" else "cpu",
        force_quick_gelu=quick_gelu or bool((preprocessing or {}).get("quick_gelu")),
        force_preprocess_cfg=None if published else preprocessing,
        force_image_size=image_size,
        force_context_length=context_length,
    )
    if image_size is not None and hasattr(model.visual, "trunk"):
        set_input_size(model.visual.trunk, image_size, name)
    return model


def small_towers(config: ModelConfig) -> nn.Module:
    """A timm image model, projected to the joint width, and a small text transformer.

    Raises:
        ValueError: timm has no such model, or the sizes do not fit.
    """
    image, text = config.image, config.text
    if image.name not in timm.list_models():
        near = timm.list_models(f"{image.name[:6]}*")[:3] or timm.list_models()[:3]
        raise ValueError(
            f"model.image.name: timm has no model '{image.name}'; it has {', '.join(near)}, ..."
        )
    size, length = image.size or SMALL_IMAGE_SIZE, text.context_length or SMALL_CONTEXT_LENGTH
    model: nn.Module = open_clip.CLIP(
        config.embed_dim,
        CLIPVisionCfg(
            timm_model_name=image.name, timm_pool="avg", timm_proj="linear", image_size=size
        ),
        CLIPTextCfg(context_length=length, width=text.width, heads=text.heads, layers=text.layers),
    )
    set_input_size(model.visual.trunk, size, image.name)  # type: ignore[union-attr]
    return model


def set_input_size(trunk: Any, size: int, name: str) -> None:
    """Set the image size of a timm transformer; convolutional models take any size."""
    if hasattr(trunk, "set_input_size"):
        patch = max(getattr(getattr(trunk, "patch_embed", None), "patch_size", (1,)))
        require_multiple(size, patch, name)
        trunk.set_input_size(img_size=(size, size))


def require_multiple(size: int, patch: int, name: str) -> None:
    if size % patch:
        raise ValueError(
            f"model.image.size: {size} is no multiple of the {patch} pixels of a patch of {name}"
        )


def image_normalisation(
    towers: nn.Module,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Channel means and standard deviations of the image tower's input, for values in [0, 1]."""
    mean = getattr(towers.visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(towers.visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    return tuple(mean), tuple(std)


def image_size(towers: nn.Module) -> int:
    """Height and width of the image tower's input, in pixels."""
    size: int | tuple[int, int] = towers.visual.image_size  # type: ignore[union-attr,assignment]
    return size if isinstance(size, int) else size[0]


class RememberingTokenizer:
    """Remembers the tokens of up to `capacity` captions, which training tokenizes repeatedly."""

    def __init__(self, tokenizer: Tokenizer, *, capacity: int = 100_000) -> None:
        self.tokenizer = tokenizer
        self.capacity = capacity
        self._known: dict[str, Tensor] = {}

    def __call__(self, texts: list[str] | str) -> Int[Tensor, "b c"]:
        if isinstance(texts, str):  # open_clip's tokenizers take a single caption too
            texts = [texts]
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        tokens = dict(zip(new, self.tokenizer(new), strict=True)) if new else {}
        batch = torch.stack([self._known[t] if t in self._known else tokens[t] for t in texts])
        if len(self._known) + len(tokens) <= self.capacity:
            self._known |= tokens
        return batch


def build_tokenizer(name: str | None, *, context_length: int | None = None) -> Tokenizer:
    """The tokenizer of an open_clip model, or CLIP's if `name` is None."""
    if name is None:
        return RememberingTokenizer(open_clip.SimpleTokenizer(context_length=context_length))
    return RememberingTokenizer(open_clip.get_tokenizer(name, context_length=context_length))


class TokenCounter:
    """Counts the tokens of captions before they are cut, start and end included."""

    def __init__(self, name: str | None) -> None:
        self.tokenizer = open_clip.get_tokenizer(name) if name else open_clip.SimpleTokenizer()

    def __call__(self, texts: list[str]) -> list[int]:
        if hasattr(self.tokenizer, "encode"):
            return [len(self.tokenizer.encode(text)) + 2 for text in texts]
        return [len(ids) for ids in self.tokenizer.tokenizer(texts)["input_ids"]]
