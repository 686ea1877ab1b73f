"""Signals as schedulers send them, to a group of processes with their data workers."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from socket import socket
from typing import Any

import pytest
from torch.utils.data import DataLoader

from interrupting import after_step, quick_config
from protoclip import cli, signals
from protoclip.config import Config
from protoclip.data.loader import iterate_items
from protoclip.data.sampler import Episode
from protoclip.distributed import collectives
from protoclip.encode import store
from protoclip.models import checkpoint as saved
from protoclip.models.checkpoint import checkpoints
from protoclip.training import folder as run_folder
from protoclip.training import run
from protoclip.training.folder import to_toml
from protoclip.training.trainer import Trainer
from tiny_align import changed, tiny_alignment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def started(work: Callable[[], None], ranks: int = 1) -> list[BaseProcess]:
    """Forked processes in one group, as SLURM starts the ranks of a step on a host."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes: list[BaseProcess] = []

    def begin(rank: int) -> None:
        os.setpgid(0, processes[0].pid if rank else 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored behind a shell's `&`
        if ranks > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in names.items()}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        work()

    for rank in range(ranks):
        process = multiprocessing.get_context("fork").Process(target=begin, args=(rank,))
        process.start()
        processes.append(process)
        while os.getpgid(process.pid or 0) != processes[0].pid:
            time.sleep(0.001)
    return processes


def to_group(name: str) -> None:
    """Send a signal to all processes of this one's group, as another process does."""
    subprocess.run(["kill", "-s", name.removeprefix("SIG"), "--", f"-{os.getpgrp()}"], check=False)


def codes(processes: list[BaseProcess]) -> list[int | None]:
    """Exit codes within two minutes, after which the group is killed."""
    deadline = time.monotonic() + 120
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    ended = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return ended


def alive(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # ended meanwhile
            continue
        if int(number) == group and state not in "ZX":
            pids.append(int(path.parent.name))
    return pids


def await_end(process: BaseProcess) -> None:
    """Wait until a process and its group have ended, for a minute."""
    process.join()
    deadline = time.monotonic() + 60
    while left := alive(process.pid or 0):
        if time.monotonic() > deadline:
            os.killpg(process.pid or 0, signal.SIGKILL)
            raise AssertionError(left)
        time.sleep(0.1)


@pytest.fixture
def words(tiny_parquet: str, tmp_path: Path) -> list[str]:
    """A command that trains six steps with two workers a rank."""
    recipe = tmp_path / "quick.toml"
    config = quick_config(tiny_parquet, tmp_path / "run")
    recipe.write_text(to_toml(config), encoding="utf-8")
    return ["train", "--config", str(recipe), "--data.workers", "2"]


@pytest.mark.parametrize(("name", "ranks"), [("SIGHUP", 1), ("SIGINT", 2)])
def test_a_signal_to_all_processes_ends_in_a_checkpoint(
    name, ranks, words, tmp_path, monkeypatch, capfd
):
    """Here it comes, twice, before an episode whose batches the workers have yet to make, and once
    more while the checkpoint is written."""
    number = getattr(signal, name)
    start_episode, write = Trainer.start_episode, saved.write_checkpoint

    def to_all(trainer: Trainer, episode: Episode) -> dict[str, float]:
        if trainer.step == 2 and collectives.rank() == ranks - 1:
            to_group(name)
            to_group(name)
        return start_episode(trainer, episode)

    def interrupted(*given: Any, **more: Any) -> None:
        to_group(name)
        write(*given, **more)

    monkeypatch.setattr(Trainer, "start_episode", to_all)
    monkeypatch.setattr(saved, "write_checkpoint", interrupted)
    before = signal.getsignal(number)
    if before is signal.SIG_IGN:  # of tests under nohup, which a run would heed
        signal.signal(number, signal.SIG_DFL)
    try:
        processes = started(lambda: cli.main(words), ranks)
    finally:
        signal.signal(number, before)
    assert codes(processes) == [128 + number] * ranks, capfd.readouterr().err
    assert alive(processes[0].pid or 0) == []
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-000000003"]
    err = capfd.readouterr().err
    assert f"{name}: stopped after step 3" in err
    assert "Traceback" not in err


def test_a_killed_process_leaves_none_behind(words, monkeypatch):
    """Its workers end, and so does the other process, with an error."""

    def kill(_: Trainer) -> None:
        if collectives.rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    after_step(2, kill, monkeypatch)
    processes = started(lambda: cli.main(words), 2)
    killed, *others = codes(processes)
    assert killed == -signal.SIGKILL
    assert all(code is not None and code > 0 for code in others)
    deadline = time.monotonic() + 60
    while alive(processes[0].pid or 0):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.1)


INTERRUPTING = """
import atexit, signal, sys
class Interrupting:
    def find_spec(self, name, *more):
        if name == {at!r}:
            try:
                [signal.raise_signal(signal.SIGINT) for _ in range(10)]
            except KeyboardInterrupt:
                raise ImportError("cannot load module more than once per process")
sys.meta_path.insert(0, Interrupting())
if {at!r} == "exit":
    atexit.register(signal.raise_signal, signal.SIGINT)
"""


@pytest.mark.parametrize("at", ["torch", "exit"])
def test_ctrl_c_is_a_line_during_imports_and_at_the_end(at, tmp_path):
    """NumPy hides it behind an error of its own, as here."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING.format(at=at), encoding="utf-8")
    words = ["--version"] if at == "exit" else ["train", "--run.out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "protoclip", *words],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: opening ")]
    assert (done.returncode, lines) == (130, ["protoclip: interrupted"])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_before_training_a_signal_ends_the_command(name, words, tmp_path, monkeypatch, capfd):
    number = getattr(signal, name)

    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(number)
        for _ in range(1000):  # the interpreter may hear it a moment later
            time.sleep(0.01)

    monkeypatch.setattr(run.run_folder, "inspect_folder", interrupted)
    assert codes(started(lambda: cli.main(words))) == [128 + number]
    said = {"SIGTERM": "protoclip: ended by SIGTERM", "SIGINT": "protoclip: interrupted"}
    written = capfd.readouterr().err
    assert "Traceback" not in written
    assert said[name] in written
    assert not (tmp_path / "run").exists()


def test_a_signal_after_the_last_step_leaves_the_evaluation_to_the_next_call(
    tiny_parquet, tmp_path, monkeypatch
):
    config = quick_config(tiny_parquet, tmp_path / "run")
    finish = run_folder.CheckpointWriter.finish

    def interrupted(writer: run_folder.CheckpointWriter) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        finish(writer)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.CheckpointWriter, "finish", interrupted)
        assert run.train(config)["stopped"] == "SIGTERM"
    assert not (tmp_path / "run" / "results.json").exists()
    assert "stopped" not in run.train(config, resume="auto")
    assert (tmp_path / "run" / "results.json").exists()


def test_under_nohup_sighup_is_not_heard():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    heard = []
    try:
        with signals.handle_signals(heard.append):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert heard == [signal.SIGUSR1]


def test_a_signal_ends_encoding_for_align_and_the_next_call_goes_on(tmp_path, monkeypatch, capfd):
    """Here of two processes, of which the last one hears it."""
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "BLOCK_ROWS", 16)
    settings = changed(tiny_alignment(tmp_path / "encoders"), tmp_path / "run")
    recipe = tmp_path / "align.toml"
    recipe.write_text(to_toml(Config.from_dict(settings)), encoding="utf-8")
    add, sent = store.Store.add, list[int]()

    def signalled(this: store.Store, hashes: store.Hashes, *features: Any, **more: Any) -> None:
        add(this, hashes, *features, **more)
        if collectives.rank() == 1 and not sent:
            sent.append(len(hashes))
            to_group("SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "add", signalled)
        words = ["align", "--config", str(recipe)]
        ended = codes(started(lambda: cli.main(words), 2))
    said = capfd.readouterr().err
    assert ended == [128 + signal.SIGTERM] * 2, said
    assert "Traceback" not in said
    assert any(path.stat().st_size for path in (tmp_path / "cache").rglob(f"*{store.ROWS_END}"))
    assert not (tmp_path / "run").exists()
    cli.main(words)
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.slow
def test_workers_of_a_killed_process_end_though_they_have_something_to_write():
    """An item fills the pipe, and nobody reads the second one."""

    def be_killed() -> None:
        items = iterate_items(DataLoader([bytes(1 << 20)] * 8, batch_size=None, num_workers=2))
        next(items)
        os.kill(os.getpid(), signal.SIGKILL)

    await_end(started(be_killed)[0])


def test_a_worker_that_begins_after_its_parent_was_killed_ends():
    def begin_late(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(0.01)
        signals.obey_parent()
        time.sleep(120)

    def be_killed() -> None:
        with signals.block_signals():
            multiprocessing.Process(target=begin_late, args=(os.getpid(),)).start()
        os.kill(os.getpid(), signal.SIGKILL)

    await_end(started(be_killed)[0])
