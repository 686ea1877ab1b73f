"""What does a table of ten million rows cost to open, and to draw from?

Writes a TSV table (ids, paths, captions; no images), and opens it in fresh processes: the first
time, later, and with reading. A small table shows what a process needs anyway. Linux only.

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
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from protoclip.config import DataConfig
from protoclip.data.sampler import EpisodeSampler
from protoclip.data.tables import open_table

SMALL_ROWS, EPISODE_ROWS, READ_ROWS, REPEATS = 10_000, 200_000, 20_000, 5
WORDS = ("a", "the", "of", "two", "small", "wooden", "grey", "dog", "bicycle", "über", "猫", "زهرة")


def write_table(path: Path, rows: int) -> None:
    """Rows of about 100 bytes: a path, a caption of 5 to 14 words, an id."""
    generator = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        file.write("filepath\ttitle\tkey\n")
        for first in range(0, rows, 50_000):
            count = min(50_000, rows - first)
            lengths = generator.integers(5, 15, count)
            drawn = iter(generator.integers(0, len(WORDS), int(lengths.sum())).tolist())
            for row, length in zip(range(first, first + count), lengths.tolist(), strict=True):
                caption = " ".join([WORDS[next(drawn)] for _ in range(length)])
                file.write(f"images/{row // 1000:05d}/{row:09d}.jpg\t{caption}\t{row:09d}\n")


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


def fresh(task: str, path: Path, cache: Path) -> dict[str, Any]:
    """`measure` in a process of its own."""
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
        print(json.dumps(measure(*arguments.task)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        path, small_path, cache = (Path(temporary) / n for n in ("large.tsv", "small.tsv", "cache"))
        write_table(path, arguments.rows)
        write_table(small_path, SMALL_ROWS)
        first, _ = fresh("open", path, cache), fresh("open", small_path, cache)
        runs = [fresh("read", path, cache) for _ in range(REPEATS)]
        small = [fresh("read", small_path, cache) for _ in range(REPEATS)]
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
