"""What is refused of settings before anything slow is imported, and what has no effect.

These are values that do not go together, and typos in paths. The limits of single settings are in
`config.py`. Standard library only.
"""

import difflib
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

from protoclip.config import LOGGERS, NO_PATHS, START, UNSET, Config, DataConfig, EpisodeConfig

SIZES = ("width", "heads", "layers")  # of small text towers
# What names something else than a local file or folder, as the beginning of a reference.
DATA_KINDS = ("pipe:", "hf:", "wds:", "torchvision:", "karpathy:")
MODEL_KINDS = ("open_clip:", "hf:", "local-dir:", "reference:", "timm:")
# What may stand behind a data set that evaluates a model, as in `pairs.tsv,root=images`.
COLUMN_OPTIONS = ("image_column", "caption_column", "id_column", "class_column")
DATA_OPTIONS = (*COLUMN_OPTIONS, "root")
DATA_HINT = "emoji, a table or folder of pairs, tar shards, hf:OWNER/NAME, a folder of classes, "
DATA_HINT += "wds:FOLDER_OR_URL, torchvision:NAME, karpathy:FILE.json"
MODEL_HINT = "other models are written open_clip:NAME[/TAG], hf:NAME_OR_FOLDER, "
MODEL_HINT += "local-dir:FOLDER or reference:FILE,model=NAME"
# What to say of a path that is not there, by what it is to be.
INSTEAD = {
    "model": f"no such run or checkpoint folder; {MODEL_HINT}",
    "teacher": "no such run folder or file of features; other teachers are written minilm, "
    "hf:NAME_OR_FOLDER, open_clip:MODEL/TAG or timm:MODEL",
    "encoder": "no such run folder; other encoders are written minilm, hf:NAME_OR_FOLDER, "
    "timm:MODEL or open_clip:MODEL/TAG",
}


# Values that do not go together


def check(config: Config, *, is_whole: bool = True) -> list[str]:
    """Refuse wrong values and combinations; return notes on settings without effect.

    Unless it `is_whole`, what is unset will be chosen, so sizes and weights pass.
    """
    if is_whole:
        check_sizes(config.episodes)
    run, data, model, loss = config.run, config.data, config.model, config.loss
    text, lora, parallel = model.text, model.lora is not None, config.parallel
    emoji_share = data.is_emoji and isinstance(data.validation, float)
    unheld = run.evaluate_every and data.validation == 0 and not run.guard
    choice = "run.keep_best" if run.keep_best is not None else "run.stop_by"
    chooses = run.keep_best is not None or run.stop_by is not None
    loggers = [name for name in run.loggers if name not in LOGGERS and not all(name.partition(":"))]
    encoder = "model.image.weights" if model.image.weights is not None else "model.text.name"
    encoded = model.image.weights is not None or text.name is not None
    both_locked = {*model.locked} == {"image", "text"} and not model.projections_are_new
    keeps = "loss.keep" if loss.keep else f"teacher.features = {START}"
    both_sources = data.sources and data.train != DataConfig().train
    weights = {source.weight is None for source in data.sources}
    clash = data.several_captions and loss.positives == "pair" and loss.info_nce
    both_teachers = config.teachers and config.teacher.features is not None
    names = [teacher.name for teacher in config.teachers]
    taken = [name for name in names if names.count(name) > 1]
    taken += [n for n in (*names, config.teacher.name) if n in ("image", "text") or "_from_" in n]
    bare = [teacher.name for teacher in config.teachers if teacher.features is None]
    # The message of each combination that is refused, and whether it is there.
    mistakes: dict[str, object] = {
        f"model.text.heads: {text.heads} does not divide model.text.width": text.width % text.heads,
        "data.validation: the emoji have held-out splits; leave it out": emoji_share,
        "run.evaluate_every: no pairs are held out; set it to 0, or name a run.guard": unheld,
        f"{choice}: needs run.evaluate_every; set it, or leave this out": chooses
        and not run.evaluate_every,
        f"run.loggers: {loggers} are none of {', '.join(LOGGERS)}, and no module:Class": loggers,
        "model.pretrained: needs model.name, the open_clip model they are for": model.pretrained
        and not model.name,
        f"{encoder}: does not go with model.name; leave one of them out": encoded and model.name,
        "model.locked: with both towers locked nothing is left to train": both_locked,
        "model.lora: needs parallel.strategy = ddp": lora and parallel.strategy == "fsdp",
        "model.lora: does not go with parallel.compile": lora and parallel.compile,
        f"{keeps}: needs model.start, the model to keep to; set it": config.uses_start
        and not model.has_start,
        "data.sources: takes the place of data.train; leave one of them out": both_sources,
        "data.sources: give every source a weight, or none": len(weights) > 1,
        "data.images: joins data.texts; give both, or neither": (data.images is None)
        != (data.texts is None),
        "loss.positives: pair takes an image's other captions for negatives; choose shared": clash,
        "teachers: take the place of teacher; leave one of them out": both_teachers,
        f"teachers: {taken} cannot be their names; give each teacher one of its own": taken,
        f"teachers: {bare} have no features; name their files": bare,
    }
    episodes, locked = config.episodes, config.locked_episodes
    size, count, stages = episodes.size, episodes.count, episodes.warm_up + locked
    always, distils = loss.info_nce or loss.keep, bool(config.distilled_teachers)
    needs_loss = locked if distils else stages
    mistakes_of_whole = {
        **{
            f"{name}.number: {number} needs to be between 2 and episodes.size ({size})": size
            and number
            and not 2 <= number <= size
            for name, number in config.prototype_numbers.items()
        },
        f"episodes.count: {count} is less than episodes.warm_up + episodes.locked_image "
        f"({stages}); raise it above that, or lower these": count and stages > count,
        "loss: all weights are 0, so there is nothing to train; raise one": not always
        and not config.uses_prototypes
        and not distils,
        "loss.info_nce: 0 leaves the warm-up and locked-image stages without a loss; raise it, "
        "or set episodes.warm_up and episodes.locked_image to 0": not always and needs_loss,
    }
    for message, is_wrong in (mistakes | mistakes_of_whole if is_whole else mistakes).items():
        if is_wrong:
            raise ValueError(message)
    return without_effect(config)


def check_sizes(episodes: EpisodeConfig) -> None:
    """Refuse an episode that is not a multiple of the batch."""
    size, batch_size = episodes.size, episodes.batch_size
    if size and size % batch_size:
        nearest = max(size - size % batch_size, batch_size)
        raise ValueError(
            f"episodes.size: {size} is no multiple of episodes.batch_size ({batch_size}); "
            f"try {nearest}"
        )


def require_named_pairs(given: Mapping[str, Any], work: str) -> None:
    """Refuse settings, as a recipe holds them, that name no pairs for this work; not the emoji."""
    data = given.get("data", {})
    if not (data.get("train") or data.get("sources")):
        raise ValueError(
            f"data.train: {work} needs your own pairs; name them, such as --data.train pairs.tsv "
            "(emoji are the bundled ones), or go on with a run by --resume auto"
        )


# What has no effect


def without_effect(config: Config) -> list[str]:
    """One note for each setting that differs from its default and changes nothing in this run."""
    data, loss, model, teacher = config.data, config.loss, config.model, config.teacher
    clip = (not config.uses_prototypes, "no loss uses prototypes")
    in_workers = data.cache_gb > 0 and data.workers not in (0, "auto")
    no_features = loss.teacher > 0 and not config.grouping_teachers
    no_teacher = not (loss.teacher or teacher.distil)
    no_instance = (loss.info_nce == 0, "loss.info_nce is 0")
    image_locked = "image" in model.locked and not model.projections_are_new
    named = (model.name is not None, f"model.name is {model.name}")
    text_named = (model.text.name is not None, f"model.text.name is {model.text.name}")
    # Whether a setting has no effect here, and why; of several rows the first that holds counts.
    causes: list[tuple[str, object, str]] = [
        ("data.cache_gb", in_workers, "worker processes keep no images in memory"),
        ("model.heads.*", *clip),
        ("prototypes.*", clip[0], "loss.prototypical is 0"),
        ("prototypes.back_translation", loss.prototypical == 0 < loss.teacher, "teachers need it"),
        ("episodes.warm_up", *clip),
        ("teacher.*", not (teacher.features or config.teachers), "teacher.features is not set"),
        ("teacher.features", no_teacher, "loss.teacher is 0"),
        ("loss.teacher", no_features, "no teacher has features"),
        ("loss.strengths", *clip),
        ("loss.strengths", *no_instance),
        ("loss.instance", *no_instance),
        ("loss.positives", *no_instance),
        ("optim.image_lr_scale", image_locked, "the image tower is locked"),
        ("model.embed_dim", *named),
        ("model.image.name", *named),
        *((f"model.text.{size}", *named) for size in SIZES),
        *((f"model.text.{size}", *text_named) for size in SIZES),
    ]
    usual, reasons = Config(), dict[str, str]()
    for setting, is_idle, why in causes if config.run.overfit is None else ():
        path = setting.removesuffix(".*")
        value, default = attrgetter(path)(config), attrgetter(path)(usual)
        if is_dataclass(default):  # a plan fills those that are unset
            names = [name for name, unset in vars(default).items() if unset is not UNSET]
            value, default = ([getattr(x, name) for name in names] for x in (value, default))
        if is_idle and value != default:
            reasons.setdefault(setting, why)
    notes = [f"{setting}: no effect, since {why}" for setting, why in reasons.items()]
    episodes, locked = config.episodes, config.locked_episodes
    if locked < episodes.locked_image:
        notes.append("episodes.locked_image = 0, since model.locked keeps the text tower too")
    if config.uses_prototypes and episodes.warm_up + locked == episodes.count:
        notes.append(
            f"no episode uses prototypes, since episodes.count is {episodes.count}, which "
            "episodes.warm_up and episodes.locked_image take; raise it, or lower these"
        )
    return notes


# Paths


def require_paths(config: Config) -> None:
    """Refuse local paths in the settings of a run that do not exist, with the nearest that does."""
    require_data_paths(config.data)
    require_model("model.start", config.model.start)
    for teacher in (config.teacher, *config.teachers):
        if teacher.features not in NO_PATHS:
            require_model("teacher.features", teacher.features, "teacher")
    for guard in config.run.guard:
        require_data_set("run.guard", guard)


def require_data_paths(data: DataConfig) -> None:
    """As `require_paths`, for the section `data`."""
    if not data.sources:
        require_source("data.train", data.train)
    for number, source in enumerate(data.sources):
        require_source(f"data.sources[{number}].path", source.path)
        require_path(f"data.sources[{number}].root", source.root, is_folder=True)
    if isinstance(data.validation, str):
        require_source("data.validation", data.validation)
    if data.images is not None:
        require_source("data.images", data.images)
    require_path("data.texts", data.texts)
    require_path("data.root", data.root, is_folder=True)
    require_path("data.only", data.only)
    require_path("data.without", data.without)


def require_source(setting: str, path: str, what: str = "no such file") -> None:
    """Refuse a source of data that is a local path, without a pattern, and does not exist."""
    is_pattern = any(sign in path for sign in "*{?[")
    if path != "emoji" and not path.startswith(DATA_KINDS) and not is_pattern:
        require_path(setting, path, what)


def require_data_set(setting: str, reference: str, more: str = "") -> None:
    """As `require_source`, of what may have options, or be a word, which its reader explains."""
    reference, options = with_options(reference)
    require_path(f"{setting}: root", options.get("root"), is_folder=True)
    if not re.fullmatch(r"[\w-]+", reference) or suggestion(reference):
        what = f"no such file, and no reference to a data set ({more}{DATA_HINT})"
        require_source(setting, reference, what)


def with_options(reference: str) -> tuple[str, dict[str, Any]]:
    """A data set that evaluates a model, and the options behind it, by name.

    Captions may have several columns. Other words behind it are its own, as of names on the hub.
    """
    name, *options = re.split(r",(?=\w+=)", reference)
    own = [option for option in options if option.partition("=")[0] in DATA_OPTIONS]
    name = ",".join([name, *(option for option in options if option not in own)])
    values = [option.split("=", 1) for option in own]
    columns = [value for option, value in values if option == "caption_column"]
    return name, dict(values) | ({"caption_column": columns} if len(columns) > 1 else {})


def require_model(setting: str, reference: str | None, kind: str = "model") -> None:
    """Refuse a model, or what else a kind of `INSTEAD` is, that is a local path and not there."""
    if reference is None or reference.startswith(MODEL_KINDS):
        return
    if kind == "model" or reference != "minilm":
        require_path(setting, reference, INSTEAD[kind])


def is_teacher_model(features: str | None) -> bool:
    """Whether `teacher.features` names a model, which is to encode the pairs."""
    return features is not None and (features == "minilm" or features.startswith(MODEL_KINDS))


def require_path(
    setting: str, path: str | None, what: str = "no such file", *, is_folder: bool = False
) -> None:
    """Refuse a local path that does not exist, as `what`, and a pipe or device; None passes."""
    if path is None or "://" in path:
        return
    start = f"{setting}: {path}" if setting else path
    if not path.strip():
        raise ValueError(f"{setting or 'an argument'}: is empty; name a file or folder")
    try:
        mode = Path(path).expanduser().stat().st_mode
    except FileNotFoundError:
        what = "no such folder" if is_folder else what
        raise ValueError(f"{start}: {what}{suggestion(path)}") from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{start}: cannot be opened ({reason}); check the path") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # may block, or have no end
        raise ValueError(f"{start}: is a pipe or device; name a file that can be read again")
    if is_folder and not stat.S_ISDIR(mode):
        raise ValueError(f"{start}: is a file, not a folder; name a folder")


def require_new(setting: str, path: str) -> None:
    """Refuse a file that exists, and a folder that holds something."""
    target = Path(path)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{setting}: {path}: exists; choose another name")


def require_place(setting: str, path: str, *, is_folder: bool, suffix: str = "") -> None:
    """Refuse a path where no file, or with `is_folder` no folder, can be written.

    A file needs the suffix, so that a wrong name does not replace something else. Whether a folder
    may already hold something is for others to say.
    """
    if not path.strip():
        raise ValueError(f"{setting}: is empty; name a {'folder' if is_folder else 'file'}")
    target, start = Path(path), f"{setting}: {path}"
    if "://" in path:
        raise ValueError(f"{start}: is a URL; name a place on a disk")
    if target.is_dir() and not is_folder:
        raise ValueError(f"{start}: is a folder; name a file in it")
    if not path.lower().endswith(suffix):
        raise ValueError(f"{start}: needs a name that ends in {suffix}")
    above = target if is_folder else target.parent
    above = next(folder for folder in (above, *above.parents) if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{start}: {above} is a file, not a folder; choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(
            f"{start}: {above} may not be written to; check its permissions, or choose another "
            "place"
        )


def suggestion(path: str) -> str:
    """What to say about a name close to that of a path which does not exist; or nothing."""
    missing = Path(path)
    with suppress(OSError, ValueError):
        names = [entry.name for entry in islice(missing.parent.iterdir(), 10_000)]
        for close in difflib.get_close_matches(missing.name, names, n=1):
            return f"; did you mean {missing.with_name(close)}?"
    return ""
