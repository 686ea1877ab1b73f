"""Processes that train together: who is who, sums, gathers; no-ops where there is one process.

What `torchrun` or SLURM's `srun` started finds itself by their variables. Sums and gathers are
collective: every process calls them in the same order.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.distributed import _functional_collectives as functional

# No wait of one process for another is longer by construction: evaluation and clustering are shared
# out, and checkpoints are written by threads.
TIMEOUT = timedelta(minutes=10)

OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

Result = TypeVar("Result")

# A group of the hosts' own, for what is decided without waiting for a GPU.
_hosts: dist.ProcessGroup | None = None


def launched() -> tuple[int, int, int]:
    """Rank, world size and rank on this host, as the launcher says; (0, 1, 0) without one."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return (
            int(env["SLURM_PROCID"]),
            int(env["SLURM_STEP_NUM_TASKS"]),
            int(env.get("SLURM_LOCALID", 0)),
        )
    return 0, 1, 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that were launched together: NCCL between GPUs, gloo between CPUs."""
    global _hosts
    rank_, size, _ = launched()
    if size == 1:
        yield
        return
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = first_host(os.environ["SLURM_STEP_NODELIST"])
        os.environ["MASTER_PORT"] = str(15_000 + int(os.environ["SLURM_JOB_ID"]) % 15_000)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        rank=rank_,
        world_size=size,
        timeout=TIMEOUT,
        device_id=device if on_gpu else None,
    )
    _hosts = dist.new_group(backend="gloo", timeout=TIMEOUT) if on_gpu else None
    yield
    # Not after an error: the others may be gone, and this would wait for them.
    dist.destroy_process_group()
    _hosts = None


def first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts, such as `gpu[003-006,9],login1`."""
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    assert found is not None, nodes
    return "".join(part or "" for part in found.groups())


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def all_reduce(values: Tensor, operation: Literal["sum", "max", "min"] = "sum") -> Tensor:
    """Elementwise sum, greatest or least over processes, the same bits in each; no gradient."""
    if world_size() == 1:
        return values
    result = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, OPERATIONS[operation])
    return result


def broadcast(values: Tensor) -> None:
    """Make a tensor what it is in the first process, in place."""
    if world_size() > 1:
        dist.broadcast(values, 0)


def all_gather(rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
    """The rows of all processes, in the order of ranks; numbers of rows may differ. No gradient."""
    if world_size() == 1:
        return rows
    sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    counts = [int(size) for size in sizes]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def all_gather_with_gradient(rows: Float[Tensor, "b *d"]) -> Float[Tensor, "B *d"]:
    """The rows of all processes, of which each has as many, in the order of ranks.

    Backward, a row's gradient is the sum of what all processes' losses have for it.
    """
    if world_size() == 1:
        return rows
    # torch 2.13 renames `all_gather_tensor_autograd`; versions before do not know the new name.
    gather = getattr(functional, "all_gather_single_autograd", None)
    gather = gather or functional.all_gather_tensor_autograd
    world = dist.group.WORLD
    assert world is not None
    everything = gather(rows, 0, world)
    return functional.wait_tensor(everything)  # type: ignore[no-untyped-call,no-any-return]


def any_rank(flags: Sequence[bool]) -> list[bool]:
    """Whether each flag is set in any process; decided between hosts, whatever GPUs are at."""
    if world_size() == 1:
        return list(flags)
    values = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(values, dist.ReduceOp.MAX, group=_hosts)
    return [bool(value) for value in values.tolist()]


class RaisedOnAnotherRank(ValueError):
    """A user's mistake that another process tells."""


def raise_on_all_ranks(function: Callable[[], Result]) -> Result:
    """What a function gives in each process; what it raises in one is raised in all.

    Otherwise the others would wait for the one that has given up. For that reason too, the function
    itself must not wait for others after a step that can fail in one process alone.

    Raises:
        Exception: What the function raised, in the first process where it did.
        RaisedOnAnotherRank, MemoryError, RuntimeError: In the others, with its message: the first for a
            ValueError or OSError, which are a user's to mend, and else what is most like it.
    """
    if world_size() == 1:
        return function()
    error: Exception | None = None
    try:
        result = function()
    except Exception as raised:
        error = raised
    # Where the function raise_on_all_ranks on an error already, the process that met it tells it again.
    own = (
        [] if error is None else [(isinstance(error, RaisedOnAnotherRank), rank(), sendable(error))]
    )
    errors = [entry for entries in all_gather_object(own) for entry in entries]
    if errors:
        _, teller, (kind, message) = min(errors, key=lambda entry: entry[:2])
        if error is not None and teller == rank():
            raise error
        raise kind(message)
    return result


def sendable(error: Exception) -> tuple[type[Exception], str]:
    """What to raise elsewhere; the error's own class may not be one that a message makes."""
    if isinstance(error, ValueError | OSError):
        return RaisedOnAnotherRank, str(error)
    if isinstance(error, MemoryError):
        return MemoryError, str(error)
    named = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
    return RuntimeError, named


def rank0_first(function: Callable[[], Result]) -> Result:
    """What a function gives in the first process, the only one that calls it.

    Raises:
        Exception: As `raise_on_all_ranks` says.
    """
    result = raise_on_all_ranks(lambda: function() if rank() == 0 else None)
    told: Result = all_gather_object(result)[0]
    return told


def all_gather_object(value: Any) -> list[Any]:
    """A small object of each process, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_hosts)
    return values


def device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU where there is one.

    Raises:
        ValueError: No such device here.
    """
    _, processes, place_on_host = launched()
    if processes > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{place_on_host}"
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"run.device: '{name}' cannot be used here ({reason})") from error
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
    return chosen
