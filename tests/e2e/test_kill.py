"""A run that is killed at any moment goes on as if it had not been."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from interrupting import WAYS, assert_equal_ends, config_for

from protoclip.config import Config
from protoclip.training import run


def in_a_child(work: Callable[[], None], seconds: float) -> bool:
    """Run in a forked process and kill it after a time; whether it had ended by then."""
    child = os.fork()
    if child == 0:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on_bit_for_bit(
    whole: Callable[[str], Path], tiny_parquet: str, tmp_path: Path
) -> None:
    """Twenty times SIGKILL at random moments, with a checkpoint after every step so that many fall
    into saving; each time it goes on, and in the end nothing differs."""
    config = config_for(tiny_parquet, tmp_path / "run", run={"save_steps": 1}, **WAYS["queue"])
    generator = random.Random(0)
    started = time.monotonic()
    assert in_a_child(lambda: run.train(replace_out(config, tmp_path / "timed")) and None, 120.0)
    length = time.monotonic() - started
    kills = 0
    while kills < 20:
        ended = in_a_child(
            lambda: run.train(config, resume="auto") and None, generator.uniform(0.05, length)
        )
        if ended:  # sooner than it could be killed: once more from the beginning
            assert_equal_ends(tmp_path / "run", whole("queue"))
            shutil.rmtree(tmp_path / "run")
        else:
            kills += 1
    run.train(config, resume="auto")
    assert_equal_ends(tmp_path / "run", whole("queue"))


def replace_out(config: Config, out: Path) -> Config:
    return replace(config, run=replace(config.run, out=str(out)))
