"""What a run says of its machines. `tests/distributed` has the waiting for other ranks."""

import time
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from interrupting import with_changes
from protoclip.models import loading
from protoclip.models.protoclip import PROJECTIONS
from protoclip.training import throughput
from protoclip.training.optim import LOCKED_IMAGE, PROTOTYPICAL, enter_stage
from protoclip.training.throughput import FirstSteps, Forward, Throughput, passes, peak
from testing import tiny_config, tiny_model

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
    assert peak(card, precision) == expected


def test_a_step_of_what_trains_in_part_takes_fewer_passes():
    whole, part = torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(4, 1, bias=False)
    both = [*whole.parameters(), *part.parameters()]
    assert passes(both) == 3
    whole.requires_grad_(False)
    assert passes(both) == 2.25
    part.requires_grad_(False)
    assert passes(both) == 1


def test_the_share_of_the_peak_follows_from_what_trains(monkeypatch):
    """60 pairs in a second, with 3 passes each, or one of a locked image tower."""
    model, count, now = loading.model(tiny_model(), seed=0), Mock(return_value=FORWARD), Mock()
    measured = Throughput(peak=1e15, forward=count, captions=2)
    monkeypatch.setattr(time, "monotonic", now)
    for stage, flops in ((PROTOTYPICAL, 3 * 30e9 + 2 * 3 * 10e9), (LOCKED_IMAGE, 90e9)):
        enter_stage(model, stage)
        now.return_value = 5.0
        measured.start(model, 100)
        measured.waited, now.return_value = 0.25, 6.0
        shares = measured.shares(model, CPU)
        assert {name: float(share) for name, share in shares.items()} == {"train/share/data": 0.25}
        metrics = measured.report(160, CPU)
        assert metrics["train/samples_per_second"] == 60
        assert metrics["train/mfu"] == pytest.approx(60 * flops / 1e15)
    assert count.call_count == 1


def test_a_locked_tower_behind_a_projection_that_trains_is_one_pass(monkeypatch):
    model = loading.model(tiny_model(), seed=0)
    for name, parameter in model.towers.named_parameters():
        parameter.requires_grad_(name.startswith(PROJECTIONS))
    assert any(parameter.requires_grad for parameter in model.towers.parameters())
    measured = Throughput(peak=1e15, forward=Mock(return_value=FORWARD))
    assert measured._pair(model, measured.forward) == FORWARD.image + FORWARD.text


def test_towers_that_cannot_be_counted_cost_one_line(capsys):
    model, count = loading.model(tiny_model(), seed=0), Mock(side_effect=NotImplementedError("no"))
    measured = Throughput(peak=1e15, forward=count)
    for _ in range(2):
        measured.start(model, 0)
        assert "train/mfu" not in measured.report(10, CPU)
    assert capsys.readouterr().err == (
        "note: train/mfu is left out, since FLOPs cannot be counted (no)\n"
    )


def test_the_first_steps_say_how_long_the_rest_takes(capsys):
    """Steps of two seconds after one that took long; of a run that goes on at step 100."""
    said = FirstSteps(steps=1000, done=100)
    for step in range(101, 140):
        said.update(step, 64, seconds=500.0 + 2 * step)
    assert capsys.readouterr().err == (
        "note: 32 pairs a second: the 880 steps that remain take about 29m 20s, and grouping, "
        "evaluation and saving come on top\n"
    )


def test_one_rank_says_where_it_is(monkeypatch):
    monkeypatch.setattr(throughput, "environment", lambda device: {"device": "a card"})
    where = throughput.machines(CPU)
    assert where.placed(64) == "1 host, 1 rank on a card, with 64 pairs of every batch"


def test_other_ranks_are_noted_and_kept():
    """With what changes: BatchNorm of towers that train, unless it is synchronised or frozen. The
    facts list machines one after the other, those that follow on like ones once."""
    config, model = tiny_config(out=""), loading.model(tiny_model(), seed=0)  # test_resnet
    assert throughput.other_ranks(1, model, config) == []
    (note,) = throughput.other_ranks(2, model, config)
    assert note.startswith("going on with 1 rank (2 before): batches stay, but BatchNorm in")
    for changes in (
        {"parallel": {"sync_batch_norm": True}},
        {"parallel": {"strategy": "fsdp"}},
        {"model": {"frozen_batch_norm": True}},
        {"model": {"locked": ["image"]}},
    ):
        (note,) = throughput.other_ranks(2, model, with_changes(config, changes))
        assert "(2 before): batches stay, and weights are equal up to rounding;" in note
    parts = {"parallel": {"sync_batch_norm": True}, "episodes": {"micro_batch_size": 8}}
    (note,) = throughput.other_ranks(2, model, with_changes(config, parts))
    assert "weights may differ by more than rounding" in note  # each micro-batch by itself
    two, one = throughput.Machines(1, 2, "a CPU"), throughput.Machines(1, 1, "a card")
    state: dict[str, Any] = {"machines": [vars(two)], "loader": [{}, {}]}
    assert throughput.machines_since(state, two, over=False) == [two]
    assert throughput.machines_since(state, one, over=True) == [two]
    facts = throughput.facts_of(throughput.machines_since(state, one, over=False))
    assert facts.pop("machines") == ["1 host, 2 ranks on a CPU", "1 host, 1 rank on a card"]
    assert facts == {"hosts": 1, "ranks": 1}
    (unknown,) = throughput.machines_since({"loader": [{}, {}]}, one, over=True)
    assert str(unknown) == "2 ranks on machines not known"  # of an earlier version
