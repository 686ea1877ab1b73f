"""Progress with the time that is left, for terminals and for logs."""

import atexit
import functools
import os
import sys
import time
from contextlib import suppress
from decimal import Decimal
from typing import Any, TextIO

from rich.console import Console
from rich.progress import Progress as Display
from rich.progress import TextColumn
from rich.table import Column

from protoclip import terminal
from protoclip.terminal import visible


def duration(seconds: float) -> str:
    """A time span in its two largest units: `45s`, `3m 20s`, `2h 05m`, `4d 07h`."""
    whole = round(seconds)
    for size, names, part in ((86400, "dh", 3600), (3600, "hm", 60), (60, "ms", 1)):
        if whole >= size:
            return f"{whole // size}{names[0]} {whole % size // part:02d}{names[1]}"
    return f"{whole}s"


def three_digits(value: float) -> str:
    """A number that is shown, rounded, and without an exponent: `0.512`, `30.3`, `3,750`."""
    return f"{Decimal(f'{value:.3g}'):,f}"


@functools.cache
def display(stream: Any) -> Display:
    """A terminal's lines, one for each task under way; redrawn by `update`, not by a thread."""
    text = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    columns = TextColumn("{task.description}", markup=False, table_column=text), "{task.fields[at]}"
    console = Console(file=stream)
    shown = Display(*columns, console=console, auto_refresh=False, transient=True, expand=True)
    atexit.register(shown.stop)  # brings the cursor back after an error
    return shown


class Progress:
    """Shows how far a task of `total` units is, and how long is left.

    A terminal shows a line for each task; elsewhere a line is printed every 15 seconds. The time
    that is left follows from what came after the first report: before it lie what is made once,
    and what a resume skips. A `quiet` task that ends before it was shown is not shown at all.
    """

    def __init__(self, label: str, total: int, *, quiet: bool = False) -> None:
        self.label, self.total, self.first = visible(label), total, -1
        # None if standard error is closed, or the command is quiet.
        self.stream: TextIO | None = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
        self.stream = None if terminal.is_quiet else self.stream
        shows = self.stream and self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.display = display(self.stream) if self.stream and shows else None
        self.task: Any = None
        self.interval, self.quiet = 0.2 if self.display else 15.0, quiet
        self.started = self.first_at = self.last_shown = time.monotonic()

    def update(self, done: int, detail: str = "") -> None:
        """Report `done` units of work, counted from the task's beginning (before a resume too)."""
        now, finished, done = time.monotonic(), done >= self.total, min(done, self.total)
        if self.first < 0:
            self.first, self.first_at = done, now
        is_new = self.quiet and self.last_shown == self.started
        if now - self.last_shown < self.interval and (is_new or not finished):
            return
        self.last_shown = now
        with suppress(OSError):  # what cannot be shown stops nothing
            self._show(done, detail, now, finished=finished)

    def _show(self, done: int, detail: str, now: float, *, finished: bool) -> None:
        passed, made = now - self.started, done - self.first
        at = f"{100 * done // max(1, self.total)}%, {duration(passed)} so far"
        if made and not finished:
            at += f", {duration((self.total - done) * (now - self.first_at) / made)} left"
        about = f" ({visible(detail)})" if detail else ""
        what = self.label + about
        if self.display is None:
            if self.stream is not None:  # `print` would take standard output
                print(f"{self.label}: {at}{about}", file=self.stream, flush=True)
            return
        if self.task is None:
            self.task = self.display.add_task(what, total=None, at=at)
            self.display.start()
        self.display.update(self.task, description=what, at=at, refresh=not finished)
        if finished:
            self.display.remove_task(self.task)
            self.display.refresh()
            if not self.display.tasks:
                self.display.stop()
            self.display.console.print(f"{self.label}: {at}", markup=False, highlight=False)
            self.task = None
