"""How many processor cores a rank may use.

How many worker processes a run starts on them is decided in `data/summary.py`.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from protoclip.distributed.collectives import world_size

CGROUPS = Path("/sys/fs/cgroup")


def cores() -> int:
    """The cores of this host that this rank may use: its share, at least one.

    Affinity and control groups (containers, SLURM) may grant a process fewer than the host has.
    """
    env = os.environ
    can_ask = hasattr(os, "sched_getaffinity")  # not on macOS
    granted = len(os.sched_getaffinity(0)) if can_ask else os.cpu_count() or 1
    granted = min(granted, quota() or granted)
    if "LOCAL_WORLD_SIZE" in env:  # of torchrun, whose ranks share its cores
        return max(1, granted // int(env["LOCAL_WORLD_SIZE"]))
    if world_size() > 1 and "SLURM_STEP_TASKS_PER_NODE" in env:
        ranks = tasks_by_node(env["SLURM_STEP_TASKS_PER_NODE"])[int(env.get("SLURM_NODEID", 0))]
        # srun may have bound each rank to cores of its own; then they are its share already.
        return max(1, min(granted, int(env.get("SLURM_CPUS_ON_NODE", granted)) // ranks))
    return max(1, granted // world_size())


def tasks_by_node(counts: str) -> list[int]:
    """SLURM's short form of a number for each node: `8(x2),4` is 8, 8, 4."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, repeats in parts for _ in range(int(repeats or 1))]


def quota() -> int | None:
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
    with suppress(OSError, ValueError):  # the first version of control groups; -1 is no limit
        most, period = (
            (CGROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="utf-8")
            for name in ("quota", "period")
        )
        limits += [int(most) // int(period)] if int(most) > 0 else []
    return max(1, min(limits)) if limits else None
