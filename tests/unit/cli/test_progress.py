"""Progress says how far a task is and how long is left, and fits its terminal."""

import io
import re
import sys

import pytest

from protoclip import progress
from protoclip.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which tests set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then(clock, capsys):
    """At most one in each interval, and one at the end. The time left counts neither what a resume
    skips nor a first step that took long."""
    shown = Progress("train", 100)
    for done in range(40, 101):
        clock[0] += 10.0 if done == 40 else 1.0
        shown.update(done, "episode 1/2")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 45%, 15s so far, 55s left (episode 1/2)"
    assert lines[-1] == "train: 100%, 1m 10s so far (episode 1/2)"
    assert len(lines) == 5


@pytest.mark.parametrize("width", [60, 80])
def test_a_terminal_line_never_wraps(width, clock, monkeypatch):
    """Long details are cut, the time left is not; a task in a task has a line of its own."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    outer = Progress("train a run with a long name", 3)
    for done in range(1, 4):
        clock[0] += 200.0
        outer.update(done, "episode 3/35, prototypical, 12 samples skipped")
        inner = Progress("evaluate: [images]", 2)
        for part in (1, 2):
            clock[0] += 1.0
            inner.update(part)
    lines = re.split(r"\x1b\[2K|\n|\r", re.sub(r"\x1b\[[?0-9;]*[mhlA]", "", stream.getvalue()))
    assert max(map(len, lines)) <= width
    assert any(re.search(r"train a run .*… 66%, 6m 4\ds so far, 3m 2\ds left", x) for x in lines)
    assert [x.strip() for x in lines].count("evaluate: [images]: 100%, 2s so far") == 3
    assert not progress.display(stream).tasks
