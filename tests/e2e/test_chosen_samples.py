"""Training on the samples that lists of ids choose."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from interrupting import assert_equal_ends, stop_after, with_changes
from protoclip.cli import main
from protoclip.testing import tiny_config, tiny_pairs
from protoclip.training.run import train


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chosen") / "pairs.parquet"
    pq.write_table(tiny_pairs(96), path)
    return path


def config_for(table: Path, out: Path, **data: object):
    sections = {"run": {"save_minutes": 0.0}, "data": {"validation": 0.0, "workers": 1, **data}}
    return with_changes(tiny_config(str(table), out=str(out)), sections)


def test_it_trains_like_on_a_table_of_the_chosen_alone(table: Path, tmp_path: Path) -> None:
    ids = [f"tiny/{row}" for row in range(0, 96, 3)]
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    own = tmp_path / "own.parquet"
    pq.write_table(tiny_pairs(96).take(pa.array(range(0, 96, 3))), own)
    train(config_for(table, tmp_path / "chosen", only=str(tmp_path / "ids.json")))
    train(config_for(own, tmp_path / "whole"))
    assert_equal_ends(tmp_path / "chosen", tmp_path / "whole")


def test_it_goes_on_with_the_same_ids_only(table: Path, tmp_path: Path, monkeypatch) -> None:
    """In another order and form they are the same ids."""
    ids = [f"tiny/{row}" for row in range(40)]
    path = tmp_path / "ids"
    path.write_text(json.dumps(ids))
    config = config_for(table, tmp_path / "run", without=str(path))
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        train(config)
    path.write_text("sample_id\n" + "\n".join(ids[1:]))
    before = sorted(file for file in (tmp_path / "run").rglob("*") if file.is_file())
    with pytest.raises(ValueError, match=r"data.without: the ids in .*ids have changed since"):
        train(config, resume="auto")
    assert sorted(file for file in (tmp_path / "run").rglob("*") if file.is_file()) == before
    path.write_text("sample_id\n" + "\n".join(ids[::-1]))
    train(config, resume="auto")
    train(config_for(table, tmp_path / "whole", without=str(path)))
    assert_equal_ends(tmp_path / "run", tmp_path / "whole")


def test_a_list_of_other_data_is_one_line(table: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "ids.csv").write_text("sample_id\nx\n")
    with pytest.raises(SystemExit):
        main(
            [
                *("train", "--data.train", str(table), "--data.only", str(tmp_path / "ids.csv")),
                *("--run.out", str(tmp_path / "run")),
            ]
        )
    error = capsys.readouterr().err.splitlines()
    assert error == [
        "protoclip: error: data.only: no sample is left of 96; ids of this data look like 'tiny/0'"
    ]
    assert not (tmp_path / "run").exists()
