"""What do more processes give? Two on two cores against one on one, at equal batch and samples.

The demonstration's three arms for one episode of warm-up (not counted) and two counted ones, in
alternation, each process with one thread. The share of time in communication is that of gloo's own
work as PyTorch's profiler sees it in a further run, whether or not something is computed meanwhile.

    python benchmarks/scaling.py [--processes 2] [--repeats 3] [--out FILE]
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

import torch
from torch.profiler import ProfilerActivity, profile

from protoclip.cli import demo
from protoclip.config import Config
from protoclip.distributed import collectives
from protoclip.models import loading
from protoclip.models.protoclip import resolve_precision
from protoclip.models.start import resolve_start
from protoclip.progress import Progress
from protoclip.training import run, watch
from protoclip.training.plan import make_plan

COUNTED = 2


def config_of(arm: str) -> Config:
    config = make_plan(demo.arms()[arm]).config
    return replace(
        config,
        run=replace(config.run, device="cpu"),
        episodes=replace(config.episodes, count=1 + COUNTED, warm_up=1, locked_image=0),
    )


def train(arm: str, out: Path, *, profiled: bool) -> None:
    """One process of a run: writes the counted episodes' seconds, or the seconds communicating."""
    config = config_of(arm)
    ends: list[float] = []
    profiler = profile(activities=[ProfilerActivity.CPU]) if profiled else None
    torch.set_flush_denormal(True)
    device = torch.device("cpu")
    with collectives.process_group(device), tempfile.TemporaryDirectory() as folder:
        model = loading.to_device(loading.build_model(resolve_start(config.model), seed=0), device)
        loading.parallelise(config, model)
        built = run.Run(make_plan(config), model, folder=Path(folder))
        for index in range(2 if profiled else config.episodes.count):
            if profiler is not None and index == 1:
                profiler.start()
            built.trainer.start_episode(built.episode(index))
            for batch in built.loader.batches(built.training_pass(index)):
                built.trainer.train_step(batch, detailed=False)
            built.trainer.end_episode()
            ends.append(time.perf_counter())
        if profiler is not None:
            profiler.stop()
        first = collectives.rank() == 0
    if first:
        seconds = [end - start for start, end in pairwise(ends)]
        if profiler is not None:
            spent = sum(
                event.cpu_time_total
                for event in profiler.key_averages()
                if event.key.startswith("gloo:")
            )
            seconds = [spent / 1e6, *seconds[:1]]
        out.write_text(json.dumps(seconds), encoding="utf-8")


def launched(arm: str, processes: int, cores: str, *, profiled: bool = False) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        command = [
            *("taskset", "-c", cores, sys.executable, "-m", "torch.distributed.run"),
            *("--standalone", "--nproc-per-node", str(processes), __file__, "--train", arm),
            *("--out", str(out), *(["--profiled"] if profiled else [])),
        ]
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        seconds: list[float] = json.loads(out.read_text(encoding="utf-8"))
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train, arguments.out, profiled=arguments.profiled)
        return
    many = arguments.processes
    ways = {
        "1 process, 1 core": (1, "0"),
        f"{many} processes, {many} cores": (many, f"0-{many - 1}"),
    }
    arms = list(demo.arms())
    progress = Progress("benchmark: scaling", arguments.repeats * len(arms) * len(ways))
    seconds: dict[tuple[str, str], list[float]] = {}
    done = 0
    for _ in range(arguments.repeats):
        for arm in arms:
            for way, (processes, cores) in ways.items():
                seconds.setdefault((arm, way), []).extend(launched(arm, processes, cores))
                done += 1
                progress.update(done, f"{arm}, {way}")
    config = config_of(arms[0])
    facts = watch.describe_environment(torch.device("cpu"))
    lines = [
        "# Scaling: more processes at equal batch",
        "",
        f"`python benchmarks/scaling.py --processes {many} --repeats {arguments.repeats}`, "
        f"{datetime.date.today().isoformat()}; {facts['device'].split(',')[0]}, torch "
        f"{facts['torch']}, gloo, {resolve_precision('auto', torch.device('cpu'))}, "
        f"one thread a process; "
        f"{config.model.image.name} at {config.model.image.size} pixels, episodes of "
        f"{config.episodes.size} pairs in batches of {config.episodes.batch_size} in all. Seconds "
        f"an episode, grouping included: median [least, most] of {arguments.repeats * COUNTED}.",
        "",
        "| arm | processes | episode | speed-up | efficiency | communicating |",
        "|---|---|---|---|---|---|",
    ]
    for arm in arms:
        alone = statistics.median(seconds[arm, "1 process, 1 core"])
        for way, (processes, cores) in ways.items():
            spent = seconds[arm, way]
            median = statistics.median(spent)
            share = "-"
            if processes > 1:
                communicating, whole = launched(arm, processes, cores, profiled=True)
                share = f"{100 * communicating / whole:.1f}%"
            lines.append(
                f"| {arm} | {way} | {median:.2f} [{min(spent):.2f}, {max(spent):.2f}] "
                f"| {alone / median:.2f} | {100 * alone / median / processes:.0f}% | {share} |"
            )
    text = "\n".join([*lines, ""])
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
