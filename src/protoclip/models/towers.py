"""Image and text towers and their tokenizer, through open_clip."""

from collections.abc import Callable

import open_clip
import timm
import torch
from jaxtyping import Int
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

Tokenizer = Callable[[list[str]], Tensor]


def named_towers(name: str, *, pretrained: str | None = None) -> nn.Module:
    """One of open_clip's models, with new weights or a published set of them.

    Raises:
        ValueError: open_clip knows no such model, or no such weights for it.
    """
    if name not in open_clip.list_models():
        raise ValueError(
            f"model.name: open_clip has no model '{name}'; "
            f"it has {len(open_clip.list_models())}, such as RN50, ViT-S-16, ViT-B-32"
        )
    known = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is not None and pretrained not in known:
        raise ValueError(
            f"model.pretrained: open_clip has no weights '{pretrained}' for {name}; "
            f"it has {', '.join(known) or 'none'}"
        )
    model: nn.Module = open_clip.create_model(name, pretrained=pretrained)
    return model


def small_towers(
    *,
    embed_dim: int,
    image_model: str,
    image_size: int,
    context_length: int,
    text_width: int,
    text_heads: int,
    text_layers: int,
) -> nn.Module:
    """A tower pair of one's own: a timm image model and a small text transformer.

    Args:
        embed_dim: Joint width `d`.
        image_model: A timm model name; its pooled output is projected to `embed_dim`.
        image_size: Height and width of the input, in pixels.
        context_length: Tokens a caption is cut to.
        text_width, text_heads, text_layers: Shape of the text transformer.

    Raises:
        ValueError: timm knows no such model, its patches do not divide the image size, or the
            heads do not divide the width.
    """
    if image_model not in timm.list_models():
        near = timm.list_models(f"{image_model[:6]}*")[:3] or timm.list_models()[:3]
        raise ValueError(
            f"model.image.name: timm has no model '{image_model}'; it has, for example, "
            + ", ".join(near)
        )
    if text_width % text_heads:
        raise ValueError(f"model.text.heads: {text_heads} heads do not divide width {text_width}")
    model: nn.Module = open_clip.CLIP(
        embed_dim,
        CLIPVisionCfg(
            timm_model_name=image_model, timm_pool="avg", timm_proj="linear", image_size=image_size
        ),
        CLIPTextCfg(
            context_length=context_length, width=text_width, heads=text_heads, layers=text_layers
        ),
    )
    fit_input(model.visual.trunk, image_size, image_model)  # type: ignore[arg-type,union-attr]
    return model


def fit_input(trunk: nn.Module, size: int, name: str) -> None:
    """Make a transformer of timm's read pictures of that size; convolutions read any."""
    if not hasattr(trunk, "set_input_size"):
        return
    patch = max(getattr(getattr(trunk, "patch_embed", None), "patch_size", (1,)))
    if size % patch:
        raise ValueError(
            f"model.image.size: {size} is no multiple of the {patch} pixels of a patch of {name}"
        )
    trunk.set_input_size(img_size=(size, size))  # type: ignore[operator]


class RememberingTokenizer:
    """A tokenizer that keeps the tokens of the captions it met, for repeated passes over them.

    Args:
        tokenizer: What tokenizes, `list[str] -> Int[b c]`.
        capacity: Captions to remember; once full, new ones are tokenized each time.
    """

    def __init__(self, tokenizer: Tokenizer, *, capacity: int = 100_000) -> None:
        self.tokenizer = tokenizer
        self.capacity = capacity
        self._known: dict[str, Tensor] = {}

    def __call__(self, texts: list[str] | str) -> Int[Tensor, "b c"]:
        if isinstance(texts, str):  # one caption, as open_clip's tokenizers take it
            texts = [texts]
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        tokens = dict(zip(new, self.tokenizer(new), strict=True)) if new else {}
        batch = torch.stack([self._known[t] if t in self._known else tokens[t] for t in texts])
        if len(self._known) + len(tokens) <= self.capacity:
            self._known |= tokens
        return batch


def build_tokenizer(name: str | None, *, context_length: int | None = None) -> Tokenizer:
    """Tokenizer of a named model, or CLIP's own byte-pair encoding cut to `context_length`."""
    return RememberingTokenizer(
        open_clip.get_tokenizer(name)
        if name is not None
        else open_clip.SimpleTokenizer(context_length=context_length)
    )


class TokenCounter:
    """Tokens of captions as a model's tokenizer counts them, start and end included, none cut off.

    Args:
        name: An open_clip model name, or None for CLIP's own byte-pair encoding.
    """

    def __init__(self, name: str | None) -> None:
        self.tokenizer = open_clip.get_tokenizer(name) if name else open_clip.SimpleTokenizer()

    def __call__(self, texts: list[str]) -> list[int]:
        if hasattr(self.tokenizer, "encode"):
            return [len(self.tokenizer.encode(text)) + 2 for text in texts]
        return [len(ids) for ids in self.tokenizer.tokenizer(texts)["input_ids"]]


def image_normalisation(
    towers: nn.Module,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Channel means and standard deviations that the image tower expects, for values in [0, 1]."""
    mean = getattr(towers.visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(towers.visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    return tuple(mean), tuple(std)


def image_size(towers: nn.Module) -> int:
    """Height and width of the image tower's input, in pixels."""
    size: int | tuple[int, int] = towers.visual.image_size  # type: ignore[union-attr,assignment]
    return size if isinstance(size, int) else size[0]
