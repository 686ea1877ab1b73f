"""A teacher's features of a source, made by several processes, are those of one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from protoclip.data.pairs import ImageTextPairs
from protoclip.teachers.embed import embed
from protoclip.teachers.encode import TextEncoder
from protoclip.teachers.store import read_teacher
from protoclip.testing import run_distributed

WIDTH, SAMPLES = 12, 47


def counts(captions: list[str]) -> torch.Tensor:
    """What the stand-in for a model makes of captions: counts of letters."""
    found = np.ones((len(captions), WIDTH))
    for row, caption in enumerate(captions):
        for letter in caption:
            found[row, ord(letter) % WIDTH] += 1
    return torch.from_numpy(found)


def make(out: Path, width: int | None) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    captions = ["".join(generator.choice(list("abcdefghijklm"), 9)) for _ in range(SAMPLES)]
    captions[13] = ""  # a bad sample
    table = pa.table({"caption": captions, "path": ["nowhere.png"] * SAMPLES})
    encoder = TextEncoder(
        module=nn.Identity(),
        tokenize=counts,
        forward=lambda rows: rows,
        device=torch.device("cpu"),
    )
    return embed(
        encoder,
        ImageTextPairs(table, name="made"),
        out,
        origin={"teacher": "letters"},
        width=width,
        batch_size=4,
        part_rows=5,
    )


@pytest.mark.parametrize("width", [None, 3])
@pytest.mark.parametrize("world_size", [2, 4])
def test_features_and_facts_are_those_of_one_process(
    width: int | None, world_size: int, tmp_path: Path
) -> None:
    """Ten parts are shared out, and the PCA's sums; features to the rounding of float16."""
    expected = run_distributed(make, 1, tmp_path / "one", width)[0]
    facts = run_distributed(make, world_size, tmp_path / "many", width)[0]
    assert facts == pytest.approx(expected)
    assert facts["bad"] == 1
    ids = [f"made/{row}" for row in range(SAMPLES) if row != 13]
    one, many = (read_teacher(tmp_path / name).lookup(ids) for name in ("one", "many"))
    torch.testing.assert_close(many, one, atol=2e-3, rtol=2e-3)
    assert not (tmp_path / "many" / "parts").exists()
    skipped = (tmp_path / "many" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample_id"] for line in skipped] == ["made/13"]
