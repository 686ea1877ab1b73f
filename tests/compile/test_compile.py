"""Compiled towers train as plain ones do. In processes of their own: the shape checks that the
other tests install would be compiled too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = """
import sys
from dataclasses import replace
import protoclip
from protoclip.testing import tiny_config

config = tiny_config(out=sys.argv[1])
protoclip.train(replace(
    config,
    run=replace(config.run, evaluate=False),
    episodes=replace(config.episodes, size=32, count=2, locked_image=0),
    parallel=replace(config.parallel, compile=sys.argv[2] == "compiled"),
))
"""


def losses(folder: Path) -> list[float]:
    subprocess.run(
        [sys.executable, "-c", TRAIN, str(folder), folder.name],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [line["train/loss/total"] for line in lines if "train/loss/total" in line]


@pytest.mark.slow
def test_compiled_towers_have_the_losses_of_plain_ones(tmp_path: Path) -> None:
    """Over warm-up and prototypical steps, to a thousandth."""
    plain = losses(tmp_path / "plain")
    assert len(plain) == 4
    assert losses(tmp_path / "compiled") == pytest.approx(plain, rel=1e-3)
