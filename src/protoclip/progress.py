"""Progress with the time that is left, for terminals and for logs."""

import sys
import time
from typing import TextIO


def duration(seconds: float) -> str:
    """A time span in the two units that matter: `45s`, `3m 20s`, `2h 05m`, `4d 07h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole // 60 % 60:02d}m"
    return f"{whole // 86400}d {whole // 3600 % 24:02d}h"


class Progress:
    """Shows how far a long task is and how long is left.

    On a terminal one line is redrawn; elsewhere a line is printed every `interval` seconds, so that
    logs stay readable.

    Args:
        label: What is going on.
        total: Units of work in all.
        stream: Where to; standard error by default.
        interval: Seconds between lines where the stream is no terminal.
    """

    def __init__(
        self, label: str, total: int, *, stream: TextIO | None = None, interval: float = 15.0
    ) -> None:
        self.label = label
        self.total = total
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.interval = 0.2 if self.live else interval
        self.first: int | None = None
        self.start()

    def start(self) -> None:
        """Count time from now rather than from construction."""
        self.started = time.monotonic()
        self.last_shown = self.started

    def update(self, done: int, detail: str = "") -> None:
        """Report `done` units of work, counted from the task's beginning (before a resume too)."""
        now = time.monotonic()
        if self.first is None:
            self.first = done
        finished = done >= self.total
        if now - self.last_shown < self.interval and not finished:
            return
        self.last_shown = now
        rate = (done - self.first) / (now - self.started) if now > self.started else 0.0
        left = f", {duration((self.total - done) / rate)} left" if rate > 0 and not finished else ""
        line = (
            f"{self.label}: {100 * done // max(1, self.total)}%, "
            f"{duration(now - self.started)} so far{left}{f' ({detail})' if detail else ''}"
        )
        if self.live:
            print(f"\r\x1b[2K{line}", end="\n" if finished else "", file=self.stream, flush=True)
        else:
            print(line, file=self.stream, flush=True)
