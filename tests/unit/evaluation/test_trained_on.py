"""Data that evaluate a model, and that it was trained on, are told, wherever they lie."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from protoclip.config import Config, DataConfig
from protoclip.data import sources
from protoclip.data.pairs import fingerprint_sources
from protoclip.data.sources import drop_rows
from protoclip.evaluation.datasets import open_data
from protoclip.evaluation.validation import count_trained
from protoclip.files import checksum, to_json
from testing import tiny_pairs


@pytest.fixture
def tables(tmp_path, monkeypatch) -> Path:
    """In a folder that is the current one: pairs, a copy of them, and as many others."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("own", 0), ("copy", 0), ("other", 1)):
        pq.write_table(tiny_pairs(24, seed=seed), f"{name}.parquet")
    return tmp_path


@pytest.mark.parametrize("folder", [".", "elsewhere"])
def test_a_run_knows_its_pairs_from_any_folder(folder, tables, monkeypatch):
    """By what its checkpoint keeps of them, also where some of them were held out of it."""
    config = Config.from_dict({"data": {"train": "own.parquet"}})
    pairs = drop_rows(sources.open_samples(config), np.array([3, 5]))
    step = Path("run/checkpoints/step-1")
    step.mkdir(parents=True)
    Path("run/config.toml").write_text('[data]\ntrain = "own.parquet"\n')
    state = to_json({"content": {"sources": fingerprint_sources(pairs)}})
    (step / "state.json").write_text(state)
    (step / "checksums.json").write_text(to_json({"state.json": checksum(state.encode())}))
    Path(folder).mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    up = os.path.relpath(tables)
    for name, is_known in (("own", True), ("copy", True), ("other", False)):
        path = f"{up}/{name}.parquet"
        count = count_trained(f"{up}/run", path, open_data(path), "test", DataConfig())
        assert (count.get("images") == 24) == is_known  # others share some images
    (Path(up) / step / "state.json").unlink()  # without it only the name is known
    own = f"{up}/own.parquet"
    count = count_trained(f"{up}/run", own, open_data(own), "test", DataConfig())
    assert bool(count) == (folder == ".")
