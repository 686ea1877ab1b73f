"""Call the command line in this process, and watch what it does to the machine meanwhile.

An audit hook refuses, and notes, a process that starts, a connection, and a write outside of the
folders that the caller names. Extensions in C and Rust open files unseen by the hook, so the
folder that a command runs in is compared with what it was before, too.
"""

import _posixsubprocess
import faulthandler
import io
import os
import re
import resource
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import joblib
import matplotlib.font_manager  # noqa: F401 (makes folders of its own when it is imported)

from protoclip.cli import main

joblib.cpu_count(only_physical_cores=True)  # scikit-learn asks it, and the first time starts lscpu

SECONDS = 60.0  # of computing, beyond which a call counts as hung; waiting may take ten times that
PROCESSES = {"subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty"}
PROCESSES |= {"os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn"}
CONNECTIONS = {"socket.connect", "socket.sendto", "socket.sendmsg"}
# Names of hosts; `getaddrinfo` of an address in digits asks nobody.
LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}
# Which of an event's arguments are paths that it changes; and which holds the descriptor of the
# folder that a relative path starts from, if any does.
CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),),
    "os.remove": ((0, 1),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
    "os.setxattr": ((0, None),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What a terminal obeys, what ends a line, what turns the direction of text.
OBEYED = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
ERROR = "protoclip: error: "
PAGE = re.compile(r" \(docs/[a-z_]+\.md(#[a-z-]+)?\)$")


class TooLong(BaseException):
    """A call takes longer than it may."""


@dataclass
class Watch:
    """What was refused, and where files may change."""

    folders: Sequence[str]
    refused: list[str] = field(default_factory=list)


_watch: Watch | None = None  # the hook stays for the life of the process
_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    watch = _watch
    if watch is None:
        return
    if event in PROCESSES:
        _refuse(watch, f"starts a process: {event} {arguments!r}"[:300])
    elif event in CONNECTIONS:
        address = arguments[1]
        if isinstance(address, tuple):  # else a socket of this machine's own, or none
            _refuse(watch, f"connects: {event} {address!r}")
    elif event in LOOKUPS:
        host = arguments[0]
        if isinstance(host, str) and not re.fullmatch(r"[\d.]+|[\da-fA-F:.%]*:.*", host):
            _refuse(watch, f"looks up a host: {host!r}")
    elif event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & WRITES and isinstance(path, str | bytes):
            _may_change(watch, path, event)
    elif event in CHANGES:
        for place, folder in CHANGES[event]:
            path, start = arguments[place], -1 if folder is None else arguments[folder]
            if isinstance(path, str | bytes):
                below = f"/proc/self/fd/{start}" if start >= 0 else ""
                _may_change(watch, os.path.join(below, os.fsdecode(path)), event)  # noqa: PTH118


def _refuse(watch: Watch, what: str) -> NoReturn:
    stack = traceback.extract_stack(limit=12)
    where = " < ".join(f"{Path(s.filename).name}:{s.lineno}" for s in reversed(stack[:-2]))
    watch.refused.append(f"{what} ({where})")
    raise PermissionError(f"refused by the audit: {what}")


def _may_change(watch: Watch, path: str | bytes, event: str) -> None:
    place = os.path.realpath(os.fsdecode(path))
    # Python's compiled modules, and devices, are nobody's data.
    if "__pycache__" in place or place.startswith("/dev/"):
        return
    if not any(place == folder or place.startswith(folder + os.sep) for folder in watch.folders):
        _refuse(watch, f"changes {place!r}: {event}")


@contextmanager
def watched(*folders: str | Path) -> Iterator[Watch]:
    """Refuse processes, connections, and changes outside these folders; meanwhile note them."""
    global _hooked, _watch
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    before, start = tempfile.gettempdir(), _posixsubprocess.fork_exec
    with tempfile.TemporaryDirectory() as own:
        _watch = watch = Watch([os.path.realpath(folder) for folder in (*folders, own)])
        tempfile.tempdir = own

        def fork_exec(*arguments: Any) -> int:
            return _refuse(watch, f"starts a process: fork_exec {arguments[0]!r}"[:300])

        # No event tells of the processes that `multiprocessing` spawns.
        _posixsubprocess.fork_exec = fork_exec
        try:
            yield watch
        finally:
            _watch, tempfile.tempdir, _posixsubprocess.fork_exec = None, before, start


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `TooLong` after this time of computing; end the process if even that does not help."""
    assert threading.current_thread() is threading.main_thread()

    def stop(number: int, frame: FrameType | None) -> None:
        stack = "".join(traceback.format_stack(frame)[-6:])
        raise TooLong(f"still busy after {seconds:g} s, in\n{stack}")

    clocks = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    before = {number: signal.signal(number, stop) for number in clocks}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
    faulthandler.dump_traceback_later(20 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        for number, clock in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(number, before[number])


@contextmanager
def full(after: int | None) -> Iterator[None]:
    """Let no file grow beyond so many bytes, as on a full disk but for the number of the error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if after is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (after, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of all that lies below a folder, by name."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a call ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The line of the error, without its page; empty if there was none."""
        last = self.err.rstrip("\n").rpartition("\n")[2]
        return PAGE.sub("", last.removeprefix(ERROR)) if last.startswith(ERROR) else ""


def call(
    words: Sequence[str],
    *,
    writes: Sequence[str | Path] = (),
    keeps: Path | None = None,
    seconds: float = SECONDS,
) -> Ended:
    """Call the command line, and check what every call must keep.

    It succeeds, is stopped after a step, or says one line and ends with code 2. It starts no
    process, connects to nothing, changes nothing but the folders in `writes` and the cache, and
    nothing at all in `keeps`. What it says holds no character that a terminal obeys.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n") for _ in range(2))
    before = contents(keeps) if keeps else {}
    code: Any = 0
    folders = [*writes, os.environ["PROTOCLIP_CACHE"]]
    with watched(*folders) as watch, redirect_stdout(out), redirect_stderr(err), within(seconds):
        try:
            main([*words])
        except SystemExit as stop:
            code = stop.code
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8"))  # type: ignore[attr-defined]
    ended = Ended(code=code, out=texts[0], err=texts[1])
    said = f"{words}\n{ended.out[-2000:]}\n{ended.err[-3000:]}"
    assert not watch.refused, f"{watch.refused}\n{said}"
    stopped = code == 128 + signal.SIGTERM and "SIGTERM: stopped after step" in ended.err
    assert code in (0, 2) or stopped, said
    assert "Traceback" not in ended.err, said
    assert ended.err.count(ERROR) == (code == 2), said
    assert (ended.error != "") == (code == 2), said
    found = OBEYED.search(ended.out + ended.err)
    assert found is None, f"{found!r} in {said!r}"
    if keeps:
        after = contents(keeps)
        changed = sorted({name for name, _ in before.items() ^ after.items()})
        assert not changed, f"changed: {changed[:5]}\n{said}"
    return ended
