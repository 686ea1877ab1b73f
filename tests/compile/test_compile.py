"""Compiled towers train as plain ones do. In processes of their own: the shape checks that the
other tests install would be compiled too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = {
    "run.device": "cpu",
    "run.precision": "fp32",
    "run.log_every": "1",
    "model.embed_dim": "16",
    "model.image.size": "32",
    "model.text.context_length": "8",
    "model.text.width": "16",
    "model.text.layers": "1",
    "model.heads.hidden_dim": "32",
    "model.heads.projection_dim": "8",
    "episodes.size": "32",
    "episodes.batch_size": "16",
    "episodes.count": "2",
    "episodes.locked_image": "0",
    "prototypes.number": "8",
    "run.evaluate": "false",
}


def losses(folder: Path, *, compiled: bool) -> list[float]:
    settings = {**SETTINGS, "run.out": str(folder), "parallel.compile": str(compiled).lower()}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    subprocess.run(
        [sys.executable, "-m", "protoclip", "train", *arguments],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [line["train/loss/total"] for line in lines if "train/loss/total" in line]


@pytest.mark.slow
def test_compiled_towers_have_the_losses_of_plain_ones(tmp_path: Path) -> None:
    """Over warm-up and prototypical steps, to a thousandth."""
    plain = losses(tmp_path / "plain", compiled=False)
    assert len(plain) == 4
    assert losses(tmp_path / "compiled", compiled=True) == pytest.approx(plain, rel=1e-3)
