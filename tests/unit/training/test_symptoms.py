"""Why a loss does not fall: each symptom is said beyond its limit alone, once, in a line."""

import json
import math
import re

import pyarrow.parquet as pq
import pytest
import torch

from interrupting import with_changes
from protoclip.config import Config, EpisodeConfig, OptimConfig
from protoclip.data.pairs import ImageTextPairs
from protoclip.distributed import collectives
from protoclip.training.optim import make_schedule
from protoclip.training.run import train
from protoclip.training.symptoms import (
    OBSERVED,
    PATIENCE,
    Symptoms,
    at_chance,
    repeated,
    repeats,
    risen,
    unmoved,
)
from testing import run_distributed, tiny_config, tiny_pairs

CHANCE = math.log(256)


@pytest.mark.parametrize(
    ("loss", "lowest", "positives", "steps", "says"),
    [
        (
            0.98 * CHANCE,
            0.98 * CHANCE,
            0.0,
            PATIENCE,
            "--overfit 64; then raise optim.learning_rate",
        ),
        (0.98 * CHANCE, 0.5 * CHANCE, 0.0, PATIENCE, "though it was 2.773; lower optim.learn"),
        (0.98 * CHANCE, 0.98 * CHANCE, 0.0, PATIENCE - 1, None),
        (0.96 * CHANCE, 0.96 * CHANCE, 0.0, PATIENCE, None),
        # Nine others match a pair: the least loss is ln(10), and the way from there is shorter.
        (0.98 * CHANCE, 0.98 * CHANCE, 9.0, PATIENCE, None),
        (CHANCE, CHANCE, 9.0, PATIENCE, "is that of a guess"),
        # Two classes leave hardly anything to learn.
        (CHANCE, CHANCE, 127.0, PATIENCE, None),
    ],
)
def test_a_loss_at_chance_is_named_after_the_warm_up(loss, lowest, positives, steps, says):
    given = {"pairs": 256, "positives": positives, "steps": steps}
    line = at_chance(loss, lowest, **given)
    assert (line is None) == (says is None)
    assert says is None or says in line
    assert "--overfit" not in (at_chance(loss, lowest, **given, overfits=True) or "")


def repeated_captions(parts: list[list[tuple[bytes, int]]]) -> float:
    captions, samples = zip(*parts[collectives.rank()], strict=True)
    return repeated(captions, torch.tensor(samples))


def test_what_repeats_counts_over_all_ranks():
    """Another sample has the caption of one in four; a sample that is drawn twice counts once."""
    parts = [[(b"a", 0), (b"b", 1), (b"c", 2)], [(b"a", 0), (b"b", 1), (b"b", 3)]]
    assert run_distributed(repeated_captions, 2, parts) == [pytest.approx(1 / 4)] * 2


def test_a_loss_that_rises_above_chance_is_named():
    """And not one that a start brings along, or that is far above a low one."""
    assert "lower optim.learning_rate" in risen(1.6 * CHANCE, CHANCE, pairs=256)
    assert risen(1.4 * CHANCE, CHANCE, pairs=256) is None
    assert risen(3 * CHANCE, 2.5 * CHANCE, pairs=256) is None
    assert risen(1.4 * CHANCE, 0.1, pairs=256) is None


def test_a_rate_that_does_nothing_is_named():
    """By the rate and the loss: not a run that has converged, nor one that learns nevertheless."""
    flat = [1.0 + 0.1 * (-1) ** step for step in range(40)]
    given = {"rate": 1e-12, "steps": PATIENCE}
    assert "stays at 1: optim.learning_rate = 1e-12 is too low" in unmoved(flat, **given)
    assert unmoved(flat, rate=1e-7, steps=10 * PATIENCE) is None
    assert unmoved(flat, rate=1e-12, steps=PATIENCE - 1) is None
    assert unmoved([1.0 - 0.01 * step for step in range(40)], **given) is None
    assert unmoved(flat[:8], **given) is None
    for loss in (1.0, CHANCE):  # which then is no reason to look at the data
        symptoms = Symptoms(pairs=256, warm_up=100, rate=1e-12)
        lines = []
        for step in range(0, 1000, 10):
            lines += symptoms.lines(step, {"train/loss/info_nce": loss})
        assert [line.partition(":")[0] for line in lines] == [f"step {100 + PATIENCE}"]
        assert "is too low to move any weight; raise it" in lines[0]


def test_what_repeats_in_a_batch_is_named():
    """In the mean of five logged steps: two equal ones in a small batch are chance."""
    assert repeats([0.5] * 4) is None
    assert repeats([0.5, 0.0, 0.0, 0.0, 0.0]) is None
    line = repeats([0.3, 0.1, 0.1, 0.1, 0.1])
    assert line.startswith("14% of the captions of a batch")


def test_each_symptom_is_said_once():
    symptoms = Symptoms(pairs=256, warm_up=100, rate=1e-3)
    lines = []
    for step in range(0, 1000, 10):
        metrics = {"train/repeated/captions": 0.2}
        loss = {"train/loss/info_nce": 2 * CHANCE if step > 600 else CHANCE}
        lines += symptoms.lines(step, metrics | loss)
    steps = [int(line.removeprefix("step ").partition(":")[0]) for line in lines]
    assert steps == [40, 100 + PATIENCE, 610]


def test_few_pairs_to_learn_by_heart_may_repeat():
    symptoms = Symptoms(pairs=64, warm_up=100, rate=1e-3, overfits=True)
    repeated = {"train/repeated/captions": 0.2}
    assert not any(symptoms.lines(step, repeated) for step in range(2 * OBSERVED))


def test_a_run_says_what_it_sees(tmp_path, capsys):
    """Once, on the terminal, from what it logs of every step."""
    pq.write_table(tiny_pairs(), tmp_path / "pairs.parquet")  # many captions are equal
    config = tiny_config(str(tmp_path / "pairs.parquet"), out=str(tmp_path / "run"))
    changes = {"run": {"log_every": 1, "evaluate": False}, "episodes": {"batch_size": 16}}
    train(with_changes(config, changes))
    said = [line for line in capsys.readouterr().err.splitlines() if "of a batch" in line]
    assert [re.sub(r"\d+%", "N%", line).partition(";")[0] for line in said] == [
        f"warning: step {OBSERVED}: N% of the captions of a batch repeat others, and equal ones "
        "are negatives of each other"
    ]
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    steps = [record for record in records if "train/loss/info_nce" in record]
    assert len(steps) >= OBSERVED
    assert all(record["train/repeated/captions"] > 0 for record in steps)


def test_a_short_run_reaches_its_full_rate_half_way():
    """However many steps of warm-up are set; the schedule has it so too."""
    pairs, shape = ImageTextPairs(tiny_pairs(8), name="few"), {"size": 8, "batch_size": 4}
    for warm_up, count, expected in ((10, 400, 10), (2000, 400, 400), (2000, 4000, 2000)):
        episodes = EpisodeConfig(**shape, count=count, locked_image=0)
        optim = OptimConfig(learning_rate=1e-3, warm_up_steps=warm_up)
        config = Config(episodes=episodes, optim=optim)
        assert Symptoms.of(config, pairs, 4).warm_up == expected
        rate = make_schedule(config)
        assert rate(expected - 1) == pytest.approx(1e-3)
        assert rate(expected - 2) < 0.9999e-3
