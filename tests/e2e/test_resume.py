"""A run that was stopped goes on as if nothing had happened."""

import json
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from interrupting import (
    assert_equal_ends,
    config_for,
    kill_at_random,
    matrix,
    quick_config,
    relative_difference,
    stop_after,
    train_until,
    with_changes,
    with_out,
)
from protoclip.models import checkpoint as saved
from protoclip.models.checkpoint import MODEL, WEIGHTS, checkpoints, find_checkpoint, model_json
from protoclip.training import run, watch
from testing import build_model, tiny_config, tiny_pairs


def test_a_stopped_run_goes_on_bit_for_bit(tiny_parquet, tmp_path, monkeypatch):
    """In every stage, within and between episodes, after any signal: all tensors and metrics end
    equal, as of two runs with one seed. Afterwards the process has its own signal handlers again,
    and the results name the machines before.
    """
    given = {"episodes": {"replacement": False}, "prototypes": {"extract_transform": "training"}}
    config = config_for(tiny_parquet, tmp_path / "run", **given)
    config = with_changes(config, {"run": {"evaluate": False}})
    run.train(with_out(config, str(tmp_path / "whole")))
    # Steps 1-4 are the warm-up, 5-12 prototypical, 13-16 have a locked image tower.
    for step, by in ((2, "SIGTERM"), (6, "SIGINT"), (8, "SIGUSR1"), (14, "SIGTERM")):
        before = signal.getsignal(getattr(signal, by))
        with monkeypatch.context() as patch:
            stop_after(step, patch, by)
            patch.setattr(watch, "gather_machines", lambda _: watch.Machines(1, 2, "others"))
            stopped = run.train(config, resume="auto")
        assert (stopped["stopped"], stopped["steps"]) == (by, step)
        assert find_checkpoint(tmp_path / "run").name == f"step-{step:09}"
        assert not (tmp_path / "run" / "results.json").exists()
        assert signal.getsignal(getattr(signal, by)) == before
        torch.manual_seed(step)  # the state of this process must not matter
    results = run.train(config, resume="auto")
    assert (results["steps"], results["samples_seen"]) == (16, 256)
    before, now = results["environment"]["machines"]
    assert before == "1 host, 2 ranks on others"
    assert now == f"1 host, 1 rank on {results['environment']['device']}"
    assert_equal_ends(tmp_path / "run", tmp_path / "whole")


def test_other_settings_do_not_go_on(whole, stopped):
    """The error names each with both values."""
    folder = Path(str(stopped.run.out))
    for section, name, value, message in [
        ("optim", "learning_rate", 0.5, r"optim\.learning_rate \(0\.002 before, 0\.5 now\)"),
        ("episodes", "batch_size", 32, r"episodes\.batch_size \(16 before, 32 now\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            run.train(with_changes(stopped, {section: {name: value}}), resume="auto")
    with pytest.raises(ValueError, match="go on with --resume auto"):
        run.train(stopped)
    free = {
        "run": {
            "name": "other",
            "save_minutes": 5.0,
            "save_steps": 5,
            "keep_checkpoints": 3,
        },
        "data": {"workers": 1, "cache_gb": 1.0, "max_bad_share": 0.5},
    }
    assert run.train(with_changes(stopped, free), resume="auto")["steps"] == 16
    assert [path.name[-2:] for path in checkpoints(folder)] == ["10", "15", "16"]
    assert_equal_ends(folder, whole)


def test_a_run_that_lacks_memory_goes_on_with_settings_that_need_less(
    tiny_parquet, tmp_path, capsys
):
    """What the line on memory that ran out advises: a note says what changed, and the run ends as
    it would have, up to rounding."""
    config = quick_config(tiny_parquet, tmp_path / "run")
    changes = {
        # Without BatchNorm, which sees a micro-batch.
        "model": {"image": replace(config.model.image, name="test_vit")},
        "loss": {"prototypical": 0.0},
        "optim": {"eps": 1e-2, "warm_up_steps": 0},
    }
    config = with_changes(config, changes)
    run.train(with_out(config, str(tmp_path / "whole")))
    train_until(3, config)
    less = {"episodes": {"micro_batch_size": 4}, "parallel": {"activation_checkpointing": True}}
    assert run.train(with_changes(config, less), resume="auto")["steps"] == 6
    said = capsys.readouterr().err
    for name in ("episodes.micro_batch_size", "parallel.activation_checkpointing"):
        assert f"{name} (" in said[said.index("note: going on with ") :]
    weights, expected = (
        load_file(find_checkpoint(tmp_path / name) / "model.safetensors")
        for name in ("run", "whole")
    )
    assert relative_difference(weights, expected, config) < 1e-4


def test_other_pairs_that_evaluate_a_run_do_not_go_on(tiny_parquet, tmp_path):
    """Those that evaluated it may move."""
    measured, moved = tmp_path / "measured.parquet", tmp_path / "moved.parquet"
    pq.write_table(tiny_pairs(24, seed=1), measured)
    base = quick_config(tiny_parquet, tmp_path / "run", run={"save_steps": 1})
    config = with_changes(base, {"data": {"validation": str(measured)}})
    train_until(1, config)
    measured.rename(moved)
    pq.write_table(tiny_pairs(24, seed=2), measured)
    message = r"data\.validation: not the pairs that evaluated the run before \(other captions\)"
    with pytest.raises(ValueError, match=message):
        run.train(config, resume="auto")
    now = with_changes(base, {"data": {"validation": str(moved)}})
    assert train_until(2, now, resume="auto")["steps"] == 2


def test_another_teacher_or_start_at_the_same_path_does_not_go_on(tiny_parquet, tmp_path):
    """But what is equal may move."""
    base = quick_config(tiny_parquet, tmp_path / "run", run={"save_steps": 1})
    path, moved, ids = tmp_path / "teacher.npy", tmp_path / "moved.npy", tiny_pairs()["sample_id"]
    for file in (path, moved):
        file.with_suffix(".ids.txt").write_text("\n".join(ids.to_pylist()))

    def write(seed: int) -> None:
        draw = np.random.default_rng(seed)
        np.save(path, draw.normal(size=(len(ids), 8)).astype(np.float32))

    def start(seed: int) -> None:
        weights = dict(build_model(base.model, seed=seed).state_dict())
        facts = {MODEL: model_json(base.model, None)}
        saved.write_checkpoint(tmp_path / "start", {WEIGHTS: weights}, facts)

    write(0)
    start(0)
    changes = {"model": {"start": str(tmp_path / "start")}, "loss": {"keep": 1.0}}
    config = with_changes(base, {**changes, "teacher": {"features": str(path), "number": 4}})
    train_until(1, config)
    path.rename(moved)
    write(1)
    message = r"teacher\.features: not what the run began with \(other features\)"
    with pytest.raises(ValueError, match=message):
        run.train(config, resume="auto")
    config = with_changes(config, {"teacher": {"features": str(moved)}})
    start(1)
    with pytest.raises(ValueError, match=r"model\.start: not .* \(other weights\)"):
        run.train(config, resume="auto")
    start(0)
    assert train_until(2, config, resume="auto")["steps"] == 2


def test_a_precision_that_nobody_named_does_not_change(stopped, monkeypatch, capsys):
    """On a machine that computes otherwise, `auto` is refused with the way out, which works."""
    state = checkpoints(Path(str(stopped.run.out)))[-1] / "state.json"
    stopped = with_changes(stopped, {"run": {"precision": "auto"}})
    monkeypatch.setattr(run, "resolve_precision", lambda *given: "bf16")
    assert '"run.precision": "fp32"' in state.read_text()
    with pytest.raises(ValueError, match=r"computed with fp32.*\(--run.precision bf16\) to go on"):
        run.train(stopped, resume="auto")
    named = with_changes(stopped, {"run": {"precision": "bf16"}})
    assert train_until(8, named, resume="auto")["steps"] == 8
    assert "note: going on with run.precision (" in capsys.readouterr().err


def test_a_finished_run_stays_as_it_is(tiny_run, tiny_parquet):
    """Asked to go on, it returns its results and trains nothing."""
    before = (tiny_run / "results.json").read_text()
    results = run.train(tiny_config(tiny_parquet, out=str(tiny_run)), resume="auto")
    assert {**results, "checksum": json.loads(before)["checksum"]} == json.loads(before)


def test_a_finished_run_is_evaluated_when_that_is_asked_for_later(tiny_parquet, tmp_path):
    """By all that evaluates it, and without a step."""
    for seed, name in enumerate(("measured", "other")):
        pq.write_table(tiny_pairs(16, seed=7 + seed), tmp_path / f"{name}.parquet")
    config = with_changes(
        tiny_config(tiny_parquet, out=str(tmp_path / "run")),
        {"run": {"evaluate": False}, "data": {"validation": str(tmp_path / "measured.parquet")}},
    )
    first = run.train(config)
    assert first["metrics"] == {}
    asked = with_changes(config, {"run": {"evaluate": True}})
    metrics = run.train(asked, resume="auto")["metrics"]
    assert metrics
    guarded = with_changes(asked, {"run": {"guard": [str(tmp_path / "other.parquet")]}})
    again = run.train(guarded, resume="auto")
    assert metrics.items() < again["metrics"].items()
    assert (again["steps"], again["train_seconds"]) == (first["steps"], first["train_seconds"])


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tiny_parquet, shards, tmp_path):
    """Two SIGKILLs at random moments."""
    changes = matrix(tiny_parquet, shards)["shards, queue"]
    config = quick_config(tiny_parquet, tmp_path / "run", **{"run": {"save_steps": 1}, **changes})
    kill_at_random(config, 2, random.Random(0))
    run.train(config, resume="auto")
    run.train(with_out(config, str(tmp_path / "whole")))
    assert_equal_ends(tmp_path / "run", tmp_path / "whole", 6)
    assert not list((tmp_path / "run").rglob(".*"))
