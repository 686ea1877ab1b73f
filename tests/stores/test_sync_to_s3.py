"""`run.sync` to an S3 bucket: a run goes on from there with an empty disk."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from interrupting import assert_equal_ends, config_for, train_until, with_changes, with_out
from protoclip.config import Config
from protoclip.models.checkpoint import CHECKSUMS
from protoclip.training import run
from testing import tiny_pairs


@pytest.fixture
def config(store: Any, tmp_path: Path) -> Config:
    """Two steps, with a checkpoint after each."""
    pq.write_table(tiny_pairs(64), tmp_path / "pairs.parquet")
    return config_for(
        str(tmp_path / "pairs.parquet"),
        tmp_path / "run",
        run={"sync": f"{store.url}/runs/a", "save_steps": 1, "evaluate": False},
        episodes={"size": 16, "count": 2},
        data={"workers": 0, "validation": 0.0},
    )


def test_a_run_goes_on_from_s3_with_an_empty_disk(store, keys, config, tmp_path, capsys):
    """Bit for bit, with credentials; nothing else is left there."""
    keys()
    assert train_until(1, config)["steps"] == 1
    marks = [name for name in store.objects() if name.endswith(CHECKSUMS)]
    assert marks == [f"runs/a/checkpoints/step-000000001/{CHECKSUMS}"]
    elsewhere = with_out(config, str(tmp_path / "elsewhere"))
    assert run.train(elsewhere, resume="auto")["steps"] == 2
    assert "step-000000001 fetched from s3://bucket/runs/a" in capsys.readouterr().err
    whole = with_changes(config, {"run": {"out": str(tmp_path / "whole"), "sync": None}})
    run.train(whole)
    assert_equal_ends(tmp_path / "elsewhere", tmp_path / "whole", 2)
    paths = (path for path in (tmp_path / "elsewhere").rglob("*") if path.is_file())
    here = {path.relative_to(tmp_path / "elsewhere").as_posix() for path in paths}
    there = {name.removeprefix("runs/a/") for name in store.objects()}
    assert there - {".protoclip"} == here


def test_wrong_credentials_end_a_run_before_it_begins(store, keys, config):
    for given, reason in (({"found": False}, "Unable to locate"), ({"right": False}, "signature")):
        keys(**given)
        with pytest.raises(
            ValueError, match=f"^run.sync: {store.url}/runs/a: .*{reason}.*"
        ) as error:
            run.train(config)
        assert "\n" not in str(error.value)
        assert "check name, credentials" in str(error.value)
    assert not Path(config.run.out or "").exists()


def test_a_store_that_does_not_list_what_it_took_ends_a_run(store, config, monkeypatch):
    monkeypatch.setattr("s3fs.S3FileSystem.find", lambda *_, **__: [])
    with pytest.raises(ValueError, match="what was written there is not listed; check name"):
        run.train(config)


def test_a_url_with_two_slashes_names_the_same_folder(store, config, tmp_path, capsys):
    """As of an empty variable; s3fs writes to a folder without a name, and lists nothing there."""
    url = f"{store.url}//runs//a"
    twice = with_changes(config, {"run": {"sync": url}})
    run.train(twice)
    elsewhere = with_out(twice, str(tmp_path / "elsewhere"))
    run.train(elsewhere, resume="auto")
    assert f"step-000000002 fetched from {url}" in capsys.readouterr().err
