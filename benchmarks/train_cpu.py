"""What do compiling, bf16 and a fused optimizer bring where a CPU trains? For whole runs, in turn.

Trains models of `protoclip demo` without evaluation, each run in a process of its own: the CLIP
arm of the demonstration (`demo`), and that of `--quick`.

    python benchmarks/train_cpu.py [--case demo quick] [--repeats 1] [--episodes N] [--out FILE]

A run's seconds are those of its process, imports and compilation included. With fewer `--episodes`
than the demonstration has, they are extrapolated by the median of those after the first.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from protoclip.cli import demo
from protoclip.config import Config
from protoclip.training import watch
from protoclip.training.run import train
from protoclip.training.trainer import Trainer

# Settings of each arm; `fused` is none.
ARMS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "fp32, compiled": {"precision": "fp32", "compile": True},
    "bf16, compiled": {"precision": "bf16", "compile": True},
    "fp32, optimizer not fused": {"precision": "fp32", "fused": False},
}


class PlainAdamW(torch.optim.AdamW):
    """Not fused; so it cannot skip a step, and is never told to."""

    found_inf = property(lambda self: None, lambda self, value: None)

    def __init__(self, *arguments: Any, fused: bool, **settings: Any) -> None:
        super().__init__(*arguments, **settings)


def config_of(case: str, folder: Path) -> Config:
    if case == "demo":
        return demo.arms()["CLIP"]
    return demo.quick_config(folder, *demo.write_pairs(folder), seed=0)


def train_once(case: str, arm: str, episodes: int, file: Path) -> None:
    """Train in this process; write the numbers of all and of made episodes, and when each ended."""
    settings, ends, config = ARMS[arm], list[float](), config_of(case, file.parent)
    count, end_episode = config.episodes.count, Trainer.end_episode

    def timed(trainer: Trainer) -> dict[str, float]:
        metrics = end_episode(trainer)
        ends.append(time.time())
        return metrics

    Trainer.end_episode = timed  # type: ignore[method-assign]
    if not settings.get("fused", True):
        torch.optim.AdamW = PlainAdamW  # type: ignore[misc]
    torch.set_flush_denormal(True)
    made = min(count, episodes)
    out, precision = str(file.parent / "run"), settings["precision"]
    train(
        replace(
            config,
            run=replace(config.run, out=out, precision=precision, evaluate=False),
            episodes=replace(config.episodes, count=made),
            parallel=replace(config.parallel, compile=settings.get("compile", False)),
        )
    )
    file.write_text(json.dumps({"count": count, "made": made, "ends": ends}), encoding="utf-8")


def run(case: str, arm: str, episodes: int) -> tuple[float, float, float]:
    """Seconds of a whole run, until the first episode's end, and of another episode."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "times.json"
        words = [sys.executable, __file__, "--once", case, arm, str(episodes), str(file)]
        started = time.time()
        subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
        whole, found = time.time() - started, json.loads(file.read_text(encoding="utf-8"))
    ends = found["ends"]
    seconds = statistics.median(after - before for before, after in pairwise(ends))
    return whole + (found["count"] - found["made"]) * seconds, ends[0] - started, seconds


def span(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--case", nargs="+", choices=("demo", "quick"), default=["demo", "quick"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--episodes", type=int, default=1000, help="at most, of a run")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    facts = watch.describe_environment(torch.device("cpu"))
    lines = [
        "# Training on a CPU: compiled, bf16, fused",
        "",
        f"`python benchmarks/train_cpu.py {' '.join(sys.argv[1:])}`, "
        f"{datetime.date.today().isoformat()}; {facts['device']}, {os.cpu_count()} cores, torch "
        f"{facts['torch']}. Seconds: median [least, most] of {options.repeats}; whole runs include "
        "imports and compilation, and ratios are of their medians.",
        "",
        "| model | arm | whole run | ratio to fp32 | first episode's end | another episode |",
        "|---|---|---|---|---|---|",
    ]
    for case in options.case:
        found: dict[str, list[tuple[float, float, float]]] = {arm: [] for arm in ARMS}
        for _ in range(options.repeats):
            for arm, runs in found.items():
                runs.append(run(case, arm, options.episodes))
        base = statistics.median(whole for whole, _, _ in found["fp32"])
        for arm, runs in found.items():
            wholes, firsts, others = (list(column) for column in zip(*runs, strict=True))
            ratio = statistics.median(wholes) / base
            cells = f"{span(wholes)} | {ratio:.2f} | {span(firsts)} | {span(others)}"
            lines.append(f"| {case} | {arm} | {cells} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        train_once(*sys.argv[2:4], int(sys.argv[4]), Path(sys.argv[5]))
    else:
        main()
