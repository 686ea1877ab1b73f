"""Draw docs/which_way.png: held-out recall by the number of training pairs, for each way and kind.

    python benchmarks/studies/align/figure.py KIND=JSON ... --out docs/which_way.png

Each JSON is what amount.py wrote; several may be of one kind. Points are means over seeds, and bars
reach from the worst seed to the best.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

STYLES = {"aligned": "-", "unfrozen": "-.", "fine-tuned": ":", "scratch": "--"}
WORDS = {
    "aligned": "align",
    "unfrozen": "align, then finetune",
    "fine-tuned": "finetune of a model of photographs",
    "scratch": "train, from scratch",
}


def lines(files: list[str]) -> dict[tuple[str, str], dict[int, list[float]]]:
    """The mean recall of each seed by number of pairs, for each kind and way."""
    found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(dict)
    for each in files:
        kind, _, path = each.rpartition("=")
        for row in json.loads(Path(path).read_text(encoding="utf-8"))["rows"]:
            found[kind, row["way"]][row["pairs"]] = row["by_seed"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("files", nargs="+", metavar="KIND=JSON")
    parser.add_argument("--out", type=Path, default=Path("docs/which_way.png"))
    given = parser.parse_args()
    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    found = lines(given.files)
    kinds = [*dict.fromkeys(kind for kind, _ in found)]
    for (kind, way), by_number in sorted(found.items()):
        numbers = sorted(by_number)
        means = np.array([np.mean(by_number[number]) for number in numbers])
        ends = [[min(by_number[number]), max(by_number[number])] for number in numbers]
        bars = np.abs(np.array(ends).T - means)
        axes.errorbar(
            numbers,
            means,
            bars,
            capsize=3,
            marker="o",
            markersize=4,
            linestyle=STYLES[way],
            color=f"C{kinds.index(kind)}",
            label=f"{kind}: {WORDS[way]}",
        )
    axes.set_xscale("log")
    ticks = sorted({number for by_number in found.values() for number in by_number})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("pairs to learn from")
    axes.set_ylabel("mean of six recalls among 2,000, in percent")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(given.out, dpi=80)


if __name__ == "__main__":
    main()
