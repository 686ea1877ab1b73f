"""Mistakes that take more than the words of a command; tests/hostile has those of words."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protoclip.cli import main
from protoclip.training.folder import to_toml
from testing import tiny_config, tiny_pairs


def test_too_many_bad_samples_stop_the_run(tmp_path, capsys):
    """With the reasons, in one line, though a worker process wraps its error. What was skipped
    until then stays recorded."""
    path, recipe = tmp_path / "pairs.parquet", tmp_path / "recipe.toml"
    images = tiny_pairs(64)["image"].to_pylist()
    spoiled = [b"nonsense" if row % 8 == 0 else image for row, image in enumerate(images)]
    table = tiny_pairs(64).set_column(0, "image", pa.array(spoiled, pa.binary()))
    pq.write_table(table, path)
    recipe.write_text(to_toml(tiny_config(str(path), out=str(tmp_path / "run"))))
    with pytest.raises(SystemExit):
        main(["train", "--config", str(recipe), "--data.workers", "2"])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "samples read are bad, more than data.max_bad_share (0.05)" in last
    assert last.count("not an image") >= 3
    assert (tmp_path / "run" / "skipped.jsonl").exists()
