"""A launcher starts, stops and loses processes; the others end soon, and the run goes on."""

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
import torch

from interrupting import with_changes
from protoclip.cli import main
from protoclip.config import Config
from protoclip.models.saved import checkpoints, read_tensors
from protoclip.testing import run_distributed, tiny_config, tiny_pairs
from protoclip.training.run import train
from protoclip.training.run_folder import to_toml

sys.path.append(str(Path(__file__).parents[1] / "unit" / "evaluation"))
from tiny_open_clip import save_tiny_open_clip

pytestmark = pytest.mark.slow


def config_for(folder: Path) -> Config:
    sections = {"run": {"save_steps": 2, "evaluate": False}, "episodes": {"count": 4}}
    return with_changes(tiny_config(out=str(folder)), sections)


def trained(config: Config) -> None:
    train(config, resume="auto")


def launch(folder: Path, *more: str) -> "subprocess.Popen[str]":
    """Start two processes by `torchrun` that train into a folder."""
    recipe = folder.parent / "tiny.toml"
    recipe.write_text(to_toml(config_for(folder)), encoding="utf-8")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "protoclip", "train", "--config", str(recipe), *more),
    ]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, **output, env=env, start_new_session=True)


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
    out, err = ([(folder / f"{n}.{of}").read_text() for n in range(2)] for of in ("out", "err"))
    assert [rank.exitcode == 0 for rank in ranks] == [well, well], err
    return out, err


def wait_for_checkpoint(run: "subprocess.Popen[str]", folder: Path, number: int) -> None:
    deadline = time.monotonic() + 120
    while len(checkpoints(folder)) == 0 or checkpoints(folder)[-1].name < f"step-{number:09}":
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint after two minutes"
        time.sleep(0.05)


def ended(run: "subprocess.Popen[str]", *, well: bool) -> str:
    output, _ = run.communicate(timeout=180)
    assert (run.returncode == 0) == well, output
    return output


def test_an_interrupted_run_of_two_processes_goes_on_bit_for_bit(tmp_path):
    """SIGTERM to torchrun ends both with a checkpoint, though their workers get it too; SIGKILL of
    one ends the other within a minute. The run goes on, here without torchrun, and ends as one that
    was not interrupted."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run = launch(folder, "--data.workers", "1")
    wait_for_checkpoint(run, folder, 4)
    os.kill(run.pid, signal.SIGTERM)
    assert "SIGTERM: stopped after step" in ended(run, well=False)
    assert run.returncode == 1  # torchrun's own

    run = launch(folder, "--resume", "auto")
    wait_for_checkpoint(run, folder, 8)
    found = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[1]), signal.SIGKILL)
    began = time.monotonic()
    output = ended(run, well=False)
    assert time.monotonic() - began < 60
    assert "Signal 9" in output
    assert not (folder / "results.json").exists()

    for of in (folder, whole):
        run_distributed(trained, 2, config_for(of))
    assert (folder / "results.json").is_file()
    expected, found = (
        read_tensors(checkpoints(of)[-1] / "model.safetensors") for of in (whole, folder)
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    steps = [
        [line.split(",")[0] for line in (of / "metrics.jsonl").open()] for of in (whole, folder)
    ]
    assert steps[0] == steps[1]


def test_two_processes_judge_as_one_does(tmp_path, capsys):
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
    told = [line for line in "".join(output).splitlines() if line.startswith("protoclip: error")]
    assert len(told) == 1, output
    assert "nothing.csv" in told[0]
    assert not (tmp_path / "run").exists()
