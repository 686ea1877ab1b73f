"""When a run saves: in a thread, at most as often as is worth it, and what becomes of old files.

`models/checkpoint.py` has the files of a checkpoint.
"""

import errno
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from protoclip.distributed.collectives import raise_on_all_ranks, rank
from protoclip.distributed.parallel import are_parts
from protoclip.models import checkpoint as saved
from protoclip.terminal import say

# At the end of an episode a checkpoint is due if the last one is older than this many seconds, and
# than this many times as long as writing it took, so that short episodes do not only save.
EPISODE_PAUSE, EPISODE_FACTOR = 15.0, 100.0
# Seconds before another attempt to save: in training, and at the end of a run.
RETRY_AFTER, LAST_RETRIES = 60.0, (5.0, 10.0, 15.0, 30.0)


def newest_intact(run: Path, notes: list[str]) -> Path | None:
    """The newest checkpoint of a run that has no damage; adds a note on each one passed over."""
    damaged: list[str] = []
    for checkpoint in reversed(saved.checkpoints(run)):
        wrong = saved.damage(checkpoint)
        if wrong is None:
            notes += [f"{text}: passed over" for text in damaged]
            return checkpoint
        damaged.append(f"{checkpoint} ({wrong})")
    if damaged:
        raise ValueError(
            f"every checkpoint of the run is damaged or cannot be read: {', '.join(damaged)}; make "
            f"them readable, restore one from a copy, delete {run / 'checkpoints'} to start again, "
            "or choose another folder with --run.out"
        )
    return None


class CheckpointWriter:
    """Decides when to write a checkpoint of a run, writes it in a thread, and removes old ones.

    If one cannot be written there is a warning, and training goes on; only `finish` insists. It
    keeps the newest `keep` checkpoints and the best. `description` is what builds the model again,
    with `text_files` for a Hugging Face text tower or tokenizer. `then` gets each folder when it is
    written.

    Of a sharded model all ranks save and write at the same steps, each its part, and rank 0 alone
    decides, warns, and removes; otherwise rank 0 does all of it.
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
        then: Callable[[Path], None] = lambda folder: None,
        in_use: Callable[[], set[Path]] = set,
    ) -> None:
        self.run, self.description, self.text_files = run, description, text_files
        self.every_steps, self.every_minutes, self.keep = every_steps, every_minutes, keep
        self.then, self.in_use = then, in_use
        self.saved_step = -1  # of the last checkpoint that was begun
        self.failed_step: int | None = None  # the same, if it could not be written
        self.best: tuple[int, float] | None = None  # step and value of an evaluation
        self._rated: tuple[int, float] | None = None  # the same, for the last save
        self.best_written: tuple[int, float] | None = None  # which counts if that one is not
        self._saved_at = time.monotonic()
        self._written_in = 0.0  # seconds
        self._problem = ""
        self._in_parts = False
        self._newest: tuple[Path, Path | None] | None = None  # that is whole, and the best then
        self._pruning, self._told = Lock(), False  # that one could not be removed
        self._pending: tuple[Callable[[], None], Path | None] | None = None
        self._thread: Thread | None = None

    def rate(self, step: int, value: float) -> None:
        """Note the result of an evaluation; higher is better. NaN and infinity do not count."""
        if math.isfinite(value) and (self.best is None or value > self.best[1]):
            self.best = (step, value)
            if step == self.saved_step:  # its checkpoint was begun before it was judged
                self._rated = self.best
                if self.folder(step).is_dir():
                    self.best_written = self.best

    def due(self, step: int, *, episode_end: bool) -> bool:
        """Whether it is time to save after this step."""
        self._drop_unwritten_best()
        age = time.monotonic() - self._saved_at
        return step != self.saved_step and (
            (self.every_steps > 0 and step % self.every_steps == 0)
            or (self.every_minutes > 0 and age >= 60 * self.every_minutes)
            or (episode_end and age >= max(EPISODE_PAUSE, EPISODE_FACTOR * self._written_in))
            or (self.failed_step is not None and age >= RETRY_AFTER)
            or (self.best is not None and self.best[0] == step)
        )

    def _drop_unwritten_best(self) -> None:
        """Let the best that was written count again, if a better one could not be written."""
        if self.best is not None and self.best[0] == self.failed_step:
            self.best = self.best_written

    def settled_best(self) -> tuple[int, float] | None:
        """The best evaluation, once it is known whether the last checkpoint could be written."""
        self.wait()
        self._drop_unwritten_best()
        return self.best

    def go_on_from(self, checkpoint: Path, step: int) -> None:
        """Take a checkpoint for the last one that was written, and remove what a process that was
        killed had no time to."""
        self.saved_step = step
        if rank() == 0:
            self._newest = checkpoint, self.best and self.folder(self.best[0])
            self.prune()

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Start to write a copy of a nested state; `model` and `optimizer` in it are copies."""
        self.settled_best()  # or this step would remove the one that counts
        self._saved_at, self.saved_step = time.monotonic(), step
        self._in_parts = are_parts(state["model"])
        if rank() != 0:
            state = {key: state[key] for key in ("model", "optimizer", "adapters")}
        tensors, facts = saved.checkpoint_files(self.description, state)
        best, self._rated = self.best and self.folder(self.best[0]), self.best
        self._needed = sum(tensor.nbytes for part in tensors.values() for tensor in part.values())
        given: tuple[Any, ...] = (tensors, facts, self.text_files)
        if self._in_parts:
            others = {saved.RESUME: tensors.pop(saved.RESUME)}
            given = (tensors, others, facts, self.text_files)
        way = saved.write_parts if self._in_parts else saved.write_checkpoint
        write = partial(way, self.folder(step), *given)
        self._pending = write, best
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

        Collective.

        Raises:
            OSError: It cannot be written; says what to do.
        """
        self.wait()
        if self._in_parts:
            self._try_again()
            raise_on_all_ranks(self._insist)
        else:
            raise_on_all_ranks(self._try_again_alone)

    def _try_again_alone(self) -> None:
        self._try_again()
        self._insist()

    def _try_again(self) -> None:
        for pause in LAST_RETRIES:
            if self.failed_step is None or self._is_limited:
                return
            if rank() == 0:
                warn(f"trying to save step {self.failed_step} again in {pause:g} s")
            time.sleep(pause)
            self._write()

    def _insist(self) -> None:
        if self.failed_step is not None and rank() == 0:
            left = saved.checkpoints(self.run)
            start = left[-1] if left else "the beginning"
            way = "raise ulimit -f" if self._is_limited else "trying again did not help; make room"
            raise OSError(
                f"{self._problem}: this checkpoint is lost; {way}, then the same command with "
                f"--resume auto goes on from {start}"
            )

    def _write(self) -> None:
        assert self._pending is not None
        write, best = self._pending
        step, folder, began = self.saved_step, self.folder(self.saved_step), time.monotonic()
        try:
            write()
        except Exception as error:  # nobody else would hear of it in a thread
            self.failed_step, self._is_limited = step, getattr(error, "errno", 0) == errno.EFBIG
            if rank() != 0:
                return
            room = f"{self._needed / 1e6:,.0f} MB are needed"
            with suppress(OSError):
                room += f", {shutil.disk_usage(self.run).free / 1e6:,.0f} MB are free"
            self._problem = f"{folder}: not saved ({error}; {room})"
            warn(f"{self._problem}; earlier checkpoints are whole")
            return
        self.failed_step = self._pending = None
        if self._rated is not None and self._rated[0] == step:
            self.best_written = self._rated
        self._written_in = time.monotonic() - began
        if rank() != 0:
            return
        self._newest = folder, best
        self.prune()
        self.then(folder)

    def prune(self) -> None:
        """Remove what is not to be kept, up to the newest checkpoint of this process. Any thread
        may call it. What cannot be removed is told once, and stays."""
        with self._pruning, self._told_once():
            if self._newest is None:
                return
            newest, best = self._newest
            # Later checkpoints are damaged: the run went on from one before them.
            so_far = [path for path in saved.checkpoints(self.run) if path <= newest]
            in_use = self.in_use() | {best}
            for old in so_far[: -self.keep]:
                if old not in in_use:
                    with self._told_once():
                        saved.remove_checkpoint(old)

    @contextmanager
    def _told_once(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._told:
                warn(f"an old checkpoint stays, since it cannot be removed ({error})")
            self._told = True


def warn(text: str) -> None:
    say(f"warning: {text}")
