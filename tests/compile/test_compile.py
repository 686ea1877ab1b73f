"""Compiled towers train as plain ones do. In a process of its own: the shape checks that the other
tests install would be compiled too."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import protoclip
import tiny_tower  # noqa: F401 (timm knows it then)
from interrupting import read_metrics, with_changes
from testing import tiny_config


def train(folder: str, compiled: bool) -> None:
    """Warm-up and prototypical steps."""
    config = tiny_config(out=folder)
    image = replace(config.model.image, name="one_block")
    sections = {
        "run": {"evaluate": False},
        "model": {"image": image},
        "episodes": {"size": 32, "count": 2, "locked_image": 0},
        "parallel": {"compile": compiled},
        # Without passes in evaluation mode, which would be compiled too.
        "prototypes": {"source": "queue"},
    }
    protoclip.train(with_changes(config, sections))


def losses(folder: Path) -> list[float]:
    return [line["train/loss/total"] for line in read_metrics(folder, "train/loss/total")]


@pytest.mark.slow
def test_compiled_towers_have_the_losses_of_plain_ones(tmp_path: Path) -> None:
    """To a thousandth."""
    train(str(tmp_path / "plain"), False)
    # Else Inductor compiles the headers of PyTorch once for each instruction set, to see if it can.
    settings = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "1"}
    settings["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # others would import PyTorch
    code = "import sys; sys.path.append('..'); import test_compile as t; t.train(sys.argv[1], True)"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "compiled")],
        check=True,
        cwd=Path(__file__).parent,
        env={**os.environ, **settings},
    )
    plain = losses(tmp_path / "plain")
    assert len(plain) == 4
    assert losses(tmp_path / "compiled") == pytest.approx(plain, rel=1e-3)
