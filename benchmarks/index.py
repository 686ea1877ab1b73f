"""What does a table of ten million rows cost to open, to draw from, and to plan a run on?

Writes a TSV table (ids, paths, captions; no images), and opens it in fresh processes: the first
time, later, and with reading. A small table shows what a process needs anyway. Plans are of a table
that was planned on before, and are measured in CPU time, beside that of opening it. Linux only.

    python benchmarks/index.py [--rows 10000000] [--folder DIR] [--out FILE]
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from public import EPISODE_ROWS, READ_ROWS, write_table

from protoclip.config import (
    Config,
    DataConfig,
    ImageTowerConfig,
    LossConfig,
    ModelConfig,
    TeacherConfig,
    TextTowerConfig,
)
from protoclip.data.sampler import EpisodeSampler
from protoclip.data.tables import open_table
from protoclip.encode.store import write_folder

SMALL_ROWS, REPEATS = 10_000, 5
TEACHER_WIDTH = 16


def memory() -> dict[str, float]:
    """Resident megabytes of this process: in all, without file-backed pages, and the peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    texts = dict(text.split(":", 1) for text in lines)
    found = {"all": "VmRSS", "anonymous": "RssAnon", "peak": "VmHWM"}
    return {name: int(texts[key].split()[0]) / 1024 for name, key in found.items()}


def measure(task: str, path: str) -> dict[str, Any]:
    """Seconds of one task in this process, and its memory before and after."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    found: dict[str, Any] = {"before": memory()}
    start = time.perf_counter()
    pairs = open_table(DataConfig(train=path))
    found["open"] = time.perf_counter() - start
    if task == "read":
        size = min(EPISODE_ROWS, len(pairs))
        sampler = EpisodeSampler(len(pairs), size, seed=0, replacement=False)
        start = time.perf_counter()
        rows = sampler.episode(0).rows[:READ_ROWS].tolist()
        found["draw"] = time.perf_counter() - start
        start = time.perf_counter()
        letters = sum(
            len(pairs.sample_id(row)) + len(pairs.sample_captions(row)[0]) for row in rows
        )
        found["read"] = time.perf_counter() - start
        assert letters > len(rows)
    return {**found, "after": memory()}


def write_teacher(path: str) -> dict[str, Any]:
    """A teacher of a few features for each row of a table."""
    ids = list(open_table(DataConfig(train=path)).sample_ids())
    features = np.random.default_rng(0).normal(size=(len(ids), TEACHER_WIDTH)).astype(np.float16)
    folder = teacher_of(path)
    folder.mkdir()
    return write_folder(folder, ids, [features], {"name": "teacher", "modality": "text"})


def teacher_of(path: str) -> Path:
    return Path(path).with_suffix(".teacher")


def plans(path: str) -> dict[str, float]:
    """CPU seconds of opening a known table, and of plans of runs on it; medians, after one more."""
    # Here, since the processes that only open a table are to stay small.
    from protoclip.training.plan import make_plan

    data = DataConfig(train=path)
    # There are no images whose size could be looked at.
    model = ModelConfig(image=ImageTowerConfig(size=64), text=TextTowerConfig(context_length=32))
    prototypes = Config(data=data, model=model)
    teacher = TeacherConfig(features=str(teacher_of(path)))
    tasks: dict[str, Callable[[], object]] = {
        "opening": lambda: open_table(data),
        "CLIP": lambda: make_plan(replace(prototypes, loss=LossConfig(prototypical=0.0))),
        "ProtoCLIP": lambda: make_plan(prototypes),
        "ProtoCLIP + stored teacher": lambda: make_plan(replace(prototypes, teacher=teacher)),
    }
    return {name: cpu_seconds(task) for name, task in tasks.items()}


def cpu_seconds(task: Callable[[], object]) -> float:
    times = []
    for _ in range(1 + REPEATS):
        start = time.process_time()
        task()
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


TASKS: dict[str, Callable[[str], dict[str, Any]]] = {
    "open": partial(measure, "open"),
    "read": partial(measure, "read"),
    "teacher": write_teacher,
    "plans": plans,
}


def fresh(task: str, path: Path, cache: Path) -> dict[str, Any]:
    """One of `TASKS` in a process of its own."""
    command = [sys.executable, __file__, "--task", task, str(path)]
    environment = {**os.environ, "PROTOCLIP_CACHE": str(cache)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        task, given = arguments.task
        print(json.dumps(TASKS[task](given)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        path, small_path, cache = (Path(temporary) / n for n in ("large.tsv", "small.tsv", "cache"))
        write_table(path, arguments.rows)
        write_table(small_path, SMALL_ROWS)
        first, _ = fresh("open", path, cache), fresh("open", small_path, cache)
        runs = [fresh("read", path, cache) for _ in range(REPEATS)]
        small = [fresh("read", small_path, cache) for _ in range(REPEATS)]
        for each in (path, small_path):
            fresh("teacher", each, cache)
        planned, of_small = (fresh("plans", each, cache) for each in (path, small_path))
        index = max(cache.rglob("*.arrow"), key=lambda file: file.stat().st_size)
        sizes = [file.stat().st_size / 1e9 for file in (path, index)]

    def median(name: str) -> float:
        return 1000 * statistics.median(run[name] for run in runs)

    most = [max(run["after"]["anonymous"] for run in some) for some in (runs, small)]
    peak = first["after"]["peak"] - first["before"]["all"]
    table = {
        "first opening": f"{first['open']:.1f} s",
        "memory of the first opening, peak over the start": f"{peak:.0f} MB",
        "later opening, fresh process, median": f"{median('open'):.0f} ms",
        f"draw an episode of {EPISODE_ROWS:,}": f"{median('draw'):.1f} ms",
        f"read {READ_ROWS:,} ids and captions": f"{median('read') / 1000:.2f} s",
        f"memory over that of {SMALL_ROWS:,} rows": f"{most[0] - most[1]:.0f} MB",
    }
    opening = planned.pop("opening")
    table |= {
        f"make_plan of {kind}, CPU time": f"{1000 * seconds:.0f} ms, {seconds / opening:.0f} times "
        f"opening ({1000 * of_small[kind]:.0f} ms with {SMALL_ROWS:,} rows)"
        for kind, seconds in planned.items()
    }
    text = f"""# A table of {arguments.rows:,} rows

`python benchmarks/index.py --rows {arguments.rows}`, {datetime.date.today().isoformat()}; \
{platform.machine()} CPU, {os.cpu_count()} cores, Linux {platform.release()}, Python \
{platform.python_version()}, pyarrow {pa.__version__}. A TSV file of {sizes[0]:.2f} GB, its index \
{sizes[1]:.2f} GB; {REPEATS} fresh processes.

| what | result |
|---|---|
""" + "".join(f"| {what} | {result} |\n" for what, result in table.items())
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
