"""The signals that ask a process to stop, and processes that do not hear them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")  # Windows lacks two
STOPPING = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


def end_process(by: signal.Signals) -> None:
    """Say so and end at once as shells report it, also as the first process of a container.

    The kernel keeps from that one each signal without a handler. SIGINT has Python's, an exception,
    which libraries hide behind another where it meets their import or the interpreter's end.
    """
    text = "interrupted" if by == signal.SIGINT else f"ended by {by.name}"
    if by != signal.SIGINT or multiprocessing.parent_process() is None:
        write_line(f"protoclip: {text}")
    os._exit(128 + by)


def write_line(text: str) -> None:
    """Write a line to standard error within a handler, which may have interrupted `print`."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


@contextmanager
def handle_signals(
    handler: Callable[[signal.Signals], None], numbers: Sequence[signal.Signals] = STOPPING
) -> Iterator[None]:
    """Call a function for each of these signals; in the main thread, the only one that can.

    SIGHUP stays ignored under `nohup`. A signal whose handler is not Python's, as in a program that
    embeds Python, is left to that program: its handler could not be put back.
    """
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if main}
    before = {n: h for n, h in before.items() if h is not None}
    before = {n: h for n, h in before.items() if (n.name, h) != ("SIGHUP", signal.SIG_IGN)}
    for number in before:
        signal.signal(number, lambda number, _: handler(signal.Signals(number)))
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def block_signals() -> Iterator[None]:
    """Hold the signals back in this thread, and for good in processes that start meanwhile.

    These shall call `obey_parent`. Linux only.
    """
    if not hasattr(signal, "sigtimedwait"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent(_worker: int = 0) -> None:
    """End this process, which started within `block_signals`, with its parent or by it.

    One that has something left to write to a parent that was killed would wait for ever.
    """
    parent, starter = multiprocessing.parent_process(), os.getppid()
    if parent is None or not hasattr(signal, "sigtimedwait"):
        return

    def listen() -> None:
        # A parent that was killed before this thread began shows by its pipe alone.
        while os.getppid() == starter and parent.is_alive():
            got = signal.sigtimedwait(STOPPING, 2.0)
            if got and (got.si_signo, got.si_pid) == (signal.SIGTERM, parent.pid):
                break
        os._exit(0)

    threading.Thread(target=listen, name="protoclip-signals", daemon=True).start()
