"""A run is copied to a bucket while it trains, and goes on from there on another machine."""

import re
from pathlib import Path
from typing import Any

import fsspec
import pytest

from interrupting import quick_config, stop_after, with_out
from protoclip.config import Config
from protoclip.models.saved import CHECKSUMS, checkpoints
from protoclip.training import run


@pytest.fixture
def config(bucket: str, tiny_parquet: str, tmp_path: Path) -> Config:
    """Six steps, with a checkpoint after each."""
    settings = {"sync": f"{bucket}/runs/a", "save_steps": 1, "evaluate": False}
    return quick_config(tiny_parquet, tmp_path / "run", run=settings)


def stopped_after(step: int, config: Config) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(step, patch)
        assert run.train(config)["steps"] == step


def objects() -> dict[str, Any]:
    return fsspec.get_filesystem_class("s3").store


def there() -> list[str]:
    """The names of complete checkpoints in the bucket."""
    return sorted(
        name.split("/")[-2] for name in objects() if re.search(rf"step-\d+/{CHECKSUMS}", name)
    )


def test_the_copy_of_a_run_that_goes_on_elsewhere_is_what_that_run_has(config, tmp_path, capsys):
    """That it goes on bit for bit is tested with a real server (tests/stores)."""
    stopped_after(3, config)
    assert (
        there()
        == ["step-000000002", "step-000000003"]
        == [p.name for p in checkpoints(tmp_path / "run")]
    )
    elsewhere = with_out(config, str(tmp_path / "elsewhere"))
    assert run.train(elsewhere, resume="auto")["steps"] == 6
    assert "step-000000003 fetched from s3://bucket/runs/a" in capsys.readouterr().err
    # All of the run is there, and nothing that it deleted.
    here = {
        str(p.relative_to(tmp_path / "elsewhere"))
        for p in (tmp_path / "elsewhere").rglob("*")
        if p.is_file()
    }
    names = {name.removeprefix("/bucket/runs/a/") for name in objects()}
    assert names - {".protoclip"} == here - {".lock"}
