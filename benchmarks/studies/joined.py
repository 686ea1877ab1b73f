"""Join results of one study that was measured in parts: other seeds at another time.

    python benchmarks/studies/joined.py A.json B.json ... [--arms NAME ...] [--out JSON]

Each file is what study.py writes, of one split, one set of pairs and the same transfer sets. What
arms of one name set, and values of a seed that several files have, must be equal in all. Intervals
(95%) are those of study.py, but for the share of the samples, which needs what each sample adds,
and that is in no file: it is the largest that a part has. A part with fewer seeds has a larger one,
so they are rather too wide. Where a part has no interval, neither has the whole.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from protoclip.config import Config
from protoclip.evaluation.metrics import half_width


def arms_of(file: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The metrics of each arm."""
    (arms,) = file["pretraining"].values()
    return {arm["name"]: arm["metrics"] for arm in arms}


def require_one_study(files: list[dict[str, Any]]) -> None:
    settings = dict[str, Config]()
    for file in files:
        for what in ("split", "transfer"):
            if file[what] != files[0][what]:
                raise ValueError(f"{what}: {file[what]} and {files[0][what]}")
        (arms,) = file["pretraining"].values()
        for arm in arms:
            given = Config.from_dict(arm["settings"])
            if settings.setdefault(arm["name"], given) != given:
                raise ValueError(f"{arm['name']}: has other settings in another file")


def reference_of(files: list[dict[str, Any]]) -> str:
    """The arm that the others are compared with; a file of one arm compares nothing."""
    (name,) = {
        name
        for arms in map(arms_of, files)
        for name, metrics in arms.items()
        if len(arms) > 1 and all("difference" not in facts for facts in metrics.values())
    }
    return name


def joined(files: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The values of every arm and metric by seed, and their difference to the reference's."""
    require_one_study(files)
    reference = reference_of(files)
    values, widths = dict[str, dict[str, dict[str, float]]](), dict[str, dict[str, float]]()
    for file in files:
        for arm, metrics in arms_of(file).items():
            for metric, facts in metrics.items():
                by_seed = values.setdefault(arm, {}).setdefault(metric, {})
                for seed, value in facts["by_seed"].items():
                    if not math.isclose(by_seed.setdefault(seed, value), value, abs_tol=1e-9):
                        raise ValueError(
                            f"{arm}, {metric}, seed {seed}: {by_seed[seed]} and {value}"
                        )
                if (difference := facts.get("difference")) is not None:
                    has_one = difference["interval"] is not None
                    half = difference["half_width"]["samples"] if has_one else math.nan
                    largest = widths.setdefault(arm, {})
                    largest[metric] = float(np.maximum(largest.get(metric, 0.0), half))
    return {
        arm: {
            metric: summary(by_seed, values[reference][metric], widths.get(arm, {}).get(metric))
            for metric, by_seed in metrics.items()
        }
        for arm, metrics in sorted(values.items(), key=lambda item: item[0] != reference)
    }


def summary(
    by_seed: dict[str, float], reference: dict[str, float], of_samples: float | None
) -> dict[str, Any]:
    """The mean of a metric; with a half-width over samples the difference, paired by seed."""
    facts: dict[str, Any] = {"mean": float(np.mean([*by_seed.values()])), "by_seed": by_seed}
    if of_samples is None:
        return facts
    gaps = {seed: value - reference[seed] for seed, value in by_seed.items()}
    of_seeds = half_width([*gaps.values()])
    mean, half = float(np.mean([*gaps.values()])), math.hypot(of_seeds, of_samples)
    ends = [mean - half, mean + half] if math.isfinite(half) else None
    facts["difference"] = {"mean": mean, "interval": ends, "by_seed": gaps}
    facts["difference"]["beyond"] = ends is not None and not ends[0] <= 0 <= ends[1]
    return facts


def shown(facts: dict[str, Any]) -> str:
    text = f"{100 * facts['mean']:.1f}"
    if (difference := facts.get("difference")) is not None:
        text += f"<br>{100 * difference['mean']:+.1f}"
        if (ends := difference["interval"]) is not None:
            text += f" [{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}]" + "*" * difference["beyond"]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--arms", nargs="+", help="these alone, beside the reference")
    parser.add_argument("--metrics", type=int, default=7, help="columns; the first are summaries")
    parser.add_argument("--out", type=Path, help="JSON of all values")
    given = parser.parse_args()
    files = [json.loads(path.read_text(encoding="utf-8")) for path in given.files]
    table = joined(files)
    names = [*next(iter(table.values()))][: given.metrics]
    print(f"| arm | seeds | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}")
    for number, (arm, metrics) in enumerate(table.items()):
        if number == 0 or given.arms is None or arm in given.arms:
            seeds = ", ".join(sorted(metrics[names[0]]["by_seed"]))
            print(f"| {arm} | {seeds} | {' | '.join(shown(metrics[name]) for name in names)} |")
    if given.out is not None:
        facts = {"parts": [path.name for path in given.files], "split": files[0]["split"]}
        given.out.write_text(json.dumps(facts | {"arms": table}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
