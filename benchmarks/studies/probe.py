"""How much of the linear probe's spread is the choice of its strength?

Fits the linear probe of finished runs at every L2 strength and prints, for each arm, its accuracy
on validation and test by strength: mean and standard deviation over seeds. The last rows choose the
strength on validation: for each run alone, as `protoclip evaluate` does, and for an arm as a whole.
They also have the mean difference to the first arm's run of the same seed, with its 95% interval
(Student's t over two seeds or more) and a star where that leaves out 0.

    python benchmarks/studies/probe.py CLIP=runs/clip-0,runs/clip-1 teacher=runs/protoclip-teacher-0
"""

import statistics
import sys

import torch

from protoclip.evaluation import datasets
from protoclip.evaluation.features import Encoder
from protoclip.evaluation.linear_probe import REGULARISATIONS, fit_linear_probes
from protoclip.evaluation.metrics import difference as difference_of
from protoclip.evaluation.paired import read_results
from protoclip.evaluation.task_features import task_features
from protoclip.models import loading
from protoclip.progress import Progress
from protoclip.results.table import format_cell

SPLITS = ("train", "validation", "test")


def accuracies(folder: str) -> dict[str, list[float]]:
    """Percent right by split and strength."""
    data = datasets.emoji()
    model, transform, tokenizer = loading.load(folder)
    encoder = Encoder(model=model, transform=transform, tokenizer=tokenizer)
    parts = task_features(encoder, data, ["linear_probe"], split="test").parts
    probes = fit_linear_probes(parts["train"].unit, parts["train"].labels)
    return {
        split: [100 * probe.accuracy(parts[split].unit, parts[split].labels) for probe in probes]
        for split in SPLITS[1:]
    }


def difference(first: dict[int, float], second: dict[int, float]) -> str:
    """The mean difference over common seeds, as `protoclip compare` writes it."""
    found = [second[seed] - first[seed] for seed in second if seed in first]
    if not found:
        return ""
    value = {"mean": 0.0, "difference": difference_of(found)}
    return "<br>" + format_cell(value, scale=1.0, digits=1).text.partition("\n")[2]


def cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    torch.set_flush_denormal(True)
    arms = {name: runs.split(",") for name, _, runs in (a.partition("=") for a in sys.argv[1:])}
    progress = Progress("study: probe", sum(len(runs) for runs in arms.values()))
    found: dict[str, list[dict[str, list[float]]]] = {}
    done = 0
    for arm, runs in arms.items():
        for run in runs:
            found.setdefault(arm, []).append(accuracies(run))
            done += 1
            progress.update(done, run)
    print("| L2 strength | " + " | ".join(f"{arm}, {s}" for arm in arms for s in SPLITS[1:]) + " |")
    print("|---" * (1 + 2 * len(arms)) + "|")
    for number, strength in enumerate(REGULARISATIONS):
        cells = [cell([r[s][number] for r in found[arm]]) for arm in arms for s in SPLITS[1:]]
        print(f"| {strength:.0e} | " + " | ".join(cells) + " |")
    seeds = {arm: [read_results(run).seed for run in runs] for arm, runs in arms.items()}
    for title in ("each run's best on validation", "the arm's best on validation"):
        cells = []
        firsts: dict[str, dict[int, float]] = {}
        for arm in arms:
            curves = [run["validation"] for run in found[arm]]
            mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
            chosen = [
                max(range(len(mean)), key=(curve if title.startswith("each") else mean).__getitem__)
                for curve in curves
            ]
            for split in SPLITS[1:]:
                own = [r[split][n] for r, n in zip(found[arm], chosen, strict=True)]
                by_seed = dict(zip(seeds[arm], own, strict=True))
                first = firsts.setdefault(split, by_seed)
                cells.append(cell(own) + ("" if first is by_seed else difference(first, by_seed)))
        print(f"| {title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
