"""Ranks that share a run folder copy it to a bucket once, and go on from there together."""

from typing import Any

import pyarrow.parquet as pq
import pytest
from fsspec.registry import _registry

from interrupting import SharedBucket, quick_config, stop_after, with_out
from protoclip.config import Config
from protoclip.models.saved import checkpoints
from protoclip.testing import run_distributed, tiny_pairs
from protoclip.training import run


def trained(config: Config, stop: int | None = None) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_registry, "s3", SharedBucket)
        if stop is not None:
            stop_after(stop, patch)
        return run.train(config, resume="auto")


def test_two_ranks_go_on_from_a_bucket(tmp_path):
    pq.write_table(tiny_pairs(), tmp_path / "pairs.parquet")
    settings = {"sync": f"s3://{tmp_path}/bucket", "evaluate": False}
    config = quick_config(str(tmp_path / "pairs.parquet"), tmp_path / "run", run=settings)
    assert [each["steps"] for each in run_distributed(trained, 2, config, 3)] == [3, 3]
    assert [path.name for path in checkpoints(tmp_path / "bucket")] == ["step-000000003"]
    elsewhere = with_out(config, str(tmp_path / "elsewhere"))
    assert [each["steps"] for each in run_distributed(trained, 2, elsewhere)] == [6, 6]
    lines = [(tmp_path / each / "metrics.jsonl").read_text() for each in ("run", "elsewhere")]
    assert lines[1].startswith(lines[0])
    assert (tmp_path / "bucket" / "results.json").is_file()
