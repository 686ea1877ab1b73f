"""How long this rank waits within collectives, found out without waiting for a device.

Between CPUs a collective is over when its call is. A card does it later, so there events on its
stream bracket the collective, and their times are read once the device has passed them.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Pairs of events that may wait to be read; reading those that are past costs a step nothing.
MOST_UNREAD = 256


class Waits:
    """Adds up the seconds that pass within `counted`, on the device of the values."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._unread: deque[tuple[Any, Any]] = deque()

    def counted(self, values: Tensor) -> AbstractContextManager[None]:
        if torch.compiler.is_compiling():  # a clock would be a constant of the compiled code
            return nullcontext()
        return self._on_card() if values.device.type == "cuda" else self._on_cpu()

    @contextmanager
    def _on_cpu(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._seconds += time.monotonic() - began

    @contextmanager
    def _on_card(self) -> Iterator[None]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        yield
        end.record()
        self._unread.append((start, end))
        if len(self._unread) > MOST_UNREAD:
            self._read()

    def _read(self) -> None:
        while self._unread and self._unread[0][1].query():
            start, end = self._unread.popleft()
            self._seconds += start.elapsed_time(end) / 1000

    def take(self) -> float:
        """The seconds since the last call; of a card, as far as it is known to have come."""
        self._read()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


WAITS = Waits()  # of this process
