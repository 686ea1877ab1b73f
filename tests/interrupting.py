"""Short runs: interrupted, shared by ranks, and compared by how they end."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from protoclip.config import Config, SourceConfig
from protoclip.data.emoji import emoji_table
from protoclip.data.loader import Batch
from protoclip.data.pairs import ImageTextPairs
from protoclip.distributed import collectives
from protoclip.evaluation import datasets
from protoclip.models import loading
from protoclip.models.checkpoint import find_checkpoint, read_tensors
from protoclip.models.start import resolve_start
from protoclip.training import run
from protoclip.training.trainer import Trainer
from testing import tiny_config

MEASURED = r"second|train/share/|train/memory"  # metrics of the machine
# Prototypes from the queue, without an evaluation.
QUEUE: dict[str, dict[str, Any]] = {
    "prototypes": {"source": "queue"},
    "run": {"save_minutes": 0.0, "evaluate": False},
}


class SharedBucket(LocalFileSystem):
    """A bucket that processes share: `s3:///tmp/bucket` is the folder."""

    protocol = "s3"

    def __init__(self, **more: Any) -> None:
        super().__init__(**{**more, "auto_mkdir": True})

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return super()._strip_protocol(str(path).removeprefix("s3://"))


def with_changes(config: Config, sections: Mapping[str, Mapping[str, Any]]) -> Config:
    for section, values in sections.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    return config


def with_out(config: Config, out: str) -> Config:
    return with_changes(config, {"run": {"out": out}})


def config_for(train: str, out: Path, **changes: Any) -> Config:
    """A run of four episodes of four steps."""
    config = with_changes(tiny_config(train, out=str(out)), {"run": {"save_minutes": 0.0}})
    return with_changes(config, changes)


def end_of(folder: Path, steps: int = 16) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """All tensors of the last checkpoint, and the metrics without what machines take for them."""
    last = find_checkpoint(folder)
    assert last.name == f"step-{steps:09}"
    tensors = {
        f"{kind}/{name}": tensor
        for kind in ("model", "optimizer", "resume")
        for name, tensor in read_tensors(last / f"{kind}.safetensors").items()
    }
    assert any(name.endswith("/exp_avg_sq") for name in tensors)
    return tensors, untimed_metrics(folder)


def read_metrics(folder: Path, name: str = "") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that hold a metric whose name begins so."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [line for line in found if any(key.startswith(name) for key in line)]


def untimed_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines, without the metrics of the machine."""
    return [
        {key: value for key, value in line.items() if not re.search(MEASURED, key)}
        for line in read_metrics(folder)
    ]


def assert_equal_ends(ours: Path, theirs: Path, steps: int = 16) -> None:
    (tensors, metrics), (expected, expected_metrics) = end_of(ours, steps), end_of(theirs, steps)
    assert tensors.keys() == expected.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], expected[name])] == []
    assert metrics == expected_metrics


def relative_difference(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], config: Config
) -> float:
    """Distance of all parameters, as a share of the way that they went from the start."""
    plain = with_changes(config, {"model": {"lora": None}})  # adapters start at 0
    start = loading.training_model(plain, torch.device("cpu"), resolve_start(plain.model))[
        0
    ].state_dict()
    names = [n for n in expected if "running_" not in n and "num_batches" not in n]

    def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
        parts = [(one[name] - other[name]).double().norm() for name in names]
        return float(torch.stack(parts).norm())

    return distance(weights, expected) / distance(expected, start)


def after_step(
    step: int, work: Callable[[Trainer], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Call a function with the trainer when the run has made this many steps."""
    train_step = Trainer.train_step

    def and_work(trainer: Trainer, batch: Batch, **more: Any) -> dict[str, float]:
        metrics = train_step(trainer, batch, **more)
        if trainer.step == step:
            work(trainer)
        return metrics

    monkeypatch.setattr(Trainer, "train_step", and_work)


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, by: str = "SIGTERM") -> None:
    """Send a signal to the last rank when the run has made this many steps."""

    def stop(_: Trainer) -> None:
        if collectives.rank() == collectives.world_size() - 1:
            os.kill(os.getpid(), getattr(signal, by))

    after_step(step, stop, monkeypatch)


def train_until(step: int, config: Config, **more: Any) -> dict[str, Any]:
    """The results of a run that is told to stop after a step."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(step, patch)
        return run.train(config, **more)


@cache
def few_emoji() -> datasets.EvaluationData:
    """The evaluation data cut to every 25th sample, so that an evaluation takes a second."""
    tables = {split: emoji_table(split) for split in datasets.SPLITS}
    parts: dict[str, ImageTextPairs] = {
        split: ImageTextPairs(table.take(list(range(0, table.num_rows, 25))), name=f"emoji/{split}")
        for split, table in tables.items()
    }
    return datasets.make_concept_data("emoji", parts)


def quick_config(train: str, out: Path, **changes: Any) -> Config:
    """A run of three episodes of two steps with a model of half a million weights."""
    config = config_for(train, out, run={"evaluate": False})
    image = replace(config.model.image, name="test_efficientnet")
    text = replace(config.model.text, width=8)  # of 49,408 tokens
    small = {
        "model": {"image": image, "text": text},
        "data": {"validation": 0.0},
        "episodes": {"size": 16, "count": 3, "batch_size": 8},
        "prototypes": {"number": 4, "iterations": 2},
    }
    return with_changes(with_changes(config, small), changes)


def matrix(table: str, shards: str) -> dict[str, dict[str, Any]]:
    """Changes to a `quick_config` for every kind of source and of prototypes, by their names."""
    parts = [SourceConfig(path=table, name="table"), SourceConfig(path=shards, name="shards")]
    sources: dict[str, dict[str, Any]] = {
        "table": {"train": table},
        "shards": {"train": shards},
        "stream": {"train": shards, "read": "streaming", "shuffle_buffer": 20, "workers": 0},
        "mixture": {"train": "emoji", "sources": parts},
    }
    return {
        f"{name}, {kind}": {"data": data, "prototypes": {"source": kind}}
        for name, data in sources.items()
        for kind in ("extract", "queue")
    }


def kill_at_random(config: Config, kills: int, generator: random.Random) -> None:
    """Train in processes that SIGKILL ends at random moments, each going on with the last one."""
    length = in_a_child(with_out(config, f"{config.run.out}-timed"), 1000.0)
    assert length is not None, "slower than expected"
    while kills:
        # One that ended sooner than it could be killed starts again.
        if in_a_child(config, generator.uniform(0.02, length)) is not None:
            shutil.rmtree(str(config.run.out))
        else:
            kills -= 1


def in_a_child(config: Config, seconds: float) -> float | None:
    """Train in a forked process, and kill it once it has computed for so many seconds.

    Time of the processor is the same on a busy machine. Returns how long it took, if it ended.
    """
    child = multiprocessing.get_context("fork").Process(
        target=run.train, args=(config,), kwargs={"resume": "auto"}
    )
    child.start()
    computed, status = 0.0, Path(f"/proc/{child.pid}/stat")
    while child.exitcode is None and computed < seconds:
        child.join(0.005)
        with suppress(OSError):
            ticks = status.read_text().rpartition(")")[2].split()[11:13]
            computed = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    ended = child.exitcode is not None
    assert child.exitcode in (None, 0)
    child.kill()
    child.join()
    return computed if ended else None
