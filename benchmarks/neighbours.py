"""What does training lose to another busy process on the machine, and what helps?

Threads of OpenMP that wait for each other can spin or sleep, and there can be fewer of them. Each
setting trains the demonstration's CLIP in a fresh process: some episodes on the quiet machine, then
some beside a Python loop that never ends.

    python benchmarks/neighbours.py [--repeats 3] [--settings spinning sleeping] [--out FILE]
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

# What the environment of each setting has; libgomp, which torch comes with, spins if nobody says.
SETTINGS = {
    "spinning": {},
    "sleeping": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
    "spinning briefly": {"GOMP_SPINCOUNT": "1000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
PAIRS, QUIET, BUSY = 2048, 3, 3


def train() -> None:
    """Train, and print the seconds of each counted episode: quiet ones, and those beside a loop."""
    import torch

    from protoclip.cli import demo
    from protoclip.models import loading
    from protoclip.training.plan import make_plan
    from protoclip.training.run import Run

    torch.set_flush_denormal(True)
    config = demo.arms()["CLIP"]
    episodes = replace(config.episodes, size=PAIRS, count=1 + QUIET + BUSY, locked_image=0)
    plan = make_plan(replace(config, episodes=episodes))
    config = plan.config
    model = loading.model(config.model, seed=0)
    ends: list[float] = []
    neighbour: list[subprocess.Popen[bytes]] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(plan, model, folder=Path(folder))
            for index in range(config.episodes.count):
                run.trainer.start_episode(run.episode(index))
                for batch in run.loader.batches_of(run.training_pass(index)):
                    run.trainer.train_step(batch, detailed=False)
                run.trainer.end_episode()
                ends.append(time.monotonic())
                if len(ends) == 1 + QUIET:
                    neighbour.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
                    ends.append(time.monotonic())
    finally:
        for process in neighbour:
            process.kill()
    seconds = [after - before for before, after in pairwise(ends)]
    threads = torch.get_num_threads()
    print(json.dumps([seconds[:QUIET], seconds[QUIET + 1 :], threads, torch.__version__]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--train", action="store_true", help="what each fresh process does")
    arguments = parser.parse_args()
    if arguments.train:
        train()
        return
    own = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    quiet: dict[str, list[float]] = {name: [] for name in arguments.settings}
    busy: dict[str, list[float]] = {name: [] for name in arguments.settings}
    threads, version = 0, ""
    for _ in range(arguments.repeats):
        for name in arguments.settings:
            done = subprocess.run(
                [sys.executable, __file__, "--train"],
                env=own | SETTINGS[name],
                check=True,
                capture_output=True,
                text=True,
            )
            alone, beside, used, version = json.loads(done.stdout.splitlines()[-1])
            quiet[name] += alone
            busy[name] += beside
            threads = max(threads, used)
            print(name, alone, beside, file=sys.stderr)
    first = arguments.settings[0]
    base = statistics.median(quiet[first])
    lines = [
        "# Neighbours: training beside another busy process",
        "",
        f"`python {' '.join(sys.argv)}`, {datetime.date.today()}; {os.uname().machine} CPU, "
        f"{threads} threads, torch {version}; CLIP of the demonstration, episodes of {PAIRS} "
        "pairs, batch 256. Seconds an episode: median [least, most] of "
        f"{len(busy[first])}, settings in turn, each in a fresh process; beside: one Python loop "
        "that never ends.",
        "",
        f"| threads that wait | quiet | to {first} | beside | to {first}, quiet | to own quiet |",
        "|---|---|---|---|---|---|",
    ]
    for name in arguments.settings:
        cells = []
        for found in (quiet[name], busy[name]):
            median = statistics.median(found)
            cells += [f"{median:.2f} [{min(found):.2f}, {max(found):.2f}]", f"{median / base:.2f}"]
        own_ratio = statistics.median(busy[name]) / statistics.median(quiet[name])
        lines.append(f"| {name} | {' | '.join(cells)} | {own_ratio:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
