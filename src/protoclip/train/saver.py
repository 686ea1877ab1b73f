"""When checkpoints are written, which are kept, and a thread that writes them."""

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from protoclip.train.checkpoint import checkpoints, write_checkpoint

# At an episode's end nothing is written if something was so many seconds ago, or so many times as
# long as writing it took: short episodes would otherwise spend their time on saving.
EPISODE_PAUSE, EPISODE_FACTOR = 15.0, 100.0


class Saver:
    """Writes checkpoints of a run beside the training.

    What `save` is given, a thread writes. A failure to write is shown and training goes on;
    checkpoints that are there stay.

    Args:
        run: The run folder.
        description: What builds the model again; JSON.
        every_steps: Save every so many steps; 0 for never.
        every_minutes: Save when so many minutes have passed since the last time; 0 for never.
        keep: Newest checkpoints to keep, besides the best.
        clock: Seconds; a test's own.
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
        )

    def save(
        self,
        step: int,
        weights: dict[str, Tensor],
        tensors: dict[str, Tensor],
        facts: dict[str, Any],
        *,
        best: int | None = None,
    ) -> None:
        """Start to write; waits for the checkpoint before.

        The weights are copies of the model's, which goes on training. `best` is the step of a
        checkpoint, maybe this one, that is kept besides the newest.
        """
        self.finish()
        self.last, self.saved_step = self.clock(), step
        self._thread = Thread(
            target=self._write,
            args=(f"step-{step:09}", weights, tensors, facts),
            kwargs={"best": None if best is None else f"step-{best:09}"},
            daemon=False,
        )
        self._thread.start()

    def finish(self) -> None:
        """Wait until what was begun is written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(
        self,
        name: str,
        weights: dict[str, Tensor],
        tensors: dict[str, Tensor],
        facts: dict[str, Any],
        *,
        best: str | None,
    ) -> None:
        folder = self.run / "checkpoints" / name
        began = time.monotonic()
        try:
            write_checkpoint(
                folder,
                weights=weights,
                description=self.description,
                tensors=tensors,
                facts=facts,
            )
        except OSError as error:
            print(
                f"warning: {folder}: not saved ({error}); training goes on, earlier checkpoints "
                "are whole",
                file=sys.stderr,
            )
            return
        self.written_in = time.monotonic() - began
        for old in checkpoints(self.run)[: -self.keep]:
            if old.name != best:
                shutil.rmtree(old, ignore_errors=True)
