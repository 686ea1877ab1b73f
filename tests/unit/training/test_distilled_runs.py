"""Runs whose towers learn the features of teachers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import protoclip
from interrupting import assert_equal_ends, quick_config, stop_after, with_changes
from protoclip.config import Config, TeacherConfig
from protoclip.models.checkpoint import find_checkpoint, read_run_config, read_tensors
from protoclip.results.page import describe_run
from protoclip.results.read import read_run
from protoclip.training import trainer
from protoclip.training.run import train
from testing import build_model, tiny_pairs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and features of most of them by an image teacher and a text teacher."""
    folder = tmp_path_factory.mktemp("pairs")
    table = tiny_pairs(48)
    pq.write_table(table, folder / "pairs.parquet")
    for seed, tower in enumerate(("image", "text")):
        rows = np.random.default_rng(seed).normal(size=(40, 6 + seed)).astype(np.float32)
        columns = {"sample_id": table["sample_id"][seed : seed + 40], "features": [*rows]}
        pq.write_table(pa.table(columns), folder / f"{tower}.parquet")
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


ALONE = {"teacher": 0.0, "prototypical": 0.0}


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that learns relations and nothing else of its teachers."""
    out = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "cluster_spaces", None)  # nothing may be clustered
        train(distilled(data, out, **ALONE))
    return out


def test_every_stage_learns_but_a_locked_tower(alone):
    both = {"total", "info_nce", "distil/a.image", "distil/a.text"}
    assert losses(alone) == [both] * 4 + [both - {"distil/a.image"}] * 2


def test_a_run_goes_on_exactly(alone, data, tmp_path, monkeypatch):
    config = distilled(data, tmp_path / "stopped", **ALONE)
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        train(config)
    train(config, resume="auto")
    assert_equal_ends(tmp_path / "stopped", alone, steps=6)


def test_everyone_is_told_of_its_teachers(alone, tmp_path):
    learned = "a.image (relations), a.text (relations)"
    protoclip.export(alone, tmp_path / "exported", formats=("open_clip",))
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert f"Taught by {learned}." in card
    assert "[[teachers]]" in card
    assert describe_run(read_run(alone))["teachers"] == learned
    assert read_run_config(str(alone)).uses_of_teachers == learned


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_a_tower_without_a_loss_stays(micro_batch, data, tmp_path):
    """Micro-batches and ranks give it gradients of zero, by which its weights would decay."""
    config = distilled(data, tmp_path / "run", info_nce=0.0, **ALONE)
    episodes = {"locked_image": 0, "warm_up": 0, "micro_batch_size": micro_batch}
    config = with_changes(config, {"episodes": episodes, "optim": {"weight_decay": 10.0}})
    config = replace(config, teachers=[config.teachers[0]])
    before = build_model(config.model, seed=config.run.seed).state_dict()
    train(config)
    after = read_tensors(find_checkpoint(tmp_path / "run") / "model.safetensors")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert any(name.startswith("towers.visual.") for name in moved)
    assert all(name.startswith("towers.visual.") for name in moved)
