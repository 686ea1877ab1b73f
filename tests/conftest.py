"""Every test runs with shapes and types checked at run time, and shares what `shared` has."""

import gc
import importlib
import os

import pytest

import checked

# numba starts OpenMP's threads for all of the process, and a fork of it would wait for them.
os.environ["NUMBA_NUM_THREADS"] = "1"
checked.install()  # before the first import from the package
gc.disable()  # until all is imported; see `quick_imports` in `protoclip.cli.spec`


def pytest_configure(config: pytest.Config) -> None:
    """The process that only hands tests to others need not import PyTorch, which takes seconds."""
    if not getattr(config.option, "numprocesses", None):
        config.pluginmanager.register(importlib.import_module("shared"))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
