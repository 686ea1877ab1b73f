"""What may go wrong around a run: disks, files, other processes, numbers that are not finite."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from interrupting import WAYS, assert_equal_ends, config_for, stop_after, stopped_run

from protoclip.models.loading import checkpoints
from protoclip.training import checkpoint, run, saver


@pytest.mark.parametrize(
    ("name", "how"),
    [("model.safetensors", "cut"), ("optimizer.safetensors", "changed"), ("state.json", "gone")],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    name: str,
    how: str,
    whole: Callable[[str], Path],
    tiny_parquet: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The one before it is used, and the end is the same."""
    config = stopped_run(tiny_parquet, tmp_path / "run", monkeypatch)
    newest = checkpoints(tmp_path / "run")[-1] / name
    data = newest.read_bytes()
    if how == "gone":
        newest.unlink()
    else:
        newest.write_bytes(data[:-10] if how == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    capsys.readouterr()
    run.train(config, resume="auto")
    shown = capsys.readouterr().err
    assert "passed over" in shown
    assert f"step-000000006 ({name}" in shown
    assert "step-000000005, step 5" in shown
    assert_equal_ends(tmp_path / "run", whole("queue"))


def rewrite(checkpoint_folder: Path, name: str, data: bytes) -> None:
    """Change a file of a checkpoint, and its checksum so that it fits."""
    (checkpoint_folder / name).write_bytes(data)
    path = checkpoint_folder / "checksums.json"
    sums = json.loads(path.read_text())
    path.write_text(json.dumps(sums | {name: checkpoint.checksum(data)}))


def test_a_run_with_damaged_checkpoints_alone_is_not_begun_anew(
    tiny_parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line names them all and says what to do; a file of states that is none is named too."""
    folder = tmp_path / "run"
    config = stopped_run(tiny_parquet, folder, monkeypatch, step=2)
    last = checkpoints(folder)[-1]
    facts = json.loads((last / "state.json").read_text())
    for state in ({}, {"format": facts["format"]}, {**facts, "format": 1}):
        rewrite(last, "state.json", json.dumps(state).encode())
        with pytest.raises(ValueError, match=r"step-000000002/state\.json: not .* version"):
            run.train(config, resume="auto")
    for found in checkpoints(folder):
        (found / "resume.safetensors").unlink()
    with pytest.raises(ValueError, match="every checkpoint of the run is damaged") as raised:
        run.train(config, resume="auto")
    for words in ("step-000000001", "step-000000002", "resume.safetensors", "--run.out"):
        assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(checkpoints(folder)) == 2


def fill_disk(steps: range, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let no checkpoint of these steps be written; returns the attempts, a list that grows."""
    write, attempts = checkpoint.write_checkpoint, []

    def full(folder: Path, *contents: Any) -> None:
        attempts.append(folder.name)
        with monkeypatch.context() as patch:
            if int(folder.name[-9:]) in steps:
                patch.setattr(os, "fsync", no_space)
            write(folder, *contents)

    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, "write_checkpoint", full)
    monkeypatch.setattr(saver, "LAST_RETRIES", (0.0, 0.0))
    return attempts


def test_a_full_disk_does_not_stop_training(
    tiny_parquet: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error is shown, earlier checkpoints are whole, and a later one is written."""
    attempts = fill_disk(range(3, 4), monkeypatch)
    run.train(config_for(tiny_parquet, tmp_path / "run", run={"save_steps": 1}))
    assert attempts.count("step-000000003") == 1
    shown = capsys.readouterr().err
    assert "step-000000003: not saved" in shown
    assert "No space left" in shown
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(names) == ["step-000000015", "step-000000016"]
    assert all(checkpoint.damage(found) is None for found in checkpoints(tmp_path / "run"))


def test_a_run_whose_end_cannot_be_saved_fails_and_goes_on(
    whole: Callable[[str], Path],
    tiny_parquet: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At its end and where a signal stops it; with room made, the end is that of any run."""
    folder = tmp_path / "run"
    config = config_for(tiny_parquet, folder, run={"save_steps": 4}, **WAYS["queue"])
    with monkeypatch.context() as patch:
        attempts = fill_disk(range(6, 17), patch)
        stop_after(6, patch)
        with pytest.raises(OSError, match="step-000000006: not saved"):
            run.train(config)
        assert attempts.count("step-000000006") == 3
    with monkeypatch.context() as patch:
        fill_disk(range(16, 17), patch)
        with pytest.raises(OSError, match=r"goes on from .*step-000000012") as raised:
            run.train(config, resume="auto")
        assert "MB are needed" in str(raised.value)
    assert not (folder / "results.json").exists()
    assert "step-000000004, step 4" in capsys.readouterr().err
    assert run.train(config, resume="auto")["steps"] == 16
    assert_equal_ends(folder, whole("queue"))


def test_a_second_process_on_a_running_folder_is_refused(
    tiny_parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is held by another open file, as another process would hold it."""
    config = stopped_run(tiny_parquet, tmp_path / "run", monkeypatch)
    with (
        FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(ValueError, match="another process is running in this folder"),
    ):
        run.train(config, resume="auto")


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("exploded"),)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["model.safetensors", "resume.safetensors", "state.json"])
def test_a_pickle_in_a_checkpoint_never_runs(
    name: str,
    tiny_parquet: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even with a checksum that fits, it is refused as damaged."""
    config = stopped_run(tiny_parquet, tmp_path / "run", monkeypatch)
    monkeypatch.chdir(tmp_path)
    newest = checkpoints(tmp_path / "run")[-1]
    rewrite(newest, name, pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="damaged"):
        run.train(config, resume="auto")
    assert not (tmp_path / "exploded").exists()


def poison(steps: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the losses of these steps NaN."""
    step = run.Trainer.train_step

    def poisoned(trainer: run.Trainer, module: Any, batch: Any, *rest: Any, **more: Any) -> Any:
        if rest[2].step + 1 in steps:
            batch.image.fill_(float("nan"))
        return step(trainer, module, batch, *rest, **more)

    monkeypatch.setattr(run.Trainer, "train_step", poisoned)


def test_a_step_that_is_not_finite_is_skipped(
    tiny_parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and moments stay as they were, the step is counted, and the next one is taken."""
    folder = tmp_path / "run"
    poison(range(3, 4), monkeypatch)
    saved = {"save_steps": 1, "keep_checkpoints": 9}
    config = config_for(tiny_parquet, folder, run=saved, episodes={"count": 1, "locked_image": 0})
    run.train(config)
    weights = [
        checkpoint.read_tensors(folder / "checkpoints" / f"step-{step:09}" / "model.safetensors")
        for step in (2, 3, 4)
    ]
    trained = [name for name in weights[0] if "running" not in name and "num_batch" not in name]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in trained)
    assert not all(torch.equal(weights[1][name], weights[2][name]) for name in trained)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    counted = {line["step"]: line.get("train/skipped_steps") for line in lines}
    assert counted[2] == 0
    assert counted[3] == 1


def test_a_run_that_does_not_recover_is_given_up(
    tiny_parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ten steps in a row, with the samples of the batch written and a checkpoint kept."""
    folder = tmp_path / "run"
    poison(range(5, 99), monkeypatch)
    config = config_for(
        tiny_parquet, folder, run={"save_steps": 4}, episodes={"warm_up": 4, "locked_image": 0}
    )
    with pytest.raises(ValueError, match="diverged: loss or gradient not finite in 10 steps"):
        run.train(config)
    report = json.loads((folder / "diverged.json").read_text())
    assert report["step"] == 14
    assert len(report["sample_ids"]) == 16
    assert all(name.startswith("tiny/") for name in report["sample_ids"])
    assert checkpoint.damage(checkpoints(folder)[-1]) is None


def test_a_folder_that_cannot_be_written_is_named(tiny_parquet: str, tmp_path: Path) -> None:
    """Here a file is where the folder's parent should be, which stops the superuser too."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/run"):
        run.train(config_for(tiny_parquet, tmp_path / "file" / "run"))


def test_a_disk_that_goes_away_does_not_hang(
    tiny_parquet: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Checkpoints and metrics fail with a warning each; the run ends in an error that names the
    file."""
    folder = tmp_path / "run"

    def vanish(session: Any, state: Any, stage: Any) -> None:
        if state.step == 6:
            folder.rename(tmp_path / "gone")
            folder.write_text("")

    monkeypatch.setattr(saver, "LAST_RETRIES", (0.0,))
    monkeypatch.setattr(run.Session, "on_step", vanish)
    with pytest.raises(OSError, match="run"):
        run.train(config_for(tiny_parquet, folder, run={"save_steps": 4}))
    shown = capsys.readouterr().err
    assert "not saved" in shown
    assert "metrics.jsonl" in shown


def test_the_best_checkpoint_is_kept(
    tmp_path: Path, few_emoji: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides the newest; here the metric falls from the first evaluation on."""
    from protoclip.training import session

    values = iter([0.5, 0.4, 0.3, 0.2])
    monkeypatch.setattr(
        session, "evaluate", lambda *given, **more: {"eval/emoji/knn/acc1": next(values)}
    )
    keep = {"evaluate_every": 1, "keep_best": "eval/emoji/knn/acc1", "keep_checkpoints": 1}
    config = config_for("emoji", tmp_path / "run", run={**keep, "evaluate": False})
    results = run.train(config)
    names = [found.name for found in checkpoints(tmp_path / "run")]
    assert names == ["step-000000004", "step-000000016"]
    assert results["best_checkpoint"] == "checkpoints/step-000000004"
    # One that could not be written is the best no longer: the next best is.
    fill_disk(range(4, 5), monkeypatch)
    values = iter([0.5, 0.4, 0.3, 0.2])
    monkeypatch.setattr(
        session, "evaluate", lambda *given, **more: {"eval/emoji/knn/acc1": next(values)}
    )
    other = replace(config, run=replace(config.run, out=str(tmp_path / "other")))
    assert run.train(other)["best_checkpoint"] == "checkpoints/step-000000008"


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried to allocate 2.00 GiB", ""])
def test_running_out_of_memory_is_one_line(
    words: str,
    tiny_parquet: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the device and on the host it says which settings to lower, without a traceback."""
    from protoclip import cli

    def full(*given: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError(words) if words else MemoryError

    monkeypatch.setattr(run.Trainer, "train_step", full)
    out = ["--run.out", str(tmp_path / "run"), "--run.device", "cpu"]
    with pytest.raises(SystemExit) as exit_:
        cli.main(
            [
                "train",
                "--data.train",
                tiny_parquet,
                "--episodes.size",
                "64",
                "--episodes.batch_size",
                "16",
                "--prototypes.number",
                "8",
                *out,
            ]
        )
    assert exit_.value.code == 1
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert shown.startswith("protoclip: error: out of memory")
    assert "episodes.micro_batch_size" in shown
