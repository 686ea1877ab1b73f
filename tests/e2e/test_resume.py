"""A run that was interrupted goes on as if it had not been."""

import json
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from protoclip import run
from protoclip.config import Config
from protoclip.data import packing
from protoclip.data.pairs import ImageTextPairs
from protoclip.testing import tiny_config, tiny_pairs
from protoclip.train import checkpoint, saver
from protoclip.train.checkpoint import checkpoints, find_checkpoint


def config_for(train: str, out: Path, **changes: Any) -> Config:
    """A run of four episodes of four steps, in any of the ways that are to be exact."""
    config = tiny_config(train, out=str(out))
    run_ = replace(config.run, save_minutes=0.0, **changes.pop("run", {}))
    config = replace(config, run=run_)
    for section, values in changes.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    return config


def end_of(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Weights, moments, queue and prototypes at the end, and the metrics but for times."""
    last = find_checkpoint(folder)
    assert last.name == "step-000000016"
    tensors = load_file(last / "model.safetensors") | load_file(last / "resume.safetensors")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [
        {key: value for key, value in json.loads(line).items() if "second" not in key}
        for line in lines
    ]
    return tensors, metrics


def assert_equal_ends(ours: Path, theirs: Path) -> None:
    (tensors, metrics), (expected, expected_metrics) = end_of(ours), end_of(theirs)
    assert tensors.keys() == expected.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], expected[name])] == []
    assert metrics == expected_metrics


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, by: str = "SIGTERM") -> None:
    """Send the signal to this process when the run has made so many steps."""
    on_step = run.Session.on_step

    def and_signal(session: run.Session, state: Any, stage: Any) -> None:
        on_step(session, state, stage)
        if state.step == step:
            os.kill(os.getpid(), getattr(signal, by))

    monkeypatch.setattr(run.Session, "on_step", and_signal)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny pairs as three tar shards."""
    folder = tmp_path_factory.mktemp("shards")
    packing.pack(ImageTextPairs(tiny_pairs(), name="tiny"), folder, samples_per_shard=32)
    return str(folder)


WAYS: dict[str, dict[str, Any]] = {
    "extract": {},
    "queue": {"prototypes": {"source": "queue"}},
    "no replacement, workers": {"data": {"workers": 1}, "episodes": {"replacement": False}},
    "micro-batches": {"episodes": {"micro_batch_size": 8}},
    "stream": {
        "data": {"read": "streaming", "shuffle": 20},
        "prototypes": {"source": "queue"},
    },
}


@pytest.fixture(scope="module")
def whole(
    tiny_parquet: str, shards: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Runs that were not interrupted, made when first asked for."""
    made: dict[str, Path] = {}

    def get(way: str) -> Path:
        if way not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            train = shards if way == "stream" else tiny_parquet
            run.train(config_for(train, folder, **WAYS[way]))
            made[way] = folder
        return made[way]

    return get


@pytest.mark.parametrize("step", [2, 4, 6, 8, 11, 14])
@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_goes_on_bit_for_bit(
    way: str,
    step: int,
    whole: Callable[[str], Path],
    tiny_parquet: str,
    shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the warm-up, within and between episodes, in the locked stage: weights, moments, queue,
    prototypes and metrics end equal, without a step lost or doubled."""
    if way not in ("extract", "queue") and step not in (6, 11):
        pytest.skip("two places do for this way")
    config = config_for(shards if way == "stream" else tiny_parquet, tmp_path / "run", **WAYS[way])
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        stopped = run.train(config)
    assert stopped["stopped"] == "SIGTERM"
    assert stopped["steps"] == step
    assert not (tmp_path / "run" / "results.json").exists()
    torch.manual_seed(step)  # the state of this process has no say
    results = run.train(config, resume="auto")
    assert results["steps"] == 16
    assert results["samples_seen"] == 256
    assert_equal_ends(tmp_path / "run", whole(way))


@pytest.mark.parametrize("by", ["SIGINT", "SIGUSR1"])
def test_every_signal_ends_with_a_checkpoint(
    by: str, tiny_parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the process has its own handlers back afterwards."""
    before = signal.getsignal(getattr(signal, by))
    stop_after(5, monkeypatch, by)
    assert run.train(config_for(tiny_parquet, tmp_path / "run"))["stopped"] == by
    assert find_checkpoint(tmp_path / "run").name == "step-000000005"
    assert signal.getsignal(getattr(signal, by)) == before


def in_a_child(work: Callable[[], None], seconds: float) -> bool:
    """Run in a forked process and kill it after a time; whether it had ended by then."""
    child = os.fork()
    if child == 0:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on_bit_for_bit(
    whole: Callable[[str], Path], tiny_parquet: str, tmp_path: Path
) -> None:
    """Twenty times SIGKILL at random moments, with a checkpoint after every step so that many fall
    into saving; each time it goes on, and in the end nothing differs."""
    config = config_for(tiny_parquet, tmp_path / "run", run={"save_steps": 1}, **WAYS["queue"])
    generator = random.Random(0)
    started = time.monotonic()
    assert in_a_child(lambda: run.train(replace_out(config, tmp_path / "timed")) and None, 120.0)
    length = time.monotonic() - started
    kills = 0
    while kills < 20:
        ended = in_a_child(
            lambda: run.train(config, resume="auto") and None, generator.uniform(0.05, length)
        )
        if ended:  # sooner than it could be killed: once more from the beginning
            assert_equal_ends(tmp_path / "run", whole("queue"))
            shutil.rmtree(tmp_path / "run")
        else:
            kills += 1
    run.train(config, resume="auto")
    assert_equal_ends(tmp_path / "run", whole("queue"))


def replace_out(config: Config, out: Path) -> Config:
    return replace(config, run=replace(config.run, out=str(out)))


def stopped_run(
    train: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, step: int = 6, keep: int = 9
) -> Config:
    """A run with checkpoints after every step up to that one."""
    config = config_for(train, folder, run={"save_steps": 1, "keep_checkpoints": keep})
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        run.train(config)
    return config


@pytest.mark.parametrize("name", ["model.safetensors", "resume.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
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
    assert "step-000000006: passed over" in shown
    assert name in shown
    assert "step-000000005, step 5" in shown
    assert_equal_ends(tmp_path / "run", whole("extract"))


def test_old_checkpoints_are_removed(
    tiny_parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as asked for are kept, the newest; no unfinished folder stays."""
    stopped_run(tiny_parquet, tmp_path / "run", monkeypatch, keep=2)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000000005", "step-000000006"]


def test_a_full_disk_does_not_stop_training(
    tiny_parquet: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error is shown, earlier checkpoints are whole, and a later one is written."""
    write, calls = checkpoint.write_checkpoint, []

    def full(folder: Path, **contents: Any) -> None:
        calls.append(folder.name)
        if folder.name == "step-000000003":
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", no_space)
                write(folder, **contents)
        else:
            write(folder, **contents)

    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, "write_checkpoint", full)
    run.train(config_for(tiny_parquet, tmp_path / "run", run={"save_steps": 1}))
    assert "step-000000003" in calls
    shown = capsys.readouterr().err
    assert "step-000000003: not saved" in shown
    assert "No space left" in shown
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(names) == ["step-000000015", "step-000000016"]
    assert all(checkpoint.damage(found) is None for found in checkpoints(tmp_path / "run"))


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


def test_other_settings_do_not_go_on(
    tiny_parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What differs is named with both values; what changes no result may differ."""
    config = stopped_run(tiny_parquet, tmp_path / "run", monkeypatch)
    other = replace(config, optim=replace(config.optim, learning_rate=0.5))
    with pytest.raises(ValueError, match=r"optim\.learning_rate \(0\.001 before, 0\.5 now\)"):
        run.train(other, resume="auto")
    with pytest.raises(ValueError, match="go on with --resume auto"):
        run.train(config)
    free = replace(config, run=replace(config.run, save_minutes=5.0))
    assert run.train(free, resume="auto")["steps"] == 16


def test_a_finished_run_stays_as_it_is(tiny_run: Path, tiny_parquet: str) -> None:
    """Asked to go on, it gives its results and trains nothing."""
    before = (tiny_run / "results.json").read_text()
    results = run.train(tiny_config(tiny_parquet, out=str(tiny_run)), resume="auto")
    assert results == json.loads(before)


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
    (newest / name).write_bytes(pickle.dumps(Bomb()))
    sums = json.loads((newest / "checksums.json").read_text())
    sums[name] = checkpoint.checksum((newest / name).read_bytes())
    (newest / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(ValueError, match="damaged"):
        run.train(config, resume="auto")
    assert not (tmp_path / "exploded").exists()
