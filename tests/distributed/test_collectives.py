"""Collectives over several ranks and on one, errors on one rank, and launchers."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from protoclip.distributed import collectives
from protoclip.testing import run_distributed


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


def fail() -> None:
    raise IndexError("no rank")


def raised(which: str) -> tuple[str, str]:
    """Class and message of what this rank raises if one or all fail."""

    def inner() -> None:
        if which == "all" or (collectives.rank() == 1 and which != "rank 0"):
            raise ValueError(f"rank {collectives.rank()}")

    def outer() -> None:
        collectives.raise_on_all_ranks(inner)

    try:
        if which == "rank 0":
            collectives.rank0_first(fail)
        collectives.raise_on_all_ranks(outer if which == "nested" else inner)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


RANK_1 = [("RaisedOnAnotherRank", "rank 1"), ("ValueError", "rank 1")]


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("rank 1", RANK_1),
        ("nested", RANK_1),
        ("all", [("ValueError", "rank 0"), ("RaisedOnAnotherRank", "rank 0")]),
        ("rank 0", [("IndexError", "no rank"), ("RuntimeError", "IndexError: no rank")]),
    ],
)
def test_an_error_on_one_rank_is_raised_on_all(which, expected):
    """As it was on the first rank that met it; with its message on the others."""
    assert run_distributed(raised, 2, which) == expected


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("gpu[003-006,9],login1", "gpu003"),
        ("a-[12,14]-ib", "a-12-ib"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes, host):
    assert collectives.first_host(nodes) == host


def test_launchers_are_recognised(monkeypatch):
    """torchrun's variables, then SLURM's inside srun, but not those of a batch script alone."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert collectives.launched() == (0, 1, 0)
    for name, value in {"STEP_NUM_TASKS": "8", "PROCID": "5", "LOCALID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert collectives.launched() == (5, 8, 1)
    for name, value in {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert collectives.launched() == (2, 4, 0)


def own_process() -> int:
    return os.getpid()


def test_ranks_that_were_killed_are_replaced():
    """A test that kills processes harms no later one."""
    before = run_distributed(own_process, 2)
    os.kill(before[0], signal.SIGKILL)
    while before[0] in [child.pid for child in multiprocessing.active_children()]:
        time.sleep(0.01)
    assert set(before).isdisjoint(run_distributed(own_process, 2))
