"""A step that is not finite, or has no loss, leaves nothing behind: a run ends as if without it."""

import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from interrupting import end_of, quick_config, with_changes, with_out
from protoclip.config import Config
from protoclip.data.loader import Batch
from protoclip.distributed.collectives import rank, world_size
from protoclip.files import read_json
from protoclip.models.checkpoint import find_checkpoint
from protoclip.training.run import train
from protoclip.training.trainer import Trainer
from testing import run_distributed, tiny_pairs

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
