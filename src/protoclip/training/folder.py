"""The folder of a run: who holds it, whether a run may go on there, and its checkpoints.

A run goes on with equal settings, data and arithmetic, or is refused with what differs.
"""

import json
import math
import re
import shutil
import time
import tomllib
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import fsspec
import tomli_w
from fsspec.implementations.dirfs import DirFileSystem
from torch import Tensor

from protoclip.config import CHOSEN, NO_PATHS, Config, LossConfig, TeacherConfig, flatten, shown
from protoclip.data import access
from protoclip.data.pairs import describe_change
from protoclip.distributed.collectives import raise_on_all_ranks, rank
from protoclip.distributed.parallel import are_parts
from protoclip.evaluation.paired import read_results
from protoclip.files import SEAL, lock_path, read_json, read_local, replacing
from protoclip.models import checkpoint
from protoclip.models.checkpoint import (
    CHECKSUMS,
    MODEL,
    SETTINGS,
    STATE,
    checkpoints,
    damage,
    facts_of,
    is_aligned,
    read_section,
)
from protoclip.models.start import Start, names_model
from protoclip.rules import require_place
from protoclip.terminal import say, without_secrets
from protoclip.training.plan import Outline, Plan
from protoclip.training.presets import Command, Section, fill

RESULTS = "results.json"
# Where copies may be: where data come from, Azure, and a folder that is mounted. Protocols that
# read what a URL brings along are left out, since a recipe may come from a stranger.
PLACES = (*access.STORES, "az", "abfs", "file")
Store = Any  # an fsspec file system, whose paths are names relative to the folder there
ANSWER_SECONDS = 60.0  # that a store may take to answer before a run begins
# Seconds that the end of a run waits for its last copy: after a signal, and after the results.
STOPPED_SECONDS, END_SECONDS = 60.0, 1800.0
PROBE = ".protoclip"
DONE = (MODEL, RESULTS)  # files that say that a run is done
LEFT_OUT = ("checkpoints", "wandb", "start_features")  # copied apart, elsewhere, made anew
RUN_ID = "wandb/run-id"  # with it Weights & Biases goes on with the run's curves
MARKER = re.compile(rf"checkpoints/(step-\d+)/{re.escape(CHECKSUMS)}", re.ASCII)
# What is meant where it is unset.
UNSAID = {"loss.positives": "pair", "model.image.pooling": "avg", "teacher.distil": 0.0}
# Defaults of version 1.0, with which its runs go on.
FORMER: dict[str, Any] = {"prototypical": 1.0, "teacher": 2.0}
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
    *("parallel.activation_checkpointing", "parallel.compile", "encode.engine"),
)
# These say where data are, as `data.root` does. They may move, if what is there is the same.
MOVABLE = (
    *("data.train", "data.sources", "data.validation", "data.only", "data.without"),
    *("teacher.features", "teachers"),
)
PATHS = ("path", "root")  # of a source
# With `run.stop_by` these decide when the run ends.
STOPS = ("run.evaluate_every", "run.guard")
WAY_OUT = "choose another folder with --run.out"
# At the end of an episode a checkpoint is due if the last one is older than this many seconds, and
# than this many times as long as writing it took, so that short episodes do not only save.
EPISODE_PAUSE, EPISODE_FACTOR = 15.0, 100.0
# Seconds before another attempt to save: in training, and at the end of a run.
RETRY_AFTER, LAST_RETRIES = 60.0, (5.0, 10.0, 15.0, 30.0)


def name_folder(config: Config) -> Path:
    name = config.run.name + " overfit" * (config.run.overfit is not None)
    return Path(config.run.out or f"runs/{slugify(name)}-{config.run.seed}")


def slugify(name: str) -> str:
    """A run's name as a folder name: `ProtoCLIP + teacher` is `protoclip-teacher`."""
    return "-".join(re.findall(r"[\w.]+", unicodedata.normalize("NFC", name.lower()))) or "run"


@contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Hold a run's folder, which may be new; raises `ValueError` if another process does."""
    with lock_path(folder, way_out=WAY_OUT):
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_unfinished(folder)
        yield


def inspect_folder(outline: Outline, *, resume: bool) -> tuple[Outline, dict[str, Any] | None]:
    """The outline as the run in its folder began, and the results of that run if it is finished.

    Writes nothing. Refuses a folder without a run to go on with, and as `check_settings`.
    """
    folder = name_folder(outline.config)
    begun = read_begun(folder)
    # A run that was killed at its very start leaves what it had begun to write, which is hidden.
    is_empty = folder.is_dir() and all(path.name[0] == "." for path in folder.iterdir())
    if folder.exists() and not (resume and (begun or is_empty)):
        way = ", or go on with --resume auto" if begun else ""
        raise ValueError(f"{folder}: folder exists; choose another --run.name or --run.out{way}")
    if begun is None:
        require_place("run.out", str(folder), is_folder=True)  # or hours of encoding are lost
        return outline, None
    path = folder / RESULTS
    config = keep_begun(outline.config, begun)
    notes = check_settings(
        str(folder), list_settings(begun), list_settings(config), finished=path.is_file()
    )
    if former := [
        f"loss.{name} stays {getattr(config.loss, name)}"
        for name in FORMER
        if getattr(config.loss, name) != getattr(outline.config.loss, name)
    ]:
        notes.append(f"{', '.join(former)}, the default when the run began")
    start = keep_resizing(outline.start, folder)
    if start.squashes != outline.start.squashes:
        how = "squashed" if start.squashes else "cropped"
        notes.append(f"{start.reference}: images stay {how}, as they were when the run began")
    notes, joint = [*outline.notes, *notes], keep_joint_space(folder)
    outline = replace(outline, config=config, start=start, notes=notes, joint=joint)
    if not path.is_file():
        return outline, None
    results = {key: value for key, value in read_results(folder).facts.items() if key != SEAL}
    return outline, {**results, "folder": str(folder)}


# Settings: what a run began with, and what may change when it goes on


def read_begun(folder: Path) -> Config | None:
    """The settings of the run in a folder, if there is one; raises as `parse_begun`."""
    path = folder / SETTINGS
    return parse_begun(read_local(path), str(path)) if path.is_file() else None


def parse_begun(text: str, source: str) -> Config:
    """The settings that a run began with, from the text of its `config.toml`."""
    try:
        tree = tomllib.loads(text)
        for section, setting in (("run", "wandb"), ("data", "cache")):  # they changed no batch
            tree.get(section, {}).pop(setting, None)
        return Config.from_dict(tree)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source}: damaged ({error}); restore it from a copy, or {WAY_OUT}"
        ) from error


def keep_chosen(command: Command, given: Mapping[str, Any], begun: Config) -> Mapping[str, Any]:
    """The settings that are given, and below them what the command chose when the run began, and
    how the image tower pools: up to 1.0.0 by the mean."""
    settings, tree = flatten(tomllib.loads(to_toml(begun))), dict(given)
    for name in sorted(settings.keys() & CHOSEN[command]):
        section, key = name.split(".")
        tree[section] = {key: settings[name], **tree.get(section, {})}
    model, image = tree.get("model", {}), begun.model.image
    if begun.model.projections_are_new and not names_model("image", image.name):
        pooling = {"pooling": image.pooling or "avg", **model.get("image", {})}
        tree["model"] = {**model, "image": pooling}
    return tree


def keep_resizing(start: Start, folder: Path) -> Start:
    """The start, with images squashed or cropped, and scaled, as by the newest checkpoint."""
    for path in reversed(checkpoints(folder)):
        if damage(path, [MODEL]) is None:
            content = read_json(path / MODEL)
            squashes, ranges = content.get("resize_mode") == "squash", content.get("ranges", ())
            return replace(start, squashes=squashes, ranges=ranges)
    return start


def keep_joint_space(folder: Path) -> dict[str, Tensor] | None:
    """The maps of two teachers into one space, as by the newest checkpoint: empty where the run
    began without them, such as by version 1.0. None without a checkpoint: the run begins anew."""
    for path in reversed(checkpoints(folder)):
        with suppress(ValueError):
            return read_section(path, "joint")
    return None


def keep_begun(config: Config, begun: Config) -> Config:
    """The settings, with those that they leave open as a run began with."""

    def keep(section: Section, before: Section, *names: str) -> Section:
        return fill(section, {name: getattr(before, name) for name in names})

    model, data, loss, teachers = config.model, config.data, config.loss, config.teachers
    if model.projections_are_new:  # others have the sizes of their start
        image = keep(model.image, begun.model.image, "size", "joined_layers")
        text = keep(model.text, begun.model.text, "context_length", "joined_layers")
        model = replace(model, image=image, text=text)
    data = keep(data, begun.data, "augmentation", "validation")
    if begun.data.read == "streaming":  # or align encodes all before other data are refused
        data = keep(data, begun.data, "read")
    for name, former in FORMER.items():
        if getattr(loss, name) == getattr(LossConfig(), name) and (
            getattr(begun.loss, name) == former
        ):
            loss = replace(loss, **{name: former})

    def keep_teacher(teacher: TeacherConfig, before: TeacherConfig, distil: Any) -> TeacherConfig:
        return fill(keep(teacher, before, "number", "tower", "distil"), {"distil": distil})

    if len(teachers) == len(begun.teachers):
        pairs = zip(teachers, begun.teachers, strict=True)
        teachers = [keep_teacher(now, before, 0.0) for now, before in pairs]
    return replace(
        config,
        model=model,
        data=data,
        loss=loss,
        episodes=keep(config.episodes, begun.episodes, "size", "count"),
        prototypes=keep(config.prototypes, begun.prototypes, "number", "source"),
        teacher=keep_teacher(config.teacher, begun.teacher, None if teachers else 0.0),
        teachers=teachers,
        optim=fill(config.optim, vars(begun.optim)),
    )


def check_settings(
    place: str, before: Mapping[str, Any], now: Mapping[str, Any], *, finished: bool = False
) -> list[str]:
    """Refuse to go on with settings that would make another run; returns notes on the others.

    `place` is what holds the run, for messages; `before` and `now` are as `list_settings`.
    """
    differ = {
        key: f"{key} ({show(before, key)} before, {show(now, key)} now)"
        for key in sorted({*before, *now})
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
        free |= {key for key in {*before, *now} if key.startswith("align.")}
    if refused := {key: text for key, text in differ.items() if key not in free}:
        moved = finished and refused.keys() <= {*MOVABLE, "data.root"}
        may_move = "data move until a run is finished, as this one is: " if moved else ""
        raise ValueError(
            f"{place}: the run was started with other settings: {', '.join(refused.values())}; "
            f"{may_move}restore them, or {WAY_OUT}"
        )
    rounding = {key: text for key, text in differ.items() if key in ROUNDING}
    if not rounding:
        return []
    parts = {"episodes.micro_batch_size", "parallel.strategy"} & rounding.keys()
    also = ", and of BatchNorm the statistics" if parts else ""
    return [f"going on with {', '.join(rounding.values())}: batches stay, rounding changes{also}"]


def list_settings(config: Config) -> dict[str, Any]:
    """Settings by dotted name, with what is meant where they are unset or idle."""
    tree = tomllib.loads(to_toml(config))
    teachers = [{"distil": 0.0, **teacher} for teacher in tree["teachers"]]
    return {**UNSAID, **IDLE, **flatten(tree), "teachers": teachers}


def without_paths(value: Any) -> Any:
    """A setting without the paths in it, since data may move; a share is no path."""
    if isinstance(value, list):  # sources, or teachers
        return [
            {
                key: without_paths(item) if key == "features" else item
                for key, item in table.items()
                if key not in PATHS
            }
            for table in value
        ]
    return "" if isinstance(value, str) and value not in NO_PATHS else value


def show(settings: Mapping[str, Any], key: str) -> str:
    """A setting as a recipe holds it; texts without quotes."""
    value = settings.get(key, "unset")
    return value if isinstance(value, str) else shown(value)


def list_names(settings: Mapping[str, Any], many: str, key: str, one: str) -> list[str]:
    """What the tables `many` in flat settings name as `key`; where there are none, `one` does."""
    tables = settings.get(many)
    listed = [table for table in tables if isinstance(table, dict)] if tables else []
    names = [table.get(key) for table in listed] or [settings.get(one)]
    return [str(name) for name in names if name]


# Settings that some runs have no use for, at their defaults: those of a small text tower, which a
# text model has others than; of towers that are put together; and the one source beside several.
SMALL_TEXT = ("model.text.width", "model.text.heads", "model.text.layers")
PARTS = ("model.embed_dim", "model.image.name", *SMALL_TEXT)
IDLE = {name: flatten(asdict(Config()))[name] for name in (*PARTS, "data.train")}


def to_toml(config: Config) -> str:
    """The configuration as TOML, without what is unset or idle, `allow_links`, and secrets in URLs.

    A run that goes on reads the URLs that it is given then. What is idle but given stays.
    """
    tree = asdict(config, dict_factory=lambda items: {k: v for k, v in items if v is not None})
    del tree["data"]["allow_links"]
    # A class is code, which a recipe cannot name.
    tree["run"]["loggers"] = [name for name in config.run.loggers if ":" not in name]
    idle = list[str]()
    if config.model.start is not None or config.model.name is not None:
        idle += PARTS
    elif config.model.text.name is not None:
        idle += SMALL_TEXT
    if config.data.sources:
        idle.append("data.train")
    for name in idle:
        *sections, key = name.split(".")
        section = tree
        for part in sections:
            section = section[part]
        if section.get(key) == IDLE[name]:
            del section[key]
    for tower in ("image", "text"):
        if not tree["model"][tower]:
            del tree["model"][tower]
    return without_secrets(tomli_w.dumps(tree))


# Checkpoints


def find_newest_intact(run: Path, notes: list[str]) -> Path | None:
    """The newest checkpoint of a run that has no damage; adds a note on each one passed over."""
    damaged: list[str] = []
    for path in reversed(checkpoints(run)):
        wrong = damage(path)
        if wrong is None:
            notes += [f"{text}: passed over" for text in damaged]
            return path
        damaged.append(f"{path} ({wrong})")
    if damaged:
        raise ValueError(
            f"every checkpoint of the run is damaged or cannot be read: {', '.join(damaged)}; make "
            f"them readable, restore one from a copy, delete {run / 'checkpoints'} to start again, "
            f"or {WAY_OUT}"
        )
    return None


def check_checkpoint(checkpoint: Path, plan: Plan, inputs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to go on from a checkpoint with other arithmetic or other data.

    Another device or precision would round differently, unless the settings name it. The validation
    set of other data may have been trained on. `inputs` are `Run.inputs`.
    """
    arithmetic, content = inputs["arithmetic"], inputs["content"]
    for setting, before in facts_of(checkpoint, "arithmetic").items():
        is_named = flatten(asdict(plan.config))[setting] != "auto"
        if not is_named and before != arithmetic.get(setting, before):
            raise ValueError(
                f"{setting}: this run was computed with {before}, and here it would be "
                f"{arithmetic[setting]}; go on on a machine like the first, or name it "
                f"(--{setting} {arithmetic[setting]}) to go on with other rounding"
            )
    lists, facts = facts_of(checkpoint, "chosen"), facts_of(checkpoint, "content")
    if changed := [name for name, key in inputs["chosen"].items() if lists.get(name) != key]:
        raise ValueError(
            f"{changed[0]}: the ids in it have changed since the run began; restore them, or "
            f"{WAY_OUT}"
        )
    if is_aligned(checkpoint) and not any("encoded" in fact for fact in content["sources"]):
        raise ValueError(  # train would move the encoders
            f"{checkpoint.parent.parent}: was begun by protoclip align; go on with that command, "
            f"or {WAY_OUT}"
        )
    for kind, what in {
        "sources": f"{plan.samples.name}: not the data that the run began with",
        "validation": "data.validation: not the pairs that evaluated the run before",
        "teachers": "teacher.features: not what the run began with",
        "start": "model.start: not what the run began with",
    }.items():
        now = content.get(kind, [])
        if differs := describe_change(facts.get(kind) or now, now):
            raise ValueError(f"{what} ({differs}); restore them, or {WAY_OUT}")


class CheckpointWriter:
    """Writes checkpoints of a run in a thread when it is time, and removes old ones.

    If one cannot be written there is a warning, and training goes on; only `finish` insists. It
    keeps the newest `keep` checkpoints, the best, and those that `copies` copies, which gets each
    when it is written. Ranks write their parts of a sharded model; rank 0 decides and removes.
    """

    def __init__(
        self,
        run: Path,
        *,
        description: Mapping[str, Any],
        text_files: Mapping[str, bytes] | None = None,
        every_steps: int,
        every_minutes: float,
        keep: int,
        copies: "Copies | None" = None,
    ) -> None:
        self.run, self.description, self.text_files = run, description, text_files
        self.every_steps, self.every_minutes, self.keep = every_steps, every_minutes, keep
        self.copies = copies
        self.saved_step = -1  # of the last checkpoint that was begun
        self.failed_step: int | None = None  # the same, if it could not be written
        self.ratings: dict[int, float] = {}  # finite values of evaluations by step
        self._saved_at = time.monotonic()
        self._written_in = 0.0  # seconds
        self._problem = ""
        self._write_files: Callable[[], None] = lambda: None
        self._thread: Thread | None = None

    def folder(self, step: int) -> Path:
        return self.run / "checkpoints" / f"step-{step:09}"

    def rate(self, step: int, value: float) -> None:
        """Note the result of an evaluation; higher is better. NaN and infinity do not count."""
        if math.isfinite(value):
            self.ratings[step] = value

    def find_best(self, step: int | None = None) -> tuple[int, float] | None:
        """Step and value of the best evaluation that has a checkpoint, as `step` will have."""
        there = [key for key in list(self.ratings) if key == step or self.folder(key).is_dir()]
        best = max(there, key=lambda key: (self.ratings[key], -key), default=None)
        return None if best is None else (best, self.ratings[best])

    def is_due(self, step: int, *, episode_end: bool) -> bool:
        """Whether it is time to save after this step."""
        age = time.monotonic() - self._saved_at
        best = self.find_best(step) if step in self.ratings else None
        return step != self.saved_step and (
            (self.every_steps > 0 and step % self.every_steps == 0)
            or (self.every_minutes > 0 and age >= 60 * self.every_minutes)
            or (episode_end and age >= max(EPISODE_PAUSE, EPISODE_FACTOR * self._written_in))
            or (self.failed_step is not None and age >= RETRY_AFTER)
            or (best is not None and best[0] == step)
        )

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Start to write a copy of a nested state; `model` and `optimizer` in it are copies."""
        self.wait()
        self._saved_at, self.saved_step = time.monotonic(), step
        in_parts = are_parts(state["model"])
        if rank() != 0:
            state = {key: state[key] for key in ("model", "optimizer", "adapters")}
        tensors, facts = checkpoint.checkpoint_files(self.description, state)
        whole = {checkpoint.RESUME: tensors.pop(checkpoint.RESUME)} if in_parts else tensors
        self._write_files = partial(
            checkpoint.write_checkpoint,
            self.folder(step),
            whole,
            facts,
            self.text_files,
            parts=tensors if in_parts else None,
        )
        self._thread = Thread(target=self._write, daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is written or could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait for the last checkpoint, and try again for a minute if need be. Collective."""
        self.wait()
        for pause in LAST_RETRIES:
            if self.failed_step is None:
                break
            warn(f"trying to save step {self.failed_step} again in {pause:g} s")
            time.sleep(pause)
            self._write()

        def require_written() -> None:
            if self.failed_step is not None and rank() == 0:
                start = max(checkpoints(self.run), default="the beginning")
                raise OSError(
                    f"{self._problem}: this checkpoint is lost; trying again did not help; make "
                    f"room, then the same command with --resume auto goes on from {start}"
                )

        raise_on_all_ranks(require_written)

    def _write(self) -> None:
        step, folder, began = self.saved_step, self.folder(self.saved_step), time.monotonic()
        try:
            self._write_files()
        except Exception as error:  # nobody else would hear of it in a thread
            self.failed_step = step
            room = ""
            with suppress(OSError):
                room = f"; {shutil.disk_usage(self.run).free / 1e6:,.0f} MB are free"
            self._problem = f"{folder}: not saved ({error}{room})"
            warn(f"{self._problem}; earlier checkpoints are whole")
            return
        self.failed_step, self._write_files = None, lambda: None
        self._written_in = time.monotonic() - began
        if rank() == 0:
            self.prune(folder)
            if self.copies is not None:
                self.copies.start(folder)

    def prune(self, newest: Path) -> None:
        """Remove what is not to be kept, up to this checkpoint: later ones are damaged, if the run
        went on from one before them. What cannot be removed costs a warning."""
        try:
            best = self.find_best()
            keep = {self.folder(best[0])} if best is not None else set[Path]()
            if self.copies is not None:
                keep |= self.copies.list_in_use()
            so_far = [path for path in checkpoints(self.run) if path <= newest]
            for old in so_far[: -self.keep]:
                if old not in keep:
                    # Nothing of it is seen any more if this ends half-way.
                    shutil.rmtree(old.rename(checkpoint.unfinished_path(old)))
        except OSError as error:
            warn(f"an old checkpoint stays, since it cannot be removed ({error})")


def warn(text: str) -> None:
    if rank() == 0:
        say(f"warning: {text}")


# `run.sync`: a copy of the run folder in a store, from which a fresh machine goes on. A checkpoint
# is complete there if its `checksums.json` is, which comes last and goes first. The files beside
# checkpoints come before them, so that a complete checkpoint has its metrics; those that say that a
# run is done come after all others.


def open_store(url: str) -> Store:
    """The folder that `run.sync` names; raises `ValueError` if it may not be one."""
    protocol, _, path = url.partition("://")
    protocol, path = protocol.lower(), re.sub("//+", "/", path)  # s3fs lists no nameless folder
    try:
        if protocol not in PLACES or not path.strip("/"):
            places = ", ".join(PLACES)
            raise ValueError(f"is no folder of a store ({places}); name one, as s3://bucket/folder")
        access.require_allowed(url, protocols=PLACES)
        options = {"auto_mkdir": True} if protocol == "file" else {}
        files, root = fsspec.core.url_to_fs(f"{protocol}://{path}", **options)
        if protocol == "file" and not Path(root).parent.is_dir():  # or it would fill another disk
            raise ValueError(f"there is no folder {Path(root).parent}; mount it, or name another")
    except (ValueError, OSError, ImportError) as error:  # or its client is not installed
        raise ValueError(f"run.sync: {url or repr(url)}: {access.describe_error(error)}") from None
    return DirFileSystem(root, files)


@contextmanager
def name_store(url: str) -> Iterator[None]:
    """Turn what goes wrong in the store, before the run begins, into a `ValueError`."""
    try:
        yield
    except Exception as error:  # the clients of stores have exceptions of their own
        raise ValueError(
            f"run.sync: {url}: {access.first_line(error)}; check name, credentials, network and "
            "room, or leave run.sync out"
        ) from None


def list_files(store: Store) -> set[str]:
    """All files by name, without hidden ones and without those that lead out of a run folder."""
    store.fs.invalidate_cache()
    names = store.find("")
    return {n for n in names if all(p and p[0] != "." for p in re.split(r"[/\\]", n))}


def ask_store(url: str) -> tuple[Store, set[str], Config | None]:
    """The store of a run folder, the names of its files, and the settings of a run there."""
    store = open_store(url)

    def ask() -> tuple[set[str], str | None]:
        store.pipe_file(PROBE, b"")
        names = list_files(store)
        if PROBE not in store.find(""):
            raise OSError("what was written there is not listed")
        return names, store.cat_file(SETTINGS).decode() if SETTINGS in names else None

    with name_store(url):
        names, text = access.run_within(ANSWER_SECONDS, ask)
    begun = None if text is None else parse_begun(text, f"run.sync: {url}/{SETTINGS}")
    return store, names, begun


def fetch_run(
    outline: Outline, store: Store, names: set[str], begun: Config | None, *, resume: bool
) -> None:
    """Bring a run folder that is missing or older to the newest state in the store.

    `store`, `names` and `begun` are of `ask_store`. Refuses, before it writes, another run there or
    here, and a run there unless `resume` is set.
    """
    config, url, folder = outline.config, outline.config.run.sync, name_folder(outline.config)
    assert url is not None
    if folder.exists():  # or what it holds would become the run of the store
        inspect_folder(outline, resume=True)
    if not names:
        return
    if begun is None or not resume:
        way = "other files;" if begun is None else "a run; go on with --resume auto, or"
        raise ValueError(f"run.sync: {url}: holds {way} choose another folder")
    is_done = RESULTS in names
    now = list_settings(keep_begun(config, begun))
    check_settings(f"run.sync: {url}", list_settings(begun), now, finished=is_done)
    intact = {path.name for path in checkpoints(folder) if damage(path) is None}
    complete = {match[1] for name in names if (match := MARKER.fullmatch(name))}
    newer = sorted(step for step in complete if step > max(intact, default=""))
    if (folder / RESULTS).is_file() or not (newer or is_done):
        return
    beside = {name for name in names if not name.startswith("checkpoints/")}
    fetched = None
    with claim_folder(folder), name_store(url):
        # What has settings is a run, so these come first.
        for name in sorted(beside - {*DONE}, key=lambda name: name != SETTINGS):
            get_file(store, name, folder)
        while newer and fetched is None:
            fetched = get_checkpoint(store, newer.pop(), names, folder)
        if fetched is not None:
            # The best first and the newest last, so that a fetch that is cut short is done again.
            best = read_json(fetched / STATE).get("best")
            step = f"step-{int(best[0]):09}" if best else ""
            if step in complete - intact and step not in fetched.name:
                publish_checkpoint(get_checkpoint(store, step, names, folder))
            publish_checkpoint(fetched)
        for name in beside & {*DONE}:
            get_file(store, name, folder)
    if fetched is not None or is_done:
        what = "its results" if fetched is None else fetched.name.split(".")[1]
        say(f"note: {folder}: {what} fetched from {url}")
    elif not intact:
        raise ValueError(
            f"run.sync: {url}: every checkpoint there is damaged; restore one from a copy, remove "
            f"all of them and {folder} to start again, or choose another folder"
        )


def get_file(store: Store, name: str, folder: Path) -> None:
    """Bring a file here, where it appears whole or not at all."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder / name) as temporary:
        store.get_file(name, str(temporary))


def get_checkpoint(store: Store, step: str, names: set[str], folder: Path) -> Path | None:
    """Bring a checkpoint to a hidden folder here; None, with a warning, if it is damaged."""
    temporary = folder / "checkpoints" / f".{step}.fetched"
    for name in names:
        if name.startswith(f"checkpoints/{step}/"):
            path = temporary / name.split("/", 2)[2]
            path.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(name, str(path))
    if (wrong := damage(temporary)) is not None:
        say(f"warning: run.sync: {step} there is passed over: {wrong}")
        return None
    return temporary


def publish_checkpoint(temporary: Path | None) -> None:
    if temporary is not None:
        target = temporary.with_name(temporary.name.split(".")[1])
        shutil.rmtree(target, ignore_errors=True)  # a damaged one
        temporary.rename(target)


class Copies:
    """Copies a run folder to its store in a thread, one copy at a time; the newest state wins.

    A checkpoint that cannot be copied costs a warning. What was complete in the store stays so
    until a newer checkpoint is. Of the checkpoints that other machines left there, the newest stay,
    up to `run.keep_checkpoints`. Only rank 0 copies, if there is a URL.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.url, self.folder, self.keep = config.run.sync, folder, config.run.keep_checkpoints
        self.store: Store = open_store(self.url) if self.url and rank() == 0 else None
        self._copied: dict[str, tuple[int, int]] = {}  # size and time of files beside checkpoints
        self._wanted: Path | None = None  # the newest checkpoint that was not copied yet
        self._copying: Path | None = None
        self._thread: Thread | None = None
        self._lock = Lock()

    def start(self, newest: Path) -> None:
        """Copy all up to this checkpoint, after the copy that is under way; returns at once."""
        if self.store is None:
            return
        with self._lock:
            self._wanted = newest
            if self._thread is None:
                self._thread = Thread(target=self._work, name="protoclip-sync", daemon=True)
                self._thread.start()

    def list_in_use(self) -> set[Path]:
        """The checkpoints to keep: one that is copied, and the next. Or a slow copy never ends."""
        with self._lock:
            return {path for path in (self._copying, self._wanted) if path is not None}

    def finish(self, seconds: float) -> None:
        """Copy what has changed, and wait for it up to this many seconds, or warn."""
        self.start(max(checkpoints(self.folder), default=self.folder))
        thread = self._thread
        if thread is None:  # done already
            return
        thread.join(min(1.0, seconds))
        if thread.is_alive():
            say(f"note: run.sync: waiting up to {seconds:g} s for the copy to {self.url}")
            thread.join(seconds)
        if thread.is_alive():
            self._warn(f"not done within {seconds:g} s")

    def _warn(self, reason: str) -> None:
        say(
            f"warning: run.sync: {self.url}: not copied ({reason}); what was complete there stays, "
            "and the next copy, or --resume auto, tries again"
        )

    def _work(self) -> None:
        while True:
            with self._lock:
                newest = self._copying = self._wanted
                self._wanted = None
                if newest is None:
                    self._thread = None
                    return
            try:
                self._copy(newest)
            except Exception as error:  # nobody else would hear of it in a thread
                self._warn(access.first_line(error))

    def _copy(self, newest: Path) -> None:
        there, folder = list_files(self.store), self.folder
        tops = [p for p in folder.iterdir() if p.name[0] != "." and p.name not in LEFT_OUT]
        paths = [*tops, *(path for top in tops for path in top.rglob("*")), folder / RUN_ID]
        beside = [p for p in paths if p.is_file() and p.name[0] != "."]
        # What has settings is a run, so these come first.
        for path in sorted(beside, key=lambda path: path.name != SETTINGS):
            if path.name not in DONE:
                self._put_if_changed(path)
        # Later ones are damaged: the run went on from one before them.
        for path in reversed([p for p in checkpoints(folder) if p <= newest]):
            try:
                self._put_checkpoint(path, there)
            except FileNotFoundError:  # it was removed meanwhile, since newer ones are whole
                if path == newest:
                    raise
        for path in beside:
            if path.name in DONE:
                self._put_if_changed(path)
        here = {path.name for path in checkpoints(folder)}
        complete = {match[1] for name in there if (match := MARKER.fullmatch(name))}
        stays = here | {*sorted(here | complete)[-self.keep :]}
        for step in {n.split("/")[1] for n in there if n.startswith("checkpoints/")} - stays:
            self._remove(f"checkpoints/{step}", there)

    def _remove(self, step: str, there: set[str]) -> None:
        """Remove what is there of a checkpoint, its checksums first."""
        if f"{step}/{CHECKSUMS}" in there:
            self.store.rm_file(f"{step}/{CHECKSUMS}")
        if any(name.startswith(f"{step}/") for name in there):
            self.store.rm(step, recursive=True)

    def _put_if_changed(self, path: Path) -> None:
        name, status = path.relative_to(self.folder).as_posix(), path.stat()
        if self._copied.get(name) != (status.st_size, status.st_mtime_ns):
            self.store.put_file(str(path), name)
            self._copied[name] = status.st_size, status.st_mtime_ns

    def _put_checkpoint(self, path: Path, there: set[str]) -> None:
        name = f"checkpoints/{path.name}"
        marker, checksums = f"{name}/{CHECKSUMS}", (path / CHECKSUMS).read_bytes()
        if marker in there and self.store.cat_file(marker) == checksums:
            return
        self._remove(name, there)  # of other files under this name, or of an upload cut short
        for file in json.loads(checksums):
            self.store.put_file(str(path / file), f"{name}/{file}")
        self.store.pipe_file(marker, checksums)
