"""The folder of a run: what it holds of a run that was begun, and whether that may go on.

A run goes on with equal settings, data and arithmetic, or is refused with what differs. Nothing
here knows how a run trains.
"""

import platform
import re
import tomllib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w
import torch
from filelock import FileLock, Timeout

import protoclip
from protoclip.config import (
    HALVES,
    REMOVED,
    START,
    Config,
    LossConfig,
    RunConfig,
    build,
    shown,
)
from protoclip.data.pairs import Facts, difference
from protoclip.evaluation.paired import read_results
from protoclip.files import (
    SEAL,
    UNFINISHED,
    has_changed,
    read_json,
    read_toml,
    write_atomically,
)
from protoclip.models.checkpoint import (
    MODEL,
    SETTINGS,
    checkpoints,
    damage,
    facts_of,
    is_squashing,
    read_config,
    remove_unfinished,
)
from protoclip.models.start import Start, flatten_section, names_model
from protoclip.rules import require_place
from protoclip.terminal import say, without_secrets
from protoclip.training.checkpoint import newest_intact
from protoclip.training.defaults import CHOSEN
from protoclip.training.plan import Outline, Plan
from protoclip.training.presets import Command, fill

LOCK = ".lock"
# What is meant where it is unset.
UNSAID = {"loss.positives": "pair", "model.image.pooling": "avg", "teacher.distil": 0.0}
# Defaults of version 1.0, with which its runs go on.
FORMER: dict[str, Any] = {"prototypical": 1.0, "teacher": 2.0}
# Settings that some runs have no use for, at their defaults: those of a small text tower, which a
# text model has others than; of towers that are put together; and the one source beside several.
SMALL_TEXT = ("model.text.width", "model.text.heads", "model.text.layers")
PARTS = ("model.embed_dim", "model.image.name", *SMALL_TEXT)
IDLE = {name: flatten_section(Config())[name] for name in (*PARTS, "data.train")}
# Settings that may change when a run goes on; all others decide which samples a step sees, or what
# is learned of them. These say what is kept and shown, and change no bit of any batch or weight.
FREE = (
    *("run.name", "run.out", "run.sync", "run.log_every", "run.save_steps", "run.save_minutes"),
    *("run.keep_checkpoints", "run.keep_best", "run.loggers", "run.evaluate"),
    *("run.evaluate_every", "run.guard", "data.workers", "data.cache_gb"),
    *("data.max_bad_share", "align.features"),
)
# These change memory, time and rounding alone, so a run that lacks memory can go on with others.
ROUNDING = (
    *("run.device", "run.precision", "episodes.micro_batch_size", "parallel.strategy"),
    *("parallel.activation_checkpointing", "parallel.compile"),
)
# These say where data are, as `data.root` does. They may move, if what is there is the same.
MOVABLE = (
    *("data.train", "data.sources", "data.validation", "data.only", "data.without"),
    *("teacher.features", "teachers"),
)
PATHS = ("path", "root")  # of a source
NAMES = ("emoji", START, *HALVES.values())  # which are not moved: they say what the data are
# With `run.stop_by` these decide when the run ends.
STOPS = ("run.evaluate_every", "run.guard")


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What a folder holds of a run; nothing, if the run is new.

    Attributes:
        outline: That of the run that begins or goes on now. What its settings leave open is as the
            run in the folder began with.
        is_begun: Whether there is such a run.
        results: The content of its `results.json`, if it is finished.
    """

    outline: Outline
    is_begun: bool = False
    results: dict[str, Any] | None = None


def folder_of(config: Config) -> Path:
    name = config.run.name + " overfit" * (config.run.overfit is not None)
    return Path(config.run.out or f"runs/{slug(name)}-{config.run.seed}")


def look(outline: Outline, *, resume: bool) -> Begun:
    """What the folder of a run holds of it; writes nothing.

    Raises:
        ValueError: It exists, and there is no run to go on with; or as `check_settings`.
    """
    folder = folder_of(outline.config)
    is_begun = (folder / "config.toml").is_file()
    # A run that was killed at its very start leaves a lock, and what it had begun to write.
    empty = folder.is_dir() and all(
        path.name == LOCK or UNFINISHED.fullmatch(path.name) for path in folder.iterdir()
    )
    if folder.exists() and not (resume and (is_begun or empty)):
        way = ", or go on with --resume auto" if is_begun else ""
        raise ValueError(f"{folder}: run folder exists; choose another with --run.out{way}")
    if not is_begun:
        require_place("run.out", str(folder), is_folder=True)  # or hours of encoding are lost
        return Begun(outline=outline)
    path = folder / "results.json"
    config = as_begun(outline.config, folder)
    notes = check_settings(folder, to_toml(config), finished=path.is_file())
    if former := [
        f"loss.{name} stays {getattr(config.loss, name)}"
        for name in FORMER
        if getattr(config.loss, name) != getattr(outline.config.loss, name)
    ]:
        notes.append(f"{', '.join(former)}, the default when the run began")
    start = resized_as_begun(outline.start, folder)
    if start.squashes != outline.start.squashes:
        kept = "squashed" if start.squashes else "cropped"
        notes.append(f"{start.reference}: images stay {kept}, as they were when the run began")
    outline = replace(outline, config=config, start=start, notes=[*outline.notes, *notes])
    if not path.is_file():
        return Begun(outline=outline, is_begun=True)
    read_results(folder)  # or they are damaged
    results = read_json(path)
    if has_changed(results):  # people may edit it
        say(f"warning: {path}: not what the run wrote: its checksum differs")
    results = {key: value for key, value in results.items() if key != SEAL}
    return Begun(outline=outline, is_begun=True, results={**results, "folder": str(folder)})


def add_begun(command: Command, given: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The settings that are given, and below them what a run in this folder chose for others."""
    if not (CHOSEN[command] and (folder / SETTINGS).is_file()):
        return given
    saved, tree = read_settings(folder), dict(given)
    for name in sorted(saved.keys() & CHOSEN[command]):
        section, key = name.split(".")
        tree[section] = {key: saved[name], **tree.get(section, {})}
    return tree


def is_evaluated(folder: Path, asked: RunConfig) -> bool:
    """Whether a finished run was evaluated as it is asked for now, by these guards too."""
    was = read_config(folder).run
    guards = {*map(without_secrets, asked.guard)}
    return not asked.evaluate or (was.evaluate and guards <= {*was.guard})


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that a run began with, by dotted name.

    Raises:
        ValueError: `config.toml` is damaged.
    """
    path = folder / "config.toml"
    try:
        saved = flat(as_kept(read_toml(path)))
        for name in ("teachers", "data.sources"):
            tables = saved.get(name, [])
            if not (isinstance(tables, list) and all(isinstance(each, dict) for each in tables)):
                raise ValueError(f"{path}: damaged ({name} holds no tables)")
    except ValueError as error:
        raise ValueError(
            f"{error}; restore it from a copy, or choose another folder with --run.out"
        ) from error
    return saved


def pooled_as_begun(config: Config, folder: Path) -> Config:
    """The settings with the image tower's pooling as the run in a folder has it, if it is unset.

    Runs of versions up to 1.0.0 have the mean, which is no longer what follows from all weights.
    """
    model = config.model
    of_timm = model.projections_are_new and not names_model("image", model.image.name)
    if not (of_timm and model.image.pooling is None and (folder / "config.toml").is_file()):
        return config
    pooling = complete_saved(read_settings(folder))["model.image.pooling"]
    return replace(config, model=replace(model, image=replace(model.image, pooling=pooling)))


def resized_as_begun(start: Start, folder: Path) -> Start:
    """The start, with images squashed or cropped as by the newest checkpoint of the run in a
    folder, so that all that judges the run is measured alike.

    Runs of versions up to 1.0.0 crop them, whatever they started from.
    """
    for checkpoint in reversed(checkpoints(folder)):
        if damage(checkpoint, [MODEL]) is None:
            squashes = is_squashing(read_json(checkpoint / MODEL))
            return replace(start, resize_mode="squash" if squashes else "shortest")
    return start


def as_begun(config: Config, folder: Path) -> Config:
    """The settings with those that are open as the run in a folder began with.

    Raises:
        ValueError: `config.toml` is damaged.
    """
    saved = read_settings(folder)

    def begun(section: Any, prefix: str, *names: str) -> Any:
        """A section, with what is open as the run began with."""
        values = {n: saved[f"{prefix}.{n}"] for n in names if f"{prefix}.{n}" in saved}
        try:
            return fill(section, vars(build(type(section), values, f"{prefix}.")))
        except ValueError as error:
            raise ValueError(
                f"{folder / 'config.toml'}: damaged ({error}); restore it from a copy, or choose "
                "another folder with --run.out"
            ) from error

    model = config.model
    if model.projections_are_new:  # others have the sizes of their start
        image = begun(model.image, "model.image", "size")
        text = begun(model.text, "model.text", "context_length")
        model = replace(model, image=image, text=text)
    data = begun(config.data, "data", "augmentation")
    if data.read == "auto" and saved.get("data.read") == "streaming":
        data = replace(data, read="streaming")  # or align encodes all before other data are refused
    loss, before = config.loss, complete_saved(saved)
    for name, former in FORMER.items():
        if getattr(loss, name) == getattr(LossConfig(), name) and before[f"loss.{name}"] == former:
            loss = replace(loss, **{name: former})
    for number, each in enumerate(saved.get("teachers", [])):
        saved |= flat({"distil": 0.0, **each}, f"teachers.{number}.")
    if not config.teachers:
        saved.setdefault("teacher.distil", 0.0)  # as before it was open
    of_teacher = ("number", "tower", "distil")
    teachers = [
        begun(each, f"teachers.{number}", *of_teacher)
        for number, each in enumerate(config.teachers)
    ]
    return replace(
        config,
        model=model,
        data=data,
        loss=loss,
        episodes=begun(config.episodes, "episodes", "size", "count"),
        prototypes=begun(config.prototypes, "prototypes", "number", "source"),
        teacher=begun(config.teacher, "teacher", *of_teacher),
        teachers=teachers,
        optim=begun(config.optim, "optim", *vars(config.optim)),
    )


def check_settings(folder: Path, config: str, *, finished: bool = False) -> list[str]:
    """Refuse to go on with settings that would make another run; returns notes on the others.

    Raises:
        ValueError: `config.toml` is damaged, or a setting differs that may not; see `FREE`.
    """
    before = complete_saved(read_settings(folder))
    now = {**UNSAID, **IDLE, **flat(tomllib.loads(config))}
    differ = {
        key: f"{key} ({told(before, key)} before, {told(now, key)} now)"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }
    stops = STOPS if before.get("run.stop_by") or now.get("run.stop_by") else ()
    free = {*FREE, *ROUNDING} - {*stops}
    if not finished:  # of a finished run nobody opens the data to compare
        free |= {"data.root", "data.read"}  # shards of a store, copied to a disk, stay a stream
        free |= {
            key for key in MOVABLE if without_paths(before.get(key)) == without_paths(now.get(key))
        }
    few = before.get("run.overfit")
    if few is not None and few == now.get("run.overfit"):
        free |= {"episodes.size", "episodes.batch_size"}  # align may leave some of the pairs out
        # It decides these itself, as version 1.0 did for fine-tuning too.
        free |= {key for key in before | now if key.startswith("align.")}
    if refused := {key: text for key, text in differ.items() if key not in free}:
        moved = finished and refused.keys() <= {*MOVABLE, "data.root"}
        may_move = "data move until a run is finished, as this one is: " if moved else ""
        raise ValueError(
            f"{folder}: the run was started with other settings: {', '.join(refused.values())}; "
            f"{may_move}restore them, or choose another folder with --run.out"
        )
    rounding = {key: text for key, text in differ.items() if key in ROUNDING}
    if not rounding:
        return []
    parts = {"episodes.micro_batch_size", "parallel.strategy"} & rounding.keys()
    also = ", and of BatchNorm the statistics" if parts else ""
    return [f"going on with {', '.join(rounding.values())}: batches stay, rounding changes{also}"]


def complete_saved(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run began with, with those that version 1.0 did not have, and without
    those that are gone."""
    idle = {name: value for name, (_, value) in REMOVED.items()}
    teachers = [
        {"distil": 0.0}
        | {
            key: value
            for key, value in teacher.items()
            if (f"teacher.{key}", value) not in idle.items()
        }
        for teacher in saved.get("teachers", [])
    ]
    usual = flat(tomllib.loads(to_toml(Config())))
    settings = {**usual, **UNSAID, **saved, "teachers": teachers}
    for setting in ("run.wandb", "data.cache"):  # gone, and they changed no batch
        settings.pop(setting, None)
    return {key: value for key, value in settings.items() if (key, value) not in idle.items()}


@contextmanager
def claimed(folder: Path, *, resume: bool) -> Iterator[None]:
    """Hold a run's folder, which is made if need be, and remove what killed processes left.

    Raises:
        ValueError: Another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=resume)  # which `look` did not find
        lock = FileLock(folder / LOCK, timeout=0).acquire()
    except (FileExistsError, Timeout):
        raise ValueError(
            f"{folder}: another process writes here; wait for it, or choose another with --run.out"
        ) from None
    with lock:
        remove_unfinished(folder)
        yield


def enter(
    begun: Begun,
    plan: Plan,
    content: Mapping[str, Sequence[Facts]],
    *,
    arithmetic: Mapping[str, str],
    chosen: Mapping[str, str],
    notes: Sequence[str],
) -> Path | None:
    """Begin or go on in a run's folder, which is `claimed`; the checkpoint to go on from, if any.

    Arguments that are not told of here are those of `check_checkpoint`, which may refuse them.

    Args:
        notes: What to say of a run that is not trained yet.

    Raises:
        ValueError: No checkpoint is intact; or as `check_checkpoint`.
    """
    folder, is_trained = folder_of(plan.config), begun.results is not None
    said = [] if is_trained else [*notes]
    if not is_trained:
        (folder / MODEL).unlink(missing_ok=True)  # of an ending that was cut short
    checkpoint = newest_intact(folder, said) if begun.is_begun else None
    if checkpoint is not None:
        check_checkpoint(
            checkpoint,
            plan.config,
            arithmetic=arithmetic,
            chosen=chosen,
            content=content,
            name=plan.samples.name,
        )
    write_atomically(folder / "config.toml", to_toml(plan.config))
    for note in said:
        say(f"note: {note}")
    if is_trained:
        say(f"note: {folder}: is trained; only what follows training is done again")
    else:
        say(f"training on {plan.amount}")
    return checkpoint


def check_checkpoint(
    checkpoint: Path,
    config: Config,
    *,
    arithmetic: Mapping[str, str],
    chosen: Mapping[str, str],
    content: Mapping[str, Sequence[Facts]],
    name: str,
) -> None:
    """Refuse to go on from a checkpoint with other arithmetic or other data.

    Another device or precision would round differently, unless the settings name it. Other lists
    of sample ids, and other pairs, would mean that what judges the run may have been trained on.

    Args:
        arithmetic: Device and precision by setting.
        chosen: What identifies the lists of sample ids, by setting.
        content: What identifies the pairs, those to train on called `name`; of `list_contents`.
    """
    for setting, before in facts_of(checkpoint, "arithmetic").items():
        named = flat(asdict(config))[setting] != "auto"
        if not named and before != arithmetic.get(setting, before):
            raise ValueError(
                f"{setting}: this run was computed with {before}, and here it would be "
                f"{arithmetic[setting]}; go on on a machine like the first, or name it "
                f"(--{setting} {arithmetic[setting]}) to go on with other rounding"
            )
    lists = facts_of(checkpoint, "chosen")
    for setting, key in chosen.items():
        if lists.get(setting) != key:
            path = getattr(config.data, setting.removeprefix("data."))
            raise ValueError(
                f"{setting}: the ids in {path} have changed since the run began; restore them, "
                "or choose another folder with --run.out"
            )
    facts = facts_of(checkpoint, "content")  # of which earlier versions kept less
    encoded = [any("encoded" in each for each in of["sources"]) for of in (facts, content) if of]
    if encoded == [True, False]:  # train would move the halves
        raise ValueError(
            f"{checkpoint.parent.parent}: was begun by protoclip align; go on with that command, "
            "or choose another folder with --run.out"
        )
    judging = content.get("validation", [])
    if differs := difference(facts.get("sources") or content["sources"], content["sources"]):
        raise ValueError(
            f"{name}: not the data that the run began with ({differs}), so what judges "
            "it may have been trained on; restore them, or choose another folder with --run.out"
        )
    if differs := difference(facts.get("validation", judging), judging):
        raise ValueError(
            f"data.validation: not the pairs that judged the run before ({differs}); restore them, "
            "or choose another folder with --run.out"
        )
    for key, setting in (("teachers", "teacher.features"), ("start", "model.start")):
        frozen = content.get(key, [])
        if differs := difference(facts.get(key) or frozen, frozen):
            raise ValueError(
                f"{setting}: not what the run began with ({differs}); restore it, or choose "
                "another folder with --run.out"
            )


def environment(device: torch.device) -> dict[str, str]:
    """Hardware and versions, without which a number means little."""
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "protoclip": protoclip.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
    }


def without_paths(value: Any) -> Any:
    """A setting without the paths in it, since data may move; a share is no path."""
    if isinstance(value, list):  # sources, or teachers
        return [
            {
                key: without_paths(item) if key == "features" else item
                for key, item in each.items()
                if key not in PATHS
            }
            for each in value
        ]
    return "" if isinstance(value, str) and value not in NAMES else value


def told(settings: Mapping[str, Any], key: str) -> str:
    """A setting as a recipe holds it; texts without quotes."""
    value = settings.get(key, "unset")
    return value if isinstance(value, str) else shown(value)


def positives_of(settings: Mapping[str, Any]) -> str:
    """What equal pairs were to a run with these `flat` settings, in words."""
    positives = settings.get("loss.positives") or UNSAID["loss.positives"]
    return str(positives)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested settings by dotted name."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key
        values |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return values


def named_by(settings: Mapping[str, Any], many: str, key: str, one: str) -> list[str]:
    """What the tables `many` in flat settings name as `key`; where there are none, `one` does."""
    tables = settings.get(many)
    listed = [each for each in tables if isinstance(each, dict)] if isinstance(tables, list) else []
    names = [each.get(key) for each in listed] or [settings.get(one)]
    return [str(name) for name in names if name]


def slug(name: str) -> str:
    """A run's name as a folder name: `ProtoCLIP + teacher` is `protoclip-teacher`.

    Letters of all scripts stay.
    """
    return "-".join(re.findall(r"[\w.]+", unicodedata.normalize("NFC", name.lower()))) or "run"


def to_toml(config: Config) -> str:
    """The configuration as TOML, without what is unset or idle, `allow_links`, and secrets in URLs.

    A run that goes on reads the URLs that it is given then.
    """
    tree = asdict(config, dict_factory=lambda items: {k: v for k, v in items if v is not None})
    del tree["data"]["allow_links"]
    # A class is code, which a recipe cannot name.
    tree["run"]["loggers"] = [name for name in config.run.loggers if ":" not in name]
    return without_secrets(tomli_w.dumps(without_idle(tree)))


def without_idle(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings without those of `IDLE` that this run has no use for.

    A value that is no default stays: somebody gave it.
    """
    settings, idle = flat(tree), list[str]()
    if settings.get("model.start") is not None or settings.get("model.name") is not None:
        idle += PARTS
    elif settings.get("model.text.name") is not None:
        idle += SMALL_TEXT
    if settings.get("data.sources"):
        idle.append("data.train")

    def kept(branch: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        values = {}
        for key, value in branch.items():
            name = prefix + key
            inner = kept(value, f"{name}.") if isinstance(value, dict) else value
            if inner != {} and not (name in idle and inner == IDLE[name]):
                values[key] = inner
        return values

    return kept(tree, "")


def as_kept(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run folder, without secrets in URLs and what is idle, which earlier versions
    wrote."""
    return tomllib.loads(without_secrets(tomli_w.dumps(without_idle(tree))))
