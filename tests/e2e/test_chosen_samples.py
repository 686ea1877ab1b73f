"""Going on with the samples that lists of ids choose; tests/combinations trains on them."""

import json

import pytest

from interrupting import quick_config, train_until
from protoclip.training.run import train


def test_it_goes_on_with_the_same_ids_only(tiny_parquet, tmp_path) -> None:
    """In another order and form they are the same ids."""
    ids = [f"tiny/{row}" for row in range(40)]
    path = tmp_path / "ids"
    path.write_text(json.dumps(ids))
    config = quick_config(tiny_parquet, tmp_path / "run", data={"without": str(path)})
    train_until(3, config)
    path.write_text("sample_id\n" + "\n".join(ids[1:]))
    before = sorted(file for file in (tmp_path / "run").rglob("*") if file.is_file())
    with pytest.raises(ValueError, match=r"data.without: the ids in it have changed since"):
        train(config, resume="auto")
    assert sorted(file for file in (tmp_path / "run").rglob("*") if file.is_file()) == before
    path.write_text("sample_id\n" + "\n".join(ids[::-1]))
    assert train(config, resume="auto")["steps"] == 6
