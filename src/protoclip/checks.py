"""What a configuration may not say, and what it says without effect."""

import dataclasses
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args, get_type_hints

from protoclip.config import Config, DataConfig

# What a number may be at least and at most, by its setting. Upper limits only catch slips of the
# finger: no data and no machine of today needs as much.
SEEDS = (0, 2**63 - 1)  # what both torch and NumPy take
WIDTHS = (1, 2**16)
COUNTS = (1, 2**31 - 1)
COUNTS_OR_NONE = (0, 2**31 - 1)
ABOVE_0 = sys.float_info.min  # denormal numbers are flushed to 0, so the least is a normal one
ANY_POSITIVE = (ABOVE_0, math.inf)
ANY_OR_NONE = (0, math.inf)
LIMITS: dict[str, tuple[float, float]] = {
    "run.seed": SEEDS,
    "run.log_every": COUNTS,
    "run.save_steps": COUNTS_OR_NONE,
    "run.save_minutes": ANY_OR_NONE,
    "run.keep_checkpoints": COUNTS,
    "run.evaluate_every": COUNTS_OR_NONE,
    "data.sources.weight": ANY_POSITIVE,
    "data.shuffle_buffer": COUNTS,
    "data.workers": (0, 4096),
    "data.cache_gb": (ABOVE_0, 1e6),
    "data.max_image_pixels": (1, 2**40),
    "data.max_bad_share": (0, 1),
    "model.embed_dim": WIDTHS,
    "model.image.size": (2, 2**13),
    "model.text.context_length": (3, 2**12),
    "model.text.width": WIDTHS,
    "model.text.heads": WIDTHS,
    "model.text.layers": (1, 1000),
    "model.heads.hidden_dim": WIDTHS,
    "model.heads.hidden_layers": (0, 1000),
    "model.heads.projection_dim": WIDTHS,
    "episodes.size": COUNTS,
    "episodes.count": COUNTS,
    "episodes.batch_size": (2, 2**31 - 1),
    "episodes.micro_batch_size": (2, 2**31 - 1),
    "episodes.warm_up": COUNTS_OR_NONE,
    "episodes.locked_image": COUNTS_OR_NONE,
    "prototypes.queue_size": (2, 2**31 - 1),
    "prototypes.number": COUNTS,
    "prototypes.iterations": COUNTS,
    "prototypes.restarts": COUNTS,
    "prototypes.target_temperature": ANY_POSITIVE,
    **{
        f"{teacher}.{field}": limits
        for teacher in ("teacher", "teachers")
        for field, limits in (
            ("weight", ANY_OR_NONE),
            ("number", COUNTS),
            ("target_temperature", ANY_POSITIVE),
        )
    },
    "loss.info_nce": ANY_OR_NONE,
    "loss.prototypical": ANY_OR_NONE,
    "loss.teacher": ANY_OR_NONE,
    "optim.learning_rate": ANY_POSITIVE,
    "optim.image_lr_scale": ANY_POSITIVE,
    "optim.text_lr_scale": ANY_POSITIVE,
    "optim.heads_lr_scale": ANY_POSITIVE,
    "optim.warm_up_steps": COUNTS_OR_NONE,
    "optim.locked_learning_rate": ANY_OR_NONE,
    "optim.locked_warm_up_steps": COUNTS_OR_NONE,
    "optim.betas": (0, math.nextafter(1.0, 0.0)),
    "optim.eps": ANY_POSITIVE,
    "optim.weight_decay": ANY_OR_NONE,
    "optim.heads_weight_decay": ANY_OR_NONE,
    "optim.clip_norm": ANY_POSITIVE,
}


def check(config: Config) -> list[str]:
    """Reject impossible combinations; return notes on settings that have no effect.

    Raises:
        ValueError: In one line that names the setting and what to do.
    """
    check_numbers(config)
    episodes, prototypes, text = config.episodes, config.prototypes, config.model.text
    if text.width % text.heads:
        raise ValueError(
            f"model.text.heads: {text.heads} heads do not divide model.text.width ({text.width})"
        )
    check_evaluation(config)
    check_sources(config.data)
    check_teachers(config)
    if episodes.batch_size > episodes.size:
        raise ValueError(
            f"episodes.batch_size: {episodes.batch_size} is larger than episodes.size "
            f"({episodes.size}); lower it or raise episodes.size"
        )
    if episodes.size % episodes.batch_size:
        nearest = episodes.size // episodes.batch_size * episodes.batch_size
        raise ValueError(
            f"episodes.size: {episodes.size} is no multiple of episodes.batch_size "
            f"({episodes.batch_size}); try {nearest}"
        )
    if episodes.warm_up + episodes.locked_image > episodes.count:
        raise ValueError(
            f"episodes.count: {episodes.count} is less than episodes.warm_up + "
            f"episodes.locked_image ({episodes.warm_up} + {episodes.locked_image})"
        )
    counts = {"prototypes.number": prototypes.number} if config.loss.prototypical else {}
    for name, teacher in config.external_teachers.items():
        counts[f"{name}.number"] = teacher.number
    for name, number in counts.items():
        if not 2 <= number <= episodes.size:
            raise ValueError(
                f"{name}: {number} needs to be between 2 and episodes.size ({episodes.size})"
            )
    queue_size = prototypes.queue_size or episodes.size
    if config.prototype_source == "queue" and max(counts.values(), default=0) > queue_size:
        raise ValueError(
            f"prototypes.queue_size: {queue_size} samples are fewer than the "
            f"{max(counts.values())} prototypes; raise it"
        )
    if not config.loss.info_nce and not config.uses_prototypes:
        raise ValueError("loss: all weights are 0, so there is nothing to train; raise one")
    if not config.loss.info_nce and (episodes.warm_up or episodes.locked_image):
        raise ValueError(
            "loss.info_nce: 0 leaves the warm-up and locked-image stages without a loss; "
            "raise it, or set episodes.warm_up = 0 and episodes.locked_image = 0"
        )
    if config.model.pretrained and not config.model.name:
        raise ValueError("model.pretrained: needs model.name, the open_clip model they are for")
    return without_effect(config)


def numbers(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Every number of a tree of settings that is set: name, value, and whether it has to be whole.

    What is a number is told by the annotations, so that a value of another kind is found too.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, kinds = getattr(settings, field.name), leaves(hints[field.name])
        listed = isinstance(value, list | tuple)
        for position, item in enumerate(value if listed else [value]):
            name = f"{prefix}{field.name}[{position}]" if listed else prefix + field.name
            if dataclasses.is_dataclass(item):
                yield from numbers(item, f"{name}.")
            elif item is not None and kinds & {int, float}:
                yield name, item, float not in kinds


def leaves(annotation: Any) -> set[Any]:
    """The plain types in an annotation: `int` and `None` of `int | None`."""
    inner = get_args(annotation)
    return set().union(*map(leaves, inner)) if inner else {annotation}


def check_numbers(config: Config) -> None:
    """Reject what is no finite number, and what is out of range."""
    for name, value, whole in numbers(config):
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            kind = "whole number" if whole else "number"
            raise ValueError(f"{name}: {value!r} is no {kind}; give one")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: {value} is not finite; give a number")
        least, most = LIMITS.get(re.sub(r"\[\d+\]", "", name), (-math.inf, math.inf))
        if value < least and least == ABOVE_0:
            hint = "; for hard targets set hard_targets = true" if "temperature" in name else ""
            raise ValueError(f"{name}: {value} needs to be above 0{hint}")
        if value < least:
            raise ValueError(f"{name}: {value} is too small; at least {least}")
        if value > most:
            limit = "below 1" if most == math.nextafter(1.0, 0.0) else f"at most {most}"
            raise ValueError(f"{name}: {value} is too large; {limit}")


def check_evaluation(config: Config) -> None:
    """Reject evaluations during training that cannot be."""
    run = config.run
    if run.evaluate_every and not config.data.has_held_out_splits:
        raise ValueError(
            "run.evaluate_every: data.train has no held-out split to evaluate on; set it to 0"
        )
    if run.keep_best is None:
        return
    if not run.evaluate_every:
        raise ValueError(
            "run.keep_best: nothing is evaluated during training; set run.evaluate_every, or leave "
            "run.keep_best out"
        )


def check_sources(data: DataConfig) -> None:
    """Reject mixtures that make no sense."""
    if data.sources and data.train != DataConfig().train:
        raise ValueError("data.sources: takes the place of data.train; leave one of them out")
    weights = [source.weight for source in data.sources]
    if any(weight is None for weight in weights) and any(weights):
        raise ValueError("data.sources: give every source a weight, or none")
    if data.shuffle_captions and data.read == "streaming":
        raise ValueError(
            "data.shuffle_captions: needs samples in any order; not data.read = streaming"
        )


def check_teachers(config: Config) -> None:
    """Reject several teachers that cannot be told no_sync, or that leave out what makes one."""
    if config.teachers and config.teacher.features is not None:
        raise ValueError("teachers: take the place of teacher; leave one of them out")
    names = [teacher.name for teacher in config.teachers]
    for name in [*names, config.teacher.name]:
        if name in ("image", "text") or "_from_" in name or names.count(name) > 1:
            raise ValueError(f"teachers: '{name}' is taken; give each teacher a name of its own")
    for teacher in config.teachers:
        if teacher.features is None:
            raise ValueError(f"teachers: '{teacher.name}' has no features; name their file")


def without_effect(config: Config) -> list[str]:
    """One note for each setting that differs from its default and does nothing in this run."""
    default, notes = Config(), []
    if (
        config.data.cache == "ram"
        and config.data.workers
        and config.data.cache_gb != default.data.cache_gb
    ):
        notes.append("data.cache_gb: no effect, since worker processes keep no pictures in memory")
    if config.loss.prototypical == 0 and config.prototypes != default.prototypes:
        notes.append("prototypes.*: no effect, since loss.prototypical is 0")
    if config.prototypes.queue_size is not None and config.prototype_source == "extract":
        notes.append(
            "prototypes.queue_size: no effect, since prototypes are extracted (prototypes.source)"
        )
    if (
        config.prototypes.extract_transform != default.prototypes.extract_transform
        and config.prototype_source == "queue"
        and config.episodes.warm_up
    ):
        notes.append(
            "prototypes.extract_transform: no effect, since prototypes come from the queue"
        )
    if config.loss.teacher == 0 and (config.teacher.features is not None or config.teachers):
        notes.append("teacher.*: no effect, since loss.teacher is 0")
    if not config.uses_teacher and config.loss.teacher not in (0, default.loss.teacher):
        notes.append("loss.teacher: no effect without teacher.features")
    if not config.uses_prototypes and config.episodes.warm_up != default.episodes.warm_up:
        notes.append("episodes.warm_up: no effect, since no loss uses prototypes")
    if not config.uses_prototypes and config.optim.heads_lr_scale != default.optim.heads_lr_scale:
        notes.append("optim.heads_lr_scale: no effect, since no loss uses prototypes")
    if config.model.name and config.model.image.name != default.model.image.name:
        notes.append(f"model.image.name: no effect, since model.name is {config.model.name}")
    text = replace(config.model.text, context_length=None)
    if config.model.name and text != default.model.text:
        notes.append(
            f"model.text.width, heads, layers: no effect, since model.name is {config.model.name}"
        )
    if config.prototypes.hard_targets and (
        config.prototypes.target_temperature != default.prototypes.target_temperature
    ):
        notes.append("prototypes.target_temperature: no effect with prototypes.hard_targets")
    return notes
