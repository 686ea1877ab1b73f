"""What watches a run: steps that are not finite, numbers that end in a bad model, and speed."""

import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from interrupting import end_of, quick_config, with_changes, with_out
from protoclip.config import Config
from protoclip.data.loader import Batch
from protoclip.distributed import collectives
from protoclip.distributed.collectives import rank, world_size
from protoclip.files import read_json
from protoclip.models.checkpoint import find_checkpoint
from protoclip.training.optim import LOCKED_IMAGE, PROTOTYPICAL, enter_stage
from protoclip.training.run import train
from protoclip.training.trainer import Trainer
from protoclip.training.watch import (
    MOST_SKIPPED,
    OBSERVED,
    PATIENCE,
    Forward,
    NonFiniteGuard,
    Throughput,
    Watch,
    describe_out_of_memory,
    find_peak,
    measure_repeats,
)
from testing import build_model, run_distributed, tiny_config, tiny_model, tiny_pairs

NAN, INF = math.nan, math.inf


def guard_of(folder: Path, *, fp16: bool = False) -> NonFiniteGuard:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([parameter], lr=1.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    return NonFiniteGuard(optimizer, scaler, folder / "diverged.json")


def step(guard: NonFiniteGuard, number: int, loss: float, norm: float = 1.0) -> Tensor:
    return guard.step(number, torch.tensor(loss), torch.tensor(norm), [f"x/{number}"])


@pytest.mark.parametrize(
    ("loss", "norm", "taken"),
    [
        *[(1.0, 1.0, True), (NAN, 1.0, False), (INF, 1.0, False), (1.0, NAN, False)],
        *[(1.0, INF, False), (1.0, 0.0, False)],
    ],
)
@pytest.mark.parametrize("fp16", [False, True])
def test_a_step_is_taken_if_loss_and_gradient_are_finite(loss, norm, taken, fp16, tmp_path):
    """Otherwise parameters stay as they are and the step is counted. In fp16 too, where the scaler
    of the losses looks at this rank's gradients alone, and finds these finite. A gradient of zero
    is no fault: it is counted apart, and the scale stays.
    """
    at_fault = not taken and norm != 0
    guard = guard_of(tmp_path, fp16=fp16)
    scale = guard.scaler.get_scale()
    assert bool(step(guard, 1, loss, norm)) == taken
    assert (guard.scaler.get_scale() < scale) == (fp16 and at_fault)
    (parameter,) = guard.optimizer.param_groups[0]["params"]
    assert bool((parameter != 0).all()) == taken
    assert guard.skipped == guard.in_a_row == int(at_fault)
    assert guard.without_gradient == int(norm == 0)
    assert not guard.report.exists()


def test_ten_steps_in_a_row_end_the_run(tmp_path):
    """Not nine and a finite one. Those without a gradient between them are as if left out."""
    guard = guard_of(tmp_path)
    assert MOST_SKIPPED == 10
    for number in range(1, 11):
        step(guard, number, NAN if number < 10 else 1.0)
    assert guard.state_dict() == {"skipped": 9, "without_gradient": 0, "in_a_row": 0, "row": []}
    for number in range(11, 20):
        step(guard, number, 1.5, INF)
        step(guard, number, 0.0, 0.0)
    state, guard = json.loads(json.dumps(guard.state_dict())), guard_of(tmp_path)
    guard.load_state_dict(state)  # as of a run that goes on
    with pytest.raises(ValueError, match=r"^training has diverged: [^\n]* in 10 steps") as error:
        step(guard, 20, NAN, NAN)
    assert (guard.skipped, guard.in_a_row) == (19, 10)
    assert guard.summarize(29, None).startswith("19 of 29 steps were skipped: their loss or ")
    assert "up to step 20; go on with --run.precision fp32" in str(error.value)
    assert json.loads(guard.report.read_text()) == {
        "step": 20,
        "losses": ["1.5"] * 9 + ["nan"],
        "gradient_norms": ["inf"] * 9 + ["nan"],
        "sample_ids": ["x/20"],
    }


def test_steps_that_wait_count_like_prompt_ones(tmp_path, monkeypatch):
    """On a GPU the host looks at many steps at once; counts and the last step are the same."""
    generator = random.Random(0)
    losses = [generator.choice([1.0, NAN]) for _ in range(40)] + [NAN] * 20
    count, found = NonFiniteGuard.count_skipped, []
    for late in (False, True):
        monkeypatch.setattr(
            NonFiniteGuard, "count_skipped", (lambda guard: None) if late else count
        )
        guard = guard_of(tmp_path)
        with pytest.raises(ValueError, match="diverged") as error:  # noqa: PT012
            for number, loss in enumerate(losses, start=1):
                step(guard, number, loss)
            count(guard)
        found.append((str(error.value), guard.state_dict(), guard.report.read_text()))
    assert found[0] == found[1]


def allocation_error() -> RuntimeError:
    """What PyTorch raises on a CPU."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**14)
    return error.value


@pytest.mark.parametrize(
    ("error", "names"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "on the device"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "on the device"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "on the device"),
        (allocation_error(), "data.cache_gb"),
        (RuntimeError("unable to mmap 9 bytes from file </x>: Cannot allocate memory (12)"), "_gb"),
        (RuntimeError("could not create a primitive"), "data.cache_gb"),  # oneDNN
        (MemoryError(), "data.workers"),
        (RuntimeError("shapes do not fit"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_out_of_memory_names_the_settings_to_lower(error, names):
    line = describe_out_of_memory(error)
    if names is None:
        assert line is None
    else:
        assert line.startswith("out of memory")
        assert ": set episodes.micro_batch_size" in line
        assert names in line
        assert "\n" not in line


# Numbers

CHANCE = math.log(256)


def list_lines(name: str, values: list[float], every: int = 10, **more: float) -> list[str]:
    """All warnings about a series of values, logged every ten steps."""
    watch, lines = Watch(pairs=256, warm_up=100), list[str]()
    for number, value in enumerate(values):
        lines += watch.list_warnings(every * number, {name: value, **more})
    return lines


def noisy(count: int, *, level: float = 2.0, noise: float = 0.2) -> list[float]:
    generator = random.Random(0)
    return [generator.gauss(level, noise) for _ in range(count)]


@pytest.mark.parametrize(
    "losses",
    [
        [*noisy(40), 6.0],  # too early to tell
        [*noisy(500), 3.9],  # far above the noise, but not twice the mean
        [*noisy(500, level=0.1, noise=0.1), 0.4],  # four times the mean, but within the noise
        [5 * 0.99**number for number in range(1000)],  # a loss that falls
        [*noisy(60), NAN, *noisy(60)],  # not finite: the guard counts it
    ],
    ids=["early", "below twice", "noise", "falling", "nan"],
)
def test_a_loss_spike_gets_a_warning_and_nothing_else(losses):
    """One line with step, value, mean, and what to do."""
    assert list_lines("train/loss/total", losses) == []
    (line,) = list_lines("train/loss/total", [*noisy(60), 6.0, *noisy(60), 7.0])
    assert line.startswith("step 600: train/loss/total is 6, its recent mean is 2")
    assert "lower optim.learning_rate" in line


def test_a_stage_with_one_more_loss_is_no_spike():
    """A total is only compared with totals of the same losses."""
    watch, lines = Watch(pairs=256, warm_up=100), []
    for number in range(301):
        metrics = {"train/loss/total": 5.0, "train/loss/info_nce": 1.0}
        if 100 <= number < 200:
            metrics |= {"train/loss/total": 20.0, "train/loss/prototypical": 1.0}
        lines += watch.list_warnings(number, metrics)
    assert lines == []
    assert len(watch.list_warnings(301, metrics | {"train/loss/total": 20.0})) == 1


@pytest.mark.parametrize(
    ("name", "bad", "good", "step", "advice"),
    [
        ("train/spread/image", 0.009, 0.01, 200, "raise optim.warm_up_steps"),
        ("train/spread/text", -1e-7, 0.5, 200, "collapse"),
        ("train/prototypes/empty/teacher", 0.51, 0.5, 0, "prototypes.number"),
        ("train/prototypes/dead/text", 0.76, 0.75, 0, "prototypes.source"),
        ("train/repeated/captions", 0.11, 0.1, 40, "give captions that say more"),
    ],
)
def test_a_bad_metric_gets_one_warning(name, bad, good, step, advice):
    """With step, value and advice, on the wrong side of the limit only. Fresh towers, whose
    features are nearly equal, get none."""
    (line,) = list_lines(name, [bad] * 99)
    assert line.startswith(f"step {step}: ")
    assert advice in line
    assert "\n" not in line
    assert list_lines(name, [good] * 99) == []


@pytest.mark.parametrize(
    ("losses", "positives", "step", "advice"),
    [
        ([0.98 * CHANCE] * 99, 0.0, 100 + PATIENCE, "--overfit 64; then raise optim.learning_rate"),
        (
            [0.5 * CHANCE] * 9 + [0.98 * CHANCE] * 99,
            *(0.0, 100 + PATIENCE, "though it was 2.773; lower optim.learn"),
        ),
        ([0.98 * CHANCE] * 40, 0.0, None, None),  # too early to tell
        ([0.96 * CHANCE] * 99, 0.0, None, None),
        # Nine others match a pair: the least loss is ln(10), and the way from there is shorter.
        ([0.98 * CHANCE] * 99, 9.0, None, None),
        ([CHANCE] * 99, 9.0, 100 + PATIENCE, "is that of a guess"),
        # Two classes leave hardly anything to learn.
        ([CHANCE] * 99, 127.0, None, None),
        # Above chance: not what a start brings along, nor far above a low loss.
        ([CHANCE, 1.6 * CHANCE], 0.0, 10, "is 8.872, and 5.545 is that"),
        ([CHANCE, 1.4 * CHANCE], 0.0, None, None),
        ([2.5 * CHANCE, 3 * CHANCE], 0.0, None, None),
        ([0.1, 1.4 * CHANCE], 0.0, None, None),
    ],
)
def test_an_infonce_that_does_not_fall_is_named_after_the_warm_up(losses, positives, step, advice):
    lines = list_lines("train/loss/info_nce", losses, **{"train/positives": positives})
    assert len(lines) == (step is not None)
    for line in lines:
        assert line.startswith(f"step {step}: ")
        assert advice in line


def test_few_pairs_to_learn_by_heart_may_repeat_and_are_not_told_to_overfit():
    watch, lines = Watch(pairs=256, warm_up=100, overfits=True), []
    for step in range(0, 1000, 10):
        metrics = {"train/repeated/captions": 0.2, "train/loss/info_nce": CHANCE}
        lines += watch.list_warnings(step, metrics)
    (line,) = lines
    assert "is that of a guess" in line
    assert "--overfit" not in line


def repeated_captions(parts: list[list[tuple[bytes, int]]]) -> float:
    captions, samples = zip(*parts[collectives.rank()], strict=True)
    return measure_repeats(captions, torch.tensor(samples))


def test_what_repeats_counts_over_all_ranks():
    """Another sample has the caption of one in four; a sample that is drawn twice counts once."""
    parts = [[(b"a", 0), (b"b", 1), (b"c", 2)], [(b"a", 0), (b"b", 1), (b"b", 3)]]
    assert run_distributed(repeated_captions, 2, parts) == [pytest.approx(1 / 4)] * 2


def test_a_run_says_what_it_sees(tmp_path, capsys):
    """Once, on the terminal, from what it logs of every step."""
    pq.write_table(tiny_pairs(), tmp_path / "pairs.parquet")  # many captions are equal
    config = tiny_config(str(tmp_path / "pairs.parquet"), out=str(tmp_path / "run"))
    changes = {"run": {"log_every": 1, "evaluate": False}, "episodes": {"batch_size": 16}}
    train(with_changes(config, changes))
    said = [line for line in capsys.readouterr().err.splitlines() if "of a batch repeat" in line]
    assert [re.sub(r"\d+%", "N%", line).partition(" of ")[0] for line in said] == [
        f"warning: step {OBSERVED}: N%"
    ]
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    steps = [record for record in records if "train/loss/info_nce" in record]
    assert len(steps) >= OBSERVED
    assert all(record["train/repeated/captions"] > 0 for record in steps)


# Speed and machines

CPU = torch.device("cpu")
FORWARD = Forward(image=30e9, text=10e9, heads=1e6, parameters=1)


@pytest.mark.parametrize(
    ("card", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA A100-SXM4-40GB", "fp16", 312e12),
        ("NVIDIA H100 PCIe", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-40GB", "fp32", None),
        ("x86_64 CPU, 8 threads", "bf16", None),
    ],
)
def test_the_peak_is_that_of_cards_that_are_known(card, precision, expected):
    assert find_peak(card, precision) == expected


def test_the_share_of_the_peak_follows_from_what_trains(monkeypatch):
    """60 pairs in a second, with 3 passes each, or one of a locked image tower."""
    model, now = build_model(tiny_model(), seed=0), Mock()
    measured = Throughput(peak=1e15, forward=FORWARD, captions=2)
    monkeypatch.setattr(time, "monotonic", now)
    for stage, flops in ((PROTOTYPICAL, 3 * 30e9 + 2 * 3 * 10e9), (LOCKED_IMAGE, 90e9)):
        enter_stage(model, stage)
        now.return_value = 5.0
        measured.start(model, 100)
        measured.waited, now.return_value = 0.25, 6.0
        shares = measured.measure_shares(model, CPU)
        assert {name: float(share) for name, share in shares.items()} == {"train/share/data": 0.25}
        metrics = measured.report(160, CPU)
        assert metrics["train/samples_per_second"] == 60
        assert metrics["train/mfu"] == pytest.approx(60 * flops / 1e15)


STEPS = 12
LEFT_OUT = sorted(random.Random(0).sample(range(STEPS), 5))
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "extraction, micro-batches": (
        1,
        {"prototypes": {"source": "extract"}, "episodes": {"micro_batch_size": 7}},
    ),
    "queue, micro-batches, no loss": (
        1,
        {
            "prototypes": {"source": "queue"},
            "loss": {"info_nce": 0.0, "prototypical": 0.0},
            "episodes": {"micro_batch_size": 7, "warm_up": 0, "locked_image": 0},
        },
    ),
    "queue, FSDP2": (2, {"prototypes": {"source": "queue"}, "parallel": {"strategy": "fsdp"}}),
}


def ended(config: Config, left_out: bool) -> tuple[dict[str, Tensor], dict[str, Any], list[Any]]:
    """The last checkpoint and the shares of dead prototypes of a run in which five steps were not
    finite, or were left out.

    Without InfoNCE they have no loss instead, since the only teacher knows none of their samples.
    Otherwise, on the last rank alone, every other one of them has a loss that is not finite, and
    the others a gradient that is not. A step that is left out counts in the schedule.
    """
    train_step, forward = Trainer.train_step, Trainer._forward
    without_loss = config.loss.info_nce == 0

    def broken(trainer: Trainer, batch: Batch) -> Any:
        embeddings, finish = forward(trainer, batch)
        if trainer.step in LEFT_OUT[1::2] and not without_loss and rank() == world_size() - 1:
            embeddings.logit_scale.register_hook(lambda gradient: gradient * math.inf)
        return embeddings, finish

    def poisoned(trainer: Trainer, batch: Batch, **more: Any) -> dict[str, float]:
        if trainer.step in LEFT_OUT and left_out:
            trainer.batch += 1
            return {"train/loss/total": math.nan}
        if without_loss and trainer.step in LEFT_OUT:
            batch.features["teacher"].fill_(math.nan)
        elif trainer.step in LEFT_OUT[::2] and rank() == world_size() - 1:
            batch.image.fill_(math.nan)
        return train_step(trainer, batch, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", poisoned)
        patch.setattr(Trainer, "_forward", broken)
        train(config)
    folder = Path(str(config.run.out))
    tensors, metrics = end_of(folder, STEPS)
    facts = read_json(find_checkpoint(folder) / "state.json")
    skipped = facts.pop("guard")["skipped"]
    assert skipped == (0 if left_out or without_loss else len(LEFT_OUT))
    for measured in ("seconds", "metrics_bytes"):
        del facts[measured]
    dead = [{k: v for k, v in line.items() if "/dead/" in k} for line in metrics]
    return tensors, facts, [line for line in dead if line]


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow if WAYS[way][0] > 1 else ()) for way in WAYS]
)
def test_a_run_ends_as_if_it_had_left_out_its_skipped_steps(way, tmp_path, capsys):
    """Bit for bit: weights, moments, BatchNorm's statistics, queue, balance, dead prototypes.

    Its end says how many were skipped, and why.
    """
    pairs, teacher = tmp_path / "pairs.parquet", tmp_path / "teacher.parquet"
    table = tiny_pairs(64)
    pq.write_table(table, pairs)
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).tolist()
    pq.write_table(pa.table({"sample_id": table["sample_id"], "features": rows}), teacher)
    ranks, changes = WAYS[way]
    episodes = {"count": 6, "size": STEPS // 6 * 8, "locked_image": 1}
    given = {"teacher": {"features": str(teacher), "number": 4}, "episodes": episodes}
    config = with_changes(quick_config(str(pairs), tmp_path / "run", **given), changes)
    skipped, left_out = (
        run_distributed(ended, ranks, with_out(config, f"{tmp_path}/{number}"), bool(number))
        for number in range(2)
    )
    for (tensors, *facts), (expected, *expected_facts) in zip(skipped, left_out, strict=True):
        assert tensors.keys() == expected.keys()
        assert [name for name in tensors if not torch.equal(tensors[name], expected[name])] == []
        assert facts == expected_facts
        assert facts[1]
    reason = "were skipped: their" if config.loss.info_nce else "had no gradient and"
    assert ranks > 1 or capsys.readouterr().err.count(f"note: 5 of {STEPS} steps {reason}") == 1
