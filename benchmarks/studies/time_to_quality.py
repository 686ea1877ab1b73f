"""How soon does ProtoCLIP with a teacher reach CLIP's final quality?

CLIP has its full schedule; ProtoCLIP has schedules of a quarter, a third, half and all of the
samples, each cooled down to its end. Prints a table with paired differences to CLIP and their 95%
intervals, and draws the curve with `--png`.

    python benchmarks/studies/time_to_quality.py [--seeds 0 1 2] [--jobs 2] [--png docs/FILE.png]
"""

import argparse
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from sweep import CLIP, TEACHER, cell, measure

from protoclip.evaluation import compare
from protoclip.progress import Progress

EPISODES = 35
SHARES = {"1/4": 9, "1/3": 12, "1/2": 18, "1": EPISODES}
METRICS = {"linear probe": "linear_probe/acc1", "kNN": "knn/acc1"}
Runs = list[dict[str, Any]]


def values(runs: Runs, name: str) -> list[float]:
    return [run["train_seconds"] if name == "seconds" else run["metrics"][name] for run in runs]


def mean(runs: Runs, name: str) -> float:
    return statistics.mean(values(runs, name))


def spread(runs: Runs, name: str) -> float:
    return statistics.stdev(values(runs, name)) if len(runs) > 1 else 0.0


def reached(shares: dict[str, Runs], metric: str, goal: float, whole: float) -> str:
    """Least share of CLIP's wall clock at which the goal is met, between neighbours in a line."""
    points = [(mean(runs, "seconds") / whole, mean(runs, metric)) for runs in shares.values()]
    if points[0][1] >= goal:
        return f"at most {points[0][0]:.2f}"
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 < goal <= y1:
            return f"{x0 + (x1 - x0) * (goal - y0) / (y1 - y0):.2f}"
    return "not reached"


def draw(path: Path, clip: Runs, shares: dict[str, Runs]) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit("--png: needs a package; pip install matplotlib") from None
    whole = mean(clip, "seconds")
    figure, panels = pyplot.subplots(1, len(METRICS), figsize=(9, 3.6), layout="constrained")
    for panel, (title, name) in zip(panels, METRICS.items(), strict=True):
        metric = f"eval/emoji/{name}"
        x = [mean(runs, "seconds") / whole for runs in shares.values()]
        y = [100 * mean(runs, metric) for runs in shares.values()]
        error = [100 * spread(runs, metric) for runs in shares.values()]
        panel.errorbar(x, y, error, marker="o", capsize=3, label="ProtoCLIP + teacher")
        goal, width = 100 * mean(clip, metric), 100 * spread(clip, metric)
        panel.axhline(goal, color="black", linewidth=1, label="CLIP, full schedule")
        panel.axhspan(goal - width, goal + width, color="black", alpha=0.1)
        panel.set(title=title, xlabel="wall clock, as a share of CLIP's", ylabel="accuracy, %")
        panel.set_xlim(left=0)
    panels[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    arms = {"CLIP": CLIP} | {
        share: TEACHER if count == EPISODES else {**TEACHER, "episodes.count": count}
        for share, count in SHARES.items()
    }
    tasks = [(arm, seed) for seed in arguments.seeds for arm in arms]
    progress = Progress("study: time to quality", len(tasks))
    found: dict[str, Runs] = {arm: [] for arm in arms}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        waiting = [pool.submit(measure, a, arms[a], seed, "validation") for a, seed in tasks]
        for done, ((arm, _), result) in enumerate(zip(tasks, waiting, strict=True), 1):
            found[arm].append(result.result())
            progress.update(done, arm)
    compared = compare.compare([run for runs in found.values() for run in runs])
    clip = found.pop("CLIP")
    whole = mean(clip, "seconds")
    print("| validation | wall clock / CLIP's | " + " | ".join(METRICS) + " |")
    print("|---" * (len(METRICS) + 2) + "|")
    for entry in compared:
        cells = [cell(entry["metrics"][f"eval/emoji/{metric}"]) for metric in METRICS.values()]
        share = entry["train_seconds"]["mean"] / whole
        print(f"| {entry['name']} | {share:.2f} | " + " | ".join(cells) + " |")
    for title, name in METRICS.items():
        metric = f"eval/emoji/{name}"
        share = reached(found, metric, mean(clip, metric), whole)
        print(f"\nCLIP's {title} is reached at a share of its wall clock of: {share}")
    if arguments.png:
        draw(arguments.png, clip, found)


if __name__ == "__main__":
    main()
