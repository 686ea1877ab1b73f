"""The start of a `[model]` section, with all that follows from it.

A section names a start, or a model of open_clip, or an image tower and a text tower: timm's, one of
Hugging Face, a small new one, or that of a model that `protoclip.load` opens.
"""

import dataclasses
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH
from torch import Tensor, nn

from protoclip.config import ModelConfig
from protoclip.models import open_clip as open_clip_models
from protoclip.models import timm
from protoclip.models.open_clip import find_config, find_weights
from protoclip.models.opening import HUGGING_FACE_CONFIG, OPEN_CLIP_CONFIG, examples_of, misfits
from protoclip.models.protoclip import (
    PROJECTIONS,
    ProtoCLIP,
    image_normalisation,
    image_size,
)
from protoclip.models.start import KINDS, OpenClipStart, Start, TransformersStart, find_start
from protoclip.models.text_models import (
    MINILM,
    find_pooling,
    read_text_weights,
    require_text_tower,
    text_config,
    text_source,
)

# Settings that a start does not decide: weights are brought to other sizes.
SIZES = ("image.size", "text.context_length")
# Settings of how a run trains, whatever it starts from.
TRAINING = ("locked", "lora", "frozen_batch_norm")
Modality = Literal["image", "text"]
PARTS = {"image": "visual.", "text": "text."}  # how the names of a tower's weights begin
# What to name where a tower cannot be joined with another.
INSTEAD = {
    "image": (
        "name a model of timm (it has DINOv2, ViT and SigLIP), or a CLIP, as open_clip:NAME/TAG"
    ),
    "text": "name a text model such as minilm, or a CLIP, as open_clip:NAME/TAG",
}


def resolve_start(section: ModelConfig) -> Start:
    """The start of a `[model]` section, with all that follows from it and notes for the user.

    Settings that are at their default follow; sizes may be given, and heads if the start has none.

    Raises:
        ValueError: There is no such model, it cannot be trained, or a setting contradicts it.
    """
    reference, name = section.start, section.name
    image = replace(section.image, name=section.image.name.removeprefix("timm:"))  # as in `align`
    section = replace(section, image=image)
    if reference is None and name is None:
        is_model = names_model("image", section.image.name)
        if not is_model:
            section = replace(section, image=timm.add_pooling(section.image))
        if is_model or names_model("text", section.text.name):
            joined = join_towers(section)
            return replace(joined, notes=joined.notes + note_resizing(joined, "model.image.name"))
        return small_start(section)
    if reference is None:
        assert name is not None
        return find_named_start(name, section)
    if name is not None and reference.startswith("reference:") and ",model=" not in reference:
        reference = f"{reference},model={name}"
    try:
        start = find_start(reference)
        if isinstance(start, TransformersStart):
            start = start.trainable()
        model = follow_start(replace(section, start=reference), start)
        if isinstance(start, OpenClipStart) and start.file is None:
            model = replace(model, start=None)  # its name and tag say it all
        refuse_coca(f"model.start: {reference}", start)
    except ValueError as error:
        if str(error).startswith("model."):
            raise
        raise ValueError(f"model.start: {error}") from error
    notes = start.notes + note_resizing(start, "model.start")
    return replace(start, model=model, setting=f"model.start: {reference}", notes=notes)


def find_named_start(name: str, section: ModelConfig) -> OpenClipStart:
    """The start of a section that names a model of open_clip, and maybe a tag."""
    tag = section.pretrained
    find_config(name)
    published = {} if tag is None else find_weights(name, tag)
    start = OpenClipStart(
        reference=f"open_clip:{name}/{tag}",
        model=section,
        own=ModelConfig(name=name, pretrained=tag),
        resize_mode=published.get("resize_mode") or "shortest",
        setting=f"model.name: {name}" if tag is None else f"model.pretrained: {name}/{tag}",
    )
    refuse_coca(f"model.name: {name}", start)
    return replace(start, notes=note_resizing(start, "model.name"))


def follow_start(section: ModelConfig, start: Start) -> ModelConfig:
    """The settings that follow from a start, at the given sizes, with its heads if it has any.

    Raises:
        ValueError: A setting is given that differs from the start's.
    """
    own, has_heads = start.own, start.has_heads
    defaults, own_by_name = flatten_section(ModelConfig()), flatten_section(own)
    for name, value in flatten_section(section).items():
        free = name in ("start", *SIZES, *TRAINING)
        free = free or (name.startswith("heads.") and not has_heads)
        if not free and value not in (defaults[name], own_by_name[name]):
            raise ValueError(
                f"model.{name}: {value} does not go with model.start = {section.start}, which has "
                f"{own_by_name[name]}; leave it out"
            )
    size = section.image.size or own.image.size
    length = section.text.context_length or own.text.context_length
    return replace(
        own,
        start=section.start,
        image=replace(own.image, size=size),
        text=replace(own.text, context_length=length),
        heads=own.heads if has_heads else section.heads,
        **{name: getattr(section, name) for name in TRAINING},
    )


def flatten_section(section: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a section of settings, by dotted name."""
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(section):
        name, value = prefix + entry.name, getattr(section, entry.name)
        inner = dataclasses.is_dataclass(value)
        values |= flatten_section(value, f"{name}.") if inner else {name: value}
    return values


def note_resizing(start: Start, setting: str) -> tuple[str, ...]:
    """A note, if a model resizes images in a way that no run keeps, such as padding them."""
    if (mode := start.resize_mode) in ("shortest", "squash"):
        return ()
    reference = start.image.reference if isinstance(start, JoinedTowers) else start.reference
    return (
        f"{setting}: {reference} resizes images by '{mode}'; this run crops them, and so "
        "does the evaluation of what it trains",
    )


def refuse_coca(setting: str, start: Start) -> None:
    """Refuse a model of open_clip with a decoder, which no loss here trains."""
    if "multimodal_cfg" in (start.open_clip_config or {}):
        raise ValueError(f"{setting} is a CoCa, whose decoder cannot be trained here")


class SmallTowers(Start):
    """timm's image tower and a small or a Hugging Face text tower; each brings its own weights."""

    def build_towers(self, *, pretrained_text: bool = True) -> nn.Module:
        """The towers with the weights that `model` names; without any on the meta device.

        Where the image tower has timm's weights, it reads images normalised as these need.

        Raises:
            ValueError: timm has no such model, the sizes do not fit, or there are no such weights,
                or they are of another model or pickled.
        """
        image, text, size = self.model.image, self.model.text, self.sizes["image_size"]
        if text.name is not None:
            length = self.sizes["context_length"]
            require_text_tower(text.name, self.text_source, context_length=length)
        built: Any = super().build_towers()
        trunk = built.visual.trunk
        if getattr(trunk, "head_hidden_size", trunk.num_features) != trunk.num_features:
            raise ValueError(
                f"model.image.name: {image.name} widens its features in its head, which open_clip "
                "does not project; choose another, such as resnet10t or mobilenetv2_050"
            )
        if built.logit_scale.is_meta:
            return built  # type: ignore[no-any-return]
        if image.weights is not None:
            pool = "" if image.pooling == "own" else "avg"
            trunk.load_state_dict(timm.read_image_weights(image.name, image.weights, size, pool))
        if text.name is not None:
            weights = read_text_weights(text.name, self.text_source)
            built.text.transformer.load_state_dict(weights)
        return built  # type: ignore[no-any-return]

    def fill(self, built: ProtoCLIP) -> list[str]:
        return []  # the towers were built with their weights


def small_start(section: ModelConfig) -> SmallTowers:
    """The start of a section that describes the towers, with each tower's way of pooling."""
    section = replace(section, image=timm.add_pooling(section.image))
    name = section.text.name
    if name is not None and section.text.pooling is None:
        section = replace(section, text=replace(section.text, pooling=find_pooling(name)))
    return SmallTowers(reference=section.image.name, model=section, own=section)


def names_model(modality: Modality, name: str | None) -> bool:
    """Whether the name of a tower is that of a whole model, which `protoclip.load` takes.

    Raises:
        ValueError: There is no such text model.
    """
    if not name:
        return False
    kind, _, rest = name.partition(":")
    may_be_text_model = modality == "text" and kind == "hf"
    if rest and kind in KINDS and not may_be_text_model:
        return True
    if modality == "text":
        return names_dual_encoder(name)
    return Path(name).is_dir() and not timm.is_image_name(name)


def names_dual_encoder(name: str) -> bool:
    """Whether a text tower is taken from a model that has an image tower too."""
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
class JoinedTowers(Start):
    """The image tower of one start and the text tower of another, with their weights.

    Their projections into a joint space are new.
    """

    image: Start
    text: Start

    def describe_towers(self) -> Mapping[str, Any]:
        """Their description, with the joint width of `model`."""
        description = deepcopy(dict(self.towers_json or {}))
        description["model_cfg"]["embed_dim"] = self.model.embed_dim
        return description

    def fill(self, built: ProtoCLIP) -> list[str]:
        towers = built.towers
        taken = {**self._weights("image", towers), **self._weights("text", towers)}
        whole = {**towers.state_dict(), **taken}
        if wrong := misfits(towers, whole):
            raise ValueError(f"{self.reference}: do not fit: {examples_of(wrong)}")
        towers.load_state_dict(whole)
        return []

    def _weights(self, modality: Modality, towers: nn.Module) -> dict[str, Tensor]:
        """Weights of a tower without its projection, at the sizes of the towers that take them."""
        start = self.image if modality == "image" else self.text
        pair = start.build() if isinstance(start, SmallTowers) else start.open_pair()
        source: Any = pair.towers
        size = image_size(towers)
        if modality == "image" and size != image_size(source):
            open_clip_models.set_trunk_size(source, size, start.reference)
        weights: dict[str, Tensor] = source.state_dict()
        if not hasattr(source, "text"):  # open_clip's first models keep the text tower in parts
            outside = ("visual.", "logit_")
            weights = {
                name if name.startswith(outside) else f"text.{name}": value
                for name, value in weights.items()
            }
        # open_clip lets the classifier of some of timm's models project.
        trunk = getattr(source.visual, "trunk", None)
        inside = () if trunk is None else timm.classifier_names(trunk)
        projections = (*PROJECTIONS, *(f"visual.trunk.{name}" for name in inside))
        of_tower = {
            name: value
            for name, value in weights.items()
            if name.startswith(PARTS[modality]) and not name.startswith(projections)
        }
        open_clip_models.interpolate_positions(of_tower, towers)
        return of_tower


def join_towers(section: ModelConfig) -> JoinedTowers:
    """The start of a section of which a tower, or both, is of another model.

    Raises:
        ValueError: There is no such model, or its tower cannot be joined with another.
    """
    image, text = start_of_tower("image", section), start_of_tower("text", section)
    image_gelu, vision_cfg = tower_config("image", image)
    text_gelu, text_cfg = tower_config("text", text)
    activations = {image_gelu, text_gelu} - {None}
    if len(activations) > 1:
        raise ValueError(
            f"model.text.name: {text.reference} and {image.reference} have different activations "
            "(GELU and QuickGELU), which open_clip's format cannot say of one model; take a timm "
            "image tower, or a Hugging Face text model"
        )
    towers = image.build(on_meta=True).towers
    mean, std = image_normalisation(towers)
    native_size, native_length = image_size(towers), int(text_cfg["context_length"])
    size = section.image.size or native_size
    length = section.text.context_length or native_length
    notes = []
    if size != native_size:
        notes.append(f"model.image.size = {size}: the image half was made for {native_size} pixels")
    if length > native_length or (length < native_length and "hf_model_name" not in text_cfg):
        notes.append(
            f"model.text.context_length = {length}: the text half was made for {native_length}"
        )
    config: dict[str, Any] = {
        "embed_dim": section.embed_dim,
        "custom_text": True,
        **({"quick_gelu": True} if activations == {True} else {}),
        "vision_cfg": {**vision_cfg, "image_size": native_size},
        "text_cfg": text_cfg,
    }
    open_clip_models.require_fitting_size(section.image.size, vision_cfg, image.reference)
    # Sizes of a tower that starts untrained follow from the data.
    model = section
    if not isinstance(image, SmallTowers) or section.image.weights is not None:
        model = replace(model, image=replace(section.image, size=size))
    if not isinstance(text, SmallTowers) or section.text.name is not None:
        model = replace(model, text=replace(section.text, context_length=length))
    return JoinedTowers(
        reference=f"{image.reference} and {text.reference}",
        model=model,
        own=model,
        towers_json={"model_cfg": config, "preprocess_cfg": {"mean": mean, "std": std}},
        text_files=text.text_files,
        tokenizer_source=text.tokenizer_source,
        resize_mode=image.resize_mode,
        setting=f"model.text.name: {text.reference}",  # libraries of towers read no more than that
        notes=tuple(notes),
        image=image,
        text=text,
    )


def start_of_tower(modality: Modality, section: ModelConfig) -> Start:
    """The start that a tower is taken from: a whole model, or small towers of which it is one."""
    name = section.image.name if modality == "image" else section.text.name
    if not names_model(modality, name):
        if modality == "image":
            return small_start(ModelConfig(image=section.image))
        small = small_start(ModelConfig(text=section.text))
        small = replace(small, reference=name or "a small text transformer")
        if name is not None and Path(folder := text_source(name)).is_dir():
            small = replace(small, text_files=Path(folder), tokenizer_source=folder)
        return small
    assert name is not None
    if modality == "text" and ":" not in name and not Path(name).is_dir():
        name = f"hf:{name}"  # a dual encoder of the hub
    try:
        start = find_start(name)
        if isinstance(start, TransformersStart):
            if (kind := start.kind) != "clip":
                raise ValueError(
                    f"{name}: a model of kind {kind} cannot be a half; {INSTEAD[modality]}"
                )
            start = start.trainable()
    except ValueError as error:
        reason = str(error).removeprefix("model.start: ")
        raise ValueError(f"model.{modality}.name: {reason}") from error
    if modality == "image" and section.image.weights is not None:
        raise ValueError(f"model.image.weights: {name} has weights of its own; leave it out")
    if modality == "image" and section.image.pooling is not None:
        raise ValueError(f"model.image.pooling: {name} has a pooling of its own; leave it out")
    return start


def tower_config(modality: Modality, start: Start) -> tuple[bool | None, dict[str, Any]]:
    """Whether a tower has QuickGELU, None where that says nothing, and its part of `model_cfg`.

    Raises:
        ValueError: open_clip has none, or its projection is inside the tower.
    """
    setting = f"model.{modality}.name: {start.reference}"
    config, instead = start.open_clip_config, INSTEAD[modality]
    if config is None:
        raise ValueError(f"{setting}: is a model that open_clip cannot hold; {instead}")
    if "multimodal_cfg" in config:
        raise ValueError(f"{setting}: is a CoCa, whose towers are no halves; {instead}")
    part: dict[str, Any] = dict(config["vision_cfg" if modality == "image" else "text_cfg"])
    is_open_clips = not any(name.endswith("_model_name") for name in part)
    if modality == "image" and isinstance(part.get("layers"), list) and is_open_clips:
        raise ValueError(
            f"{setting}: open_clip's ResNets project within their pooling; name timm's tower, such "
            "as resnet50_clip.openai"
        )
    if is_open_clips and (part.get("proj_type") == "none" or part.get("output_tokens")):
        raise ValueError(f"{setting}: its tower ends in no linear projection; {instead}")
    if not is_open_clips and modality == "image":
        part |= {"timm_proj": "linear", "timm_model_pretrained": False}
    elif not is_open_clips:
        part |= {"hf_proj_type": "linear", "hf_model_pretrained": False}
        if isinstance(start, SmallTowers) or start.text_files is not None:
            # How it was named; the path of its files is of this machine.
            name = start.reference.removeprefix("hf:")
            part |= dict.fromkeys(("hf_model_name", "hf_tokenizer_name"), name)
    if modality == "text":  # a run's length may differ from the published model's
        length = start.sizes["context_length"]
        part["context_length"] = length or part.get("context_length") or DEFAULT_CONTEXT_LENGTH
    return bool(config.get("quick_gelu")) if is_open_clips else None, part
