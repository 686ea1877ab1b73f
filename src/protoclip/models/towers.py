"""Image and text towers and their tokenizers, built by open_clip and timm.

Towers of `transformers` are in `hugging_face.py`, and small ones in `halves.py`.
"""

import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import open_clip
import timm
import torch
from jaxtyping import Int
from open_clip.model import (
    resize_pos_embed,
    resize_text_pos_embed,
)
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import PretrainedCfg
from torch import Tensor, nn

from protoclip.data.captions import legible

Tokenizer = Callable[[list[str]], Tensor]
Weights = Literal["published", "new", "none"]  # "none" is for towers on the meta device
TowerKind = Literal["transformer", "convolutional"]

OPEN_CLIP_CONFIG = "open_clip_config.json"
# How the names of what leads from a tower into the joint space begin: of timm's image and Hugging
# Face's text trunks in open_clip, of open_clip's own towers, and of models of `transformers`.
PROJECTIONS = ("visual.head.", "visual.proj", "text.proj", "text.text_projection")
# A text in which tokenizers differ: capitals, accents, digits, punctuation, and other scripts.
TELLING = "It's a DOG, 3.14% Naïve-É; 狗 собака كلب"
# Parts of the names of timm's transformers among open_clip's image towers.
TIMM_TRANSFORMERS = ("vit", "eva", "swin", "deit", "beit", "cait", "xcit", "hiera", "pit_")
TIMM_CONVOLUTIONAL = ("fastvit", "repvit")


class Misfit(ValueError):
    """Weights are of another model than the one that they are for."""


def examples_of(wrong: Sequence[str]) -> str:
    """The first five of the tensors that do not fit a model, in words."""
    names = ", ".join(name.removeprefix("towers.") for name in wrong[:5])
    return f"{len(wrong)} tensors are missing, unknown or of another shape, such as {names}"


def named_config(name: str, setting: str = "model.name") -> dict[str, Any]:
    """open_clip's configuration of a model; raises `ValueError` if there is no such model."""
    known = {known.lower(): known for known in open_clip.list_models()}
    if name not in known.values():
        near = difflib.get_close_matches(name.lower(), known, n=4, cutoff=0.3)
        closest = ", ".join(known[one] for one in near) or "none"
        raise ValueError(f"{setting}: open_clip has no model '{name}'; the closest: {closest}")
    config: dict[str, Any] = open_clip.get_model_config(name)
    return config


def published_weights(name: str, tag: str, setting: str = "model.pretrained") -> dict[str, Any]:
    """What open_clip knows of a model's weights; raises `ValueError` if there are none."""
    published: dict[str, Any] = open_clip.get_pretrained_cfg(name, tag)
    if not published:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"{setting}: open_clip has no weights '{tag}' for {name}; it has {known}")
    return published


def repository_of(name: str, tag: str | None) -> str:
    """Where on the hub published weights are; "" if they are elsewhere."""
    published = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    return str(published.get("hf_hub", "").rpartition("/")[0])


def tower_kind(vision: Mapping[str, Any]) -> TowerKind:
    """The kind of an image tower, by open_clip's `vision_cfg`."""
    if "timm_model_name" not in vision:
        transformer = isinstance(vision["layers"], int)
    else:
        name = vision["timm_model_name"]
        transformer = any(part in name for part in TIMM_TRANSFORMERS)
        transformer &= not name.startswith(TIMM_CONVOLUTIONAL)
    return "transformer" if transformer else "convolutional"


def require_fitting_size(size: int | None, vision: Mapping[str, Any], name: str) -> None:
    """Refuse an image size that the patches of an open_clip image tower do not divide."""
    if size is not None:
        # open_clip's ResNets halve the image five times before they attend to what is left.
        stride = 32 if isinstance(vision.get("layers"), list) else 1
        require_multiple(size, vision.get("patch_size") or stride, name)


def transformers_config(name: str) -> Any:
    """The configuration of a model of `transformers`, by its folder or name on the hub.

    It raises for a model that brings code.
    """
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def is_image_name(name: str) -> bool:
    """Whether a name, with or without the tag of its weights, is that of a timm model.

    What it stands for does not change with the folders that lie here; ./NAME is a folder.
    """
    return bool(timm.is_model(name.partition(".")[0]))


def near_image_names(name: str) -> list[str]:
    """Names of timm models near one that there is not: those that begin with it or hold it, or else
    those that begin alike."""
    words, known = re.sub(r"[ -]", "_", name.partition(".")[0].lower()), timm.list_models()
    first = [each for each in known if each.startswith(words)]
    held = [each for each in known if words in each and each not in first]
    alike = [each for each in known if each.startswith(name[:6])]
    return first[:3] + held[:2] or (alike or known)[:3]


def require_image_name(name: str) -> None:
    """Refuse what is no timm model, with or without the tag of its weights."""
    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise ValueError(f"model.image.name: {name}: no such folder")
    if not timm.is_model_pretrained(name) and name not in timm.list_models():
        raise ValueError(
            f"model.image.name: timm has no model '{name}'; it has "
            f"{', '.join(near_image_names(name))}, ..."
        )


def timm_settings(name: str) -> PretrainedCfg:
    """What timm knows of the weights of a model: their images, and where they are."""
    require_image_name(name)
    return timm.get_pretrained_cfg(name) or PretrainedCfg()


def interpolate(weights: dict[str, Tensor], model: Any) -> None:
    """Bring open_clip's position embeddings to the sizes of a model, in place.

    Those of timm's towers are timm's to bring: `set_input_size`.
    """
    resize_pos_embed(weights, model)
    resize_text_pos_embed(weights, model)
    pool, name = getattr(model.visual, "attnpool", None), "visual.attnpool.positional_embedding"
    if pool is not None and name in weights:
        side = round((len(pool.positional_embedding) - 1) ** 0.5)
        weights[name] = resample_abs_pos_embed(weights[name][None], [side, side])[0]


def max_tokens(config: Any) -> int:
    """The most tokens that a text model of `transformers` reads, by its configuration."""
    if not hasattr(config, "max_position_embeddings"):
        return sys.maxsize  # T5 and its kin take any length
    kind = config.model_type
    # RoBERTa and its kin count positions from the padding token's number on.
    is_kin = "roberta" in kind or kind in ("mpnet", "camembert")
    first = config.pad_token_id + 1 if is_kin else 0
    return int(config.max_position_embeddings) - first


def require_length(context_length: int, config: Any, name: str) -> None:
    """Refuse a caption length that a text model of `transformers` has no positions for."""
    if context_length > (most := max_tokens(config)):
        raise ValueError(
            f"model.text.context_length: {context_length} is too large; {name} reads at most {most}"
        )


def set_input_size(trunk: Any, size: int, name: str) -> None:
    """Set the image size of a timm transformer; convolutional models take any size.

    Raises:
        ValueError: It reads images of another size alone.
    """
    if hasattr(trunk, "set_input_size"):
        patch = max(getattr(getattr(trunk, "patch_embed", None), "patch_size", (1,)))
        require_multiple(size, patch, name)
        trunk.set_input_size(img_size=(size, size))
    settings = getattr(trunk, "pretrained_cfg", None) or {}
    native_size = settings.get("input_size", (3, size))[-1]
    is_patched = hasattr(trunk, "patch_embed")  # and then read, once its patches divide the size
    is_fixed = settings.get("fixed_input_size") and not (
        is_patched and hasattr(trunk, "set_input_size")
    )
    if native_size != size and is_fixed and not reads(trunk, size):
        raise ValueError(
            f"model.image.size: {name} cannot read images of {size} pixels; its own are of "
            f"{native_size}"
        )


def reads(trunk: Any, size: int) -> bool:
    """Whether an image tower of timm can read images of this size."""
    trains = trunk.training
    try:
        with torch.no_grad():
            trunk.eval()(torch.zeros(1, 3, size, size, device=next(trunk.parameters()).device))
    except Exception:  # each of timm's models has its own
        return False
    finally:
        trunk.train(trains)
    return True


def set_trunk_size(built: Any, size: int | None, name: str) -> None:
    """Set the image size of a model of open_clip where its image tower is timm's; None for none."""
    if size is not None and hasattr(built.visual, "trunk"):
        set_input_size(built.visual.trunk, size, name)


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


def image_input(towers: nn.Module) -> dict[str, Any]:
    """The arguments of an image transform: what images the towers read."""
    mean, std = image_normalisation(towers)
    return {"size": image_size(towers), "mean": mean, "std": std}


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
        read = [legible(text) for text in new]
        tokens = dict(zip(new, self.tokenizer(read), strict=True)) if new else {}
        batch = torch.stack([self._known[t] if t in self._known else tokens[t] for t in texts])
        if len(self._known) + len(tokens) <= self.capacity:
            self._known |= tokens
        return batch


def build_tokenizer(name: str | None, *, context_length: int | None = None) -> Tokenizer:
    """The tokenizer of an open_clip model, or CLIP's if `name` is None."""
    if name is None:
        return RememberingTokenizer(clip_tokenizer(context_length))
    return RememberingTokenizer(open_clip.get_tokenizer(name, context_length=context_length))


@cache
def clip_tokenizer(context_length: int | None) -> Tokenizer:
    """CLIP's tokenizer, built once: reading its merges takes a tenth of a second."""
    tokenizer: Tokenizer = open_clip.SimpleTokenizer(context_length=context_length)
    return tokenizer


def described_tokenizer(
    text: Mapping[str, Any], *, context_length: int | None, source: str | None = None
) -> Tokenizer:
    """The tokenizer of an open_clip model, by its `text_cfg`.

    A Hugging Face tokenizer is read from `source`, if given, and otherwise by its name.
    """
    length = context_length or text.get("context_length") or DEFAULT_CONTEXT_LENGTH
    settings = text.get("tokenizer_kwargs") or {}
    tokenizer: Tokenizer
    if text.get("hf_tokenizer_name"):
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


class TokenCounter:
    """Counts the tokens of captions before they are cut, start and end included."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)

    def __call__(self, texts: list[str]) -> list[int]:
        texts = [legible(text) for text in texts]
        if hasattr(self.tokenizer, "encode"):
            return [len(self.tokenizer.encode(text)) + 2 for text in texts]
        return [len(ids) for ids in self.tokenizer.tokenizer(texts)["input_ids"]]
