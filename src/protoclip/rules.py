"""What is refused of settings before anything slow is imported, and what has no effect.

These are values that do not go together, and typos in paths. The limits of single settings are in
`config.py`. Standard library only.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

from protoclip.config import (
    HALVES,
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
from protoclip.files import kind_of

TRAIN_OR_SOURCES = "data.sources: takes the place of data.train; leave one of them out"
SIZES = ("width", "heads", "layers")  # of small text towers
OF_GROUPS = ("whiten", "number")  # of teachers
# What names something else than a local file or folder, as the beginning of a reference.
DATA_KINDS = ("pipe:", "hf:", "wds:", "torchvision:", "karpathy:")
MODEL_KINDS = ("open_clip:", "hf:", "local-dir:", "reference:", "timm:")
# What may stand behind a data set that judges a model, as in `pairs.tsv,root=images`.
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
    "half": "no such run folder; other halves are written minilm, hf:NAME_OR_FOLDER, "
    "timm:MODEL or open_clip:MODEL/TAG",
}


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
        rows = [
            *((setting, no_loss, "loss.teacher is 0") for setting in OF_GROUPS),
            ("tower", teacher.distil == 0, f"{teacher.name}.distil is 0"),
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


def require_paths(config: Config) -> None:
    """Refuse local paths in the settings of a run that do not exist.

    Raises:
        ValueError: Names the setting, and a file or folder of nearly that name if there is one.
    """
    require_data_paths(config.data)
    require_model("model.start", config.model.start)
    for teacher in (config.teacher, *config.teachers):
        features = teacher.features
        if features is not None and features not in ("emoji", START, *HALVES.values()):
            require_path("teacher.features", features, "no such file")
    for guard in config.run.guard:
        require_data_set("run.guard", guard)


def require_data_paths(data: DataConfig) -> None:
    """As `require_paths`, for the section `data`."""
    if not data.sources:
        require_source("data.train", data.train)
    for number, source in enumerate(data.sources):
        require_source(f"data.sources[{number}].path", source.path)
        require_folder(f"data.sources[{number}].root", source.root)
    if isinstance(data.validation, str):
        require_source("data.validation", data.validation)
    require_folder("data.root", data.root)
    require_file("data.only", data.only)
    require_file("data.without", data.without)


def is_no_path(reference: str) -> bool:
    """Whether data are named otherwise than by a path, whatever files there are."""
    return reference == "emoji" or reference.startswith(DATA_KINDS)


def require_source(setting: str, path: str) -> None:
    """Refuse a source of data that is a local path, without a pattern, and does not exist."""
    is_pattern = any(sign in path for sign in "*{?[")
    if not is_no_path(path) and not is_pattern:
        require_path(setting, path, "no such file")


def require_data_set(setting: str, reference: str) -> None:
    """As `require_source`, for what may also be the name of a data set, with options behind it.

    A word that is no path passes: its reader says where such a data set is to be had.
    """
    reference, options = with_options(reference, setting)
    require_folder(f"{setting}: root", options.get("root"))
    is_pattern = any(sign in reference for sign in "*{?[")
    is_word = re.fullmatch(r"[\w-]+", reference) and not suggestion(reference)
    if not (is_no_path(reference) or is_pattern or is_word):
        what = f"no such file, and no reference to a data set ({DATA_HINT})"
        require_path(setting, reference, what)


def with_options(reference: str, setting: str = "") -> tuple[str, dict[str, str]]:
    """A data set that judges a model, and the options behind it, by name.

    Raises:
        ValueError: There is no such option, or it has no value.
    """
    name, *options = re.split(r",(?=\w+=)", reference)
    if name in DATA_KINDS:
        what = {"wds:": "FOLDER_OR_URL", "hf:": "OWNER/NAME", "karpathy:": "FILE.json"}
        raise ValueError(
            f"{f'{setting}: ' * bool(setting)}'{reference}' is not complete; give "
            f"{name}{what.get(name, 'NAME')}"
        )
    known = [option for option in options if option.partition("=")[0] in DATA_OPTIONS]
    others = [option for option in options if option not in known]
    # Names on the hub have options of their own, and a file may be called as if it had some.
    start = f"{setting}: " if setting else ""
    if (options and not name) or any(option.endswith("=") for option in known):
        raise ValueError(f"{start}'{reference}' is not complete; give REF,class_column=NAME")
    name = ",".join([name, *others])
    is_free = re.match(r"hf:|.*(://|[*{?[])", name)
    path = re.sub(r"^(wds|karpathy):", "", name)
    if others and not is_free and not os.path.exists(path):  # noqa: PTH110 (Path raises)
        raise ValueError(
            f"{start}'{reference}': no option '{others[0].partition('=')[0]}' and no such file; "
            f"behind a data set may stand {', '.join(COLUMN_OPTIONS)} (,class_column=NAME) and "
            ",root=FOLDER"
        )
    return name, dict(option.split("=", 1) for option in known)


def require_model(setting: str, reference: str | None, kind: str = "model") -> None:
    """Refuse a model, or what else a kind of `INSTEAD` is, that is a local path and not there."""
    if reference is None or reference.startswith(MODEL_KINDS):
        return
    if kind == "model" or reference != "minilm":
        require_path(setting, reference, INSTEAD[kind])


def require_file(setting: str, path: str | None) -> None:
    """Refuse a file or folder that does not exist, a URL, and a pipe or device."""
    if path is not None:
        require_path(setting, path, "no such file")
        if "://" in path:
            raise ValueError(f"{setting}: {path}: is not read from a URL; copy it here first")


def require_folder(setting: str, path: str | None) -> None:
    """Refuse a folder that does not exist, or is none."""
    if path is not None:
        require_path(setting, path, "no such folder")
        if "://" not in path and not Path(path).is_dir():
            raise ValueError(f"{setting}: {path}: is a file, not a folder; name a folder")


def require_path(setting: str, path: str, what: str) -> None:
    """Refuse a local path that does not exist, as `what`, and a pipe or device."""
    start = f"{setting}: {path}" if setting else path
    if not path.strip():
        raise ValueError(f"{setting or 'an argument'}: is empty; name a file or folder")
    if "://" in path:
        return
    if "\0" in path:
        raise ValueError(f"{start}: a path holds no zero byte; leave it out")
    try:
        kind = kind_of(Path(path).expanduser().stat())
    except FileNotFoundError:
        if Path(path).is_symlink():
            what, path = f"is a link to {Path(path).readlink()}, which is not there", ""
        raise ValueError(f"{start}: {what}{suggestion(path)}") from None
    except NotADirectoryError:
        above = next(folder for folder in Path(path).parents if folder.exists())
        raise ValueError(f"{start}: {what}; {above} is a file, not a folder") from None
    # RuntimeError: of a user without a home. UnicodeError: no file has half of a character.
    except (OSError, RuntimeError, UnicodeError) as error:
        error = getattr(error, "strerror", None) or error
        raise ValueError(f"{start}: cannot be opened ({error}); check the path") from None
    if kind not in ("a file", "a folder"):  # may block, or have no end
        raise ValueError(f"{start}: is {kind}, not a file; name a file that can be read again")


def require_empty(setting: str, folder: Path) -> None:
    """Refuse a folder that holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is not empty; choose a new folder with {setting}")


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
    if target.is_symlink() and not target.exists():
        raise ValueError(f"{start}: is a link that leads nowhere; choose another place")
    if target.is_dir() and not is_folder:
        raise ValueError(f"{start}: is a folder; name a file in it")
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise ValueError(f"{start}: is a device or a pipe; choose another place")
    if not path.lower().endswith(suffix):
        raise ValueError(f"{start}: needs a name that ends in {suffix}")
    above = target if is_folder else target.parent
    above = next(folder for folder in (above, *above.parents) if folder.exists())
    if not above.is_dir():
        what = "" if above == target else f"{above} "
        raise ValueError(f"{start}: {what}is a file, not a folder; choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(
            f"{start}: {above} may not be written to; check its permissions, or choose another "
            "place"
        )


def require_store(setting: str, path: str) -> None:
    """Refuse a path that is no folder, and where none can be made.

    One that may not be written to will do, if it holds all that is asked for.
    """
    if not path.strip() or not Path(path).is_dir():
        require_place(setting, path, is_folder=True)


def suggestion(path: str) -> str:
    """What to say about a name close to that of a path which does not exist; or nothing."""
    with suppress(OSError, ValueError):
        missing = Path(path)
        while not missing.parent.exists():  # a folder above may be the one that is misspelt
            missing = missing.parent
        names = [each.name for each in islice(missing.parent.iterdir(), 10_000)]
        names = [each for each in names if each.isascii() and each.isprintable()]
        for close in difflib.get_close_matches(missing.name, names, n=1):
            near = missing.with_name(close) / Path(path).relative_to(missing)
            return f"; did you mean {near}?" if near.exists() else ""
    return ""
