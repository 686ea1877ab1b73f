"""Two hosts with their own networks and scratch folders, one shared run folder, and torchrun."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from namespaces import Host, NotAllowed, Part, at, codes, hosts, kill_this, launch, until

from interrupting import assert_equal_ends, relative_difference, with_changes
from protoclip import cli
from protoclip.config import Config
from protoclip.distributed import collectives
from protoclip.models import checkpoint as saved
from protoclip.models.checkpoint import find_checkpoint, read_tensors
from protoclip.training.folder import CheckpointWriter, to_toml
from protoclip.training.run import train
from protoclip.training.trainer import Trainer
from testing import tiny_config
from tiny_align import assert_near, tiny_alignment

pytestmark = pytest.mark.slow
# A restart begins sooner than by default, and does not wait long for a host that is gone.
QUICK = ["--monitor-interval", "0.1", "--rdzv-conf"]
QUICK += ["last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"]
TOGETHER = ["--nnodes", "2", "--nproc-per-node", "1"]
STEPS = 6
CLUSTERING: Part = (Trainer, "start_episode", 2)
TRAINING: Part = (Trainer, "train_step", 4)
SAVING: Part = (saved, "write_checkpoint", 3)
WAITING: Part = (CheckpointWriter, "save", 3)  # rank 0 alone works


@contextmanager
def made(number: int, folder: Path) -> Iterator[list[Host]]:
    try:
        with hosts(number, folder) as given:
            yield given
    except NotAllowed as error:
        pytest.skip(str(error))


def small(out: Path) -> Config:
    """A run of six steps, which saves after each and whose rounding stays small."""
    sections = {
        "run": {"save_steps": 1, "save_minutes": 0.0, "evaluate": False},
        "parallel": {"sync_batch_norm": True},
        "optim": {"eps": 1e-2, "warm_up_steps": 0},
        "episodes": {"count": 3, "size": 32},
    }
    return with_changes(tiny_config(out=str(out)), sections)


def words(config: Config, folder: Path) -> list[str]:
    recipe = folder / "recipe.toml"
    recipe.write_text(to_toml(config), encoding="utf-8")
    return ["train", "--config", str(recipe), "--resume", "auto"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(find_checkpoint(run) / "model.safetensors")


def errors(host: Host) -> list[str]:
    """What `protoclip` says of an error; tracebacks are torchrun's own."""
    return [line for line in host.said.splitlines() if line.startswith("protoclip: error")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two hosts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = words(small(folder / "run"), folder)
    with made(2, folder / "hosts") as both:
        ended = codes([launch(host, TOGETHER, lambda: cli.main(command)) for host in both])
        assert ended == [0, 0], [host.said for host in both]
    return folder


def test_two_hosts_train_what_one_process_trains(undisturbed, tmp_path):
    config = small(tmp_path / "run")
    train(config)
    assert (
        relative_difference(weights(undisturbed / "run"), weights(tmp_path / "run"), config) < 1e-4
    )


def test_two_hosts_evaluate_embed_and_align_as_one_process(undisturbed, tmp_path, monkeypatch):
    """One after another. At last, a store of encoders that each host has for itself is refused."""
    (tmp_path / "encoders").mkdir()
    aligned = Config.from_dict(tiny_alignment(tmp_path / "encoders"))
    (tmp_path / "align.toml").write_text(to_toml(aligned), encoding="utf-8")
    run, data = str(undisturbed / "run"), str(tmp_path / "encoders" / "pairs.parquet")
    aligned = ["align", "--config", str(tmp_path / "align.toml"), "--run.out"]
    monkeypatch.setattr(collectives, "UNSEEN", 0.5)

    def work(out: Path) -> None:
        out.mkdir(exist_ok=True)
        records = out / f"{collectives.read_launcher()[0]}.json"
        with records.open("w") as file, redirect_stdout(file):
            cli.main(["evaluate", run, "--data", data, "--json", "--no-cache"])
        embed = ["embed-teacher", "--teacher", run, "--data.train", data]
        cli.main([*embed, "--out", str(out / "teacher")])
        cli.main([*aligned, str(out / "aligned"), "--align.features", str(out / "store")])
        if collectives.read_launcher()[1] > 1:
            cli.main([*aligned, str(out / "apart")])

    work(tmp_path / "one")
    with made(2, tmp_path / "hosts") as both:
        ended = [launch(host, TOGETHER, lambda: work(tmp_path / "two")) for host in both]
        assert codes(ended) == [1, 1]
        (said,) = [line for host in both for line in errors(host)]
    assert "rank 1: " in said
    assert "share by align.features" in said
    one, two = [json.loads((tmp_path / n / "0.json").read_text()) for n in ("one", "two")]
    assert two == one
    first, second = [
        (tmp_path / n / "teacher" / "features.npy").read_bytes() for n in ("one", "two")
    ]
    assert second == first
    assert_near(tmp_path / "two" / "aligned", tmp_path / "one" / "aligned")


def test_a_link_that_is_cut_ends_each_rank_in_one_line(tmp_path, monkeypatch):
    """After the timeout, though a rank may wait longer for what another does alone."""
    monkeypatch.setattr(collectives, "TIMEOUT", timedelta(seconds=4))
    monkeypatch.setattr(cli, "PATIENCE", 0.0)
    command, once = words(small(tmp_path / "run"), tmp_path), tmp_path / "once"

    def work() -> None:
        at(WAITING, 0, lambda: time.sleep(2), once)
        cli.main(command)

    with made(2, tmp_path / "hosts") as both:
        ended = [launch(host, TOGETHER, work) for host in both]
        until(once, ended, both)
        both[1].link("down")
        assert codes(ended, 60) == [1, 1], [host.said for host in both]
        for host in both:
            (line,) = errors(host)
            assert "another rank has ended or does not answer" in line


def test_a_run_goes_on_when_ranks_are_killed(undisturbed, tmp_path):
    """Bit for bit, by what torchrun starts anew: one in clustering, then one that saves."""
    command = words(small(tmp_path / "run"), tmp_path)
    first, second = tmp_path / "first", tmp_path / "second"

    def work() -> None:
        at(CLUSTERING, 1, kill_this, first)
        at(SAVING, 0, kill_this, second)
        cli.main(command)

    with made(1, tmp_path / "hosts") as (host,):
        options = ["--nproc-per-node", "2", "--max-restarts", "2", *QUICK]
        assert codes([launch(host, options, work)]) == [0], host.said
    assert second.exists()
    assert_equal_ends(tmp_path / "run", undisturbed / "run", STEPS)


def test_a_run_goes_on_when_a_host_is_gone(undisturbed, tmp_path):
    """With the other one, up to rounding."""
    config = small(tmp_path / "run")
    command, once = words(config, tmp_path), tmp_path / "once"

    def work() -> None:
        at(TRAINING, 1, lambda: time.sleep(100), once)
        cli.main(command)

    with made(2, tmp_path / "hosts") as both:
        options = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", *QUICK]
        ended = [launch(host, options, work) for host in both]
        until(once, ended, both)
        both[1].kill()
        assert codes(ended[:1]) == [0], both[0].said
        assert f"going on from {tmp_path}/run/checkpoints/step-00000000" in both[0].said
    assert (
        relative_difference(weights(tmp_path / "run"), weights(undisturbed / "run"), config) < 1e-4
    )
