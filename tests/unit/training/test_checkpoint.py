"""Checkpoints: nested states, full disks, and files that are not as they were written."""

import errno
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import protoclip
from protoclip.models import checkpoint as saved
from protoclip.models import loading
from protoclip.models.checkpoint import checkpoints, damage
from protoclip.training import folder as run_folder
from protoclip.training.folder import CheckpointWriter
from testing import tiny_model


def state(weights: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    few = {"w": torch.ones(1000)}
    return {"model": weights or few, "optimizer": few, "source": {"queue": few}}


def writer_of(run: Path, **more: Any) -> CheckpointWriter:
    settings: dict[str, Any] = {"every_steps": 0, "every_minutes": 0.0, "keep": 2}
    return CheckpointWriter(run, **{"description": {}, **settings, **more})


def test_a_nested_state_comes_back_as_it_was(tmp_path, monkeypatch):
    """With keys in the same order, although training changes it while a thread writes."""
    model = loading.model(tiny_model(), seed=0)
    rows, ids = torch.arange(3), ["a", "b"]
    nested = {"z": rows, "a": [1.5, None, ids, {"flag": torch.ones(2, dtype=torch.bool)}]}
    writer = writer_of(tmp_path)
    writer.save(3, {**state(dict(model.state_dict())), "source": nested, "empty": {}, "step": 3})
    rows += 1
    ids[0] = "c"
    writer.wait()
    found = saved.read_checkpoint(writer.folder(3), model)
    assert list(found) == ["format", "source", "empty", "step", "model", "optimizer"]
    assert list(found["source"]) == ["z", "a"]
    assert found["source"]["z"].tolist() == [0, 1, 2]
    assert found["source"]["a"][:3] == [1.5, None, ["a", "b"]]
    assert torch.equal(found["source"]["a"][3]["flag"], torch.ones(2, dtype=torch.bool))
    assert (found["empty"], found["step"]) == ({}, 3)
    assert found["model"].keys() == model.state_dict().keys()
    assert torch.equal(found["optimizer"]["w"], torch.ones(1000))
    monkeypatch.setattr(saved, "rank", lambda: 1)
    other = saved.read_checkpoint(writer.folder(3), model)
    assert (other["model"], other["optimizer"]) == ({}, {})


def test_training_tries_again_a_minute_after_it_could_not_save(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    writer = writer_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
        writer.save(7, state())
        writer.wait()
    now[0] = run_folder.RETRY_AFTER - 1
    assert not writer.is_due(8, episode_end=False)
    now[0] = run_folder.RETRY_AFTER
    assert writer.is_due(8, episode_end=False)
    writer.save(8, state())
    writer.wait()
    now[0] = 3 * run_folder.RETRY_AFTER
    assert not writer.is_due(9, episode_end=False)


def test_a_checkpoint_whose_removal_is_cut_short_is_gone(tmp_path, monkeypatch):
    """Half of one would be taken for damaged. The next process removes the rest."""
    writer = writer_of(tmp_path, keep=1)
    writer.save(1, state())
    writer.wait()
    remove = saved.shutil.rmtree

    def cut(folder: Path, **more: Any) -> None:
        if (folder / "model.json").exists():
            (folder / "model.json").unlink()
        else:
            remove(folder, **more)

    with monkeypatch.context() as patch:
        patch.setattr(saved.shutil, "rmtree", cut)
        writer.save(2, state())
        writer.wait()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000000002"]
    assert len([*(tmp_path / "checkpoints").iterdir()]) == 2
    saved.remove_unfinished(tmp_path)
    assert len([*(tmp_path / "checkpoints").iterdir()]) == 1


@pytest.mark.parametrize("rated", ["before it is saved", "while it is written", "after that"])
def test_if_a_better_checkpoint_cannot_be_written_the_best_one_stays(rated, tmp_path, monkeypatch):
    """A step is evaluated after its checkpoint was begun if `run.save_steps` falls on it."""
    writer, go_on, write = writer_of(tmp_path, keep=1), Event(), saved.write_checkpoint

    def write_late(folder: Path, *given: Any) -> None:
        assert go_on.wait(60)
        if folder == writer.folder(2):
            raise OSError(errno.ENOSPC, "No space left")
        write(folder, *given)

    monkeypatch.setattr(saved, "write_checkpoint", write_late)
    for step, value in ((1, 0.5), (2, 0.9)):
        go_on.clear()
        if rated == "before it is saved":
            writer.rate(step, value)
            assert writer.is_due(step, episode_end=False)
        writer.save(step, state())
        if rated == "while it is written":
            writer.rate(step, value)
        go_on.set()
        writer.wait()
        if rated == "after that":
            writer.rate(step, value)
    for worse in (0.1, float("nan"), float("inf")):
        writer.rate(3, worse)
        assert not writer.is_due(3, episode_end=False)
    for step in (4, 5):
        assert writer.find_best(step) == (1, 0.5)  # a checkpoint holds it
        writer.save(step, state())
        writer.wait()
    assert [found.name[-1] for found in checkpoints(tmp_path)] == ["1", "5"]


def test_new_checkpoints_outlive_later_ones_that_are_damaged(tmp_path):
    """A run that went on from before them must not remove what it writes now."""
    writer = writer_of(tmp_path)
    for step in (90, 100):
        writer.save(step, state())
        writer.wait()
        (writer.folder(step) / "model.safetensors").write_bytes(b"")
    for step in (81, 85):
        writer.save(step, state())
        writer.wait()
    whole = [int(found.name[-9:]) for found in checkpoints(tmp_path) if damage(found) is None]
    assert whole == [81, 85]


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "checksums.json"])
def test_a_flipped_bit_is_noticed_wherever_weights_are_loaded(name, tmp_path):
    """One line names the file. The format itself would not notice this bit."""
    writer = writer_of(tmp_path, description={"model": asdict(tiny_model())})
    writer.save(1, state(dict(loading.model(tiny_model(), seed=3).state_dict())))
    writer.wait()
    folder = writer.folder(1)
    protoclip.load(folder)
    data = (folder / name).read_bytes()
    # In a digit of a size, in the checksum of the weights, in a weight.
    places = {"model.json": data.find(b"32"), "checksums.json": data.find(b"model.safe") + 25}
    place = places.get(name, len(data) - 9)
    (folder / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    named = "" if name == "checksums.json" else name
    with pytest.raises(ValueError, match=rf"(?=.*damaged)(?=.*{named})^[^\n]*$"):
        protoclip.load(folder)
    with pytest.raises(ValueError, match="damaged"):
        loading.model(replace(tiny_model(), start=str(folder)), seed=0)


def test_checkpoints_that_may_not_be_read_are_not_taken_for_none(tmp_path, monkeypatch):
    """A run would begin again, and cut its log. (The superuser may read everything.)"""
    assert checkpoints(tmp_path) == []
    (tmp_path / "checkpoints" / "step-000000001").mkdir(parents=True)
    real = Path.iterdir

    def refuse(path: Path) -> Iterator[Path]:
        if path.name == "checkpoints":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    for find in (
        checkpoints,
        saved.find_checkpoint,
        lambda p: run_folder.find_newest_intact(p, []),
    ):
        with pytest.raises(PermissionError, match="checkpoints"):
            find(tmp_path)


def test_what_killed_processes_left_is_removed(tmp_path):
    """Half a checkpoint may be large. What is whole stays, and so does the lock."""
    kept = [tmp_path / ".lock", tmp_path / "checkpoints" / "step-000000002" / "state.json"]
    left = [
        tmp_path / "checkpoints" / ".step-000000003.99" / "model.safetensors",
        tmp_path / ".results.json.99.tmp",
        tmp_path / "results" / ".emoji-test.parquet.99.tmp",
    ]
    for path in kept + left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    saved.remove_unfinished(tmp_path)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in left)
    assert not left[0].parent.exists()


def test_the_run_of_a_folder_is_found(tmp_path):
    """Of a run, of a checkpoint, and of a link to one; other folders, and names, are of no run."""
    run, link = tmp_path / "run", tmp_path / "link"
    step = run / "checkpoints" / "step-000000002"
    step.mkdir(parents=True)
    (run / "config.toml").write_text("[nothing]\n")
    link.symlink_to(step)
    assert [saved.run_of(path) for path in (run, str(step), link)] == [run, run, run]
    for other in (tmp_path, run / "checkpoints", step / "text", "open_clip:RN50/openai"):
        assert saved.run_of(other) is None
    within = tmp_path / "checkpoints" / "small"
    within.mkdir(parents=True)
    (within / "config.toml").write_text("")
    assert saved.run_of(within) == within
    with pytest.raises(ValueError, match=r"config\.toml: nothing: "):
        saved.read_config(run)
