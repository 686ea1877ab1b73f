"""The start of a `[model]` section, with all that follows from it.

The kinds of start, and those of plain references, are in `start.py`; two halves are joined in
`two_halves.py`.
"""

import dataclasses
from dataclasses import replace
from typing import Any

from protoclip.config import ModelConfig
from protoclip.models.architecture import Architecture, NamedTowers
from protoclip.models.halves import SmallTowers, pooling_of, with_pooling
from protoclip.models.start import HuggingFaceStart, OpenClipStart, Start, find_start
from protoclip.models.two_halves import names_model, two_halves

# Settings that a start does not decide: weights are brought to other sizes.
SIZES = ("image.size", "text.context_length")
# Settings of how a run trains, whatever it starts from.
TRAINING = ("locked", "lora", "frozen_batch_norm")


def resolve_start(given: ModelConfig) -> Start:
    """The start of a `[model]` section, with all that follows from it and notes for the user.

    Settings that are at their default follow; sizes may be given, and heads if the start has none.

    Raises:
        ValueError: There is no such model, it cannot be trained, or a setting contradicts it.
    """
    reference, name = given.start, given.name
    image = replace(given.image, name=given.image.name.removeprefix("timm:"))  # as `align` has it
    given = replace(given, image=image)
    if reference is None and name is None:
        of_a_model = names_model("image", given.image.name)
        if not of_a_model:
            given = replace(given, image=with_pooling(given.image))
        if of_a_model or names_model("text", given.text.name):
            halves = two_halves(given)
            told = other_resizing(halves.image, "model.image.name")
            return replace(halves, notes=halves.notes + told)
        if given.text.name is not None and given.text.pooling is None:
            text = replace(given.text, pooling=pooling_of(given.text.name))
            given = replace(given, text=text)
        small = SmallTowers(model=given)
        return Start(reference=given.image.name, unresized=small, model=given)
    if reference is None:
        named = NamedTowers(model=given)
        refuse_coca(f"model.name: {name}", named)
        unresized = NamedTowers(model=ModelConfig(name=name, pretrained=given.pretrained))
        label = f"open_clip:{name}/{given.pretrained}"
        start = OpenClipStart(reference=label, unresized=unresized, model=given)
        return replace(start, notes=other_resizing(start, "model.name"))
    if name is not None and reference.startswith("reference:") and ",model=" not in reference:
        reference = f"{reference},model={name}"
    try:
        return _resolved(find_start(reference), replace(given, start=reference))
    except ValueError as error:
        if str(error).startswith("model."):
            raise
        raise ValueError(f"model.start: {error}") from error


def _resolved(start: Start, given: ModelConfig) -> Start:
    if isinstance(start, HuggingFaceStart):
        start = start.trainable()
    model = merged(given, start.unresized.model, has_heads=start.has_heads)
    if isinstance(start, OpenClipStart) and start.file is None:
        model = replace(model, start=None)  # its name and tag say it all
    refuse_coca(f"model.start: {start.reference}", start.unresized)
    return replace(start, model=model, notes=start.notes + other_resizing(start))


def other_resizing(start: Start, setting: str = "model.start") -> tuple[str, ...]:
    """A note, if a model resizes images in a way that no run keeps, such as padding them."""
    if (mode := start.resize_mode) in ("shortest", "squash"):
        return ()
    return (
        f"{setting}: {start.reference} resizes images by '{mode}'; this run crops them, and so "
        "does the evaluation of what it trains",
    )


def refuse_coca(setting: str, architecture: Architecture) -> None:
    """Refuse a model of open_clip with a decoder, which no loss here trains."""
    if "multimodal_cfg" in (architecture.open_clip_config or {}):
        raise ValueError(f"{setting} is a CoCa, whose decoder cannot be trained here")


def merged(given: ModelConfig, follow: ModelConfig, *, has_heads: bool) -> ModelConfig:
    """The settings that follow from a start, at the given sizes, with its heads if it has any.

    Raises:
        ValueError: A setting is given that differs from the start's.
    """
    defaults, follow_by_name = by_name(ModelConfig()), by_name(follow)
    for name, value in by_name(given).items():
        free = name in ("start", *SIZES, *TRAINING)
        free = free or (name.startswith("heads.") and not has_heads)
        if not free and value not in (defaults[name], follow_by_name[name]):
            raise ValueError(
                f"model.{name}: {value} does not go with model.start = {given.start}, which has "
                f"{follow_by_name[name]}; leave it out"
            )
    size = given.image.size or follow.image.size
    length = given.text.context_length or follow.text.context_length
    return replace(
        follow,
        start=given.start,
        image=replace(follow.image, size=size),
        text=replace(follow.text, context_length=length),
        heads=follow.heads if has_heads else given.heads,
        **{name: getattr(given, name) for name in TRAINING},
    )


def by_name(section: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a section of settings, by dotted name."""
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(section):
        name, value = prefix + entry.name, getattr(section, entry.name)
        inner = dataclasses.is_dataclass(value)
        values |= by_name(value, f"{name}.") if inner else {name: value}
    return values
