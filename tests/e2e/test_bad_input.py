"""Mistakes that take more than the words of a command; tests/hostile has those of words."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protoclip.cli import main
from protoclip.models.saved import find_checkpoint
from protoclip.training import run_folder
from testing import tiny_config, tiny_pairs


def error_of(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    assert stop.value.code == 2
    written = capsys.readouterr().err.strip().splitlines()
    assert len(written) == 1, written
    assert written[-1].startswith("protoclip: error: ")
    return written[-1].removeprefix("protoclip: error: ")


def test_a_checkpoint_of_another_architecture_or_damaged(tiny_run, tmp_path, capsys):
    """Weights load entirely or not at all, and the reason is said."""
    fresh = f"train --model.start {tiny_run} --run.out {tmp_path}/next"
    message = error_of(f"{fresh} --model.embed_dim 64", capsys)
    assert "model.embed_dim: 64 does not go with model.start = " in message
    assert not (tmp_path / "next").exists()
    checkpoint = shutil.copytree(find_checkpoint(tiny_run), tmp_path / "checkpoint")
    (checkpoint / "model.json").write_text("{}")
    assert "model.json is not what was written" in error_of(f"evaluate {checkpoint}", capsys)


def test_too_many_bad_samples_stop_the_run(tmp_path, capsys):
    """With the reasons, in one line, though a worker process wraps its error. What was skipped
    until then stays recorded."""
    path, recipe = tmp_path / "pairs.parquet", tmp_path / "recipe.toml"
    images = tiny_pairs(64)["image"].to_pylist()
    spoiled = [b"nonsense" if row % 8 == 0 else image for row, image in enumerate(images)]
    table = tiny_pairs(64).set_column(0, "image", pa.array(spoiled, pa.binary()))
    pq.write_table(table, path)
    recipe.write_text(run_folder.to_toml(tiny_config(str(path), out=str(tmp_path / "run"))))
    with pytest.raises(SystemExit):
        main(["train", "--config", str(recipe), "--data.workers", "2"])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "samples read are bad, more than data.max_bad_share (0.05)" in last
    assert last.count("not an image") >= 3
    assert (tmp_path / "run" / "skipped.jsonl").exists()
