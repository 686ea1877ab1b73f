"""Collectives over several ranks and on one, errors on one rank, and launchers."""

import os
import re
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest
import torch

from interrupting import quick_config
from protoclip.distributed import collectives, parallel
from protoclip.distributed.collectives import WAITS
from protoclip.training import watch
from protoclip.training.run import train
from testing import run_distributed, tiny_pairs


def collect(rank_rows: list[int]) -> dict[str, object]:
    rank = collectives.rank()
    rows = torch.full((rank_rows[rank], 2), float(rank))
    return {
        "gathered": collectives.all_gather(rows)[:, 0].tolist(),
        "sum": collectives.all_reduce(torch.tensor([rank + 1.0, 1.0])).tolist(),
        "max": collectives.all_reduce(torch.tensor([rank]), "max").tolist(),
        "any": collectives.any_rank([rank == 1, False]),
        "objects": collectives.all_gather_object({"rank": rank}),
        "passed on": collectives.all_gather_object(
            collectives.pass_on(torch.full((2, 3), float(rank)).T)[0].tolist()
        ),
    }


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_has_the_same_sums_and_gathers(world_size):
    """Numbers of rows may differ between ranks and be zero. One rank needs no group. What is passed
    on comes from the rank before."""
    rows = [3, 0, 1, 2][:world_size]
    expected = {
        "gathered": [float(rank) for rank, count in enumerate(rows) for _ in range(count)],
        "sum": [world_size * (world_size + 1) / 2, world_size],
        "max": [world_size - 1],
        "any": [world_size > 1, False],
        "objects": [{"rank": rank} for rank in range(world_size)],
        "passed on": [[float((rank - 1) % world_size)] * 2 for rank in range(world_size)],
    }
    assert run_distributed(collect, world_size, rows) == [expected] * world_size


def wait_until(holds: Callable[[], bool]) -> None:
    """Fails after a minute."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


LATE = 0.5  # seconds that rank 1 comes after rank 0


def begin(step: str, folder: Path) -> float:
    """The time at which this rank begins a step: rank 1 late, however busy the machine is."""
    said, began = folder / step, time.monotonic()
    if collectives.rank() == 0:
        said.touch()
    else:
        wait_until(said.exists)
        time.sleep(LATE)
    return began


def wait_for_a_late_rank(folder: Path) -> tuple[tuple[float, float], tuple[float, float], str]:
    """Of a collective and of gradients, the seconds that a rank says it has waited, and those that
    have passed; and where the ranks are."""
    module = parallel.distribute(torch.nn.Linear(2, 2))
    where = watch.gather_machines(torch.device("cpu")).describe(8)
    WAITS.take_seconds()
    began = begin("gather", folder)
    collectives.all_gather_with_gradient(torch.zeros(1, 2))
    waited = WAITS.take_seconds(), time.monotonic() - began
    for step in ("first", "second"):  # DDP says at a step how the one before it was
        total = module(torch.zeros(1, 2)).sum()
        began = begin(step, folder)
        total.backward()
        passed = time.monotonic() - began
    module(torch.zeros(1, 2))
    return waited, (parallel.measure_unhidden(module), passed), where


def test_a_rank_knows_how_long_it_waits_for_another(tmp_path):
    (*waits, where), (*_, there) = run_distributed(wait_for_a_late_rank, 2, tmp_path)
    for waited, passed in waits:
        assert LATE / 2 < waited <= passed
    assert where == there
    assert where.startswith("1 host, 2 ranks on ")
    assert where.endswith(
        ", each with 8 pairs of every batch; learning rate, batch and episode are for all ranks "
        "together"
    )


def fail() -> None:
    raise IndexError("no rank")


def raised(which: str) -> tuple[str, str]:
    """Class and message of what this rank raises if one or all fail."""

    def inner() -> None:
        if which == "all" or (collectives.rank() == 1 and which != "rank 0"):
            raise ValueError(f"rank {collectives.rank()}")

    try:
        if which == "rank 0":
            collectives.rank0_first(fail)
        collectives.raise_on_all_ranks(inner)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("rank 1", [("RaisedOnAnotherRank", "rank 1"), ("ValueError", "rank 1")]),
        ("all", [("ValueError", "rank 0"), ("RaisedOnAnotherRank", "rank 0")]),
        ("rank 0", [("IndexError", "no rank"), ("RuntimeError", "IndexError: no rank")]),
    ],
)
def test_an_error_on_one_rank_is_raised_on_all(which, expected):
    """As it was on the first rank that met it; with its message on the others."""
    assert run_distributed(raised, 2, which) == expected


def shared() -> tuple[list[int], list[int | None], str]:
    """Squares that ranks share, what this rank gets of three items turn by turn, and an error."""

    def read(items: Iterator[int]) -> Generator[int, None, None]:
        for item in items:
            if item == 4:
                raise ValueError(f"item {item}")
            yield item

    squares = collectives.share(lambda item: item**2, range(5))
    turns = [*collectives.take_turns(range(1, 4), read)]
    with pytest.raises(ValueError, match="item") as error:
        [*collectives.take_turns(range(1, 6), read)]
    return squares, turns, str(error.value)


def test_ranks_share_items_and_take_turns():
    """All get all results in the order of items; a rank without more items waits for the others,
    and an error of one is raised on all."""
    squares = [0, 1, 4, 9, 16]
    assert run_distributed(shared, 1) == [(squares, [1, 2, 3], "item 4")]
    two = [(squares, [1, 3], "item 4"), (squares, [2, None], "item 4")]
    assert run_distributed(shared, 2) == two


@pytest.mark.parametrize(
    "collective",
    [
        lambda: collectives.all_gather_object(1),
        lambda: collectives.any_rank([True]),
        lambda: collectives.all_reduce(torch.ones(1)),
        lambda: collectives.all_gather(torch.ones(1)),
        lambda: collectives.broadcast(torch.ones(1)),
        lambda: collectives.raise_on_all_ranks(int),
        lambda: collectives.rank0_first(int),
        lambda: collectives.gather_results(int),
    ],
)
@pytest.mark.parametrize("within", [collectives.raise_on_all_ranks, collectives.rank0_first])
def test_no_collective_where_one_rank_can_leave_by_an_exception(within, collective):
    """Not on one rank either, so that each test of a caller finds it. After it all is as before."""
    with pytest.raises(AssertionError, match="a collective within"):
        within(collective)
    collective()


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("gpu[003-006,9],login1", "gpu003"),
        ("a-[12,14]-ib", "a-12-ib"),
        ("rack[1-2]n[01-03]", "rack1n01"),
        ("rack[2,4]-[07]x,login[1-2]", "rack2-07x"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes, host):
    assert collectives.find_first_host(nodes) == host


def test_launchers_are_recognised(monkeypatch):
    """torchrun's variables, then SLURM's inside srun, but not those of a batch script alone."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert collectives.read_launcher() == (0, 1, 0)
    for name, value in {"STEP_NUM_TASKS": "8", "PROCID": "5", "LOCALID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert collectives.read_launcher() == (5, 8, 1)
    for name, value in {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert collectives.read_launcher() == (2, 4, 0)


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({}, ("node3", "15007")),
        ({"MASTER_ADDR": "other"}, ("other", "15007")),
        ({"MASTER_PORT": "29500"}, ("node3", "29500")),
    ],
)
def test_host_and_port_that_are_given_stay_under_srun(given, place, monkeypatch):
    ranks = {"STEP_NUM_TASKS": "2", "PROCID": "1", "STEP_NODELIST": "node[3-4]", "JOB_ID": "7"}
    env = {**{f"SLURM_{name}": value for name, value in ranks.items()}, **given}
    monkeypatch.setattr(os, "environ", env)
    monkeypatch.setattr(collectives, "rendezvous", Mock(side_effect=RuntimeError("nobody")))
    with (
        pytest.raises(ValueError, match="the ranks do not reach each other"),
        collectives.process_group(torch.device("cpu")),
    ):
        pass
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == place


def write_to(folders: list[Path]) -> str:
    """What this rank says of a folder to which all hosts write, as if it were shared."""
    with pytest.MonkeyPatch.context() as patch:  # ranks serve other tests, too
        patch.setattr(collectives, "UNSEEN", 0.2)
        try:
            collectives.require_shared(folders[collectives.rank()] / "facts.json", by="--out")
        except ValueError as error:
            return str(error)
    return ""


def test_two_folders_of_two_hosts_are_not_one_place_to_write_to(tmp_path):
    apart = [tmp_path / "a", tmp_path / "b"]
    for folder in apart:
        folder.mkdir()
    assert all("share by --out" in said for said in run_distributed(write_to, 2, apart))
    assert run_distributed(write_to, 2, [apart[0]] * 2) == ["", ""]
    assert not [*tmp_path.rglob("*.tmp")]


def other_pairs(folders: list[Path], out: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folders[collectives.rank()])
        try:
            train(quick_config("pairs.parquet", out))
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(("number", "seed"), [(40, 0), (48, 1)])
def test_hosts_that_see_other_pairs_are_refused(number, seed, tmp_path):
    """Ranks would draw rows of tables that are not one; equal numbers of rows have equal ids."""
    for name, table in (("a", tiny_pairs(48)), ("b", tiny_pairs(number, seed=seed))):
        (tmp_path / name).mkdir()
        pq.write_table(table.drop_columns("sample_id"), tmp_path / name / "pairs.parquet")
    folders = [tmp_path / name for name in "ab"]
    for said in run_distributed(other_pairs, 2, folders, tmp_path / "run"):
        assert re.search("data.train: .* sees other files than ", said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("visible", "name"), [(1, "cuda:0"), (4, "cuda:2")])
def test_a_rank_takes_the_gpu_of_its_number_unless_it_sees_one_alone(visible, name, monkeypatch):
    """As under `srun --gpus-per-task 1`."""
    for key, value in {"STEP_NUM_TASKS": "4", "PROCID": "2", "LOCALID": "2"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    assert str(collectives.choose_device("auto")) == name


def test_two_ranks_with_one_gpu_are_refused(monkeypatch):
    """NCCL tells; as of two processes under CUDA_VISIBLE_DEVICES=0."""

    def refuse(*_: object, **__: object) -> None:
        raise torch.distributed.DistBackendError(
            "NCCL error: invalid usage\nLast error:\nDuplicate GPU detected : rank 1 and rank 0"
        )

    for key, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(collectives, "open_new_store", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    with (
        pytest.raises(ValueError, match=r"^run\.device: rank 1 has the same GPU \(cuda:0\) as"),
        collectives.process_group(torch.device("cuda:0")),
    ):
        pass
