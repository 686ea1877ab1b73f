"""Every test runs with shapes and types checked at run time, and shares what `shared` has."""

import gc
import importlib
import os
from collections import deque
from itertools import chain
from pathlib import Path

import pytest

import checked

# numba starts OpenMP's threads for all of the process, and a fork of it would wait for them.
os.environ["NUMBA_NUM_THREADS"] = "1"
checked.install()  # before the first import from the package
gc.disable()  # until all is imported; see `protoclip.cli.imports`


def pytest_configure(config: pytest.Config) -> None:
    """The process that only hands tests to others need not import PyTorch, which takes seconds."""
    if not getattr(config.option, "numprocesses", None):
        config.pluginmanager.register(importlib.import_module("shared"))


@pytest.hookimpl(tryfirst=True)  # before another order is drawn
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let each process begin with long tests, so that short ones are left at the end.

    Each of several takes as many tests as the others, one after the other, and then some of those
    that others have not come to. The last ones of all should not take a minute.
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes == 1:
        return
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    long, short = list[list[pytest.Item]](), deque[pytest.Item]()
    for path, tests in files.items():
        is_long = "unit" not in path.parts or any(t.get_closest_marker("slow") for t in tests)
        (long.append if is_long else short.extend)(tests)
    share, ordered = len(items) // processes, list[pytest.Item]()
    for process in range(processes):
        ordered += chain.from_iterable(long[process::processes])
        while short and len(ordered) < share * (process + 1):
            ordered.append(short.popleft())
    items[:] = [*ordered, *short]


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
