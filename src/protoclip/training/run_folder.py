"""A run's folder: who may write to it, and where an interrupted run goes on."""

import signal
import threading
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from protoclip.distributed.collectives import rank
from protoclip.files import read_json
from protoclip.models.loading import OPTIMIZER, RESUME, STATE, checkpoints, damage, read_tensors
from protoclip.training.checkpoint import FORMAT

# Settings that may change between two parts of a run: with any of them every batch, weight and
# metric of training is the same to the bit.
FREE = (
    "run.out",
    "run.save_steps",
    "run.save_minutes",
    "run.keep_checkpoints",
    "run.wandb",
    "run.evaluate",
    "data.workers",
    "data.cache",
    "data.cache_gb",
    "data.cache_folder",
    "data.max_bad_share",
)
LOCK = ".lock"
STOPPING = ("SIGTERM", "SIGINT", "SIGUSR1")


@dataclass(frozen=True, kw_only=True)
class Interrupted:
    """The checkpoint that a run goes on from; the optimizer's tensors in the first process."""

    folder: Path
    optimizer: dict[str, Tensor]
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Interrupted":
        facts = read_json(folder / STATE)
        if facts.get("format") != FORMAT:
            raise ValueError(
                f"{folder / STATE}: not written by this version of protoclip, which cannot go on "
                "from it; begin anew from its weights with --model.checkpoint, in another folder"
            )
        return cls(
            folder=folder,
            optimizer=read_tensors(folder / OPTIMIZER) if rank() == 0 else {},
            tensors=read_tensors(folder / RESUME),
            facts=facts,
        )


def is_empty(folder: Path) -> bool:
    """Whether a folder holds hidden files at most, as when a run was killed at its very start."""
    return folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process.

    Raises:
        ValueError: Another process runs in it.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{folder}: another process is running in this folder; wait for it, or choose "
            "another with --run.out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def newest_whole(folder: Path, notes: list[str]) -> Path | None:
    """The newest checkpoint whose files are as they were written; others are noted.

    Raises:
        ValueError: There are checkpoints, and all are damaged.
    """
    damaged: list[str] = []
    for found in reversed(checkpoints(folder)):
        wrong = damage(found)
        if wrong is None:
            notes += [f"{text}: passed over" for text in damaged]
            return found
        damaged.append(f"{found} ({wrong})")
    if damaged:
        raise ValueError(
            f"every checkpoint of the run is damaged: {', '.join(damaged)}; restore one from a "
            f"copy, delete {folder / 'checkpoints'} to begin anew, or choose another folder with "
            "--run.out"
        )
    return None


def require_same(folder: Path, config: str) -> None:
    """Check that a run goes on with the settings it began with.

    Raises:
        ValueError: Some differ; names them.
    """
    before = flat(tomllib.loads((folder / "config.toml").read_text(encoding="utf-8")))
    now = flat(tomllib.loads(config))
    differ = [
        f"{key} ({before.get(key, 'unset')} before, {now.get(key, 'unset')} now)"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in FREE
    ]
    if differ:
        raise ValueError(
            f"{folder}: the run was begun with other settings: {', '.join(differ)}; "
            "restore them, or choose another folder with --run.out"
        )


def require_same_arithmetic(checkpoint: Path, now: Mapping[str, str]) -> None:
    """Check that a run goes on with the arithmetic it began with, where settings say `auto`.

    Args:
        checkpoint: Where it goes on from.
        now: The settings `run.device` and `run.precision`, decided.

    Raises:
        ValueError: One is decided otherwise here.
    """
    before = read_json(checkpoint / STATE).get("arithmetic", now)
    for setting, value in now.items():
        if before.get(setting) != value:
            raise ValueError(
                f"{setting}: this run was computed with {before.get(setting)}, and here it would "
                f"be {value}, with other last digits; go on on a machine like the first, or choose "
                "another folder with --run.out"
            )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted name."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


class StopRequest:
    """Whether a signal has asked the run to stop after its step."""

    def __init__(self) -> None:
        self.by: str | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGTERM, SIGINT or SIGUSR1 into a request; the second acts as usual."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}

    def ask(number: int, frame: FrameType | None) -> None:
        request.by = signal.Signals(number).name
        signal.signal(number, before[number])

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
