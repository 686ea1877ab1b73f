"""Runs side by side: the table of `protoclip compare`, with paired differences."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from protoclip.evaluation import paired
from protoclip.evaluation.samples import SampleResults

# Rows of the table in order: metric suffix and label. All are percentages in the table.
SHARES = {
    "zero_shot/acc1": "zero-shot, unseen concepts, acc1",
    "zero_shot/acc5": "zero-shot, unseen concepts, acc5",
    "zero_shot_subgroup/acc1": "zero-shot, subgroups, acc1",
    "zero_shot_subgroup/acc5": "zero-shot, subgroups, acc5",
    "retrieval/image_to_text@1": "image-to-text recall@1",
    "retrieval/image_to_text@5": "image-to-text recall@5",
    "retrieval/image_to_text@10": "image-to-text recall@10",
    "retrieval/text_to_image@1": "text-to-image recall@1",
    "retrieval/text_to_image@5": "text-to-image recall@5",
    "retrieval/text_to_image@10": "text-to-image recall@10",
    "linear_probe/acc1": "linear probe",
    "knn/acc1": "kNN",
    "clustering/ami": "K-means AMI",
    "clustering/ari": "K-means ARI",
}


Run = Mapping[str, Any]
DRAWS = 1000  # of the bootstrap


def read_results(run: str | Path) -> dict[str, Any]:
    """The `results.json` of a run folder, and where the results of each test sample are.

    Returns:
        `name`, `seed`, `folder`, `samples_seen`, `train_seconds`, `metrics` without those that are
        not finite, and `samples`, the file of each data set.

    Raises:
        ValueError: No such run, or one that has not finished.
    """
    path = Path(run)
    if not path.is_dir():
        raise ValueError(f"{path}: no such run folder")
    if not (path / "results.json").is_file():
        raise ValueError(f"{path}: no results.json; the run has not finished")
    try:
        results = json.loads((path / "results.json").read_text(encoding="utf-8"))
        metrics = {key: number(value) for key, value in dict(results["metrics"]).items()}
        if not isinstance(results["name"], str) or not isinstance(results["seed"], int):
            raise TypeError("name or seed")
        return {
            "name": results["name"],
            "seed": results["seed"],
            "folder": str(path),
            "samples_seen": number(results["samples_seen"]),
            "train_seconds": number(results["train_seconds"]),
            "metrics": {key: value for key, value in metrics.items() if value is not None},
            "samples": samples_of(path, "test"),
        }
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{path / 'results.json'}: not the results of a run ({error!r})"
        ) from error


def number(value: Any) -> float | None:
    """A finite number, or None for null and what is not finite.

    Raises:
        TypeError, OverflowError: No number, or one that is too large.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(f"{value!r} is no number")
    return float(value) if value is not None and math.isfinite(value) else None


def samples_of(folder: Path, split: str) -> dict[str, Path]:
    """The files with the results of each sample of a split, by data set."""
    files = sorted((folder / "results").glob(f"*-{split}.parquet"))
    return {file.name.removesuffix(f"-{split}.parquet"): file for file in files}


def summary(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and spread: the sample standard deviation, which one run alone does not have."""
    found = np.asarray([value for value in values if value is not None], dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        spread = {"spread": float(found.std(ddof=1))} if len(found) > 1 else {}
        return {"mean": float(found.mean()) if len(found) else None, **spread}


def compare(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Group runs by name, and set each group against the first.

    A run that is given twice counts once. Runs of equal name and seed in different folders are
    groups of their own, called by their folders too.

    Args:
        runs: Results as `read_results` gives them.

    Returns:
        One entry a name, in order of appearance: `name`, `seeds`, and for `samples_seen`,
        `train_seconds` and each metric `mean` and `spread` (with two runs or more). A metric of
        another than the first entry has `difference`, see `difference`.
    """
    runs = list({os.path.realpath(run["folder"]): run for run in runs}.values())
    counts = Counter((run["name"], run["seed"]) for run in runs)
    twice = {name for (name, _), count in counts.items() if count > 1}
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        own = f"{run['name']} ({run['folder']})" if run["name"] in twice else run["name"]
        groups.setdefault(own, {})[run["seed"]] = run
    reference = next(iter(groups.values()), {})

    @cache
    def resampled(path: Path) -> tuple[SampleResults, dict[str, paired.Draws]]:
        results = SampleResults.read(path)
        known = {
            key.split("/", 2)[2] for run in runs for key in run["metrics"] if key.count("/") > 1
        }
        return results, paired.resampled(results, sorted(known), draws=DRAWS)

    entries = []
    for name, members in groups.items():
        entry: dict[str, Any] = {"name": name, "seeds": list(members)}
        for key in ("samples_seen", "train_seconds"):
            entry[key] = summary([run[key] for run in members.values()])
        listed = [run["metrics"] for run in members.values()]
        entry["metrics"] = {
            key: summary([metrics[key] for metrics in listed])
            for key in listed[0]
            if all(key in metrics for metrics in listed)
        }
        for key, value in entry["metrics"].items() if members is not reference else ():
            if any(key in run["metrics"] for run in reference.values()):
                value["difference"] = difference(key, reference, members, resampled)
        entries.append(entry)
    return entries


def difference(
    key: str,
    first: Mapping[int, Run],
    second: Mapping[int, Run],
    resampled: Callable[[Path], tuple[SampleResults, dict[str, paired.Draws]]],
) -> dict[str, Any]:
    """How much higher a metric of the second runs is, by seed.

    Returns:
        `mean` over the seeds that both have; `interval`, its 95% interval: Student's t over two
        seeds or more (`kind` "seeds"), or from `DRAWS` draws of one seed's samples
        ("bootstrap", for a metric that has results of samples); `n`, the number of seeds or
        samples; `beyond`, whether the interval leaves out 0. Without a common seed it is the
        difference of means, and without an interval `interval` and `kind` are None.
    """
    one, two = (
        {seed: run["metrics"][key] for seed, run in runs.items() if key in run["metrics"]}
        for runs in (first, second)
    )
    seeds = [seed for seed in two if seed in one]
    interval, kind, n = None, None, len(seeds)
    with np.errstate(over="ignore", invalid="ignore"):
        found = [np.float64(two[seed]) - np.float64(one[seed]) for seed in seeds]
        mean = np.mean(found or [np.mean(list(two.values())) - np.mean(list(one.values()))])
        if len(seeds) > 1:
            interval, kind = paired.t_interval(found), "seeds"
    if len(seeds) == 1:
        _, data, metric = key.split("/", 2) if key.count("/") > 1 else ("", "", "")
        files = [run[seeds[0]].get("samples", {}).get(data) for run in (first, second)]
        if all(files):
            (results, draws), (others, other_draws) = map(resampled, files)
            ids = "text_ids" if "text_to_image" in metric else "image_ids"
            names = sorted(getattr(results, ids))
            if metric in draws and names == sorted(getattr(others, ids)):
                interval = paired.bootstrap_interval(draws[metric], other_draws[metric])
                kind, n = "bootstrap", len(names)
    beyond = interval is not None and not interval[0] <= 0 <= interval[1]
    ends = None if interval is None else list(interval)
    return {"mean": float(mean), "interval": ends, "n": n, "kind": kind, "beyond": beyond}


def table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """The comparison as a table: a row a metric, a column a name."""
    drawn = Table(
        title="Accuracies, recalls, AMI and ARI in percent",
        caption=explanation(entries),
        caption_justify="left",
    )
    drawn.add_column("metric")
    for entry in entries:
        count = len(entry["seeds"])
        name = "".join(letter if letter.isprintable() else "?" for letter in entry["name"])
        drawn.add_column(f"{escape(name)}\n{count} seed{'s' if count > 1 else ''}", justify="right")
    keys = list(dict.fromkeys(key for entry in entries for key in entry["metrics"]))
    for key in keys:
        label, scale, digits = describe(key)
        cells = [
            escape(cell(entry["metrics"].get(key), scale=scale, digits=digits)) for entry in entries
        ]
        drawn.add_row(escape(label), *cells)
    drawn.add_section()
    seen = [entry["samples_seen"]["mean"] for entry in entries]
    drawn.add_row("samples seen", *("-" if mean is None else f"{mean:,.0f}" for mean in seen))
    seconds = [entry["train_seconds"]["mean"] for entry in entries]
    drawn.add_row("training, seconds (ratio)", *(with_ratio(mean, seconds[0]) for mean in seconds))
    return drawn


def with_ratio(value: float | None, reference: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f} ({value / reference:.2f})" if reference else f"{value:,.0f}"


def explanation(entries: Sequence[Mapping[str, Any]]) -> str | None:
    """What the intervals in a table are."""
    kinds = {
        value["difference"]["kind"]
        for entry in entries
        for value in entry["metrics"].values()
        if "difference" in value
    }
    lines = [
        "Second line: difference to the first, with its 95% interval; * where that leaves out 0."
    ]
    if "seeds" in kinds:
        lines.append("Several seeds: paired by seed, Student's t.")
    if "bootstrap" in kinds:
        lines.append("One seed: drawn over test samples; what another seed changes is not in it.")
    return " ".join(lines) if kinds else None


def describe(key: str) -> tuple[str, float, int]:
    """Label, factor and digits of a metric's row."""
    _, _, metric = key.removeprefix("eval/").partition("/")
    if metric in SHARES:
        return SHARES[metric], 100.0, 1
    return metric.replace("modality_gap/", "").replace("_", " "), 1.0, 3


def cell(value: Mapping[str, Any] | None, *, scale: float, digits: int) -> str:
    """Mean and spread; on a line of its own the difference, marked where it is beyond chance."""
    if value is None:
        return "-"
    text = f"{value['mean'] * scale:.{digits}f}"
    if "spread" in value:
        text += f" ± {value['spread'] * scale:.{digits}f}"
    if "difference" in value:
        text += "\n" + interval_text(value["difference"], scale=scale, digits=digits)
    return text


def interval_text(difference: Mapping[str, Any], *, scale: float, digits: int) -> str:
    """`+3.4 [+2.8, +4.0]*`: a difference, its interval if there is one, a mark if it is beyond."""
    text = f"{difference['mean'] * scale:+.{digits}f}"
    if difference["interval"] is not None:
        low, high = (f"{end * scale:+.{digits}f}" for end in difference["interval"])
        text += f" [{low}, {high}]"
    return text + ("*" if difference["beyond"] else "")


def show(entries: Sequence[Mapping[str, Any]]) -> None:
    """Print the table, as wide as it needs to be where the output is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=40 + 30 * len(entries))
    console.print(table(entries))
