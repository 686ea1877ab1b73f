"""A run that is killed at any moment goes on as if nothing had happened."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from interrupting import WAYS, assert_equal_ends, config_for, kill_at_random

from protoclip.training import run


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(
    whole: Callable[[str], Path], tiny_parquet: str, tmp_path: Path
) -> None:
    """Five SIGKILLs at random moments, often while a checkpoint is written.

    `benchmarks/kills.py` kills as often as you like.
    """
    config = config_for(tiny_parquet, tmp_path / "run", run={"save_steps": 1}, **WAYS["queue"])
    kill_at_random(config, 5, random.Random(0))
    run.train(config, resume="auto")
    assert_equal_ends(tmp_path / "run", whole("queue"))
