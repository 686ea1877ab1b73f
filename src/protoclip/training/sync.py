"""`run.sync`: a copy of the run folder in a store, from which a fresh machine goes on.

A checkpoint is complete there if its `checksums.json` is, which comes last and goes first. The
files beside checkpoints come before them, so that a complete checkpoint has its metrics; those that
say that a run is done come after all others.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import fsspec
from fsspec.implementations.dirfs import DirFileSystem

from protoclip.config import Config
from protoclip.data import access
from protoclip.distributed.collectives import rank
from protoclip.files import read_json, replacing
from protoclip.models.checkpoint import CHECKSUMS, MODEL, SETTINGS, STATE, checkpoints, damage
from protoclip.terminal import say
from protoclip.training.folder import (
    RESULTS,
    check_settings,
    claim_folder,
    inspect_folder,
    keep_begun,
    list_settings,
    name_folder,
    parse_begun,
)
from protoclip.training.plan import Outline

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
        raise ValueError(f"run.sync: {url or repr(url)}: {access.reason_of(error)}") from None
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
    """The store of a run folder, the names of its files, and the settings of the run there, if any.

    Raises:
        ValueError: It cannot be read and written, or the settings are damaged.
    """
    store = open_store(url)

    def ask() -> tuple[set[str], str | None]:
        store.pipe_file(PROBE, b"")
        names = list_files(store)
        if PROBE not in store.find(""):
            raise OSError("what was written there is not listed")
        return names, store.cat_file(SETTINGS).decode() if SETTINGS in names else None

    with name_store(url):
        names, text = access.within(ANSWER_SECONDS, ask)
    begun = None if text is None else parse_begun(text, f"run.sync: {url}/{SETTINGS}")
    return store, names, begun


def fetch_run(
    outline: Outline, store: Store, names: set[str], begun: Config | None, *, resume: bool
) -> None:
    """Bring a run folder that is missing or older to the newest state in the store.

    Args:
        store, names, begun: Of `ask_store`.

    Raises:
        ValueError: The store may not be written, it or the run folder holds another run, or it
            holds one and `resume` is not set. Nothing was written here. Or every checkpoint there
            is damaged, and there is none here.
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
    with claim_folder(folder, resume=True), name_store(url):
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
        for checkpoint in reversed([p for p in checkpoints(folder) if p <= newest]):
            try:
                self._put_checkpoint(checkpoint, there)
            except FileNotFoundError:  # it was removed meanwhile, since newer ones are whole
                if checkpoint == newest:
                    raise
        for path in beside:
            if path.name in DONE:
                self._put_if_changed(path)
        here = {path.name for path in checkpoints(folder)}
        complete = {match[1] for name in there if (match := MARKER.fullmatch(name))}
        stays = here | {*sorted(here | complete)[-self.keep :]}
        for step in {n.split("/")[1] for n in there if n.startswith("checkpoints/")} - stays:
            self._remove(f"checkpoints/{step}", there)

    def _remove(self, checkpoint: str, there: set[str]) -> None:
        """Remove what is there of a checkpoint, its checksums first."""
        if f"{checkpoint}/{CHECKSUMS}" in there:
            self.store.rm_file(f"{checkpoint}/{CHECKSUMS}")
        if any(name.startswith(f"{checkpoint}/") for name in there):
            self.store.rm(checkpoint, recursive=True)

    def _put_if_changed(self, path: Path) -> None:
        name, status = path.relative_to(self.folder).as_posix(), path.stat()
        if self._copied.get(name) != (status.st_size, status.st_mtime_ns):
            self.store.put_file(str(path), name)
            self._copied[name] = status.st_size, status.st_mtime_ns

    def _put_checkpoint(self, checkpoint: Path, there: set[str]) -> None:
        name = f"checkpoints/{checkpoint.name}"
        marker, checksums = f"{name}/{CHECKSUMS}", (checkpoint / CHECKSUMS).read_bytes()
        if marker in there and self.store.cat_file(marker) == checksums:
            return
        self._remove(name, there)  # of other files under this name, or of an upload cut short
        for file in json.loads(checksums):
            self.store.put_file(str(checkpoint / file), f"{name}/{file}")
        self.store.pipe_file(marker, checksums)
