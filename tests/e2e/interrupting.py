"""Interrupted runs, for the tests that go on with them."""

import json
import os
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
from safetensors.torch import load_file

from protoclip.config import Config
from protoclip.data.loader import Batch
from protoclip.models.loading import find_checkpoint
from protoclip.testing import tiny_config
from protoclip.training import run
from protoclip.training.trainer import Trainer

WAYS: dict[str, dict[str, Any]] = {
    "extract": {"prototypes": {"source": "extract"}},
    "queue": {"prototypes": {"source": "queue"}},
    "teacher": {"teacher": {"features": "emoji"}, "run": {"evaluate": False}},
    "no replacement, workers, augmented extraction": {
        "data": {"workers": 1},
        "episodes": {"replacement": False},
        "prototypes": {"extract_transform": "training"},
    },
    "micro-batches": {"episodes": {"micro_batch_size": 8}},
    "stream": {
        "data": {"read": "streaming", "shuffle_buffer": 20},
        "prototypes": {"source": "queue"},
    },
}


def config_for(train: str, out: Path, **changes: Any) -> Config:
    """A run of four episodes of four steps."""
    config = tiny_config(train, out=str(out))
    run_ = replace(config.run, save_minutes=0.0, **changes.pop("run", {}))
    config = replace(config, run=run_)
    for section, values in changes.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    return config


def end_of(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """All tensors of the last checkpoint, and the metrics without times."""
    last = find_checkpoint(folder)
    assert last.name == "step-000000016"
    tensors = {
        f"{kind}/{name}": tensor
        for kind in ("model", "optimizer", "resume")
        for name, tensor in load_file(last / f"{kind}.safetensors").items()
    }
    assert any(name.endswith("/exp_avg_sq") for name in tensors)
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


def after_step(step: int, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call a function when the run has made this many steps."""
    train_step = Trainer.train_step

    def and_work(trainer: Trainer, batch: Batch, **more: Any) -> dict[str, float]:
        metrics = train_step(trainer, batch, **more)
        if trainer.step == step:
            work()
        return metrics

    monkeypatch.setattr(Trainer, "train_step", and_work)


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, by: str = "SIGTERM") -> None:
    """Send a signal to this process when the run has made this many steps."""
    after_step(step, lambda: os.kill(os.getpid(), getattr(signal, by)), monkeypatch)


def kill_at_random(config: Config, kills: int, generator: random.Random) -> None:
    """Train in processes that SIGKILL ends at random moments, each going on with the last one."""
    started = time.monotonic()
    assert in_a_child(with_out(config, f"{config.run.out}-timed"), 120.0), "slower than expected"
    length = time.monotonic() - started
    while kills:
        # One that ended sooner than it could be killed starts again.
        if in_a_child(config, generator.uniform(0.05, length)):
            shutil.rmtree(str(config.run.out))
        else:
            kills -= 1


def in_a_child(config: Config, seconds: float) -> bool:
    """Train in a forked process and kill it after a time; returns whether it ended by then."""
    child = os.fork()
    if child == 0:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            run.train(config, resume="auto")
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


def with_out(config: Config, out: str) -> Config:
    return replace(config, run=replace(config.run, out=out))
