"""What does a manifest of ten million rows cost? Conversion, opening, episodes, and memory.

Writes a synthetic TSV manifest (paths, captions, ids; there are no pictures) to a temporary folder
and opens it in fresh processes: once to convert it, then to open the index, then to do what
training does with it beside pictures: draw episodes of 200,000 rows and read ids and captions. The
same with a small manifest gives what a process holds anyway. Linux only: memory is read from /proc.

    python benchmarks/index.py [--rows 10000000] [--folder DIR] [--out FILE]
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from protoclip.data.manifests import open_manifest
from protoclip.data.sampler import EpisodeSampler
from protoclip.progress import Progress

SMALL_ROWS = 10_000
EPISODE_ROWS, READ_ROWS = 200_000, 20_000
REPEATS = 5
# Bytes a row takes as text and in the index together, generously.
BYTES_A_ROW = 300
WORDS = (
    *("a", "the", "of", "with", "on", "near", "two", "red", "small", "old", "wooden", "grey"),
    *("dog", "cat", "street", "bridge", "harbour", "window", "market", "bicycle", "mountain"),
    *("river", "child", "bread", "lamp", "über", "猫", "собака", "زهرة", "train", "station"),
)


def write_manifest(path: Path, rows: int, progress: Progress) -> None:
    """Rows of about 100 bytes: a path, a caption of 5 to 14 words, an id."""
    words = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        file.write("filepath\ttitle\tkey\n")
        for first in range(0, rows, 50_000):
            count = min(50_000, rows - first)
            lengths = words.integers(5, 15, count)
            drawn = iter(words.integers(0, len(WORDS), int(lengths.sum())).tolist())
            lines = []
            for row, length in zip(range(first, first + count), lengths.tolist(), strict=True):
                caption = " ".join([WORDS[next(drawn)] for _ in range(length)])
                lines.append(f"images/{row // 1000:05d}/{row:09d}.jpg\t{caption}\t{row:09d}\n")
            file.writelines(lines)
            progress.update(first + count)


def memory() -> dict[str, float]:
    """Resident megabytes of this process: in all, without file-backed pages, and the peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    texts = dict(line.split(":", 1) for line in lines)
    found = {"all": "VmRSS", "anonymous": "RssAnon", "peak": "VmHWM"}
    return {name: int(texts[key].split()[0]) / 1024 for name, key in found.items()}


def measure(task: str, path: str, cache: Path) -> dict[str, Any]:
    """One task in this process: seconds, and memory before and after."""
    # The peak counts from here on, not from the imports.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = memory()
    start = time.perf_counter()
    pairs = open_manifest(path, cache=cache)
    found: dict[str, Any] = {"open": time.perf_counter() - start}
    if task == "train":
        rows = EpisodeSampler(len(pairs), EPISODE_ROWS, seed=0).episode(0).rows[:READ_ROWS].tolist()
        start = time.perf_counter()
        letters = sum(len(pairs.sample_id(row)) + len(pairs.caption(row)) for row in rows)
        found["read"] = time.perf_counter() - start
        assert letters > len(rows)
    return {**found, "rows": len(pairs), "before": before, "after": memory()}


def fresh(task: str, path: Path, cache: Path) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--task", task, str(path), str(cache)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def draw_seconds(rows: int, replacement: bool) -> float:
    """Seconds to draw an episode, the least of several."""
    sampler = EpisodeSampler(rows, EPISODE_ROWS, seed=0, replacement=replacement)
    seconds = []
    for index in range(REPEATS):
        start = time.perf_counter()
        sampler.episode(index)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def growth(large: dict[str, Any], small: dict[str, Any], part: str) -> str:
    return f"{large['after'][part] - small['after'][part]:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--task", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        task, path, cache = arguments.task
        print(json.dumps(measure(task, path, Path(cache))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        needed, free = arguments.rows * BYTES_A_ROW, shutil.disk_usage(folder).free
        if needed > free:
            raise SystemExit(
                f"{folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} needed; set --folder"
            )
        paths = {"small": folder / "small.tsv", "large": folder / "large.tsv"}
        cache = folder / "cache"
        rows = {"small": SMALL_ROWS, "large": arguments.rows}
        for size, path in paths.items():
            write_manifest(path, rows[size], Progress(f"write {size} manifest", rows[size]))
        progress = Progress("benchmark: index", 2 + 2 * REPEATS)
        first = {size: fresh("open", path, cache) for size, path in paths.items()}
        progress.update(2, "converted")
        opened, trained = [], {}
        for repeat in range(REPEATS):
            opened.append(fresh("open", paths["large"], cache)["open"])
            progress.update(3 + repeat, "opened")
        trained = {size: [] for size in paths}
        for repeat in range(REPEATS):
            for size, path in paths.items():
                trained[size].append(fresh("train", path, cache))
            progress.update(3 + REPEATS + repeat, "read")
        index = max(cache.glob("*.arrow"), key=lambda file: file.stat().st_size)
        sizes = [file.stat().st_size / 1e9 for file in (paths["large"], index)]

    large, small = (
        max(trained[size], key=lambda run: run["after"]["all"]) for size in ("large", "small")
    )
    draws = [draw_seconds(arguments.rows, replacement) for replacement in (True, False)]
    reads = statistics.median(run["read"] for run in trained["large"])
    converting = first["large"]["after"]["peak"] - first["large"]["before"]["all"]
    table = [
        ("first open: convert", f"{first['large']['open']:.1f} s"),
        ("memory while converting, peak over the start", f"{converting:.0f} MB"),
        ("later open, fresh process, median", f"{1000 * statistics.median(opened):.0f} ms"),
        ("later open, fresh process, slowest", f"{1000 * max(opened):.0f} ms"),
        (f"draw an episode of {EPISODE_ROWS:,}", f"{1000 * draws[0]:.1f} ms"),
        ("the same without replacement", f"{1000 * draws[1]:.1f} ms"),
        (f"read {READ_ROWS:,} ids and captions", f"{reads:.2f} s"),
        (f"resident memory over {SMALL_ROWS:,} rows", growth(large, small, "all")),
        ("the same without file-backed pages", growth(large, small, "anonymous")),
        ("the same, peak", growth(large, small, "peak")),
    ]
    lines = [
        f"# A manifest of {arguments.rows:,} rows",
        "",
        f"`python benchmarks/index.py --rows {arguments.rows}`, "
        f"{datetime.date.today().isoformat()}; {platform.machine()} CPU, {os.cpu_count()} cores, "
        f"Linux {platform.release()}, Python {platform.python_version()}, pyarrow "
        f"{pa.__version__}. A TSV file of {sizes[0]:.2f} GB, its index {sizes[1]:.2f} GB; "
        f"{REPEATS} fresh processes each.",
        "",
        "| what | result |",
        "|---|---|",
        *(f"| {what} | {result} |" for what, result in table),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
