"""What may go wrong around a run: disks, files, other processes, losses that are not finite."""

import json
import os
import pickle
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from interrupting import (
    QUEUE,
    assert_equal_ends,
    config_for,
    read_metrics,
    stop_after,
    train_until,
    with_changes,
)
from protoclip.files import checksum
from protoclip.models import checkpoint as saved
from protoclip.models.checkpoint import checkpoints, damage, read_tensors
from protoclip.training import evaluate, run
from protoclip.training import folder as run_folder
from protoclip.training.trainer import Trainer


@pytest.mark.parametrize(
    ("name", "how"),
    [("optimizer.safetensors", "changed"), ("state.json", "gone")],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(name, how, stopped, capsys):
    """The run goes on from the one before."""
    newest = checkpoints(Path(str(stopped.run.out)))[-1] / name
    data = newest.read_bytes()
    newest.unlink()
    if how != "gone":
        newest.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    train_until(6, stopped, resume="auto")
    shown = capsys.readouterr().err
    assert f"step-000000006 ({name}" in shown
    assert "step-000000005, step 5" in shown
    assert damage(newest.parent) is None


def rewrite(checkpoint_folder: Path, name: str, data: bytes) -> None:
    """Change a file of a checkpoint, and its checksum with it."""
    (checkpoint_folder / name).write_bytes(data)
    path = checkpoint_folder / "checksums.json"
    sums = json.loads(path.read_text())
    path.write_text(json.dumps(sums | {name: checksum(data)}))


def test_a_run_whose_checkpoint_cannot_be_used_does_not_start_again(stopped):
    """One line says that another version wrote it."""
    folder = Path(str(stopped.run.out))
    last = checkpoints(folder)[-1]
    facts = json.loads((last / "state.json").read_text())
    rewrite(last, "state.json", json.dumps({**facts, "format": 2}).encode())
    with pytest.raises(ValueError, match=r"step-000000006/state\.json: not .* version"):
        run.train(stopped, resume="auto")
    assert len(checkpoints(folder)) == 6


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("exploded"),)  # type: ignore[return-value]


def test_a_pickle_in_a_checkpoint_never_runs(stopped, tmp_path, monkeypatch):
    """It is refused as damaged, even with a checksum that fits."""
    monkeypatch.chdir(tmp_path)
    newest = checkpoints(Path(str(stopped.run.out)))[-1]
    rewrite(newest, "resume.safetensors", pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="damaged"):
        run.train(stopped, resume="auto")
    assert not (tmp_path / "exploded").exists()


def fill_disk(steps: Collection[int], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let no checkpoint of these steps be written; returns a list that gets every attempt."""
    write, attempts = saved.write_checkpoint, []

    def full(folder: Path, *given: Any, **more: Any) -> None:
        attempts.append(folder.name)
        with monkeypatch.context() as patch:
            if int(folder.name[-9:]) in steps:
                patch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
            write(folder, *given, **more)

    monkeypatch.setattr(saved, "write_checkpoint", full)
    monkeypatch.setattr(run_folder, "LAST_RETRIES", (0.0, 0.0))
    return attempts


def test_a_full_disk_fails_a_run_only_at_its_end(
    whole, tiny_parquet, tmp_path, monkeypatch, capsys
):
    """In between there is a warning. When a signal stops the run or at its end it is an error."""
    folder = tmp_path / "run"
    config = config_for(tiny_parquet, folder, **QUEUE)
    config = with_changes(config, {"run": {"save_steps": 4}})
    with monkeypatch.context() as patch:
        attempts = fill_disk(range(6, 13), patch)
        stop_after(6, patch)
        with pytest.raises(OSError, match="step-000000006: not saved"):
            run.train(config)
        assert attempts.count("step-000000006") == 3
    with monkeypatch.context() as patch:
        fill_disk([8, 16], patch)
        with pytest.raises(OSError, match=r"goes on from .*step-000000012"):
            run.train(config, resume="auto")
    assert not (folder / "results.json").exists()
    found = checkpoints(folder)
    assert [path.name for path in found] == ["step-000000004", "step-000000012"]
    assert all(damage(path) is None for path in found)
    shown = capsys.readouterr().err
    assert "step-000000004, step 4" in shown
    assert "step-000000008: not saved ([Errno 28] No space left" in shown
    assert run.train(config, resume="auto")["steps"] == 16
    assert_equal_ends(folder, whole)


def poison(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the losses of these steps NaN."""
    step = Trainer.train_step

    def poisoned(trainer: Trainer, batch: Any, **more: Any) -> dict[str, float]:
        if trainer.step + 1 in steps:
            batch.image.fill_(float("nan"))
        return step(trainer, batch, **more)

    monkeypatch.setattr(Trainer, "train_step", poisoned)


def test_steps_that_are_not_finite_are_skipped_up_to_ten(tiny_parquet, tmp_path, monkeypatch):
    """The model stays as it was. The samples of the last batch are written; a checkpoint stays."""
    folder = tmp_path / "run"
    poison([3, *range(5, 99)], monkeypatch)
    often = {"save_steps": 1, "keep_checkpoints": 99}
    stages = {"warm_up": 4, "locked_image": 0}
    with pytest.raises(ValueError, match="diverged: loss or gradient not finite in 10 steps"):
        run.train(config_for(tiny_parquet, folder, run=often, episodes=stages))
    weights = [
        read_tensors(folder / "checkpoints" / f"step-{step:09}" / "model.safetensors")
        for step in (2, 3, 4)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    counted = {line["step"]: line.get("train/skipped_steps") for line in read_metrics(folder)}
    assert (counted[2], counted[3]) == (0, 1)
    report = json.loads((folder / "diverged.json").read_text())
    assert report["step"] == 14
    assert len(report["sample_ids"]) == 16
    assert damage(checkpoints(folder)[-1]) is None


def test_the_best_checkpoint_is_kept(tmp_path, monkeypatch):
    """Besides the newest. One that could not be written is not the best."""
    values = iter([0.5, 0.4, 0.3, 0.2] * 2)
    metric = "eval/emoji/knn/acc1"
    monkeypatch.setattr(evaluate, "evaluate_run", lambda *given, **more: {metric: next(values)})
    keep = {"evaluate_every": 1, "keep_best": metric, "keep_checkpoints": 1, "evaluate": False}
    one_step = {"episodes": {"size": 16}}
    results = run.train(config_for("emoji", tmp_path / "run", run=keep, **one_step))
    names = [found.name for found in checkpoints(tmp_path / "run")]
    assert names == ["step-000000001", "step-000000004"]
    assert results["best_checkpoint"] == "checkpoints/step-000000001"
    fill_disk([1], monkeypatch)
    results = run.train(config_for("emoji", tmp_path / "other", run=keep, **one_step))
    assert results["best_checkpoint"] == "checkpoints/step-000000002"
    with pytest.raises(ValueError, match=rf"run\.keep_best: no metric .* {metric}"):
        run.train(config_for("emoji", tmp_path / "typo", run={**keep, "keep_best": metric[:-1]}))
