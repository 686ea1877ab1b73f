"""Starting from a model: the settings that follow from it, and its weights at other sizes."""

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from protoclip.config import ModelConfig
from protoclip.models import hugging_face, towers
from protoclip.models.hugging_face import HuggingFaceTowers
from protoclip.models.protoclip import ProtoCLIP, TowerPair
from protoclip.models.references import misfits
from protoclip.models.towers import examples_of

# Settings that a start does not decide: weights are brought to other sizes.
SIZES = ("image.size", "text.context_length")
# Settings of how a run trains, whatever it starts from.
OWN = ("locked", "lora", "frozen_batch_norm")


def merged(given: ModelConfig, theirs: ModelConfig, *, has_heads: bool) -> ModelConfig:
    """The settings of a start, at the sizes that are given, with its heads if it has any.

    Raises:
        ValueError: A setting is given that differs from the start's.
    """
    usual, follow = flat(ModelConfig()), flat(theirs)
    for name, value in flat(given).items():
        free = name in ("start", *SIZES, *OWN) or (name.startswith("heads.") and not has_heads)
        if not free and value not in (usual[name], follow[name]):
            raise ValueError(
                f"model.{name}: {value} does not go with model.start = {given.start}, which has "
                f"{follow[name]}; leave it out"
            )
    return replace(
        theirs,
        start=given.start,
        image=replace(theirs.image, size=given.image.size or theirs.image.size),
        text=replace(
            theirs.text, context_length=given.text.context_length or theirs.text.context_length
        ),
        heads=theirs.heads if has_heads else given.heads,
        **{name: getattr(given, name) for name in OWN},
    )


def flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a section of settings, by dotted name."""
    found: dict[str, Any] = {}
    for entry in dataclasses.fields(section):
        name, value = prefix + entry.name, getattr(section, entry.name)
        inner = dataclasses.is_dataclass(value)
        found |= flat(value, f"{name}.") if inner else {name: value}
    return found


def adopt(built: ProtoCLIP, source: TowerPair, *, name: str) -> list[str]:
    """Load the weights of `source` in place, and interpolate its position embeddings if need be.

    The heads stay new if `source` has none. `source` cannot be used afterwards.

    Returns:
        A note on each modality whose position embeddings were interpolated.

    Raises:
        ValueError: `source` is of another architecture.
    """
    expected, given = built.state_dict(), source.state_dict()
    changed = {
        key for key in given.keys() & expected.keys() if given[key].shape != expected[key].shape
    }
    size, own_size = (towers.image_size(pair.towers) for pair in (built, source))
    if size != own_size:
        trunk = getattr(source.towers.visual, "trunk", None)
        if trunk is not None:
            towers.set_input_size(trunk, size, name)
    weights = source.towers.state_dict()
    if isinstance(built.towers, HuggingFaceTowers):
        hugging_face.interpolate(weights, built.towers)
    else:
        towers.interpolate(weights, built.towers)
    found = {**source.state_dict(), **{f"towers.{key}": value for key, value in weights.items()}}
    if not isinstance(source, ProtoCLIP):
        found |= {key: value for key, value in expected.items() if not key.startswith("towers.")}
    if wrong := misfits(built, found):
        raise ValueError(f"{name}: does not fit the [model] section: {examples_of(wrong)}")
    built.load_state_dict(found)
    notes = []
    if any(key.startswith("towers.visual.") for key in changed):
        notes.append(
            f"model.image.size: position embeddings of {name} interpolated, from {own_size} to "
            f"{size} pixels"
        )
    if texts := [key for key in changed if not key.startswith("towers.visual.")]:
        length, own_length = len(expected[texts[0]]), len(given[texts[0]])
        notes.append(
            f"model.text.context_length: position embeddings of {name} interpolated, from "
            f"{own_length} to {length} tokens"
        )
    return notes


def refuse_untrainable(setting: str, description: Mapping[str, Any]) -> None:
    """Refuse towers that have parts that no loss here trains."""
    if "multimodal_cfg" in description.get("model_cfg", {}):
        raise ValueError(f"{setting} is a CoCa, whose decoder cannot be trained here")


def resizing_notes(name: str, description: Mapping[str, Any]) -> list[str]:
    """A note if a start resizes images otherwise than training does."""
    mode = description.get("preprocess_cfg", {}).get("resize_mode", "shortest")
    if mode == "shortest":
        return []
    return [
        f"model.start: {name} resizes images by '{mode}'; this run crops them, and so does the "
        "evaluation of what it trains"
    ]
