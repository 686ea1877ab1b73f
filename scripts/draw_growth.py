"""Draw docs/growth.png, what the default gains over CLIP by the number of pairs, from its results.

python scripts/draw_growth.py
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
METRICS = {"mean without AMI": "mean", "held-out retrieval": "retrieval"}


def main() -> None:
    study = json.loads((ROOT / "benchmarks/results/study_growth.json").read_text())
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for axes, (metric, title) in zip(panels, METRICS.items(), strict=True):
        for shift, kind in ((0.97, "product photos"), (1.03, "web photographs")):
            rows = [row for row in study["rows"] if row["kind"] == kind]
            gains = [100 * row["metrics"][metric]["difference"] for row in rows]
            ends = [[100 * end for end in row["metrics"][metric]["interval"]] for row in rows]
            below = [gain - low for gain, (low, _) in zip(gains, ends, strict=True)]
            above = [high - gain for gain, (_, high) in zip(gains, ends, strict=True)]
            pairs = [shift * row["pairs"] for row in rows]
            axes.errorbar(pairs, gains, [below, above], marker="o", capsize=3, label=kind)
        axes.axhline(0, color="0.5", linewidth=1)
        axes.set_xscale("log")
        ticks = [2000, 6000, 18_000, 36_000]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set(title=title, xlabel="training pairs")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("points over CLIP")
    panels[0].legend()
    figure.savefig(ROOT / "docs" / "growth.png", dpi=110)


if __name__ == "__main__":
    main()
