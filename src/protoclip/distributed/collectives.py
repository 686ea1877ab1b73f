"""Ranks that train together: sums, gathers and errors over ranks, which cost nothing on one.

A process finds its rank in the variables of `torchrun` or of SLURM's `srun`. Every rank has to call
a collective, and all in the same order.
"""

import gc
import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from datetime import timedelta
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

Item = TypeVar("Item")
Result = TypeVar("Result")
# How long a rank waits for the tensors of another: within a step ranks do equal work.
TIMEOUT = timedelta(minutes=10)
# How long it waits for an object, a decision or an error. Before these a rank may work alone for
# hours: its host indexes the data, or it has the larger share to embed. A rank that ends is noticed
# at once all the same, since gloo's connections to it close; a host that is gone, after `TIMEOUT`.
WORK_TIMEOUT = timedelta(days=7)
CGROUPS = Path("/sys/fs/cgroup")
# How many seconds a file of another host may be unseen: NFS looks anew after 60 at most.
UNSEEN = 60.0
# The gloo group for these waits. It does not wait for a GPU either.
_hosts: dist.ProcessGroup | None = None
# The gloo group of a thread that works beside the training, whose own order of collectives is none
# of that thread's; and whether this thread is such a one.
_background: dist.ProcessGroup | None = None
_beside = ContextVar("_beside", default=False)
# Whether this thread is in a function that one rank alone may leave by an exception.
_alone = ContextVar("_alone", default=False)
# Pairs of events that may wait to be read; reading those that are past costs a step nothing.
MOST_UNREAD = 256


class Waits:
    """Adds up the seconds that pass within `count`, on the device of the values."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._unread: deque[tuple[Any, Any]] = deque()

    def count(self, values: Tensor) -> AbstractContextManager[None]:
        if torch.compiler.is_compiling():  # a clock would be a constant of the compiled code
            return nullcontext()
        return self._time(on_card=values.device.type == "cuda")

    @contextmanager
    def _time(self, *, on_card: bool) -> Iterator[None]:
        if not on_card:
            began = time.monotonic()
            yield
            self._seconds += time.monotonic() - began
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        yield
        end.record()
        self._unread.append((start, end))
        if len(self._unread) > MOST_UNREAD:
            self._read()

    def _read(self) -> None:
        while self._unread and self._unread[0][1].query():
            start, end = self._unread.popleft()
            self._seconds += start.elapsed_time(end) / 1000

    def take_seconds(self) -> float:
        """The seconds since the last call; of a card, as far as it is known to have come."""
        self._read()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


WAITS = Waits()  # of this process


def read_launcher() -> tuple[int, int, int]:
    """Rank, world size and rank on this host, as the launcher says; (0, 1, 0) without one."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return 0, 1, 0
    return int(env[names[0]]), int(env[names[1]]), int(env.get(names[2], 0))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the ranks that were launched together: NCCL between GPUs, gloo between CPUs."""
    global _hosts, _background
    rank_, size, _ = read_launcher()
    if size == 1:
        yield
        return
    by_srun = "SLURM_STEP_NODELIST" in os.environ
    if by_srun and "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = find_first_host(os.environ["SLURM_STEP_NODELIST"])
    if by_srun and "MASTER_PORT" not in os.environ:
        # By SLURM's numbers of the job and of the step: a sweep may start several steps on a host.
        job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_STEP_ID", 0))
        os.environ["MASTER_PORT"] = str(15_000 + (job + 131 * step) % 15_000)
    # PyTorch imports this module when it is needed. Its functions have the group of that moment as
    # a default and keep it for ever; its threads would then meet the end of the interpreter, which
    # can end in SIGABRT after all work is done.
    import_module("torch.distributed.nn")

    on_gpu = device.type == "cuda"
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=open_new_store(rank_, size),
            rank=rank_,
            world_size=size,
            timeout=TIMEOUT,
            device_id=device if on_gpu else None,
        )
        _hosts = dist.new_group(backend="gloo", timeout=WORK_TIMEOUT)
    except RuntimeError as error:
        if "Duplicate GPU" in str(error):
            raise ValueError(
                f"run.device: rank {rank_} has the same GPU ({device}) as another; start one "
                "process for each GPU that CUDA_VISIBLE_DEVICES shows"
            ) from error
        if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
            raise
        raise ValueError(
            f"the ranks do not reach each other ({describe_failure(error)}); where hosts have "
            "several networks, name one in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from error
    notice_lost_hosts()
    yield
    # Not after an error: other ranks may be gone, and this would wait for them.
    _hosts = _background = None
    gc.collect()  # what `DistributedDataParallel` leaves keeps the group, and so its threads
    dist.destroy_process_group()


def open_background() -> None:
    """Make the group that `in_background` uses, unless there is one already. Collective."""
    global _background
    if dist.is_initialized() and _background is None:
        _background = dist.new_group(backend="gloo", timeout=WORK_TIMEOUT)
        notice_lost_hosts()


@contextmanager
def in_background() -> Iterator[dist.ProcessGroup | None]:
    """Let objects and errors of this thread meet those of the same thread on the other ranks.
    Gives their group, which `open_background` has made. Tensors have no way here."""
    entered = _beside.set(True)
    try:
        yield _background
    finally:
        _beside.reset(entered)


def open_new_store(rank: int, size: int) -> Store:
    """The launcher's store, with a prefix of keys that no earlier start used.

    torchrun has one store for all its restarts, and there a rank would meet the addresses of ranks
    that were killed. So rank 0 answers what the others ask until each has its prefix. Ranks wait
    here and not in the store of torchrun, where signals are not heard. Raises `RuntimeError` if one
    does not come within `TIMEOUT`.
    """
    store, _, _ = next(rendezvous("env://", rank, size, timeout=TIMEOUT))
    name, deadline = uuid4().hex, time.monotonic() + TIMEOUT.total_seconds()
    answer, waits = f"protoclip/answer/{name}", set(range(1, size))
    if rank:
        store.set(f"protoclip/asks/{rank}", name)
    while not store.check([answer]) if rank else waits:
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {0 if rank else min(waits)} has not come")
        for other in sorted(waits) if rank == 0 else ():
            asks = f"protoclip/asks/{other}"
            if store.check([f"protoclip/has/{name}/{other}"]):
                waits.remove(other)
            elif store.check([asks]):  # perhaps of a rank that is gone
                store.set(f"protoclip/answer/{store.get(asks).decode()}", name)
        time.sleep(0.01)
    prefix = store.get(answer).decode() if rank else name
    if rank:
        store.set(f"protoclip/has/{prefix}/{rank}", "")
    return PrefixStore(prefix, store)


def notice_lost_hosts() -> None:
    """End connections over which nothing has come for `TIMEOUT`, on Linux: a host without power
    closes none, and a rank would wait for it for `WORK_TIMEOUT`."""
    seconds = int(TIMEOUT.total_seconds())
    options = {"TCP_KEEPIDLE": max(1, seconds // 10), "TCP_KEEPINTVL": max(1, seconds // 10)}
    options["TCP_USER_TIMEOUT"] = 1000 * seconds
    for file in Path("/proc/self/fd").glob("*"):
        if not file.is_socket():
            continue
        # One that is none of TCP raises.
        with suppress(OSError), socket.socket(fileno=os.dup(int(file.name))) as connection:
            for name, value in options.items():
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def describe_failure(error: Exception) -> str:
    """What gloo or a store says, without where in its source and what else may be the matter."""
    first = str(error).strip().partition("\n")[0]
    return re.sub(r"\[/[^\]]*\] ", "", first).partition(". This is typically")[0]


def find_first_host(nodes: str) -> str:
    """First host of a SLURM list such as `gpu[003-006,9],login1` or `rack[1-2]n[01-03]`."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])+", nodes)  # up to a comma that is in no bracket
    assert first is not None, nodes
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _check_place() -> None:
    """Check that a collective may begin here. One rank checks it too, so that every test does."""
    assert not _alone.get(), (
        "a collective within raise_on_all_ranks or rank0_first: a rank that raises before it "
        "would leave the others waiting, or answer with its error to another question"
    )


def all_reduce(values: Tensor, operation: Literal["sum", "max"] = "sum") -> Tensor:
    """Elementwise sum or maximum over ranks, the same bits on each; no gradient."""
    _check_place()
    if world_size() == 1:
        return values
    result = values.detach().clone(memory_format=torch.contiguous_format)
    with WAITS.count(result):
        dist.all_reduce(result, getattr(dist.ReduceOp, operation.upper()))
    return result


def broadcast(values: Tensor) -> None:
    """Copy rank 0's values to all ranks, in place."""
    _check_place()
    if world_size() > 1:
        with WAITS.count(values):
            dist.broadcast(values, 0)


def all_gather(rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
    """The rows of all ranks, rank after rank. Ranks may differ in number of rows. No gradient."""
    _check_place()
    if world_size() == 1:
        return rows
    sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
    with WAITS.count(rows):
        dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    counts = [int(size) for size in sizes]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    with WAITS.count(rows):
        dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def all_gather_with_gradient(rows: Shaped[Tensor, "b *d"]) -> Shaped[Tensor, "B *d"]:
    """The rows of all ranks, which have equally many; it does not wait for a GPU. Gradients, of
    rows that have some, are summed over ranks."""
    if world_size() == 1:
        return rows
    # torch 2.13 renamed it; earlier versions do not have the new name.
    new = "all_gather_single_autograd"
    gather = getattr(functional, new if hasattr(functional, new) else "all_gather_tensor_autograd")
    with WAITS.count(rows):
        gathered: Tensor = functional.wait_tensor(gather(rows, 0, dist.group.WORLD))  # type: ignore[no-untyped-call]
    return gathered


def pass_on(values: Tensor) -> Tensor:
    """The values of the rank before, while this rank's go to the one after it. No gradient."""
    _check_place()
    if world_size() == 1:
        return values
    received = torch.empty_like(values, memory_format=torch.contiguous_format)
    after, before = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    sends = dist.P2POp(dist.isend, values.detach().contiguous(), after)
    receives = dist.P2POp(dist.irecv, received, before)
    with WAITS.count(received):
        for request in dist.batch_isend_irecv([sends, receives]):
            request.wait()
    return received


def all_gather_object(value: Any) -> list[Any]:
    """A small object of each rank, in the order of ranks."""
    _check_place()
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    group = _background if _beside.get() else _hosts
    dist.all_gather_object(values, value, group=group)
    return values


def any_rank(flags: Sequence[bool]) -> list[bool]:
    """Whether each flag is set on any rank. Does not wait for a GPU."""
    _check_place()
    if world_size() == 1:
        return list(flags)
    values = torch.tensor(flags, dtype=torch.int32)
    # With cards only the host waits here, and they go on.
    with WAITS.count(values) if dist.get_backend() == "gloo" else nullcontext():
        dist.all_reduce(values, dist.ReduceOp.MAX, group=_hosts)
    return [bool(value) for value in values.tolist()]


def barrier() -> None:
    """Wait until every rank is here, for as long as it may work alone: not with `TIMEOUT`."""
    any_rank([False])


class RaisedOnAnotherRank(ValueError):
    """A user's mistake that another rank reports."""


def gather_results(function: Callable[[], Result]) -> list[Result]:
    """Call a function on every rank, and give all ranks the results of all, in the order of ranks.

    If it raises on one, every rank raises, and none waits: the first rank that failed its own
    error, and the others its message, a user's mistake (ValueError, OSError) as
    RaisedOnAnotherRank, any other as MemoryError or RuntimeError. No collective may be in the
    function: this one included, they refuse. Results are small.
    """
    _check_place()
    error: Exception | None = None
    result: Any = None
    entered = _alone.set(True)
    try:
        result = function()
    except Exception as raised:
        error = raised
    finally:
        _alone.reset(entered)
    try:
        answers = all_gather_object((result, None if error is None else sendable(error)))
    except RuntimeError:  # another rank is gone, but this rank's own error says more
        if error is None:
            raise
        raise error from None
    for reporter, (_, failure) in enumerate(answers):
        if failure is not None:
            if error is not None and reporter == rank():
                raise error
            kind, message = failure
            raise kind(message)
    return [result for result, _ in answers]


def raise_on_all_ranks(function: Callable[[], Result]) -> Result:
    """Call a function on every rank, whose result stays there; raises as `gather_results`."""
    results = list[Result]()
    gather_results(lambda: results.append(function()))
    return results[0]


def rank0_first(function: Callable[[], Result]) -> Result:
    """Call a function on rank 0 alone and give its result to all; raises as `gather_results`."""
    return gather_results(lambda: function() if rank() == 0 else None)[0]  # type: ignore[return-value]


def share(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """What a function makes of items, in their order; ranks share the calls. Raises as
    `gather_results`."""
    ranks = gather_results(lambda: [function(item) for item in items[rank() :: world_size()]])
    return [ranks[place % len(ranks)][place // len(ranks)] for place in range(len(items))]


def take_turns(
    items: Sequence[Item], work: Callable[[Iterator[Item]], Generator[Result, None, None]]
) -> Generator[Result | None, None, None]:
    """Deal items to the ranks, and give what this rank's `work` makes of its share, turn by turn.

    A rank that is done gives None while others go on. An error of one rank is raised on all, so no
    collective may be in `work`; between the turns there may be. To be closed.
    """
    made: Result | None = None

    def go_on() -> bool:
        nonlocal made
        made = next(mine, None)
        return made is not None

    with closing(work(islice(items, rank(), None, world_size()))) as mine:
        while any(gather_results(go_on)):
            yield made


def sendable(error: Exception) -> tuple[type[Exception], str]:
    """What other ranks raise: not the error's own class, which may need other arguments."""
    if isinstance(error, ValueError | OSError):
        return RaisedOnAnotherRank, str(error)
    if isinstance(error, MemoryError):
        return MemoryError, str(error)
    name = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
    return RuntimeError, f"{name}{error}"


def require_shared(path: Path, *, by: str) -> None:
    """Refuse a folder, or the folder of a file, that the hosts do not see as one. Collective.

    Equal files may be left there of earlier starts, so rank 0 writes one that is new. The error
    names what sets the place.
    """
    if world_size() == 1:
        return

    def write() -> tuple[str, str]:
        name, content = f".{path.name}.{os.getpid()}.tmp", uuid4().hex
        path.with_name(name).write_text(content)
        return name, content

    name, content = rank0_first(write)
    token = path.with_name(name)

    def is_seen() -> bool:
        return token.is_file() and token.read_text() == content

    try:
        raise_on_all_ranks(lambda: wait_to_see(path, is_seen, by=by))
    finally:
        if rank() == 0:
            token.unlink(missing_ok=True)


def wait_to_see(path: Path, is_seen: Callable[[], bool], *, by: str) -> None:
    """Wait until this host sees what rank 0 wrote; raises `ValueError` after `UNSEEN` seconds."""
    deadline = time.monotonic() + UNSEEN
    while not is_seen():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{path}: {socket.gethostname()} does not see it as rank 0 does; name a place that "
                f"all hosts share by {by}"
            )
        time.sleep(0.1)


def choose_device(name: str, *, setting: str = "run.device") -> torch.device:
    """The device of this name; `auto` is a GPU if there is one."""
    _, size, local_rank = read_launcher()
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    if name == "cuda" and size > 1:
        # `srun --gpus-per-task 1` shows each rank its own GPU alone, whatever its number.
        name = f"cuda:{local_rank if torch.cuda.device_count() > 1 else 0}"
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        choices = "auto, cpu, cuda, cuda:1 or mps"
        raise ValueError(
            f"{setting}: '{name}' cannot be used here ({reason[:120]}); choose from {choices}"
        ) from error
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
    return chosen


def count_cores() -> int:
    """The cores of this host that this rank may use: its share, at least one.

    Affinity and control groups (containers, SLURM) may grant a process fewer than the host has.
    """
    env = os.environ
    can_ask = hasattr(os, "sched_getaffinity")  # not on macOS
    granted = len(os.sched_getaffinity(0)) if can_ask else os.cpu_count() or 1
    granted = min(granted, read_quota() or granted)
    if "LOCAL_WORLD_SIZE" in env:  # of torchrun, whose ranks share its cores
        return max(1, granted // int(env["LOCAL_WORLD_SIZE"]))
    if world_size() > 1 and "SLURM_STEP_TASKS_PER_NODE" in env:
        # SLURM's short form of a number for each node: `8(x2),4` is 8, 8, 4.
        parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", env["SLURM_STEP_TASKS_PER_NODE"])
        ranks = [int(count) for count, repeats in parts for _ in range(int(repeats or 1))]
        here = ranks[int(env.get("SLURM_NODEID", 0))]
        # srun may have bound each rank to cores of its own; then they are its share already.
        return max(1, min(granted, int(env.get("SLURM_CPUS_ON_NODE", granted)) // here))
    return max(1, granted // world_size())


def read_quota() -> int | None:
    """Whole cores that control groups grant this process; None without a limit."""
    group = "/"
    with suppress(OSError):
        text = Path("/proc/self/cgroup").read_text(encoding="utf-8")
        group = next(re.finditer(r"^0::(/.*)$", text, re.MULTILINE), ["", "/"])[1]
    limits = []
    for folder in (below := Path(group.lstrip("/"))), *below.parents:
        with suppress(OSError, ValueError):  # a group without a limit has the quota "max"
            most, period = (CGROUPS / folder / "cpu.max").read_text(encoding="utf-8").split()
            limits.append(int(most) // int(period))
    return max(1, min(limits)) if limits else None
