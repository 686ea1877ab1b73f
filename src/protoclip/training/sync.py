"""`run.sync`: a copy of the run folder in an object store, from which a fresh machine goes on.

A store has no rename. A checkpoint is complete there if its `checksums.json` is, which comes last
and goes first. The files beside checkpoints come before them, so that a complete checkpoint has its
metrics; those that say that a run is done come after all others.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from threading import Lock, Thread
from typing import Any

import fsspec
from fsspec.implementations.dirfs import DirFileSystem

from protoclip.config import Config
from protoclip.data import access
from protoclip.distributed.collectives import rank
from protoclip.files import has_changed, read_local
from protoclip.models.checkpoint import (
    CHECKSUMS,
    MODEL,
    SETTINGS,
    STATE,
    WEIGHTS,
    checkpoints,
    damage,
)
from protoclip.terminal import say, without_secrets
from protoclip.training.plan import Outline
from protoclip.training.run_folder import claimed, folder_of, look

# Where copies may be: beside the stores that data come from, Azure's, and a folder that is mounted.
# Clients of others are left out: that of sftp takes any host for the one it asked for, and that of
# oci wants what stands in the place of a user. So are protocols that read what a URL brings along.
PLACES = (*access.STORES, "az", "abfs", "file")
Store = Any  # an fsspec file system, whose paths are names relative to the folder there
ANSWER_SECONDS = 60.0  # that a store may take to answer before a run begins
# Seconds that the end of a run waits for its last copy: after a signal, and after the results.
STOPPED_SECONDS, END_SECONDS = 60.0, 1800.0
RESULTS, PROBE = "results.json", ".protoclip"
PART = ".protoclip.tmp"  # what is written to a mounted folder, until it is whole
DONE = (MODEL, RESULTS)
LEFT_OUT = ("checkpoints", "wandb", "start_features")  # copied apart, elsewhere, made anew
RUN_ID = "wandb/run-id"  # with it Weights & Biases goes on with the run's curves
MARKER = re.compile(rf"checkpoints/(step-\d+)/{re.escape(CHECKSUMS)}", re.ASCII)
# Hidden names, and those that would lead out of the run folder, which a store allows.
ODD = re.compile(r"(^|/)(\.|/|$)|\\|^[a-z]:", re.IGNORECASE)


class MountedFolder(DirFileSystem):  # type: ignore[misc]
    """A folder that acts as a store does: files appear whole, folders go with their last file."""

    def put_file(self, lpath: str, rpath: str) -> None:
        super().put_file(lpath, PART)
        self.mv(PART, rpath)

    def pipe_file(self, path: str, value: bytes) -> None:
        super().pipe_file(PART, value)
        self.mv(PART, path)

    def rm_file(self, path: str) -> None:
        super().rm_file(path)
        with suppress(OSError):  # it holds more
            for folder in PurePosixPath(path).parents[:-1]:
                self.rmdir(str(folder))


def store_of(url: str) -> Store:
    """The folder that `run.sync` names; raises `ValueError` if it may not be one."""
    protocol, _, path = url.partition("://")
    protocol, path = protocol.lower(), re.sub("//+", "/", path)  # s3fs lists no nameless folder
    try:
        if protocol not in PLACES or not path.strip("/"):
            known = ", ".join(PLACES)
            raise ValueError(f"is no folder of a store ({known}); name one, as s3://bucket/folder")
        access.require_allowed(url, protocols=PLACES)
        if protocol == "file":
            return mounted(path)
        if without_secrets(url) != url:
            raise ValueError("leave out user and query: a store's client finds credentials itself")
        files, root = fsspec.core.url_to_fs(f"{protocol}://{path}")
    except (ValueError, OSError, ImportError) as error:  # or its client is not installed
        raise ValueError(f"run.sync: {url or repr(url)}: {access.reason_of(error)}") from None
    return DirFileSystem(root, files)


def mounted(path: str) -> MountedFolder:
    """A folder in one that exists, or a mount that is not there would fill the disk below it."""
    if not path.startswith("/"):
        raise ValueError("name the whole path, as file:///mnt/folder")
    if without_secrets(f"file://{path}") != f"file://{path}":  # so settings would not keep it
        raise ValueError("'?' and '#' begin a query in a URL; name a folder without them")
    files, root = fsspec.core.url_to_fs(f"file://{path}", auto_mkdir=True)
    if not (parent := Path(root).parent).is_dir():
        raise ValueError(f"there is no folder {parent}; mount it, make it, or name another")
    if Path(root).exists() and not Path(root).is_dir():
        raise ValueError("is no folder; name another")
    return MountedFolder(root, files)


def require_apart(url: str, folder: Path) -> None:
    """Refuse a copy in the run folder, or around it."""
    if url.lower().startswith("file://"):
        there, here = Path(store_of(url).path).resolve(), folder.resolve()
        if there.is_relative_to(here) or here.is_relative_to(there):
            raise ValueError(f"run.sync: {url}: is not apart from {folder}; choose another folder")


def names_in(store: Store) -> set[str]:
    """All files but `ODD` ones."""
    store.fs.invalidate_cache()
    return {name for name in store.find("") if not ODD.search(name)}


@contextmanager
def needed(url: str) -> Iterator[None]:
    """Turn what goes wrong in the store, before the run begins, into a `ValueError`."""
    try:
        yield
    except Exception as error:  # the clients of stores have exceptions of their own
        raise ValueError(
            f"run.sync: {url}: {access.first_line(error)}; check name, credentials, network and "
            "room, or leave run.sync out"
        ) from None


def answer(url: str, folder: Path) -> tuple[Store, set[str]]:
    """The store of a run folder, and what it holds.

    Raises:
        ValueError: It cannot be read and written, or is not apart from the folder.
    """
    require_apart(url, folder)
    store = store_of(url)

    def ask() -> set[str]:
        store.pipe_file(PROBE, b"")
        names = names_in(store)
        if PROBE not in store.find(""):
            raise OSError("what was written there is not listed")
        return names

    with needed(url):
        return store, access.within(ANSWER_SECONDS, ask)


@contextmanager
def begun(config: Config) -> Iterator[Path]:
    """The run folder; if it holds no run and the store does, a folder with that one's settings."""
    folder, url = folder_of(config), config.run.sync
    if url is None or (folder / SETTINGS).is_file():
        yield folder
        return
    with copied_settings(url, *answer(url, folder)) as there:
        yield there


@contextmanager
def copied_settings(url: str, store: Store, names: set[str]) -> Iterator[Path]:
    """A folder with the settings of the run in the store, if any; errors name the store."""
    with TemporaryDirectory() as temporary:
        if SETTINGS in names:
            with needed(url):
                get(store, SETTINGS, Path(temporary) / SETTINGS)
        try:
            yield Path(temporary)
        except ValueError as error:
            told = str(error).replace(temporary, f"run.sync: {url}")
            raise ValueError(told.replace("--run.out", "--run.sync")) from None


def fetch(outline: Outline, *, resume: bool) -> None:
    """Bring a run folder that is missing or older to the newest state in the store.

    Raises:
        ValueError: The store does not answer or may not be written, it or the run folder holds
            another run, or it holds one and `resume` is not set. Nothing was written here. Or
            every checkpoint there is damaged, and there is none here.
    """
    config, url, folder = outline.config, outline.config.run.sync, folder_of(outline.config)
    if url is None:
        return
    if folder.exists():  # or what it holds would become the run of the store
        look(outline, resume=True)
    store, names = answer(url, folder)
    if names and not (resume and SETTINGS in names):
        way = "a run; go on with --resume auto, or" if SETTINGS in names else "other files;"
        raise ValueError(f"run.sync: {url}: holds {way} choose another folder")
    if not names:
        return
    with copied_settings(url, store, names) as folder_there:
        there = replace(config, run=replace(config.run, out=str(folder_there)))
        look(replace(outline, config=there), resume=True)
    intact = [path.name for path in checkpoints(folder) if damage(path) is None]
    complete = {match[1] for name in names if (match := MARKER.fullmatch(name))}
    newer = sorted(step for step in complete if step > max(intact, default=""))
    if (folder / RESULTS).is_file() or not (newer or RESULTS in names):
        return
    beside = {name for name in names if not name.startswith("checkpoints/")}
    with claimed(folder, resume=True), needed(url):
        # What has settings is a run, so these come first.
        for name in sorted(beside - {*DONE}, key=lambda name: name != SETTINGS):
            get(store, name, folder / name)
        # Only now, and the newest last, so that a fetch that is cut short is done again.
        got = None
        for step in reversed(newer):
            best = best_of(store, step)
            if best is not None and best in complete - {step, *intact}:
                get_checkpoint(store, best, names, folder)
            if get_checkpoint(store, step, names, folder):
                got = step
                break
        for name in beside & {*DONE}:
            get(store, name, folder / name)
    if not (got or intact or RESULTS in names):
        raise ValueError(
            f"run.sync: {url}: every checkpoint there is damaged; restore one from a copy, remove "
            f"all of them and {folder} to start again, or choose another folder"
        )
    if got or RESULTS in names:
        say(f"note: {folder}: {got or 'its results'} fetched from {url}")


def best_of(store: Store, step: str) -> str | None:
    """The checkpoint that is kept beside this one of the store, since its evaluation was best."""
    try:
        best = json.loads(store.cat_file(f"checkpoints/{step}/{STATE}")).get("best")
        return f"step-{int(best[0]):09}" if best else None
    except (ValueError, TypeError, AttributeError, FileNotFoundError):  # as `get_checkpoint` says
        return None


def get(store: Store, name: str, path: Path) -> None:
    """Bring a file here, where it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # as `files.replacing` does
    store.get_file(name, str(temporary))
    temporary.replace(path)


def get_checkpoint(store: Store, step: str, names: set[str], folder: Path) -> bool:
    """Bring a checkpoint here; returns False, with a warning, if it is damaged.

    Args:
        names: Of the files in the store.
    """
    target = folder / "checkpoints" / step
    temporary = target.with_name(f".{step}.fetched")
    for name in names:
        if name.startswith(f"checkpoints/{step}/"):
            get(store, name, temporary / name.split("/", 2)[2])
    if (wrong := damage(temporary)) is not None:
        say(f"warning: run.sync: {step} there is passed over: {wrong}")
        return False
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    return True


def copies(config: Config, folder: Path) -> "Copies":
    """Those of a run, by rank 0."""
    url = config.run.sync if rank() == 0 else None
    return Copies(url, folder, keep=config.run.keep_checkpoints)


def files_beside(folder: Path) -> dict[str, Path]:
    """The files of a run that are copied beside its checkpoints, by name.

    Where checkpoints are written is not looked at: folders appear and go there meanwhile.
    """
    files = dict[str, Path]()
    for top, folders, names in os.walk(folder):
        of = Path(top).relative_to(folder)
        folders[:] = [n for n in folders if n[0] != "." and str(of / n) != "checkpoints"]
        files |= {(of / name).as_posix(): Path(top, name) for name in names if name[0] != "."}
    wanted = {n for n in files if n.split("/")[0] not in LEFT_OUT or n == RUN_ID}
    return {name: path for name, path in files.items() if name in wanted and path.is_file()}


def spoiled(folder: Path, name: str) -> str | None:
    """What is wrong with a file beside checkpoints, that would take the place of a good copy."""
    if name in (WEIGHTS, MODEL) and (folder / CHECKSUMS).is_file():
        return damage(folder, [name])
    if not name.endswith(".json"):
        return None
    try:
        content = json.loads(read_local(folder / name))
    except (OSError, ValueError, RecursionError) as error:
        return f"{name} is damaged ({error})"
    changed = isinstance(content, dict) and has_changed(content)
    return f"{name} is not what was written: its checksum differs" if changed else None


def state_of(path: Path) -> tuple[int, int]:
    """Size and time of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


class Copies:
    """Copies a run folder to its store in a thread, one copy at a time; the newest state wins.

    A checkpoint that cannot be copied costs a warning. What was complete in the store stays so
    until a newer checkpoint is. Of the checkpoints that other machines left there, the newest stay,
    up to the number `keep`. Without a URL there is nothing to do.
    """

    def __init__(self, url: str | None, folder: Path, *, keep: int) -> None:
        self.url, self.folder, self.keep = url, folder, keep
        self._seen = set[str]()  # checkpoints that were in the folder
        self.store: Store = None if url is None else store_of(url)
        self._newest: Path | None = None
        self._copied: dict[str, tuple[int, int]] = {}  # size and time of files beside checkpoints
        self._told = set[str]()  # what is wrong with files beside checkpoints
        self._wanted: Path | None = None  # the newest checkpoint that was not copied yet
        self._copying: Path | None = None
        self.copied: Callable[[], None] = lambda: None  # is called after each copy
        self._warned_of: Path | None = None
        self._thread: Thread | None = None
        self._lock = Lock()

    def start(self, newest: Path) -> None:
        """Copy all up to this checkpoint, after the copy that is under way; returns at once."""
        if self.store is None:
            return
        with self._lock:
            self._newest = self._wanted = newest
            if self._thread is None:
                self._thread = Thread(target=self._work, name="protoclip-sync", daemon=True)
                self._thread.start()

    def in_use(self) -> set[Path]:
        """The checkpoints to leave where they are: that which is copied, and that which will be.

        A slow copy would never end otherwise, as each checkpoint would be gone before it is whole.
        """
        with self._lock:
            return {path for path in (self._copying, self._wanted) if path is not None}

    def finish(self, seconds: float) -> None:
        """Copy what has changed, and wait for it; after so many seconds there is a warning."""
        self._warned_of = None  # the last word is on the last copy
        self.start(self._newest or max(checkpoints(self.folder), default=self.folder))
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
                if newest != self._warned_of:
                    self._warn(access.first_line(error))
                self._warned_of = newest
            with self._lock:
                self._copying = None
            with suppress(OSError):  # what cannot be removed now, the next checkpoint removes
                self.copied()

    def _copy(self, newest: Path) -> None:
        there, folder = names_in(self.store), self.folder
        beside = files_beside(folder)
        for name in sorted(n for n in beside if self._is_new(beside[n], n)):
            if (wrong := spoiled(folder, name)) is None:
                continue
            del beside[name]
            if wrong not in self._told:
                say(f"warning: run.sync: {folder}: {wrong}; it is not copied")
            self._told.add(wrong)
        if any(
            name.endswith(".safetensors") and self._is_new(beside[name], name) for name in beside
        ):
            for name in there & {*DONE}:  # they speak of the model before
                self.store.rm_file(name)
        # What has settings is a run, so these come first.
        for name in sorted(beside.keys() - {*DONE}, key=lambda name: name != SETTINGS):
            self._put(beside[name], name)
        # Later ones are damaged: the run went on from one before them.
        kept = [path for path in checkpoints(folder) if path <= newest]
        for checkpoint in reversed(kept):
            try:
                self._put_checkpoint(checkpoint, there)
            except (FileNotFoundError, ValueError) as error:
                # One before it is removed meanwhile, since newer ones are whole; or damaged.
                removed = isinstance(error, FileNotFoundError) and self._wanted is not None
                if checkpoint == newest and not removed:
                    raise
        for name in sorted(beside.keys() & {*DONE}):
            self._put(beside[name], name)
        here = {path.name for path in checkpoints(folder)}
        others = {n.split("/")[1] for n in there if n.startswith("checkpoints/")} - here
        gone, foreign = others & self._seen, sorted(others - self._seen)
        self._seen |= here
        gone |= {*foreign[: max(0, len(foreign) + len(here) - self.keep)]}
        names = [n for n in there if n.startswith("checkpoints/") and n.split("/")[1] in gone]
        for name in sorted(names, key=lambda name: not MARKER.fullmatch(name)):
            self.store.rm_file(name)

    def _is_new(self, path: Path, name: str) -> bool:
        return self._copied.get(name) != state_of(path)

    def _put(self, path: Path, name: str) -> None:
        """Copy a file that has changed since it was copied last."""
        state = state_of(path)
        if self._copied.get(name) != state:
            self.store.put_file(str(path), name)
            self._copied[name] = state

    def _put_checkpoint(self, checkpoint: Path, there: set[str]) -> None:
        name = f"checkpoints/{checkpoint.name}"
        marker, checksums = f"{name}/{CHECKSUMS}", (checkpoint / CHECKSUMS).read_bytes()
        if marker in there:
            if self.store.cat_file(marker) == checksums:
                return
            self.store.rm_file(marker)  # of other files under this name
        files = json.loads(checksums)
        for file in files:
            self.store.put_file(str(checkpoint / file), f"{name}/{file}")
        # Of an upload that was cut short, by a run with more ranks.
        for left in there - {marker}:
            if left.startswith(f"{name}/") and left.removeprefix(f"{name}/") not in files:
                self.store.rm_file(left)
        self.store.pipe_file(marker, checksums)
