"""Runs that are interrupted, for the tests that go on with them."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from protoclip.config import Config
from protoclip.models.loading import find_checkpoint
from protoclip.testing import tiny_config
from protoclip.training import run

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


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, by: str = "SIGTERM") -> None:
    """Send the signal to this process when the run has made so many steps."""
    on_step = run.Session.on_step

    def and_signal(session: run.Session, state: Any, stage: Any) -> None:
        on_step(session, state, stage)
        if state.step == step:
            os.kill(os.getpid(), getattr(signal, by))

    monkeypatch.setattr(run.Session, "on_step", and_signal)


def stopped_run(
    train: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, step: int = 6, keep: int = 9
) -> Config:
    """A run in the way "queue", with checkpoints after every step up to that one."""
    saved = {"save_steps": 1, "keep_checkpoints": keep}
    config = config_for(train, folder, run=saved, **WAYS["queue"])
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        run.train(config)
    return config
