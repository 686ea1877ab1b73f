"""A start of two halves: the image tower of one model and the text tower of another.

Each is of a model that `protoclip.load` opens and open_clip can describe. The other half may be a
timm image tower or a Hugging Face text model; two of those need no more than `halves.SmallTowers`.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH
from torch import Tensor

from protoclip.config import ModelConfig
from protoclip.models import towers
from protoclip.models.architecture import Architecture, DescribedTowers
from protoclip.models.halves import (
    MINILM,
    SmallTowers,
    classifier_names,
    pooling_of,
    text_config,
    text_source,
    with_pooling,
)
from protoclip.models.opening import HUGGING_FACE_CONFIG, misfits
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.start import KINDS, HuggingFaceStart, Start, find_start
from protoclip.models.towers import OPEN_CLIP_CONFIG, PROJECTIONS, Weights, examples_of

Tower = Literal["image", "text"]
PARTS = {"image": "visual.", "text": "text."}  # how the names of a tower's weights begin
# What to name where a tower can be no half.
INSTEAD = {
    "image": (
        "name a model of timm (it has DINOv2, ViT and SigLIP), or a CLIP, as open_clip:NAME/TAG"
    ),
    "text": "name a text model such as minilm, or a CLIP, as open_clip:NAME/TAG",
}


def names_model(tower: Tower, name: str | None) -> bool:
    """Whether the name of a half is that of a whole model, which `protoclip.load` takes.

    Raises:
        ValueError: There is no such text model.
    """
    if not name:
        return False
    kind, _, rest = name.partition(":")
    may_be_text_model = tower == "text" and kind == "hf"
    if rest and kind in KINDS and not may_be_text_model:
        return True
    if tower == "text":
        return names_dual_encoder(name)
    return Path(name).is_dir() and not towers.is_image_name(name)


def names_dual_encoder(name: str) -> bool:
    """Whether a text half is taken from a model that has an image tower too."""
    if name == MINILM:
        return False
    folder = Path(name.removeprefix("hf:"))
    if folder.is_dir():
        if (folder / OPEN_CLIP_CONFIG).is_file():
            return True
        if not (folder / HUGGING_FACE_CONFIG).is_file():  # such as a run
            return True
    return hasattr(text_config(name, text_source(name)), "vision_config")


@dataclass(frozen=True, kw_only=True)
class TwoHalves(Start):
    """Halves with their weights, and new projections into a joint space."""

    image: Start
    text: Start

    @property
    def resize_mode(self) -> str:
        return self.image.resize_mode

    @property
    def architecture(self) -> Architecture:
        """Their towers, with projections as `model` says, where a tower leaves a choice."""
        description = deepcopy(dict(self.unresized.towers_json or {}))
        config = description["model_cfg"]
        config["embed_dim"] = self.model.embed_dim
        for tower, setting in self.choices.items():
            config[tower][setting] = self.model.projection
        return replace(self.unresized, model=self.model, towers_json=description)

    @property
    def choices(self) -> dict[str, str]:
        """The settings of open_clip's for projections with a hidden layer, by part.

        timm's and Hugging Face's trunks have them; open_clip's own towers project linearly.
        """
        config = (self.unresized.towers_json or {})["model_cfg"]
        known = {"vision_cfg": "timm_proj", "text_cfg": "hf_proj_type"}
        return {part: setting for part, setting in known.items() if setting in config[part]}

    def build(self, weights: Weights) -> ProtoCLIP:
        built = super().build("new" if weights == "published" else weights)
        if weights == "published":
            taken = {**self._weights("image", built), **self._weights("text", built)}
            whole = {**built.towers.state_dict(), **taken}
            if wrong := misfits(built.towers, whole):
                raise ValueError(f"{self.reference}: do not fit: {examples_of(wrong)}")
            built.towers.load_state_dict(whole)
        return built

    def _weights(self, tower: Tower, built: ProtoCLIP) -> dict[str, Tensor]:
        """Weights of a half without its projection, named as in the towers, at the run's sizes."""
        start: Start = getattr(self, tower)
        source = (start.build("published") if type(start) is Start else start.pretrained()).towers
        size = towers.image_size(built.towers)
        if tower == "image" and size != towers.image_size(source):
            towers.set_trunk_size(source, size, start.reference)
        weights = source.state_dict()
        if not hasattr(source, "text"):  # open_clip's first models keep the text tower in parts
            outside = ("visual.", "logit_")
            weights = {
                name if name.startswith(outside) else f"text.{name}": value
                for name, value in weights.items()
            }
        # open_clip lets the classifier of some of timm's models project.
        trunk = getattr(source.visual, "trunk", None)
        inside = () if trunk is None else classifier_names(trunk)
        projections = (*PROJECTIONS, *(f"visual.trunk.{name}" for name in inside))
        of_half = {
            name: value
            for name, value in weights.items()
            if name.startswith(PARTS[tower]) and not name.startswith(projections)
        }
        towers.interpolate(of_half, built.towers)
        return of_half


def two_halves(given: ModelConfig) -> TwoHalves:
    """The start of a `[model]` section of which a half, or both, is of another model.

    Raises:
        ValueError: There is no such model, or its tower can be no half.
    """
    image, text = half("image", given), half("text", given)
    image_facts, vision_cfg = tower_config("image", image)
    text_facts, text_cfg = tower_config("text", text)
    activations = {*image_facts.values(), *text_facts.values()}
    if len(activations) > 1:
        raise ValueError(
            f"model.text.name: {text.reference} and {image.reference} have different activations "
            "(GELU and QuickGELU), which open_clip's format cannot say of one model; take a timm "
            "image tower, or a Hugging Face text model"
        )
    built = image.build("none").towers
    mean, std = towers.image_normalisation(built)
    native_size, native_length = towers.image_size(built), int(text_cfg["context_length"])
    size = given.image.size or native_size
    length = given.text.context_length or native_length
    notes = []
    if size != native_size:
        notes.append(f"model.image.size = {size}: the image half was made for {native_size} pixels")
    if length > native_length or (length < native_length and "hf_model_name" not in text_cfg):
        notes.append(
            f"model.text.context_length = {length}: the text half was made for {native_length}"
        )
    # Sizes of a half that starts untrained follow from the data.
    untrained_image = type(image) is Start and given.image.weights is None
    untrained_text = type(text) is Start and given.text.name is None
    config: dict[str, Any] = {
        "embed_dim": given.embed_dim,
        "custom_text": True,
        **({"quick_gelu": True} if activations == {True} else {}),
        "vision_cfg": {**vision_cfg, "image_size": native_size},
        "text_cfg": text_cfg,
    }
    towers.require_fitting_size(given.image.size, config["vision_cfg"], image.reference)
    source = text.unresized
    model = replace(
        given,
        image=given.image if untrained_image else replace(given.image, size=size),
        text=given.text if untrained_text else replace(given.text, context_length=length),
    )
    return TwoHalves(
        reference=f"{image.reference} and {text.reference}",
        unresized=DescribedTowers(
            model=model,
            towers_json={"model_cfg": config, "preprocess_cfg": {"mean": mean, "std": std}},
            text_files=source.text_files,
            tokenizer_source=source.tokenizer_source,
        ),
        model=model,
        notes=tuple(notes),
        image=image,
        text=text,
    )


def half(tower: Tower, given: ModelConfig) -> Start:
    """The start that a half is taken from; of a half that is no whole model, small towers."""
    name = given.image.name if tower == "image" else given.text.name
    if not names_model(tower, name):
        if tower == "image":
            model = ModelConfig(image=with_pooling(given.image))
            return Start(
                reference=given.image.name, unresized=SmallTowers(model=model), model=model
            )
        pooling = given.text.pooling if name is None else given.text.pooling or pooling_of(name)
        model = ModelConfig(text=replace(given.text, pooling=pooling))
        small = SmallTowers(model=model)
        if name is not None and Path(folder := text_source(name)).is_dir():
            small = replace(small, text_files=Path(folder), tokenizer_source=folder)
        return Start(reference=name or "a small text transformer", unresized=small, model=model)
    assert name is not None
    if tower == "text" and ":" not in name and not Path(name).is_dir():
        name = f"hf:{name}"  # a dual encoder of the hub
    try:
        start = find_start(name)
        if isinstance(start, HuggingFaceStart):
            if (kind := start.kind) != "clip":
                raise ValueError(
                    f"{name}: a model of kind {kind} cannot be a half; {INSTEAD[tower]}"
                )
            start = start.trainable()
    except ValueError as error:
        said = str(error).removeprefix("model.start: ")
        raise ValueError(f"model.{tower}.name: {said}") from error
    if tower == "image" and given.image.weights is not None:
        raise ValueError(f"model.image.weights: {name} has weights of its own; leave it out")
    if tower == "image" and given.image.pooling is not None:
        raise ValueError(f"model.image.pooling: {name} has a pooling of its own; leave it out")
    return start


def tower_config(tower: Tower, start: Start) -> tuple[dict[str, bool], dict[str, Any]]:
    """Whether a tower has QuickGELU, where that matters, and open_clip's configuration of it.

    Raises:
        ValueError: open_clip has none, or its projection is inside the tower.
    """
    setting = f"model.{tower}.name: {start.reference}"
    config = start.architecture.open_clip_config
    if config is None:
        raise ValueError(f"{setting}: is a model that open_clip cannot hold; {INSTEAD[tower]}")
    if "multimodal_cfg" in config:
        raise ValueError(f"{setting}: is a CoCa, whose towers are no halves; {INSTEAD[tower]}")
    part: dict[str, Any] = dict(config["vision_cfg" if tower == "image" else "text_cfg"])
    is_open_clips = not any(name.endswith("_model_name") for name in part)
    if tower == "image" and isinstance(part.get("layers"), list) and is_open_clips:
        raise ValueError(
            f"{setting}: open_clip's ResNets project within their pooling; name timm's tower, such "
            "as resnet50_clip.openai"
        )
    facts: dict[str, bool] = {}
    if is_open_clips:
        facts["quick_gelu"] = quick_gelu(start, config)
        if part.get("proj_type") == "none" or part.get("output_tokens"):
            raise ValueError(f"{setting}: its tower ends in no linear projection; {INSTEAD[tower]}")
    elif tower == "image":
        part |= {"timm_proj": "linear", "timm_model_pretrained": False}
    else:
        part |= {"hf_proj_type": "linear", "hf_model_pretrained": False}
        if type(start) is Start or start.unresized.text_files is not None:
            # How it was named; the path of its files is of this machine.
            name = start.reference.removeprefix("hf:")
            part |= dict.fromkeys(("hf_model_name", "hf_tokenizer_name"), name)
    if tower == "text":  # a run's length may differ from the published model's
        length = start.architecture.sizes["context_length"]
        part["context_length"] = length or part.get("context_length") or DEFAULT_CONTEXT_LENGTH
    return facts, part


def quick_gelu(start: Start, config: Mapping[str, Any]) -> bool:
    """Whether open_clip's own towers have QuickGELU, which a model's weights may ask for."""
    model = start.unresized.model
    known = model.name is not None and model.pretrained is not None
    weights = towers.published_weights(str(model.name), str(model.pretrained)) if known else {}
    return bool(config.get("quick_gelu") or weights.get("quick_gelu"))
