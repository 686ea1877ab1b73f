"""What a configuration may not say, and what it says without effect."""

from dataclasses import replace

from protoclip.config import Config, DataConfig


def check(config: Config) -> list[str]:
    """Reject impossible combinations; return notes on settings that have no effect.

    Raises:
        ValueError: In one line that names the setting and what to do.
    """
    episodes, prototypes = config.episodes, config.prototypes
    at_least = {
        "run.log_every": (config.run.log_every, 1),
        "data.workers": (config.data.workers, 0),
        "data.shuffle": (config.data.shuffle, 1),
        "data.max_image_pixels": (config.data.max_image_pixels, 1),
        "data.max_bad_share": (config.data.max_bad_share, 0),
        "model.embed_dim": (config.model.embed_dim, 1),
        "model.image.size": (config.model.image.size, 1),
        "model.text.context_length": (config.model.text.context_length, 3),
        "model.text.layers": (config.model.text.layers, 1),
        "model.heads.hidden_dim": (config.model.heads.hidden_dim, 1),
        "model.heads.hidden_layers": (config.model.heads.hidden_layers, 0),
        "model.heads.projection_dim": (config.model.heads.projection_dim, 1),
        "episodes.size": (episodes.size, 1),
        "episodes.count": (episodes.count, 1),
        "episodes.batch_size": (episodes.batch_size, 2),
        "episodes.micro_batch_size": (episodes.micro_batch_size or 2, 2),
        "episodes.warm_up": (episodes.warm_up, 0),
        "episodes.locked_image": (episodes.locked_image, 0),
        "prototypes.iterations": (prototypes.iterations, 1),
        "prototypes.restarts": (prototypes.restarts, 1),
        "loss.info_nce": (config.loss.info_nce, 0),
        "loss.prototypical": (config.loss.prototypical, 0),
        "loss.teacher": (config.loss.teacher, 0),
        "optim.locked_learning_rate": (config.optim.locked_learning_rate, 0),
        "optim.weight_decay": (config.optim.weight_decay, 0),
        "optim.heads_weight_decay": (config.optim.heads_weight_decay, 0),
        "optim.warm_up_steps": (config.optim.warm_up_steps, 0),
        "optim.locked_warm_up_steps": (config.optim.locked_warm_up_steps, 0),
        "run.save_steps": (config.run.save_steps, 0),
        "run.save_minutes": (config.run.save_minutes, 0),
        "run.keep_checkpoints": (config.run.keep_checkpoints, 1),
        "run.evaluate_every": (config.run.evaluate_every, 0),
    }
    for name, (value, least) in at_least.items():
        if value is not None and value < least:
            raise ValueError(f"{name}: {value} is too small; at least {least}")
    positive = {
        "prototypes.target_temperature": prototypes.target_temperature,
        **{
            f"{name}.target_temperature": teacher.target_temperature
            for name, teacher in [("teacher", config.teacher), *config.external_teachers.items()]
        },
        "optim.learning_rate": config.optim.learning_rate,
        "optim.image_scale": config.optim.image_scale,
        "optim.text_scale": config.optim.text_scale,
        "optim.heads_scale": config.optim.heads_scale,
        "data.cache_gb": config.data.cache_gb,
        "optim.eps": config.optim.eps,
        "optim.clip_norm": config.optim.clip_norm,
    }
    for name, rate in positive.items():
        if rate is not None and not rate > 0:
            hint = "; for hard targets set hard_targets = true" if "temperature" in name else ""
            raise ValueError(f"{name}: {rate} needs to be above 0{hint}")
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


def check_sources(data: DataConfig) -> None:
    """Reject mixtures that make no sense."""
    if data.sources and data.train != DataConfig().train:
        raise ValueError("data.sources: takes the place of data.train; leave one of them out")
    weights = [source.weight for source in data.sources]
    if any(weight is None for weight in weights) and any(weights):
        raise ValueError("data.sources: give every source a weight, or none")
    if any(weight is not None and not weight > 0 for weight in weights):
        raise ValueError(f"data.sources: weights {weights} need to be above 0")
    if data.shuffle_captions and data.read == "streaming":
        raise ValueError(
            "data.shuffle_captions: needs samples in any order; not data.read = streaming"
        )


def check_teachers(config: Config) -> None:
    """Reject several teachers that cannot be told apart, or that leave out what makes one."""
    if config.teachers and config.teacher.features is not None:
        raise ValueError("teachers: take the place of teacher; leave one of them out")
    names = [teacher.name for teacher in config.teachers]
    for name in [*names, config.teacher.name]:
        if name in ("image", "text") or "_from_" in name or names.count(name) > 1:
            raise ValueError(f"teachers: '{name}' is taken; give each teacher a name of its own")
    for teacher in config.teachers:
        if teacher.features is None:
            raise ValueError(f"teachers: '{teacher.name}' has no features; name their file")
        if teacher.weight < 0:
            raise ValueError(f"teachers: '{teacher.name}' has a weight below 0")


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
    if config.run.keep_best is not None and not config.run.evaluate_every:
        notes.append("run.keep_best: no effect without run.evaluate_every")
    if not config.uses_teacher and config.loss.teacher not in (0, default.loss.teacher):
        notes.append("loss.teacher: no effect without teacher.features")
    if not config.uses_prototypes and config.episodes.warm_up != default.episodes.warm_up:
        notes.append("episodes.warm_up: no effect, since no loss uses prototypes")
    if not config.uses_prototypes and config.optim.heads_scale != default.optim.heads_scale:
        notes.append("optim.heads_scale: no effect, since no loss uses prototypes")
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
