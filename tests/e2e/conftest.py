"""Runs small enough for tests."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from interrupting import QUEUE, config_for, train_until, with_changes, with_out
from protoclip.config import Config
from protoclip.data import tools
from protoclip.data.pairs import ImageTextPairs
from protoclip.training import run
from testing import tiny_config, tiny_pairs
from tiny_align import saved_sources, tiny_alignment


@pytest.fixture(autouse=True, scope="module")
def quick_reports(without_charts: None) -> None:
    """tests/unit/report and tests/browser look at charts."""


@pytest.fixture(scope="session")
def tiny_parquet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Parquet file of 96 coloured shapes with captions."""
    path = tmp_path_factory.mktemp("data") / "tiny.parquet"
    pq.write_table(tiny_pairs(), path)
    return str(path)


@pytest.fixture(scope="session")
def tiny_run(tiny_parquet: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four tiny episodes."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run.train(tiny_config(tiny_parquet, out=str(folder)))
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny pairs as three tar shards."""
    folder = tmp_path_factory.mktemp("shards")
    tools.pack(ImageTextPairs(tiny_pairs(), name="tiny"), folder, samples_per_shard=32)
    return str(folder)


@pytest.fixture(scope="session")
def whole(tiny_parquet: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with prototypes from the queue."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run.train(config_for(tiny_parquet, folder, **QUEUE))
    return folder


@pytest.fixture(scope="session")
def run_stopped_at_6(tiny_parquet: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The same run, with checkpoints after each of its six steps."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    config = with_changes(
        config_for(tiny_parquet, folder, **QUEUE), {"run": {"save_steps": 1, "keep_checkpoints": 9}}
    )
    train_until(6, config)
    return config


@pytest.fixture
def stopped(run_stopped_at_6: Config, tmp_path: Path) -> Config:
    """A copy of that run, in a folder of its own."""
    copy = shutil.copytree(str(run_stopped_at_6.run.out), tmp_path / "run")
    return with_out(run_stopped_at_6, str(copy))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Settings of a tiny alignment. What one test of a file has encoded, the others read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tiny_alignment(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of `data` for the pairs of `given` and others, by what they are."""
    return saved_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def store(given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of a test's own, with nothing in it."""
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"
