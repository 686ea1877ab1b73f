"""CLIP, SigLIP and dual encoders of Hugging Face `transformers`, as tower pairs."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from protoclip.data.transforms import EvaluationTransform, LibraryTransform
from protoclip.models.protoclip import TowerPair
from protoclip.models.towers import RememberingTokenizer, Tokenizer, max_tokens

ImageTransform = Callable[[Image.Image], Tensor]

# The kinds of Hugging Face model, as their configurations name them.
KINDS = ("clip", "siglip", "siglip2", "vision-text-dual-encoder")
# Those whose text tower must not read padding. CLIP's tokens never read later ones, and SigLIP was
# trained to read padding.
MASKED_KIND, PADDING = "vision-text-dual-encoder", -1


def open_model(name: str) -> tuple[TowerPair, ImageTransform, Tokenizer]:
    """Open a repository of the hub or a folder; reads safetensors only, and runs no code of it."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False)
    kind = config.model_type
    if kind not in KINDS:
        is_a = ", ".join(config.architectures or ()) or kind
        raise ValueError(f"{is_a} is no CLIP-like model; known are {', '.join(KINDS)}")
    model, found = AutoModel.from_pretrained(
        name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    if lacking := sorted(found["missing_keys"]):
        raise ValueError(f"its weights lack {len(lacking)} tensors, such as {lacking[0]}")
    tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    reads = PaddedTokenizer(
        tokenizer,
        context_length=min(tokenizer.model_max_length, max_tokens(config.text_config)),
        masked=kind == MASKED_KIND,
    )
    open_processor: Any = AutoImageProcessor.from_pretrained
    processor = open_processor(name, trust_remote_code=False)
    pair = TowerPair(HuggingFaceTowers(model.float(), tokenizer.pad_token_id))
    return pair.eval(), image_transform(processor), RememberingTokenizer(reads)


class HuggingFaceTowers(nn.Module):
    """A model of `transformers` as a tower pair; where it masks padding, padding has token -1."""

    def __init__(self, model: Any, pad_token: int) -> None:
        super().__init__()
        self.model, self.pad_token = model, pad_token

    def encode_image(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        inputs = unpack_patches(images) if self.model.config.model_type == "siglip2" else {}
        return pooled(self.model.get_image_features(**{"pixel_values": images, **inputs}))

    def encode_text(self, tokens: Int[Tensor, "b c"]) -> Float[Tensor, "b d"]:
        if self.model.config.model_type != MASKED_KIND:
            return pooled(self.model.get_text_features(input_ids=tokens))
        mask = tokens != PADDING
        # Columns of padding alone cost time and change nothing.
        used = mask.any(0)
        ids = tokens.masked_fill(~mask, self.pad_token)[:, used]
        return pooled(self.model.get_text_features(ids, attention_mask=mask[:, used].long()))


def pooled(outputs: Any) -> Tensor:
    """The features; `transformers` 4 returns them alone, and 5 among others."""
    return getattr(outputs, "pooler_output", outputs)  # type: ignore[no-any-return]


class PaddedTokenizer:
    """Captions as tokens, padded to one length; padding is -1 if the model masks it."""

    def __init__(self, tokenizer: Any, *, context_length: int, masked: bool) -> None:
        self.tokenizer, self.context_length, self.masked = tokenizer, context_length, masked

    def __call__(self, texts: list[str]) -> Int[Tensor, "b c"]:
        batch = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        tokens: Tensor = batch["input_ids"]
        return tokens.masked_fill(batch["attention_mask"] == 0, PADDING) if self.masked else tokens


def image_transform(processor: Any) -> ImageTransform:
    """Ours if it gives the same; else what the model's own image processor does."""
    text = processor.to_json_string()
    settings = json.loads(text)
    side = (settings.get("size") or {}).get("shortest_edge")
    clip = {
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": Image.Resampling.BICUBIC.value,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
    }
    if side and all(settings.get(name) == value for name, value in clip.items()):
        mean, std = tuple(settings["image_mean"]), tuple(settings["image_std"])
        return EvaluationTransform(size=side, mean=mean, std=std)
    name = type(processor).__name__
    return LibraryTransform(
        settings=f"{name}({' '.join(text.split())})",
        apply=partial(pack_patches if name.startswith("Siglip2") else process, processor),
    )


def process(processor: Any, image: Image.Image) -> Float[Tensor, "3 h w"]:
    pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    return pixels


def pack_patches(processor: Any, image: Image.Image) -> Float[Tensor, "3 n q"]:
    """SigLIP 2's input as one tensor: patches, then a row that begins with the grid's size."""
    found = processor(images=image, return_tensors="pt")
    patches = found["pixel_values"][0]
    packed = F.pad(patches.reshape(3, len(patches), -1), (0, 0, 0, 1))
    packed[:2, -1, 0] = found["spatial_shapes"][0]
    return packed


def unpack_patches(packed: Float[Tensor, "b 3 n q"]) -> dict[str, Tensor]:
    shapes = packed[:, :2, -1, 0].round().long()
    patches = packed[:, :, :-1]
    count = patches.shape[2]
    mask = torch.arange(count, device=packed.device) < shapes.prod(1, keepdim=True)
    return {
        "pixel_values": patches.reshape(len(packed), count, -1),
        "pixel_attention_mask": mask.int(),
        "spatial_shapes": shapes,
    }
