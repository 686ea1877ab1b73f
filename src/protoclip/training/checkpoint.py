"""Checkpoints: folders that appear whole or not at all, with a checksum of every file.

Tensors are safetensors and everything else is JSON, so loading a checkpoint runs no code from it.
`model.safetensors` and `model.json` are the model, which a run may have in its own folder too.
`optimizer.safetensors`, which only rank 0 reads, `resume.safetensors` and `state.json` are what a
run needs besides to go on.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from protoclip.distributed.collectives import rank
from protoclip.files import (
    checksum,
    read_json,
    replacing,
    sync_folder,
    to_json,
    write_atomically,
)
from protoclip.models import loading
from protoclip.models.halves import TEXT_FILES
from protoclip.models.loading import CHECKSUMS, MODEL, OPTIMIZER, RESUME, STATE, WEIGHTS
from protoclip.terminal import say

FORMAT = 3  # of what a run needs to go on
TENSOR = "$tensor"  # key in `state.json` of an object that stands for the tensor of that name
# At the end of an episode a checkpoint is due if the last one is older than this many seconds, and
# than this many times as long as writing it took, so that short episodes do not only save.
EPISODE_PAUSE, EPISODE_FACTOR = 15.0, 100.0
# Seconds before another attempt to save: in training, and at the end of a run.
RETRY_AFTER, LAST_RETRIES = 60.0, (5.0, 10.0, 15.0, 30.0)


def split(state: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """A copy of a nested state as JSON; adds copies of its tensors to `tensors`, on the CPU."""
    if isinstance(state, Tensor):
        assert name not in tensors, f"{name}: two tensors of this name"
        tensors[name] = state.detach().to("cpu", copy=True)
        return {TENSOR: name}
    prefix = name and f"{name}/"
    if isinstance(state, Mapping):
        return {key: split(value, tensors, f"{prefix}{key}") for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [split(value, tensors, f"{prefix}{place}") for place, value in enumerate(state)]
    return state


def joined(facts: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The nested state that `split` took apart, with its keys in the same order."""
    if isinstance(facts, list):
        return [joined(value, tensors) for value in facts]
    if not isinstance(facts, dict):
        return facts
    if facts.keys() == {TENSOR}:
        return tensors[facts[TENSOR]]
    return {key: joined(value, tensors) for key, value in facts.items()}


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, dict[str, Tensor]],
    facts: Mapping[str, Any],
    text_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write safetensors and JSON files, by name, to a folder that appears whole or not at all.

    `text_files` are written as they are, to a folder of their own.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    checksums: dict[str, str] = {}

    def write(name: str, data: bytes) -> None:
        checksums[name] = checksum(data)
        write_atomically(temporary / name, data, durable=True)

    try:
        temporary.mkdir()
        if text_files:
            (temporary / TEXT_FILES).mkdir()
        for name, data in (text_files or {}).items():
            write(f"{TEXT_FILES}/{name}", data)
        # One file at a time, so that only one file's bytes are in memory besides the tensors.
        for name, part in tensors.items():
            write(name, save({key: tensor.contiguous() for key, tensor in part.items()}))
        for name, content in {**facts, CHECKSUMS: checksums}.items():
            write(name, (to_json(content, indent=2) + "\n").encode())
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_model(
    run: Path,
    weights: Mapping[str, Tensor],
    description: Mapping[str, Any],
    text_files: Mapping[str, bytes] | None = None,
) -> None:
    """Make a model the run's own: in the run folder, where it comes before the checkpoints.

    It replaces an earlier one. If this ends half-way, there is none, and the newest checkpoint
    counts.
    """
    files = {f"{TEXT_FILES}/{name}": data for name, data in (text_files or {}).items()}
    files[WEIGHTS] = save({name: tensor.contiguous() for name, tensor in weights.items()})
    files[MODEL] = (to_json(description, indent=2) + "\n").encode()
    checksums = {name: checksum(data) for name, data in files.items()}
    files[CHECKSUMS] = (to_json(checksums, indent=2) + "\n").encode()
    if text_files:
        (run / TEXT_FILES).mkdir(exist_ok=True)
    with ExitStack() as stack:
        # Files take their places in the reverse order: `MODEL`, without which there is no model,
        # comes last, and goes first.
        for name in sorted(files, key=lambda name: name != MODEL):
            temporary = stack.enter_context(replacing(run / name))
            write_atomically(temporary, files[name], durable=True)
        (run / MODEL).unlink(missing_ok=True)
    sync_folder(run)


def read_checkpoint(folder: Path, model: nn.Module) -> dict[str, Any]:
    """The state that `CheckpointWriter.save` got, with its tensors on the model's device.

    `model` and `optimizer` are on the CPU, and empty but on rank 0.
    """
    facts, device = read_json(folder / STATE), next(model.parameters()).device
    if facts.get("format") != FORMAT:
        raise ValueError(
            f"{folder / STATE}: not written by this version of protoclip, which cannot go on from "
            "it; start a new run from its weights with --model.start, in another folder"
        )
    stored = loading.read_tensors(folder / RESUME)
    tensors = {name: tensor.to(device) for name, tensor in stored.items()}
    with understood(folder):
        state = {**joined(facts, tensors), "model": {}, "optimizer": {}}
    if rank() == 0:
        state["model"] = loading.read_weights(folder, model)
        state["optimizer"] = loading.read_tensors(folder / OPTIMIZER)
    return state


@contextmanager
def understood(folder: Path) -> Iterator[None]:
    """Turn what a state of another form raises into a `ValueError` with the way out."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{folder / STATE}: not what this version of protoclip writes ({error!r}); "
            f"restore it from a copy, or delete {folder} to go on from the one before"
        ) from error


def facts_of(folder: Path, name: str) -> dict[str, Any]:
    """A section of a checkpoint's state, without its tensors."""
    with understood(folder):
        return dict(read_json(folder / STATE).get(name, {}))


def newest_intact(run: Path, notes: list[str]) -> Path | None:
    """The newest checkpoint of a run that has no damage; adds a note on each one passed over."""
    damaged: list[str] = []
    for found in reversed(loading.checkpoints(run)):
        wrong = loading.damage(found)
        if wrong is None:
            notes += [f"{text}: passed over" for text in damaged]
            return found
        damaged.append(f"{found} ({wrong})")
    if damaged:
        raise ValueError(
            f"every checkpoint of the run is damaged: {', '.join(damaged)}; restore one from a "
            f"copy, delete {run / 'checkpoints'} to start again, or choose another folder with "
            "--run.out"
        )
    return None


class CheckpointWriter:
    """Decides when to write a checkpoint of a run, writes it in a thread, and removes old ones.

    If one cannot be written there is a warning, and training goes on; only `finish` insists. It
    keeps the newest `keep` checkpoints and the best. `description` is what builds the model again,
    with `text_files` for a Hugging Face text tower or tokenizer.
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
    ) -> None:
        self.run, self.description, self.text_files = run, description, text_files
        self.every_steps, self.every_minutes, self.keep = every_steps, every_minutes, keep
        self.saved_step = -1  # of the last checkpoint that was begun
        self.failed_step: int | None = None  # the same, if it could not be written
        self.best: tuple[int, float] | None = None  # step and value of an evaluation
        self._saved_at = time.monotonic()
        self._written_in = 0.0  # seconds
        self._problem = ""
        self._pending: tuple[Callable[[], None], Path | None] | None = None
        self._thread: Thread | None = None

    def rate(self, step: int, value: float) -> None:
        """Note the result of an evaluation; higher is better."""
        if self.best is None or value > self.best[1]:
            self.best = (step, value)

    def due(self, step: int, *, episode_end: bool) -> bool:
        """Whether it is time to save after this step."""
        if self.best is not None and self.best[0] == self.failed_step:
            self.best = None
        age = time.monotonic() - self._saved_at
        return step != self.saved_step and (
            (self.every_steps > 0 and step % self.every_steps == 0)
            or (self.every_minutes > 0 and age >= 60 * self.every_minutes)
            or (episode_end and age >= max(EPISODE_PAUSE, EPISODE_FACTOR * self._written_in))
            or (self.failed_step is not None and age >= RETRY_AFTER)
            or (self.best is not None and self.best[0] == step)
        )

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Start to write a copy of a nested state; `model` and `optimizer` in it are copies."""
        self.wait()
        self._saved_at, self.saved_step = time.monotonic(), step
        rest = {key: value for key, value in state.items() if key not in ("model", "optimizer")}
        tensors: dict[str, Tensor] = {}
        facts = {MODEL: self.description, STATE: split({"format": FORMAT, **rest}, tensors)}
        files = {WEIGHTS: state["model"], OPTIMIZER: state["optimizer"], RESUME: tensors}
        best = self.best and self.folder(self.best[0])
        self._needed = sum(tensor.nbytes for part in files.values() for tensor in part.values())
        self._pending = (
            partial(write_checkpoint, self.folder(step), files, facts, self.text_files),
            best,
        )
        self._thread = Thread(target=self._write, daemon=False)
        self._thread.start()

    def folder(self, step: int) -> Path:
        return self.run / "checkpoints" / f"step-{step:09}"

    def wait(self) -> None:
        """Wait until the last checkpoint is written or could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait for the last checkpoint; if it could not be written, try again for a minute.

        Raises:
            OSError: It cannot be written; says what to do.
        """
        self.wait()
        for pause in LAST_RETRIES:
            if self.failed_step is None:
                return
            warn(f"trying to save step {self.failed_step} again in {pause:g} s")
            time.sleep(pause)
            self._write()
        if self.failed_step is not None:
            left = loading.checkpoints(self.run)
            start = left[-1] if left else "the beginning"
            raise OSError(
                f"{self._problem}, and trying again did not help: this checkpoint is lost; make "
                f"room, then the same command with --resume auto goes on from {start}"
            )

    def _write(self) -> None:
        assert self._pending is not None
        write, best = self._pending
        step, folder, began = self.saved_step, self.folder(self.saved_step), time.monotonic()
        try:
            write()
        except Exception as error:  # nobody else would hear of it in a thread
            self.failed_step = step
            room = f"{self._needed / 1e6:,.0f} MB are needed"
            with suppress(OSError):
                room += f", {shutil.disk_usage(self.run).free / 1e6:,.0f} MB are free"
            self._problem = f"{folder}: not saved ({error}; {room})"
            warn(f"{self._problem}; earlier checkpoints are whole")
            return
        self.failed_step = self._pending = None
        self._written_in = time.monotonic() - began
        # Later checkpoints are damaged: the run went on from one before them.
        so_far = [found for found in loading.checkpoints(self.run) if found <= folder]
        for old in so_far[: -self.keep]:
            if old != best:
                shutil.rmtree(old, ignore_errors=True)


def warn(text: str) -> None:
    say(f"warning: {text}")
