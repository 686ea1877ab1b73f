"""What is refused of a run's settings before anything is opened, and what has no effect there.

The limits of single settings are in `config.py`, and typos in paths are found by `paths.py`.
"""

import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from protoclip.config import (
    LOGGERS,
    NO_START,
    START,
    UNSET,
    Config,
    DataConfig,
    EpisodeConfig,
    ModelConfig,
    TeacherConfig,
    build,
    locked_rate,
)

TRAIN_OR_SOURCES = "data.sources: takes the place of data.train; leave one of them out"
SIZES = ("width", "heads", "layers")  # of small text towers
OF_GROUPS = ("whiten", "hard_targets", "number", "target_temperature")  # of teachers


def check(config: Config, *, is_whole: bool = True) -> list[str]:
    """Refuse wrong values and combinations; return notes on settings without effect.

    Args:
        is_whole: Whether nothing that is unset will be chosen; if not, sizes and weights pass.

    Raises:
        ValueError: In one line that names the setting and the way out.
    """
    build(Config, vars(config))
    run, text = config.run, config.model.text
    if text.width % text.heads:
        raise ValueError(f"model.text.heads: {text.heads} does not divide model.text.width")
    share = config.data.validation
    if isinstance(share, float) and config.data.is_emoji:
        raise ValueError("data.validation: the emoji have held-out splits; leave it out")
    if run.evaluate_every and share == 0 and not run.guard:
        raise ValueError(
            "run.evaluate_every: data.validation is 0, so no pairs are held out; set this to 0 "
            "too, or name a guard (run.guard)"
        )
    if run.keep_best is not None and not run.evaluate_every:
        raise ValueError("run.keep_best: needs run.evaluate_every; set it, or leave this out")
    if run.stop_by is not None and not run.evaluate_every:
        raise ValueError("run.stop_by: needs run.evaluate_every; set it, or leave this out")
    for name in run.loggers:
        if name not in LOGGERS and not all(name.partition(":")):
            known = ", ".join(LOGGERS)
            raise ValueError(f"run.loggers: '{name}' is none of {known}, and no module:Class")
    if config.model.pretrained is not None and not config.model.name:
        raise ValueError("model.pretrained: needs model.name, the open_clip model they are for")
    check_halves(config.model)
    check_fine_tuning(config)
    check_sources(config.data)
    check_positives(config)
    check_teachers(config)
    if is_whole:
        check_amounts(config)
    return without_effect(config)


def check_amounts(config: Config) -> None:
    """Refuse sizes that do not fit each other, and weights that leave nothing to train."""
    episodes = config.episodes
    size, stages = episodes.size, episodes.warm_up + config.locked_episodes
    check_sizes(episodes)
    if episodes.count and stages > episodes.count:
        raise ValueError(
            f"episodes.count: {episodes.count} is less than episodes.warm_up + "
            f"episodes.locked_image ({stages}); raise it above that, or lower these"
        )
    numbers = {"prototypes": config.prototypes.number} if config.groups_modalities else {}
    numbers |= {name: teacher.number for name, teacher in config.grouping_teachers.items()}
    for name, number in numbers.items():
        if size and number and not 2 <= number <= size:
            raise ValueError(
                f"{name}.number: {number} needs to be between 2 and episodes.size ({size})"
            )
    always, distils = config.loss.info_nce or config.loss.keep, bool(config.distilled_teachers)
    if not (always or config.uses_prototypes or distils):
        raise ValueError("loss: all weights are 0, so there is nothing to train; raise one")
    if not always and (config.locked_episodes if distils else stages):
        raise ValueError(
            "loss.info_nce: 0 leaves the warm-up and locked-image stages without a loss; "
            "raise it, or set episodes.warm_up = 0 and episodes.locked_image = 0"
        )


def never_trained(config: Config) -> list[str]:
    """Notes on what no episode trains; numbers of episodes are filled in, and fit each other."""
    episodes, locked = config.episodes, config.locked_episodes
    stages = {"episodes.warm_up": episodes.warm_up, "episodes.locked_image": locked}
    taking = " and ".join(name for name, number in stages.items() if number)
    notes = []
    if config.uses_prototypes and episodes.warm_up + locked == episodes.count:
        notes.append(
            f"no episode uses prototypes, since episodes.count ({episodes.count}) has none beside "
            f"{taking}; raise it, or lower what takes them"
        )
    if locked == episodes.count and (
        "image" not in config.model.locked or config.model.projections_are_new
    ):
        notes.append(
            "nothing of the image side trains, since episodes.locked_image takes all of "
            "episodes.count; raise it, or set episodes.locked_image = 0"
        )
    return notes


def check_sizes(episodes: EpisodeConfig) -> None:
    """Refuse an episode that is not so many whole batches."""
    size, batch_size = episodes.size, episodes.batch_size
    if size and size % batch_size:
        nearest = max(size - size % batch_size, batch_size)
        raise ValueError(
            f"episodes.size: {size} is no multiple of episodes.batch_size ({batch_size}); "
            f"try {nearest}"
        )


def check_halves(model: ModelConfig) -> None:
    """Refuse weights of single towers beside those of a whole model."""
    halves = {"model.image.weights": model.image.weights, "model.text.name": model.text.name}
    for setting, value in halves.items():
        if value is not None and model.name is not None:
            raise ValueError(f"{setting}: does not go with model.name; leave one of them out")


def check_fine_tuning(config: Config) -> None:
    """Refuse what leaves nothing to train, or needs a start where there is none."""
    model, both_locked = config.model, {*config.model.locked} == {"image", "text"}
    if both_locked and not model.projections_are_new:
        raise ValueError("model.locked: with both towers locked nothing is left to train")
    if model.lora is not None and both_locked:
        raise ValueError("model.lora: both towers are locked (model.locked); leave one of them out")
    if model.lora is not None and config.parallel.strategy == "fsdp":
        raise ValueError("model.lora: does not go with parallel.strategy = fsdp; choose ddp")
    if model.lora is not None and config.parallel.compile:
        raise ValueError("model.lora: does not go with parallel.compile; leave one of them out")
    if config.uses_start and model.start is None and model.pretrained is None:
        setting = "loss.keep" if config.loss.keep else f"teacher.features = {START}"
        raise ValueError(f"{setting}: needs model.start, the model to keep to; set it")


def require_start(config: Config) -> None:
    """Refuse settings that name no model to fine-tune."""
    if not config.model.has_start:
        raise ValueError(NO_START)


def require_named_pairs(given: Mapping[str, Any], work: str) -> None:
    """Refuse settings, as a recipe holds them, that name no pairs for this work.

    The bundled emoji, on which `train` trains a first model, are hardly what a model is for.
    """
    data, start = given.get("data", {}), given.get("model", {}).get("start")
    if data.get("train") or data.get("sources"):
        return
    is_tuned = False
    with suppress(OSError, ValueError):  # it may be no folder at all
        settings = (Path(start or "") / "config.toml").read_text(encoding="utf-8")
        is_tuned = start is not None and was_fine_tuned(tomllib.loads(settings))
    again = f", or go on with {start} by --resume auto" if is_tuned else ""
    raise ValueError(
        f"data.train: {work} needs pairs of yours; name them, such as --data.train pairs.tsv"
        f" (emoji are the bundled ones){again}"
    )


def was_fine_tuned(settings: Mapping[str, Any]) -> bool:
    """Whether the settings of a run are those of fine-tuning: it had a start itself."""
    model = settings.get("model", {})
    return model.get("start") is not None or model.get("pretrained") is not None


def check_sources(data: DataConfig) -> None:
    if data.sources and data.train != DataConfig().train:
        raise ValueError(TRAIN_OR_SOURCES)
    if len({source.weight is None for source in data.sources}) > 1:
        raise ValueError("data.sources: give every source a weight, or none")


def check_positives(config: Config) -> None:
    several, loss = config.data.several_captions, config.loss
    if several and loss.positives == "pair" and loss.info_nce:
        raise ValueError(
            f"loss.positives: pair takes captions of one image, of which data.captions = "
            f"{config.data.captions} brings several, for negatives; leave it out, or choose shared"
        )


def check_teachers(config: Config) -> None:
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
    """One note for each setting that differs from its default and changes nothing in this run."""
    reasons: dict[str, str] = {}
    for setting, is_idle, why in causes(config):
        value_in = attrgetter(setting.removesuffix(".*"))
        if is_idle and value_in(config) != value_in(Config()):
            reasons.setdefault(setting, why)
    notes = [f"{setting}: no effect, since {why}" for setting, why in reasons.items()]
    notes += teachers_without_effect(config)
    if config.locked_episodes < config.episodes.locked_image:
        notes.append("episodes.locked_image = 0, since model.locked keeps the text tower too")
    return notes


def causes(config: Config) -> list[tuple[str, bool, str]]:
    """Each setting that may have no effect, whether it has none here, and why.

    A setting may have several rows; the first one that holds counts.
    """
    data, episodes, loss, model = config.data, config.episodes, config.loss, config.model
    clip, no_prototypical = not config.uses_prototypes, loss.prototypical == 0
    queue = config.prototype_source == "queue" and not clip and episodes.warm_up > 0
    hard = config.prototypes.hard_targets and not no_prototypical
    in_workers = data.cache_gb > 0 and data.workers not in (0, "auto")
    has_teacher = bool(config.teachers or config.teacher.features)
    locked = [] if model.projections_are_new else model.locked
    # A tenth is what the plan fills in, and so what a run's own settings hold, unasked.
    tenth = config.optim.locked_learning_rate == locked_rate(config.optim.learning_rate or 0.0)
    overfits = config.run.overfit is not None
    crops = overfits and data.augmentation == "clip"  # the plan fills in light
    linear_heads = not clip and model.heads.hidden_layers == 0
    no_features = not config.grouping_teachers and loss.teacher > 0
    no_locked_stage = not config.locked_episodes and not tenth

    def weight_is_0(setting: str) -> str:
        """Why, where it is this weight; run.overfit sets them all to 0 but InfoNCE's."""
        if overfits:
            return "run.overfit learns by the instance loss alone"
        return f"{setting} is 0"

    unused = (clip, "no loss uses prototypes")
    # Without any prototypes the row of `prototypes.*` says it.
    no_target = (no_prototypical and not clip, "loss.prototypical is 0")
    no_groups = (not config.groups_modalities and not clip, "loss.prototypical is 0")
    no_teacher = (not config.external_teachers and has_teacher, weight_is_0("loss.teacher"))
    no_instance = (loss.info_nce == 0, "loss.info_nce is 0")
    named = (model.name is not None, f"model.name is {model.name}")
    text_named = (model.text.name is not None, f"model.text.name is {model.text.name}")
    return [
        ("run.patience", config.run.stop_by is None, "run.stop_by is not set"),
        ("data.cache_gb", in_workers, "worker processes keep no images in memory"),
        ("data.class_column", data.validation == 0, "data.validation is 0"),
        ("data.augmentation", crops, "run.overfit transforms images as an evaluation does"),
        ("model.heads.*", *unused),
        ("model.heads.hidden_dim", linear_heads, "model.heads.hidden_layers is 0"),
        ("prototypes.*", clip, weight_is_0("loss.prototypical")),
        ("prototypes.number", *no_groups),
        ("prototypes.hard_targets", *no_target),
        ("prototypes.back_translation", *no_target),
        ("prototypes.target_temperature", *no_target),
        ("prototypes.target_temperature", hard, "prototypes.hard_targets is set"),
        ("prototypes.extract_transform", queue, "prototypes come from the queue"),
        ("episodes.warm_up", *unused),
        ("optim.heads_lr_scale", *unused),
        ("optim.heads_weight_decay", *unused),
        ("teacher.*", *no_teacher),
        ("teachers.*", *no_teacher),
        ("loss.teacher", no_features, "no teacher has features"),
        ("loss.strengths", *unused),
        ("loss.strengths", *no_instance),
        ("loss.instance", *no_instance),
        ("loss.positives", *no_instance),
        ("optim.locked_learning_rate", no_locked_stage, "there is no locked-image stage"),
        ("optim.image_lr_scale", "image" in locked, "the image tower is locked"),
        ("model.embed_dim", *named),
        ("model.image.name", *named),
        ("model.image.pooling", *named),
        ("model.text.pooling", model.text.name is None, "model.text.name is not set"),
        *((f"model.text.{size}", *named) for size in SIZES),
        *((f"model.text.{size}", *text_named) for size in SIZES),
    ]


def teachers_without_effect(config: Config) -> list[str]:
    """Notes on teachers, or settings of theirs, that change nothing."""
    notes = []
    usual, no_loss = TeacherConfig(), config.loss.teacher == 0
    alone = replace(asked(config.teacher), number=usual.number, name=usual.name)
    if config.teachers and alone != usual:
        notes.append("teacher.*: no effect, since teachers take its place")
    for teacher in config.teachers or [config.teacher]:
        untouched = TeacherConfig(name=teacher.name)
        if asked(teacher) == untouched or (no_loss and not teacher.distil):
            continue
        if config.run.overfit is not None:  # no teacher has a weight then
            continue
        if teacher.features is None:
            notes.append("teacher.*: no effect, since teacher.features is not set")
            continue
        hard, no_distillation = teacher.hard_targets, teacher.distil == 0
        rows = [
            *((setting, no_loss, "loss.teacher is 0") for setting in OF_GROUPS),
            ("target_temperature", hard and not no_loss, f"{teacher.name}.hard_targets is set"),
            ("tower", no_distillation, f"{teacher.name}.distil is 0"),
        ]
        notes += [
            f"{teacher.name}.{setting}: no effect, since {why}"
            for setting, is_idle, why in rows
            if is_idle and getattr(teacher, setting) != getattr(untouched, setting)
        ]
    return notes


def asked(teacher: TeacherConfig) -> TeacherConfig:
    """A teacher without the `distil` of 0 that the plan fills in, unasked."""
    return replace(teacher, distil=teacher.distil or UNSET)
