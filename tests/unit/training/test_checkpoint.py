"""Checkpoints: nested states, full disks, and files that are not as they were written."""

import errno
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import protoclip
from protoclip.models import checkpoint as saved
from protoclip.models.checkpoint import checkpoints, damage
from protoclip.training import folder as run_folder
from protoclip.training.folder import CheckpointWriter
from testing import build_model, tiny_model


def state(weights: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    few = {"w": torch.ones(1000)}
    return {"model": weights or few, "optimizer": few, "source": {"queue": few}}


def writer_of(run: Path, **more: Any) -> CheckpointWriter:
    settings: dict[str, Any] = {"every_steps": 0, "every_minutes": 0.0, "keep": 2}
    return CheckpointWriter(run, **{"description": {}, **settings, **more})


def test_a_nested_state_comes_back_as_it_was(tmp_path, monkeypatch):
    """With keys in the same order, although training changes it while a thread writes."""
    model = build_model(tiny_model(), seed=0)
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
    writer.save(1, state(dict(build_model(tiny_model(), seed=3).state_dict())))
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
        build_model(replace(tiny_model(), start=str(folder)), seed=0)
