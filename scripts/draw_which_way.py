"""Draw docs/which_way.png, held-out recall by the number of pairs and the way, from its results.

python scripts/draw_which_way.py
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"product photos": "fashion", "web photographs": "webcc"}
# The name of a way: that of results, its line, and the studies of both kinds that measured it. A
# later study of the same number of pairs counts: it has more seeds.
WAYS = {
    "align": ("aligned", "-", {"fashion": ["closed_form"], "webcc": [""]}),
    "train, from scratch": (
        "scratch",
        "--",
        {"fashion": ["scratch"], "webcc": ["scratch", "scratch_three"]},
    ),
    "finetune of a model of photographs": (
        "fine-tuned",
        ":",
        {"fashion": ["finetuned_fast"], "webcc": ["finetuned_fast"]},
    ),
}


def read_recalls(kind: str, way: str, studies: list[str]) -> dict[int, list[float]]:
    """By the number of pairs, the mean of six recalls of each seed."""
    found = {}
    for study in studies:
        name = "_".join(filter(None, ["study_amount", kind, study]))
        rows = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["rows"]
        found |= {row["pairs"]: row["by_seed"] for row in rows if row["way"] == way}
    return dict(sorted(found.items()))


def main() -> None:
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for color, (title, kind) in zip(("tab:blue", "tab:orange"), KINDS.items(), strict=True):
        for label, (way, line, studies) in WAYS.items():
            recalls = read_recalls(kind, way, studies[kind])
            means = [sum(values) / len(values) for values in recalls.values()]
            below = [mean - min(found) for mean, found in zip(means, recalls.values(), strict=True)]
            above = [max(found) - mean for mean, found in zip(means, recalls.values(), strict=True)]
            axes.errorbar(
                list(recalls),
                means,
                [below, above],
                linestyle=line,
                color=color,
                marker="o",
                markersize=4,
                capsize=3,
                label=f"{title}: {label}",
            )
    axes.set_xscale("log")
    ticks = [1000, 3000, 10_000, 36_304]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="training pairs", ylabel="mean of six recalls among 2,000, in percent")
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(ROOT / "docs" / "which_way.png", dpi=110)


if __name__ == "__main__":
    main()
