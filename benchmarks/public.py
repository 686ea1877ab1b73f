"""What do the public functions cost that every version has? Made to be run by `against.py`.

Processor time of one thread: forward and backward of both losses at width 512, and a table of ROWS
rows (TSV), opened for the first time, opened again in a fresh process, and read from.

    python benchmarks/public.py [--rows 2000000] [--repeats 9]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import protoclip
from protoclip.config import DataConfig
from protoclip.data.sampler import EpisodeSampler
from protoclip.data.tables import open_table

WIDTH, BATCHES = 512, (1024, 4096)
EPISODE_ROWS, READ_ROWS = 200_000, 20_000
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


def milliseconds(task: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(1 + repeats):
        start = time.process_time()
        task()
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times[1:])


def step(loss: Callable[[Tensor, Tensor], Tensor], features: list[Tensor]) -> None:
    loss(*features).backward()
    for feature in features:
        feature.grad = None


def losses(repeats: int) -> dict[str, float]:
    generator, measured = torch.Generator().manual_seed(0), {}
    scale, bias = torch.tensor(14.3), torch.tensor(-10.0)
    for batch in BATCHES:
        features = [torch.randn(batch, WIDTH, generator=generator) for _ in range(2)]
        features = [torch.nn.functional.normalize(x, dim=1).requires_grad_() for x in features]
        ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "info_nce": lambda x, y: protoclip.info_nce(x, y, scale),
            "sigmoid_loss": lambda x, y: protoclip.sigmoid_loss(x, y, scale, bias),
        }
        for name, loss in ways.items():
            task = partial(step, loss, features)
            measured[f"{name}, batch {batch:,}"] = milliseconds(task, repeats)
    return measured


def table(path: str) -> dict[str, float]:
    """Opening it, and reading captions of an episode."""
    times = [time.process_time()]
    pairs = open_table(DataConfig(train=path))
    times.append(time.process_time())
    sampler = EpisodeSampler(len(pairs), min(EPISODE_ROWS, len(pairs)), seed=0, replacement=False)
    rows = sampler.episode(0).rows[:READ_ROWS].tolist()
    times.append(time.process_time())
    for row in rows:
        pairs.sample_id(row), pairs.sample_captions(row)
    times.append(time.process_time())
    names = ("opening", f"drawing {EPISODE_ROWS:,}", f"reading {READ_ROWS:,}")
    spans = zip(names, times, times[1:], strict=False)
    return {name: 1000 * (end - start) for name, start, end in spans}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--table", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.table:
        print("\n".join(f"{name}\t{value}" for name, value in table(given.table).items()))
        return
    torch.set_num_threads(1)
    measured = losses(given.repeats)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.tsv"
        write_table(path, given.rows)
        variables = {**os.environ, "PROTOCLIP_CACHE": f"{folder}/cache"}
        command = [sys.executable, __file__, "--table", str(path)]
        for opened in ("first", "later"):
            done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, check=True)
            for line in done.stdout.decode().splitlines():
                name, value = line.split("\t")
                measured[f"{opened} {name}" if name == "opening" else name] = float(value)
    print("| what | ms |\n|---|---|")
    for name, number in measured.items():
        print(f"| {name} | {number:.1f} |")


if __name__ == "__main__":
    main()
