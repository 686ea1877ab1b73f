"""When checkpoints are written, which are kept, and a thread that writes them."""

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from protoclip.models.loading import checkpoints
from protoclip.training.checkpoint import Contents, write_checkpoint

# At an episode's end nothing is written if something was so many seconds ago, or so many times as
# long as writing it took: short episodes would otherwise spend their time on saving.
EPISODE_PAUSE, EPISODE_FACTOR = 15.0, 100.0
# Seconds after which training tries again to save, when it could not.
RETRY_AFTER = 60.0
# Seconds between attempts to write the last checkpoint of a run.
LAST_RETRIES = (5.0, 10.0, 15.0, 30.0)


class Saver:
    """Writes checkpoints of a run beside the training.

    What `save` is given, a thread writes. A failure to write is shown and training goes on;
    checkpoints that are there stay. `insist` does not put up with one.

    Args:
        run: The run folder.
        description: What builds the model again; JSON.
        every_steps: Save every so many steps; 0 for never.
        every_minutes: Save when so many minutes have passed since the last time; 0 for never.
        keep: Newest checkpoints to keep, besides the best.
        clock: Seconds; a test's own.

    Attributes:
        saved_step: Step of the checkpoint that was begun last.
        failed_step: The same where it could not be written, or None.
    """

    def __init__(
        self,
        run: Path,
        *,
        description: Mapping[str, Any],
        every_steps: int,
        every_minutes: float,
        keep: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run, self.description = run, description
        self.every_steps, self.every_minutes, self.keep = every_steps, every_minutes, keep
        self.clock = clock
        self.last = clock()
        self.written_in = 0.0
        self.saved_step = -1
        self.failed_step: int | None = None
        self._problem = ""
        self._write: Callable[[], None] = lambda: None
        self._thread: Thread | None = None

    def due(self, step: int, *, episode_end: bool) -> bool:
        """Whether it is time to save after that step."""
        if step == self.saved_step:
            return False
        waited = self.clock() - self.last
        return (
            (self.every_steps > 0 and step % self.every_steps == 0)
            or (self.every_minutes > 0 and waited >= 60 * self.every_minutes)
            or (episode_end and waited >= max(EPISODE_PAUSE, EPISODE_FACTOR * self.written_in))
            or (self.failed_step is not None and waited >= RETRY_AFTER)
        )

    def save(self, step: int, contents: Contents, *, best: int | None = None) -> None:
        """Start to write; waits for the checkpoint before.

        The tensors are copies of the model's, which goes on training. `best` is the step of a
        checkpoint, maybe this one, that is kept besides the newest.
        """
        self.finish()
        self.last, self.saved_step = self.clock(), step
        kept = None if best is None else self.folder(best)
        self._write = lambda: self._attempt(step, contents, kept)
        self._thread = Thread(target=self._first_attempt, daemon=False)
        self._thread.start()

    def folder(self, step: int) -> Path:
        return self.run / "checkpoints" / f"step-{step:09}"

    def finish(self) -> None:
        """Wait until what was begun is written, or is known not to be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def insist(self) -> None:
        """Wait for the checkpoint that was begun last; if it was not written, try for a minute.

        Raises:
            OSError: It could not be written; says what to do.
        """
        self.finish()
        for pause in LAST_RETRIES:
            if self.failed_step is None:
                return
            warn(f"{self._problem}; trying again in {pause:g} s, the weights are kept in memory")
            time.sleep(pause)
            self._write()
        if self.failed_step is not None:
            left = [str(found) for found in checkpoints(self.run)]
            raise OSError(
                f"{self._problem}, and nothing helped: this checkpoint is lost; make room, then "
                f"the same command with --resume auto goes on from {left[-1] if left else 'the '}"
                f"{'' if left else 'beginning'}"
            )

    def _first_attempt(self) -> None:
        self._write()
        if self.failed_step is not None:
            warn(f"{self._problem}; training goes on, earlier checkpoints are whole")

    def _attempt(self, step: int, contents: Contents, best: Path | None) -> None:
        folder, began = self.folder(step), time.monotonic()
        try:
            write_checkpoint(folder, contents, self.description)
        except Exception as error:  # in a thread, nobody else would hear of it
            self.failed_step = step
            self._problem = f"{folder}: not saved ({error}; {room(self.run, contents.bytes)})"
            return
        self.failed_step, self._write = None, lambda: None  # lets go of the tensors
        self.written_in = time.monotonic() - began
        # Later ones are damaged: the run went on from one before them.
        so_far = [found for found in checkpoints(self.run) if found <= folder]
        for old in so_far[: -self.keep]:
            if old != best:
                shutil.rmtree(old, ignore_errors=True)


def room(folder: Path, needed: int) -> str:
    """The room that files need, and that there is on the disk of a folder."""
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB are free"
    except OSError as error:
        free = str(error)
    return f"{needed / 1e6:,.0f} MB are needed, {free}"


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
