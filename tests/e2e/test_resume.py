"""A run that was interrupted goes on as if it had not been."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interrupting import WAYS, assert_equal_ends, config_for, stop_after, stopped_run

from protoclip.models.loading import find_checkpoint
from protoclip.testing import tiny_config
from protoclip.training import run


@pytest.mark.parametrize(
    ("way", "step"),
    [
        (way, step)
        for way in WAYS
        for step in ([2, 4, 6, 8, 11, 14] if way in ("extract", "queue") else [6, 8, 11])
    ],
)
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
    train = {"stream": shards, "teacher": "emoji"}.get(way, tiny_parquet)
    config = config_for(train, tmp_path / "run", **WAYS[way])
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


def test_old_checkpoints_are_removed(
    tiny_parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as asked for are kept, the newest; no unfinished folder stays."""
    stopped_run(tiny_parquet, tmp_path / "run", monkeypatch, keep=2)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000000005", "step-000000006"]


def test_other_settings_do_not_go_on(
    whole: Callable[[str], Path], tiny_parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What differs is named with both values; what changes no result may differ."""
    config = stopped_run(tiny_parquet, tmp_path / "run", monkeypatch)
    other = replace(config, optim=replace(config.optim, learning_rate=0.5))
    with pytest.raises(ValueError, match=r"optim\.learning_rate \(0\.002 before, 0\.5 now\)"):
        run.train(other, resume="auto")
    with pytest.raises(ValueError, match="go on with --resume auto"):
        run.train(config)
    with pytest.raises(ValueError, match=r"run\.device \(cpu before, auto now\)"):
        run.train(replace(config, run=replace(config.run, device="auto")), resume="auto")
    free = replace(
        config,
        run=replace(config.run, save_minutes=5.0, save_steps=0, keep_checkpoints=3, evaluate=False),
        data=replace(config.data, workers=1, cache="disk", cache_gb=0.5, max_bad_share=0.5),
    )
    assert run.train(free, resume="auto")["steps"] == 16
    assert_equal_ends(tmp_path / "run", whole("queue"))


def test_a_finished_run_stays_as_it_is(tiny_run: Path, tiny_parquet: str) -> None:
    """Asked to go on, it gives its results and trains nothing."""
    before = (tiny_run / "results.json").read_text()
    results = run.train(tiny_config(tiny_parquet, out=str(tiny_run)), resume="auto")
    assert results == json.loads(before)
