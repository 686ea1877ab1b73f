"""A launcher starts and stops the processes of a command, which answers once."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from interrupting import with_changes
from protoclip.cli import main
from protoclip.models.checkpoint import checkpoints
from protoclip.training.folder import to_toml
from testing import tiny_config, tiny_pairs

sys.path.append(str(Path(__file__).parents[1] / "unit" / "evaluation"))
from tiny_open_clip import save_tiny_open_clip

pytestmark = pytest.mark.slow


def on_a_rank(rank: int, port: int, words: list[str], folder: Path) -> None:
    """A command with the environment that torchrun gives, which prints into files."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "localhost", **{key: str(names[key]) for key in names}}
    out, err = ((folder / f"{rank}.{stream}").open("w") for stream in ("out", "err"))
    with out, err, redirect_stdout(out), redirect_stderr(err):
        main(words)


def forked(words: list[str], folder: Path, *, well: bool) -> tuple[list[str], list[str]]:
    """What two processes of a command print, which are forked: importing takes them seconds."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork").Process
    ranks = [fork(target=on_a_rank, args=(rank, port, words, folder)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(180)
    out, err = (
        [(folder / f"{n}.{stream}").read_text() for n in range(2)] for stream in ("out", "err")
    )
    assert [rank.exitcode == 0 for rank in ranks] == [well, well], err
    return out, err


def test_torchrun_ends_a_run_with_a_checkpoint(tmp_path):
    """It passes a signal on to both processes, whose workers get it too, and ends with a code of
    its own. SIGUSR1 it has to be told of; SIGTERM goes the same way."""
    folder, recipe = tmp_path / "run", tmp_path / "tiny.toml"
    pq.write_table(tiny_pairs(), tmp_path / "pairs.parquet")
    sections = {"run": {"save_steps": 2, "evaluate": False}, "data": {"workers": 1}}
    config = with_changes(tiny_config(f"{tmp_path}/pairs.parquet", out=str(folder)), sections)
    recipe.write_text(to_toml(with_changes(config, {"episodes": {"count": 999}})), encoding="utf-8")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"),
        *("-m", "protoclip", "train", "--config", str(recipe)),
    ]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, **output, env=env, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(checkpoints(folder)) == 0:
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint after two minutes"
        time.sleep(0.05)
    run.send_signal(signal.SIGUSR1)
    said, _ = run.communicate(timeout=180)
    assert run.returncode == 1, said  # torchrun's own
    last = int(checkpoints(folder)[-1].name.removeprefix("step-"))
    assert f"SIGUSR1: stopped after step {last}" in said


def test_two_processes_evaluate_as_one_does(tmp_path, capsys):
    """Two models on two data sets, with the difference to one of them: the same records."""
    words = ["evaluate"]
    for seed in range(2):
        folder = tmp_path / f"model-{seed}"
        folder.mkdir()
        words.append(str(save_tiny_open_clip(folder, seed=seed)))
        pq.write_table(tiny_pairs(60, seed=seed), tmp_path / f"pairs-{seed}.parquet")
        words += ["--data", str(tmp_path / f"pairs-{seed}.parquet")]
    words += ["--compare-to", str(tmp_path / "model-0"), "--json", "--no-cache"]
    (first, second), _ = forked(words, tmp_path, well=True)
    main(words)
    alone = json.loads(capsys.readouterr().out)
    assert json.loads(first) == alone
    assert second == ""
    assert len(alone) == 2 * (2 + 1) * 2  # models, data sets and their mean, tasks
    assert sum("differences" in record for record in alone) == 6


def test_a_mistake_is_told_once(tmp_path):
    """All ranks meet it; the first one says what is wrong, in one line."""
    words = ["train", "--data.train", str(tmp_path / "nothing.csv")]
    words += ["--run.out", str(tmp_path / "run"), "--run.device", "cpu"]
    _, output = forked(words, tmp_path, well=False)
    errors = [line for line in "".join(output).splitlines() if line.startswith("protoclip: error")]
    assert len(errors) == 1, output
    assert "nothing.csv" in errors[0]
    assert not (tmp_path / "run").exists()
