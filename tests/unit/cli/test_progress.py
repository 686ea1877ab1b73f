"""Progress says how far a task is and how long is left, and fits its terminal."""

import io
import re
import sys

import pytest

from protoclip import progress
from protoclip.progress import Progress, duration


class Stream(io.TextIOWrapper):
    """A log, or a terminal."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", newline="")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which tests set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_time_span_has_two_units() -> None:
    spans = {0.0: "0s", 45.4: "45s", 59.6: "1m 00s", 200.0: "3m 20s", 7500.0: "2h 05m"}
    spans[371_000.0] = "4d 07h"
    for seconds, text in spans.items():
        assert duration(seconds) == text


def test_a_log_gets_a_line_now_and_then(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most one in each interval, and one at the end; what a resume skips takes no time."""
    stream = Stream(terminal=False)
    monkeypatch.setattr(sys, "stderr", stream)
    shown = Progress("train", 100)
    for done in range(40, 101):
        clock[0] += 1.0
        shown.update(done, "episode 1/2")
    lines = stream.text().splitlines()
    assert lines[0] == "train: 54%, 15s so far, 49s left (episode 1/2)"
    assert lines[-1] == "train: 100%, 1m 01s so far (episode 1/2)"
    assert len(lines) == 5


@pytest.mark.parametrize("width", [60, 80])
def test_a_terminal_line_never_wraps(
    width: int, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long details are cut, the time left is not; a task in a task has a line of its own."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    stream = Stream(terminal=True)
    monkeypatch.setattr(sys, "stderr", stream)
    outer = Progress("train a run with a long name", 3)
    for done in range(1, 4):
        clock[0] += 200.0
        outer.update(done, "episode 3/35, prototypical, 12 samples skipped")
        inner = Progress("evaluate: [images]", 2)
        for part in (1, 2):
            clock[0] += 1.0
            inner.update(part)
    frames = re.split(r"\x1b\[2K|\n|\r", re.sub(r"\x1b\[[?0-9;]*[mhlA]", "", stream.text()))
    assert max(map(len, frames)) <= width
    assert any(frame.endswith("3m 21s so far, 3m 19s left") or "left" in frame for frame in frames)
    assert sum(frame.strip() == "evaluate: [images]: 100%, 2s so far" for frame in frames) == 3
    assert frames[-2].strip() or frames[-3].strip()
    assert not progress.display(stream).tasks
