"""What `audited.call` checks of every command is noticed if a command does it."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import audited
import pyarrow as pa
import pyarrow.parquet as pq
import pytest


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def through_a_link() -> None:
    Path("../out/link").symlink_to("../elsewhere")
    Path("../out/link/new").write_text("")


def after_an_error() -> None:
    print(f"{audited.ERROR}one", file=sys.stderr)
    print(f"{audited.ERROR}two", file=sys.stderr)
    sys.exit(2)


def in_the_data() -> None:
    """By an extension, which no event tells of."""
    pq.write_table(pa.table({"a": [1]}), "new.parquet", filesystem=pa.fs.LocalFileSystem())


# The current folder is that of the data, `../out` may be written to, `../elsewhere` may not.
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "writes elsewhere": (lambda: Path("../elsewhere/new").write_text(""), "changes"),
    "writes through a link": (through_a_link, "changes"),
    "removes from the data": (lambda: Path("kept").unlink(), "changes"),
    "adds to the data unseen": (in_the_data, "changed"),
    "runs a command": (lambda: subprocess.run(["true"]), "starts a process"),
    "forks": (fork, "starts a process"),
    "connects": (lambda: socket.create_connection(("127.0.0.1", 9)), "connects"),
    "looks up a host": (lambda: socket.getaddrinfo("example.com", 80), "looks up a host"),
    "says two errors": (after_an_error, "two"),
    "ends with 2 and says nothing": (lambda: sys.exit(2), "'x'"),
    "says what a terminal obeys": (lambda: print("\x1b[2J"), r"\\x1b"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_no_command_may_do_is_noticed(name, tmp_path, monkeypatch):
    act, message = WRONG[name]

    def main(words: list[str]) -> None:
        """Says an error in one line, as the real one does."""
        try:
            act()
        except OSError:
            print(f"{audited.ERROR}one", file=sys.stderr)
            sys.exit(2)

    for folder in ("data", "out", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data" / "kept").write_text("")
    (tmp_path / "out" / "own").write_text("")
    monkeypatch.chdir(tmp_path / "data")
    monkeypatch.setattr(audited, "main", main)
    with pytest.raises(AssertionError, match=message):
        audited.call(["x"], writes=[tmp_path / "out"], keeps=tmp_path / "data")
    assert not [*(tmp_path / "elsewhere").iterdir()]


def test_a_traceback_and_a_hang_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(audited, "main", lambda _: [].other)
    with pytest.raises(AttributeError):
        audited.call(["x"])
    monkeypatch.setattr(audited, "main", lambda _: [None for _ in iter(int, 1)])
    with pytest.raises(audited.TooLong):
        audited.call(["x"], seconds=0.2)


def test_what_a_command_may_do_is_let_through(tmp_path, monkeypatch):
    monkeypatch.setattr(audited, "main", lambda _: (tmp_path / "new").write_text(""))
    assert audited.call(["x"], writes=[tmp_path]).code == 0
