"""Hosts on one machine: network namespaces on one bridge, each with its own name, process numbers,
and scratch folder. Linux, as root.

What runs on a host is forked from this process, so it need not import anything again.
"""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.launcher.api import elastic_launch

from protoclip.distributed import collectives

NEW_MOUNTS, NEW_NAME, NEW_PIDS, NETWORK = 0x00020000, 0x04000000, 0x20000000, 0x40000000
DIES_WITH_PARENT = 1  # of prctl
PORT = 29_500
Part = tuple[Any, str, int]  # a function, and which of its calls


class NotAllowed(Exception):
    """Hosts cannot be made here; says why."""


def call(*words: str) -> None:
    try:
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        raise NotAllowed(f"{words[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        raise NotAllowed(f"{' '.join(words)}: {error.stderr.strip()}") from None


@dataclass(eq=False)
class Host:
    """A host; `folder` holds what it alone sees, as `scratch`, and what it printed."""

    name: str
    space: str
    folder: Path
    scratch: Path
    names: Path
    running: list[BaseProcess] = field(default_factory=list)

    def start(self, work: Callable[[], object]) -> BaseProcess:
        """Call a function there, in a process that takes all others of that host with it."""
        process = multiprocessing.get_context("fork").Process(target=self._enter, args=(work,))
        process.start()
        self.running.append(process)
        return process

    def kill(self) -> None:
        """SIGKILL to every process, as if the power had failed."""
        for process in self.running:
            process.kill()
            process.join()

    def link(self, state: str) -> None:
        """Set the link `up` or `down`."""
        call("ip", "-n", self.space, "link", "set", "eth0", state)

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text(encoding="utf-8")

    def _enter(self, work: Callable[[], object]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(DIES_WITH_PARENT, signal.SIGKILL)
        with Path("/run/netns", self.space).open() as network:
            entered = libc.setns(network.fileno(), NETWORK)
        if entered or libc.unshare(NEW_MOUNTS | NEW_NAME | NEW_PIDS):
            raise OSError(ctypes.get_errno(), "cannot enter the host")
        first = os.fork()
        if first:  # it is process 1 there, with which all others end
            _, status = os.waitpid(first, 0)
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
        libc.prctl(DIES_WITH_PARENT, signal.SIGKILL)
        call("mount", "--make-rprivate", "/")
        call("mount", "--bind", str(self.folder / "scratch"), str(self.scratch))
        call("mount", "--bind", str(self.names), "/etc/hosts")
        call("hostname", self.name)
        call("mount", "-t", "proc", "proc", "/proc")
        os.environ |= {"TMPDIR": str(self.scratch), "PROTOCLIP_CACHE": f"{self.scratch}/cache"}
        file = os.open(self.folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
        code = 1
        try:
            work()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


@contextmanager
def hosts(number: int, folder: Path) -> Iterator[list[Host]]:
    """Make so many hosts, and remove them with all that runs there. `folder` is theirs.

    Raises:
        NotAllowed: This machine has no network namespaces, or this user may not make them.
    """
    if sys.platform != "linux" or os.geteuid():
        raise NotAllowed("network namespaces take root on Linux")
    scratch, names = folder / "scratch", folder / "hosts"
    scratch.mkdir(parents=True)
    spaces = [f"pc-{os.getpid()}-{part}" for part in ("net", *range(number))]
    net, *own = spaces
    made: list[Host] = []
    lines = ["127.0.0.1 localhost", *(f"10.77.0.{n + 1} host{n}" for n in range(number))]
    names.write_text("\n".join(lines) + "\n")
    try:
        call("ip", "netns", "add", net)
        call("ip", "-n", net, "link", "add", "bridge", "type", "bridge")
        call("ip", "-n", net, "link", "set", "bridge", "up")
        for n, space in enumerate(own):
            port = f"port{n}"
            call("ip", "netns", "add", space)
            pair = ("type", "veth", "peer", "name", "eth0", "netns", space)
            call("ip", "-n", net, "link", "add", port, *pair)
            call("ip", "-n", net, "link", "set", port, "master", "bridge", "up")
            call("ip", "-n", space, "addr", "add", f"10.77.0.{n + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                call("ip", "-n", space, "link", "set", device, "up")
            host = Host(f"host{n}", space, folder / f"host{n}", scratch, names)
            (host.folder / "scratch").mkdir(parents=True)
            made.append(host)
        yield made
    finally:
        for host in made:
            host.kill()
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def launch(host: Host, options: Sequence[str], work: Callable[[], Any]) -> BaseProcess:
    """`torchrun OPTIONS` on a host, whose ranks call a function."""
    endpoint = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"host0:{PORT}", "--rdzv-id", "test"]

    def agent() -> None:
        words = [*options, *endpoint, "--start-method", "fork", "-m", "unused"]
        config, _, _ = torchrun.config_from_args(torchrun.parse_args(words))
        # It asks for the sources of all that is on the stack, for a log: a quarter of these tests.
        vars(dynamic_rendezvous)["get_method_name"] = lambda: "unknown"
        elastic_launch(config, work)()

    return host.start(agent)


def codes(processes: Sequence[BaseProcess], seconds: float = 120) -> list[int | None]:
    """Their exit codes; None of one that has not ended by then."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    return [process.exitcode for process in processes]


def at(part: Part, rank: int, act: Callable[[], object], once: Path) -> None:
    """In this process and those that it forks: do something when that rank is at a part."""
    owner, name, number = part
    original, calls = getattr(owner, name), []

    def and_act(*given: Any, **more: Any) -> Any:
        calls.append(name)
        if (len(calls), collectives.read_launcher()[0]) == (number, rank) and not once.exists():
            once.touch()
            act()
        return original(*given, **more)

    setattr(owner, name, and_act)


def until(once: Path, running: list[BaseProcess], on: list[Host]) -> None:
    """Wait for a file that what runs on hosts makes."""
    deadline = time.monotonic() + 120
    while not once.exists():
        assert time.monotonic() < deadline, f"{once} does not appear"
        assert all(process.is_alive() for process in running), [host.said for host in on]
        time.sleep(0.02)


def kill_this() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
