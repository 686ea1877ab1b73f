"""Runs whose towers learn the features of teachers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import protoclip
from interrupting import assert_equal_ends, quick_config, stop_after, with_changes
from protoclip.config import Config, TeacherConfig
from protoclip.models.saved import find_checkpoint, read_tensors
from protoclip.testing import tiny_pairs
from protoclip.training import trainer
from protoclip.training.run import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and features of most of them by an image teacher and a text teacher."""
    folder = tmp_path_factory.mktemp("pairs")
    table = tiny_pairs(48)
    pq.write_table(table, folder / "pairs.parquet")
    for seed, tower in enumerate(("image", "text")):
        rows = np.random.default_rng(seed).normal(size=(40, 6 + seed)).astype(np.float32)
        known = {"sample_id": table["sample_id"][seed : seed + 40], "features": [*rows]}
        pq.write_table(pa.table(known), folder / f"{tower}.parquet")
    return folder


def distilled(data: Path, out: Path, **loss: object) -> Config:
    """Three episodes of two steps with both teachers; the last one locks the image tower."""
    config = quick_config(str(data / "pairs.parquet"), out, run={"log_every": 1})
    teachers = [
        TeacherConfig(name=f"a.{tower}", features=str(data / f"{tower}.parquet"), tower=tower)
        for tower in ("image", "text")
    ]
    teachers = [replace(teacher, distil=1.0, number=4) for teacher in teachers]
    config = replace(config, teachers=teachers)
    return with_changes(config, {"run": {"evaluate": False}, "loss": loss})


def losses(folder: Path) -> list[set[str]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    steps = [line for line in lines if "train/loss/total" in line]
    return [{key.removeprefix("train/loss/") for key in line if "/loss/" in key} for line in steps]


def test_distillation_alone_clusters_nothing_and_goes_on_exactly(data, tmp_path, monkeypatch):
    """The locked image tower learns no features. Heads come back with a run, and are in no model."""
    alone = {"teacher": 0.0, "prototypical": 0.0}
    config = distilled(data, tmp_path / "run", **alone)
    monkeypatch.setattr(trainer, "cluster_spaces", None)
    train(config)
    both = {"total", "info_nce", "distil/a.image", "distil/a.text"}
    assert losses(tmp_path / "run") == [both] * 4 + [both - {"distil/a.image"}] * 2
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        train(distilled(data, tmp_path / "stopped", **alone))
    train(distilled(data, tmp_path / "stopped", **alone), resume="auto")
    assert_equal_ends(tmp_path / "stopped", tmp_path / "run", steps=6)
    checkpoint = find_checkpoint(tmp_path / "run")
    heads = [key for key in read_tensors(checkpoint / "resume.safetensors") if "_heads" in key]
    assert sum(key.endswith(".weight") for key in heads) == 2
    model, *_ = protoclip.load(tmp_path / "run")
    assert not hasattr(model, "teacher_heads")
