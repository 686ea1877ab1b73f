"""Runs whose towers learn the features of teachers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import protoclip
from interrupting import assert_equal_ends, quick_config, stop_after, with_changes
from protoclip.config import Config, SourceConfig, TeacherConfig
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.tools import pack
from protoclip.files import checksum, read_json, to_json
from protoclip.models.checkpoint import (
    CHECKSUMS,
    STATE,
    find_checkpoint,
    read_clusters,
    read_run_config,
    read_tensors,
)
from protoclip.results.page import describe_run
from protoclip.results.read import read_run
from protoclip.training import plan, trainer
from protoclip.training.plan import fit_teachers, make_plan
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
        write_features(folder / f"{tower}.parquet", table["sample_id"][seed : seed + 40], rows)
    return folder


def write_features(path: Path, ids: object, rows: np.ndarray) -> None:
    pq.write_table(pa.table({"sample_id": ids, "features": [*rows]}), path)


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


# Two teachers that are aligned on the training pairs.


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and features of theirs by two teachers that know the same of each."""
    folder = tmp_path_factory.mktemp("agreeing")
    table = tiny_pairs(160)
    pq.write_table(table, folder / "pairs.parquet")
    draw = np.random.default_rng(0)
    known = draw.normal(size=(160, 5))
    for width, tower in enumerate(("image", "text"), start=6):
        rows = known @ draw.normal(size=(5, width)) + 0.1 * draw.normal(size=(160, width))
        write_features(folder / f"{tower}.parquet", table["sample_id"], rows.astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def aligned(agreeing: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of theirs."""
    out = tmp_path_factory.mktemp("aligned") / "run"
    train(distilled(agreeing, out))
    return out


def test_teachers_that_agree_teach_pairs_and_group_in_one_space(aligned):
    """But pairs are not taught in the stage that locks the images."""
    assert ["distil/pairs" in step for step in losses(aligned)] == [True] * 4 + [False] * 2
    clusters = read_clusters(find_checkpoint(aligned))
    assert {clusters[f"a.{tower}"][0].shape[1] for tower in ("image", "text")} == {6}


def test_an_aligned_run_goes_on_with_its_own_space(aligned, agreeing, tmp_path, monkeypatch):
    """Which its checkpoint holds: nothing is fitted again, by whatever rule."""
    config = distilled(agreeing, tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        train(config)
    monkeypatch.setattr(plan, "fit_teachers", None)
    train(config, resume="auto")
    assert_equal_ends(tmp_path / "stopped", aligned, steps=6)


@pytest.mark.parametrize("by_this_version", [True, False])
def test_a_run_that_began_without_a_joint_space_goes_on_without(
    by_this_version, agreeing, tmp_path, monkeypatch
):
    """Though its teachers agree. Checkpoints of earlier versions do not speak of it."""
    whole, stopped = (distilled(agreeing, tmp_path / name) for name in ("whole", "stopped"))
    with monkeypatch.context() as patch:
        patch.setattr(plan, "fit_teachers", lambda _: ({}, []))
        train(whole)
        stop_after(3, patch)
        train(stopped)
    if not by_this_version:
        change_state(find_checkpoint(tmp_path / "stopped"), lambda state: state.pop("joint"))
    train(stopped, resume="auto")
    assert_equal_ends(tmp_path / "stopped", tmp_path / "whole", steps=6)


def change_state(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state, checksums = read_json(checkpoint / STATE), read_json(checkpoint / CHECKSUMS)
    change(state)
    (checkpoint / STATE).write_text(to_json(state), encoding="utf-8")
    checksums[STATE] = checksum((checkpoint / STATE).read_bytes())
    (checkpoint / CHECKSUMS).write_text(to_json(checksums), encoding="utf-8")


def test_what_aligns_is_the_pairs_that_are_trained_on(agreeing, tmp_path):
    table = pq.read_table(agreeing / "pairs.parquet")
    pq.write_table(table.slice(0, 120), tmp_path / "pairs.parquet")
    pq.write_table(table.slice(120), tmp_path / "held_out.parquet")
    for tower in ("image", "text"):
        features = pq.read_table(agreeing / f"{tower}.parquet")
        pq.write_table(features.slice(0, 120), tmp_path / f"{tower}.parquet")
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("pairs", "held_out")}
    data = {"train": files["pairs"], "validation": files["held_out"]}
    configs = (distilled(folder, tmp_path / "run") for folder in (agreeing, tmp_path))
    assert_same_maps(*(with_changes(config, {"data": data}) for config in configs))


def assert_same_maps(*configs: Config) -> None:
    """Into the joint space of teachers that are aligned on the same 120 pairs."""
    maps = []
    for made in map(make_plan, configs):
        assert any("are aligned on 120 training pairs" in note for note in made.notes)
        assert made.joint is not None
        maps.append([*made.joint.values()])
    torch.testing.assert_close(*maps, rtol=0, atol=0)


def test_of_several_sources_those_align_that_both_teachers_know(agreeing, tmp_path):
    """The others teach what a teacher knows of them. Both sources are in each episode."""
    table, named = pq.read_table(agreeing / "pairs.parquet"), list[SourceConfig]()
    for name, pairs in (("one", table.slice(0, 120)), ("two", table)):
        pq.write_table(pairs, tmp_path / f"{name}.parquet")
        named.append(SourceConfig(path=str(tmp_path / f"{name}.parquet"), name=name))
    for tower, known in (("image", ("one", "two")), ("text", ("one",))):
        features = pq.read_table(agreeing / f"{tower}.parquet")
        ids = [f"{name}/{own}" for name in known for own in features["sample_id"].to_pylist()]
        write_features(tmp_path / f"{tower}.parquet", ids, [*features["features"]] * len(known))
    of_one = with_changes(distilled(agreeing, tmp_path / "one"), {"data": {"train": named[0].path}})
    config = distilled(tmp_path, tmp_path / "run")
    config = with_changes(config, {"data": {"train": "emoji", "sources": named}})
    assert_same_maps(of_one, config)
    train(config)
    both = {"distil/a.image", "distil/a.text", "distil/pairs"}
    assert all(step >= both for step in losses(tmp_path / "run")[:4])


@pytest.mark.parametrize("why", ["strangers", "few", "stream"])
def test_a_line_says_why_teachers_are_not_aligned(why, agreeing, tmp_path):
    """They stay as they are if captions are those of other pairs, if they share 40 pairs, and for
    a stream."""
    config = distilled(agreeing, tmp_path / "run")
    path, table = tmp_path / "text.parquet", pq.read_table(agreeing / "text.parquet")
    ids = table["sample_id"].to_pylist()
    columns = {"sample_id": [*ids[1:], ids[0]], "features": table["features"]}
    pq.write_table(
        {"strangers": pa.table(columns), "few": table.slice(0, 40)}.get(why, table), path
    )
    image, text = config.teachers
    config = replace(config, teachers=[image, replace(text, features=str(path))])
    if why == "stream":
        pairs = ImageTextPairs(pq.read_table(agreeing / "pairs.parquet"), name="tiny")
        pack(pairs, tmp_path / "shards", samples_per_shard=40)
        data = {"train": str(tmp_path / "shards"), "read": "streaming", "workers": 0}
        config = with_changes(config, {"data": data})
    made = make_plan(config)
    told = {
        "strangers": "a.image and a.text do not agree, so each teaches by itself: a partner",
        "few": "a.image and a.text are not aligned, since both know only 40 training pairs",
        "stream": "a.image and a.text are not aligned, since the pairs of a stream",
    }
    assert [told[why] in note for note in made.notes].count(True) == 1
    assert made.joint == {}
    assert made.teachers["a.text"].joint is None


@pytest.mark.parametrize(
    "change",
    [
        lambda image, text: [image],
        lambda image, text: [image, replace(image, name="other")],
        lambda image, text: [image, text, replace(text, name="third", distil=0.0)],
        lambda image, text: [image, replace(text, distil=0.0)],
    ],
    ids=["one", "two of images", "three", "one that groups alone"],
)
def test_other_teachers_stay_as_they_are(change, agreeing, tmp_path):
    config = distilled(agreeing, tmp_path / "run")
    made = make_plan(replace(config, teachers=change(*config.teachers)))
    assert (made.joint or {}, [note for note in made.notes if "align" in note]) == ({}, [])


def test_what_was_not_measured_with_a_joint_space_has_none(agreeing, tmp_path):
    """Relations alone, other commands, and a tower that learns a teacher of the other modality."""
    assert make_plan(distilled(agreeing, tmp_path / "run", teacher=0.0)).joint == {}
    made = make_plan(distilled(agreeing, tmp_path / "run"))
    assert fit_teachers(made)[0].keys() == {"a.image", "a.text"}
    for command in ("align", "finetune"):
        assert fit_teachers(replace(made, command=command)) == ({}, [])
    crossed = {**made.teachers, "a.image": replace(made.teachers["a.image"], modality="text")}
    assert fit_teachers(replace(made, teachers=crossed)) == ({}, [])
