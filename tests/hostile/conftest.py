"""What commands are given: one small run in good order, and a folder of everything."""

import contextlib
import io
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import world

from interrupting import with_changes
from protoclip.training import folder as run_folder
from protoclip.training import run
from protoclip.training.folder import to_toml
from testing import tiny_config, tiny_pairs


@pytest.fixture(autouse=True, scope="module")
def quick_reports(without_charts: None) -> None:
    """tests/unit/report and tests/browser look at charts."""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs, a recipe, and the run of it; copy it before changing it."""
    home = tmp_path_factory.mktemp("trained")
    pq.write_table(tiny_pairs(64), home / "pairs.parquet")
    config = tiny_config(str(home / "pairs.parquet"), out=str(home / "run"))
    (home / "recipe.toml").write_text(to_toml(config))
    run.train(with_changes(config, {"data": {"validation": 0.4}}))
    return home


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world, and beside it a copy."""
    place = tmp_path_factory.mktemp("hostile") / "world"
    place.mkdir()
    with (
        contextlib.chdir(place),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        world.build()
    shutil.copytree(place, place.with_name("pristine"), symlinks=True, copy_function=world.copy)
    return place


@pytest.fixture(scope="module")
def folder(built: Path) -> Iterator[Path]:
    """The world as the current folder, without a network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(built)
        patch.setattr(socket, "getaddrinfo", no_network(socket.getaddrinfo))
        patch.setenv("COLUMNS", "300")
        # Commands that start a worker for each core then read in this process.
        patch.setattr(run_folder, "LAST_RETRIES", (0.0, 0.0))
        patch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
        yield built


def no_network(before: Any) -> Any:
    def getaddrinfo(host: Any, *more: Any, **options: Any) -> Any:
        if host not in ("127.0.0.1", "localhost", "::1", None):
            raise socket.gaierror(-3, "Temporary failure in name resolution")
        return before(host, *more, **options)

    return getaddrinfo
