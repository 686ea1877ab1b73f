"""Runs small enough for tests."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from interrupting import WAYS, config_for, stop_after, with_out
from protoclip.config import Config
from protoclip.data import pack
from protoclip.data.pairs import ImageTextPairs
from protoclip.testing import tiny_config, tiny_pairs
from protoclip.training import run


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
    pack.pack(ImageTextPairs(tiny_pairs(), name="tiny"), folder, samples_per_shard=32)
    return str(folder)


@pytest.fixture(scope="session")
def whole(
    tiny_parquet: str, shards: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Runs that were not interrupted, by their key in `WAYS`; each is made when first asked for."""
    made: dict[str, Path] = {}

    def get(way: str) -> Path:
        if way not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            train = {"stream": shards, "teacher": "emoji"}.get(way, tiny_parquet)
            run.train(config_for(train, folder, **WAYS[way]))
            made[way] = folder
        return made[way]

    return get


@pytest.fixture(scope="session")
def run_stopped_at_6(tiny_parquet: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with prototypes from the queue, with checkpoints after each of its six steps."""
    saved = {"save_steps": 1, "keep_checkpoints": 9}
    folder = tmp_path_factory.mktemp("stopped") / "run"
    config = config_for(tiny_parquet, folder, run=saved, **WAYS["queue"])
    with pytest.MonkeyPatch.context() as patch:
        stop_after(6, patch)
        run.train(config)
    return config


@pytest.fixture
def stopped(run_stopped_at_6: Config, tmp_path: Path) -> Config:
    """A copy of that run, in a folder of its own."""
    copy = shutil.copytree(str(run_stopped_at_6.run.out), tmp_path / "run")
    return with_out(run_stopped_at_6, str(copy))
