"""Checkpoints on a disk that is full, and files that are not as they were written."""

import errno
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import protoclip
from protoclip.data.loader import SkipLog
from protoclip.data.pairs import BadSample
from protoclip.files import write_atomically
from protoclip.models import loading
from protoclip.models.loading import checkpoints, damage
from protoclip.testing import tiny_model
from protoclip.training import saver
from protoclip.training.checkpoint import Contents, write_checkpoint


def contents(weights: dict[str, torch.Tensor] | None = None) -> Contents:
    few = {"w": torch.ones(250_000)}
    return Contents(weights=weights or few, optimizer=few, tensors=few, facts={})


def saver_of(run: Path, **more: Any) -> saver.Saver:
    settings: dict[str, Any] = {"every_steps": 0, "every_minutes": 0.0, "keep": 2, **more}
    return saver.Saver(run, description={}, **settings)


@pytest.fixture
def full_times(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a write meets a full disk from now on, in a list of one number to set."""
    left, fsync = [0], os.fsync

    def may_fail(handle: int) -> None:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", may_fail)
    monkeypatch.setattr(saver, "LAST_RETRIES", (0.0, 0.0, 0.0))
    return left


def test_the_last_checkpoint_is_tried_until_there_is_room(
    full_times: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The warnings name the file, and the room that is needed and there."""
    full_times[0] = 3
    writer = saver_of(tmp_path)
    writer.save(7, contents())
    writer.insist()
    (found,) = checkpoints(tmp_path)
    assert damage(found) is None
    shown = capsys.readouterr().err
    assert shown.count("trying again in") == 3
    assert "step-000000007" in shown
    assert "3 MB are needed" in shown
    assert f"{found.parent}/.step-000000007.{os.getpid()}/model.safetensors" in shown


def test_a_checkpoint_that_is_never_written_is_an_error(
    full_times: list[int], tmp_path: Path
) -> None:
    """It says where the run goes on; what was there stays, and nothing is half there."""
    writer = saver_of(tmp_path)
    writer.save(3, contents())
    writer.finish()
    full_times[0] = 4
    writer.save(7, contents())
    with pytest.raises(OSError, match=r"goes on from .*step-000000003"):
        writer.insist()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000003"]


def test_training_tries_again_a_minute_after_it_could_not_save(
    full_times: list[int], tmp_path: Path
) -> None:
    now = [0.0]
    writer = saver_of(tmp_path, clock=lambda: now[0])
    full_times[0] = 1
    writer.save(7, contents())
    writer.finish()
    now[0] = saver.RETRY_AFTER - 1
    assert not writer.due(8, episode_end=False)
    now[0] = saver.RETRY_AFTER
    assert writer.due(8, episode_end=False)
    writer.save(8, contents())
    writer.finish()
    now[0] = 3 * saver.RETRY_AFTER
    assert not writer.due(9, episode_end=False)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "step-000000001"
    weights = loading.model(tiny_model(), seed=3).state_dict()
    write_checkpoint(folder, contents(dict(weights)), {"model": asdict(tiny_model())})
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "checksums.json"])
def test_a_flipped_byte_is_noticed_wherever_weights_are_loaded(
    name: str, model_folder: Path
) -> None:
    """One line names the file. Here the byte is one that the format itself does not notice."""
    path = model_folder / name
    data = path.read_bytes()
    # Digits of a size, of the checksum of the weights, of a weight.
    places = {"model.json": data.find(b"32"), "checksums.json": data.find(b"model.safe") + 25}
    place = places.get(name, len(data) - 9)
    try:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match="damaged") as raised:
            protoclip.load(model_folder)
        assert "\n" not in str(raised.value)
        assert name in str(raised.value) or name == "checksums.json"
        if name != "model.json":  # which `model.checkpoint` does not read
            with pytest.raises(ValueError, match="damaged"):
                loading.model(replace(tiny_model(), checkpoint=str(model_folder)), seed=0)
    finally:
        path.write_bytes(data)
    protoclip.load(model_folder)


def test_results_that_cannot_be_written_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*given: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(OSError, match=r"results\.json"):
        write_atomically(tmp_path / "results.json", "{}")


def bad(name: str) -> BadSample:
    return BadSample(sample_id=name, where=name, reason="damaged")


def test_skipped_samples_are_known_again_whatever_their_names(tmp_path: Path) -> None:
    """Line breaks that only Unicode knows; lines of garbage, or torn, are passed over and told."""
    path = tmp_path / "skipped.jsonl"
    names = ["a\u2028b.png", "c\x85d.png", "e\nf.png"]
    log = SkipLog(path, max_share=1.0, at_least=1)
    log.add(9, [bad(name) for name in names])
    assert SkipLog(path, max_share=1.0, at_least=1).notes == []
    with path.open("ab") as file:
        file.write(b'garbage\n[1]\n\xff\n{"sample_id": "g.p')
    log = SkipLog(path, max_share=1.0, at_least=1)
    assert log.distinct == 3
    assert log.notes == [f"{path}: ignored 4 damaged lines"]
    log.add(9, [bad(names[0]), bad("h.png")])
    assert log.distinct == 4
    assert SkipLog(path, max_share=1.0, at_least=1).distinct == 4
    assert json.loads(path.read_bytes().split(b"\n")[-2])["sample_id"] == "h.png"


def test_new_checkpoints_outlive_later_ones_that_are_damaged(tmp_path: Path) -> None:
    """A run that went on from before them does not remove what it writes now."""
    writer = saver_of(tmp_path)
    for step in (90, 100):
        saver.write_checkpoint(tmp_path / "checkpoints" / f"step-{step:09}", contents(), {})
        (tmp_path / "checkpoints" / f"step-{step:09}" / "model.safetensors").write_bytes(b"")
    for step in (81, 85):
        writer.save(step, contents())
        writer.finish()
    whole = [int(found.name[-9:]) for found in checkpoints(tmp_path) if damage(found) is None]
    assert whole == [81, 85]
