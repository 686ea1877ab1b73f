"""Checkpoints of a model that FSDP2 shards: each rank writes its part, any number reads them."""

import os
import re
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.registry import _registry
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import protoclip
from interrupting import (
    SharedBucket,
    after_step,
    quick_config,
    relative_difference,
    with_changes,
    with_out,
)
from protoclip.config import Config
from protoclip.distributed import collectives, parallel
from protoclip.models import checkpoint as saved
from protoclip.models.checkpoint import (
    OPTIMIZER,
    RESUME,
    WEIGHTS,
    checkpoints,
    damage,
    find_checkpoint,
    has_shards,
    read_tensors,
)
from protoclip.training import folder as run_folder
from protoclip.training.folder import find_newest_intact
from protoclip.training.run import Run, train
from protoclip.training.trainer import Trainer
from testing import run_distributed

CHANGES: dict[str, dict[str, Any]] = {
    "parallel": {"strategy": "fsdp"},
    # The first is amid an episode that has prototypes.
    "run": {"save_steps": 3, "keep_checkpoints": 9, "evaluate": False},
    # Rounding may move a value across a ReLU; so the steps stay small.
    "optim": {"eps": 1e-2, "warm_up_steps": 0},
    "teacher": {"features": "emoji", "distil": 1.0},
    "loss": {"teacher": 0.0},
    "data": {"validation": None},
}
DDP = {"parallel": {"strategy": "ddp"}}


def config_in(folder: Path | str) -> Config:
    return quick_config("emoji", Path(folder), **CHANGES)


def all_of(step: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    names = [
        name
        for name in (WEIGHTS, OPTIMIZER, RESUME)
        if (step / name).is_file() or has_shards(step / name)
    ]
    parts = {name: read_tensors(step / name) for name in names}
    return {f"{part}/{name}": value for part in parts for name, value in parts[part].items()}


def weights_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.partition("/")[2]: v for n, v in tensors.items() if n.startswith(WEIGHTS)}


def probed(config: Config) -> tuple[list[str], float, dict[str, Tensor]]:
    """A run: what was gathered while it saved, the share of weights and moments that a rank then
    held, and on rank 0 the whole weights at the end."""
    gathered, shares = list[str](), list[float]()
    end: dict[str, Tensor] = {}
    save, start = Run.save, run_folder.CheckpointWriter.save

    def and_watch(run: Run) -> None:
        with pytest.MonkeyPatch.context() as watching:
            for name in ("redistribute", "full_tensor"):
                whole = getattr(DTensor, name)

                def and_note(self: Any, *given: Any, _whole: Any = whole, **more: Any) -> Any:
                    gathered.append(_whole.__name__)
                    return _whole(self, *given, **more)

                watching.setattr(DTensor, name, and_note)
            save(run)
            count = len(gathered)
            parallel.gather_weights(run.model)  # the probe notices it
            assert len(gathered) > count
            del gathered[count:]

    def and_weigh(writer: Any, step: int, state: Mapping[str, Any]) -> None:
        values = [*state["model"].values(), *state["optimizer"].values()]
        own = [value.to_local() if isinstance(value, DTensor) else value for value in values]
        shares.append(sum(v.nbytes for v in own) / sum(value.nbytes for value in values))
        start(writer, step, state)

    def and_gather(trainer: Trainer) -> None:
        end.update(parallel.gather_weights(trainer.model))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", and_watch)
        patch.setattr(run_folder.CheckpointWriter, "save", and_weigh)
        after_step(6, and_gather, patch)
        train(config)
    return gathered, max(shares), end


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The folder of a run of two ranks, with two checkpoints, and what each rank saw."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    return folder, run_distributed(probed, 2, config_in(folder))


def test_no_rank_gathers_or_writes_the_whole(ended):
    folder, ranks = ended
    for gathered, share, _ in ranks:
        assert gathered == []
        assert share < 0.55  # statistics of BatchNorm are on each rank
    last = find_checkpoint(folder)
    for part in ("model", "optimizer"):
        first, second = sorted((last / part).iterdir())
        assert first.stat().st_size == pytest.approx(second.stat().st_size, rel=0.2)
        assert not (last / f"{part}.safetensors").exists()
    assert [path.name for path in checkpoints(folder)] == [f"step-00000000{n}" for n in (3, 6)]


def test_its_model_is_the_whole_one(ended, tmp_path):
    """Bit for bit; it is loaded, exported, and trained from in one process."""
    folder, ((_, _, whole), _) = ended
    found = read_tensors(find_checkpoint(folder) / WEIGHTS)
    assert found.keys() == whole.keys()
    assert [name for name in found if not torch.equal(found[name], whole[name])] == []
    model, _, tokenizer = protoclip.load(folder)
    texts = tokenizer(["a red apple", "a cat"])
    expected = model.encode_text(texts)
    model.load_state_dict({name: whole[name] for name in found})
    assert torch.equal(model.encode_text(texts), expected)
    protoclip.export(folder, tmp_path / "out", formats=["open_clip"])
    exported = load_file(next((tmp_path / "out").rglob("open_clip_model.safetensors")))
    assert torch.equal(exported["logit_scale"], whole["towers.logit_scale"])


def gone_on(config: Config) -> dict[str, Tensor]:
    """The end of a run that goes on, on each rank the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_registry, "s3", SharedBucket)
        train(config, resume="auto")
    return all_of(find_checkpoint(str(config.run.out)))


def stopped(folder: Path, out: Path, step: int = 3) -> Path:
    """A copy of a run as it was after a step."""
    shutil.copytree(folder, out)
    for path in checkpoints(out):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    (out / "results.json").unlink()
    return out


@pytest.mark.parametrize(
    ("ranks", "changes"), [(2, {}), (1, DDP), pytest.param(4, {}, marks=pytest.mark.slow)]
)
def test_a_run_goes_on_with_any_number_of_ranks(ranks, changes, ended, tmp_path):
    """Bit for bit with the same number and strategy, else but for rounding."""
    folder = stopped(ended[0], tmp_path / "run")
    config = with_changes(config_in(folder), changes)
    expected = all_of(find_checkpoint(ended[0]))
    for end in run_distributed(gone_on, ranks, config):
        if (ranks, changes) == (2, {}):
            assert end.keys() == expected.keys()
            assert [name for name in end if not torch.equal(end[name], expected[name])] == []
        else:
            assert relative_difference(weights_in(end), weights_in(expected), config) < 1e-4


def test_a_damaged_shard_is_named_and_passed_over(ended, tmp_path):
    folder = stopped(ended[0], tmp_path / "run", step=6)
    last = find_checkpoint(folder)
    first, shard = sorted((last / "model").iterdir())
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    name = f"model/{shard.name}"
    assert damage(last) == f"{name} is not what was written: its checksum differs"
    notes: list[str] = []
    assert find_newest_intact(folder, notes) == checkpoints(folder)[0]
    assert [name in note and "passed over" in note for note in notes] == [True]
    with pytest.raises(ValueError, match=re.escape(name)):
        protoclip.load(last)
    first.unlink()
    assert damage(last) == f"model/{first.name} cannot be read: No such file or directory"
    # Of a checkpoint by more ranks that had the same name.
    before = checkpoints(folder)[0]
    shutil.copy(min((before / "model").iterdir()), before / "model" / "shard-00003.safetensors")
    assert str(damage(before)).startswith("model/shard-00003.safetensors is not what was written")


def failing(config: Config, times: int) -> tuple[list[str], str]:
    """What a rank says of a run in which rank 1 cannot write so many times, and its error."""
    said, left = list[str](), [times]
    write_data = saved.ShardWriter.write_data

    def full(writer: Any, *given: Any) -> Any:
        if collectives.rank() == 1 and left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device", str(writer.folder))
        return write_data(writer, *given)

    def say(text: str) -> None:
        if text.startswith("warning: "):
            said.append(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved.ShardWriter, "write_data", full)
        patch.setattr(run_folder, "say", say)
        patch.setattr(run_folder, "LAST_RETRIES", (0.0,))
        try:
            train(config)
        except (OSError, collectives.RaisedOnAnotherRank) as error:
            return said, str(error)
    return said, ""


def test_a_rank_that_cannot_write_costs_a_checkpoint(tmp_path):
    """And one warning; the run goes on. At its end it insists, on all ranks."""
    (first, error), (second, _) = run_distributed(failing, 2, config_in(tmp_path / "a"), 1)
    assert error == ""
    assert second == []
    assert len(first) == 1
    assert "step-000000003: not saved ([Errno 28] No space left" in first[0]
    assert [path.name[-1] for path in checkpoints(tmp_path / "a")] == ["6"]
    assert not [*(tmp_path / "a" / "checkpoints").glob(".*")]
    config = with_changes(config_in(tmp_path / "b"), {"run": {"save_steps": 0}})
    (first, error), (second, same) = run_distributed(failing, 2, config, 2)
    assert len(first) == 3
    assert second == []
    assert "trying again did not help" in error
    assert error == same


def killed(config: Config) -> None:
    """A run whose ranks are all killed when they have written some of the second checkpoint."""
    write_data, marker = saved.ShardWriter.write_data, "checkpoints/step-000000003/checksums.json"

    def and_die(writer: Any, *given: Any) -> Any:
        written = write_data(writer, *given)
        if "000000006" in str(writer.folder):
            while not Path(str(config.run.sync).removeprefix("s3://"), marker).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    saved.ShardWriter.write_data = and_die  # type: ignore[method-assign]
    _registry["s3"] = SharedBucket
    train(config)


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_saves_goes_on(ended, tmp_path):
    """From the checkpoint before, bit for bit; also elsewhere, from a copy in a bucket alone."""
    bucket, kept = tmp_path / "bucket", tmp_path / "kept"
    config = with_changes(config_in(tmp_path / "run"), {"run": {"sync": f"s3://{bucket}"}})
    with pytest.raises((AssertionError, EOFError, ConnectionError)):
        run_distributed(killed, 2, config)
    (left,) = (tmp_path / "run" / "checkpoints").glob(".*")
    assert list((left / "model").iterdir())
    assert [path.name for path in checkpoints(bucket)] == ["step-000000003"]
    expected = all_of(find_checkpoint(ended[0]))
    shutil.copytree(bucket, kept)
    for out in ("run", "elsewhere"):
        shutil.rmtree(bucket)
        shutil.copytree(kept, bucket)
        for end in run_distributed(gone_on, 2, with_out(config, str(tmp_path / out))):
            assert [name for name in end if not torch.equal(end[name], expected[name])] == []
        # Until the checkpoint, with the seconds that steps took.
        lines = [
            (folder / "metrics.jsonl").read_text().split("\n")[:3]
            for folder in (kept, tmp_path / out)
        ]
        assert lines[0] == lines[1]
        assert all(lines[0])
        assert (bucket / "results.json").is_file()
    assert not left.exists()
