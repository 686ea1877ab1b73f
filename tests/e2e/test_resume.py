"""A run that was stopped goes on as if nothing had happened."""

import json
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from interrupting import (
    WAYS,
    assert_equal_ends,
    config_for,
    kill_at_random,
    matrix,
    quick_config,
    relative_difference,
    stop_after,
    with_changes,
    with_out,
)
from protoclip.cli import main
from protoclip.config import Config
from protoclip.models import saved
from protoclip.models.saved import checkpoints, find_checkpoint
from protoclip.testing import tiny_config
from protoclip.training import run

# Steps 1-4 are the warm-up, 5-12 prototypical, 13-16 have a locked image tower.
STEPS = {"extract": [2, 6, 8, 14], "queue": [4], "stream": [11]}


@pytest.mark.parametrize(
    ("way", "step"), [(way, step) for way in WAYS for step in STEPS.get(way, [6])]
)
def test_a_stopped_run_goes_on_bit_for_bit(
    way, step, whole, tiny_parquet, shards, tmp_path, monkeypatch
):
    """In every stage, within and between episodes: all tensors and metrics end equal."""
    train = {"stream": shards, "teacher": "emoji"}.get(way, tiny_parquet)
    config = config_for(train, tmp_path / "run", **WAYS[way])
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        stopped = run.train(config)
    assert stopped["stopped"] == "SIGTERM"
    assert stopped["steps"] == step
    assert not (tmp_path / "run" / "results.json").exists()
    torch.manual_seed(step)  # the state of this process must not matter
    results = run.train(config, resume="auto")
    assert results["steps"] == 16
    assert results["samples_seen"] == 256
    assert_equal_ends(tmp_path / "run", whole(way))


@pytest.mark.parametrize("by", ["SIGINT", "SIGUSR1"])
def test_every_signal_ends_with_a_checkpoint(by, tiny_parquet, tmp_path, monkeypatch):
    """Afterwards the process has its own signal handlers again."""
    before = signal.getsignal(getattr(signal, by))
    stop_after(2, monkeypatch, by)
    assert run.train(config_for(tiny_parquet, tmp_path / "run"))["stopped"] == by
    assert find_checkpoint(tmp_path / "run").name == "step-000000002"
    assert signal.getsignal(getattr(signal, by)) == before


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_a_stopped_command_does_not_end_as_a_finished_one(
    command, tiny_run, tmp_path, monkeypatch, capsys
):
    """Its exit code is that of the signal, so that `train && export` goes no further."""
    words = ["--data.train", "emoji", "--run.evaluate_every", "0"]
    words += ["--run.out", str(tmp_path / "run")]
    words += ["--episodes.size", "32", "--episodes.count", "2", "--episodes.batch_size", "16"]
    start = [str(tiny_run)] if command == "finetune" else ["--model.image.name", "test_resnet"]
    stop_after(1, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        main([command, *start, *words])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "SIGTERM: stopped after step 1" in capsys.readouterr().err


def test_the_checkpoint_that_a_run_goes_on_from_is_not_written_again(
    tiny_parquet, tmp_path, monkeypatch
):
    """At the end of an episode it would be due at once, and a kill meanwhile would leave none."""
    config = quick_config(tiny_parquet, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        run.train(config)
    (kept,) = checkpoints(tmp_path / "run")
    written = []
    write = saved.write_checkpoint

    def and_note(folder: Path, *given: object) -> None:
        written.append(folder)
        write(folder, *given)

    monkeypatch.setattr(saved, "write_checkpoint", and_note)
    run.train(with_changes(config, {"run": {"save_steps": 1}}), resume="auto")
    assert [int(folder.name[-9:]) for folder in written] == [3, 4, 5, 6]
    assert kept not in written


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
            "evaluate": False,
        },
        "data": {"workers": 1, "cache": "none", "max_bad_share": 0.5},
    }
    assert run.train(with_changes(stopped, free), resume="auto")["steps"] == 16
    assert [path.name[-2:] for path in checkpoints(folder)] == ["10", "15", "16"]
    assert_equal_ends(folder, whole("queue"))


SPARING = {
    "micro-batches": {"episodes": {"micro_batch_size": 4}},
    "checkpointing": {"parallel": {"activation_checkpointing": True}},
    "precision": {"run": {"precision": "bf16"}},
}


@pytest.fixture(scope="module")
def without_batch_norm(tiny_parquet: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of CLIP without BatchNorm, to its end; and beside it, stopped after step 3."""
    top = tmp_path_factory.mktemp("sparing")
    config = quick_config(tiny_parquet, top / "whole")
    image = replace(config.model.image, name="test_vit")
    changes = {
        "model": {"image": image},
        "loss": {"prototypical": 0.0},
        "optim": {"eps": 1e-2, "warm_up_steps": 0},
    }
    config = with_changes(config, changes)
    run.train(config)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(3, patch)
        run.train(with_out(config, str(top / "stopped")))
    return config


@pytest.mark.parametrize("way", SPARING)
def test_a_run_that_lacks_memory_goes_on_with_settings_that_need_less(
    way, without_batch_norm, tmp_path, capsys
):
    """What the line on memory that ran out advises: a note says what changed, and the run ends as
    it would have, up to rounding."""
    whole = Path(str(without_batch_norm.run.out))
    shutil.copytree(whole.with_name("stopped"), tmp_path / "run")
    config = with_changes(with_out(without_batch_norm, str(tmp_path / "run")), SPARING[way])
    assert run.train(config, resume="auto")["steps"] == 6
    ((section, values),) = SPARING[way].items()
    assert f"note: going on with {section}.{next(iter(values))} (" in capsys.readouterr().err
    weights, expected = (
        load_file(find_checkpoint(folder) / "model.safetensors")
        for folder in (tmp_path / "run", whole)
    )
    most = 0.1 if way == "precision" else 1e-4
    assert relative_difference(weights, expected, without_batch_norm) < most


def test_a_precision_that_nobody_named_does_not_change(stopped, monkeypatch):
    """On a machine that computes otherwise, `auto` is refused with the way out, which works."""
    state = checkpoints(Path(str(stopped.run.out)))[-1] / "state.json"
    stopped = with_changes(stopped, {"run": {"precision": "auto"}})
    monkeypatch.setattr(run, "resolve", lambda *given: "bf16")
    assert '"run.precision": "fp32"' in state.read_text()
    with pytest.raises(ValueError, match=r"computed with fp32.*\(--run.precision bf16\) to go on"):
        run.train(stopped, resume="auto")
    named = with_changes(stopped, {"run": {"precision": "bf16"}})
    assert run.train(named, resume="auto")["steps"] == 16


def test_a_run_of_an_earlier_version_goes_on(whole, stopped):
    """Its config.toml does not name the loss, which was InfoNCE, nor the teacher's whitening, but
    settings that are gone."""
    path = Path(str(stopped.run.out)) / "config.toml"
    settings = path.read_text()
    assert settings.count('instance = "info_nce"\n') == 1
    path.write_text(settings.replace('instance = "info_nce"\n', ""))
    with pytest.raises(ValueError, match=r"loss\.instance \(info_nce before, sigmoid now\)"):
        run.train(with_changes(stopped, {"loss": {"instance": "sigmoid"}}), resume="auto")
    with_teacher = settings.replace("[teacher]\n", '[teacher]\nfeatures = "emoji"\nweight = 1.0\n')
    assert with_teacher.count("whiten = 64\n") == 1
    path.write_text(with_teacher.replace("whiten = 64\n", ""))
    with pytest.raises(ValueError, match=r"teacher\.whiten \(0 before, 64 now\)"):
        run.train(with_changes(stopped, {"teacher": {"features": "emoji"}}), resume="auto")
    path.write_text(
        settings.replace('instance = "info_nce"\n', "").replace(
            "[teacher]\n", "[teacher]\nweight = 1.0\n"
        )
    )
    assert run.train(stopped, resume="auto")["steps"] == 16
    assert_equal_ends(Path(str(stopped.run.out)), whole("queue"))


def test_a_finished_run_stays_as_it_is(tiny_run, tiny_parquet):
    """Asked to go on, it returns its results and trains nothing."""
    before = (tiny_run / "results.json").read_text()
    results = run.train(tiny_config(tiny_parquet, out=str(tiny_run)), resume="auto")
    assert {**results, "checksum": json.loads(before)["checksum"]} == json.loads(before)


KILLED = ["shards, queue", "stream, queue", "mixture, extract"]


@pytest.mark.slow
@pytest.mark.parametrize("way", KILLED)
def test_a_killed_run_goes_on_bit_for_bit(way, tiny_parquet, shards, tmp_path):
    """Two SIGKILLs at random moments; `benchmarks/kills.py` has every way, and kills more often."""
    changes = matrix(tiny_parquet, shards)[way]
    config = quick_config(tiny_parquet, tmp_path / "run", **{"run": {"save_steps": 1}, **changes})
    kill_at_random(config, 2, random.Random(0))
    run.train(config, resume="auto")
    run.train(with_out(config, str(tmp_path / "whole")))
    assert_equal_ends(tmp_path / "run", tmp_path / "whole", 6)
    assert not [path for path in (tmp_path / "run").rglob(".*") if path.name != ".lock"]
