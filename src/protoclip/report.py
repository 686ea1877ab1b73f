"""Runs side by side: the table of `protoclip compare`."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

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


def read_results(run: str | Path) -> dict[str, Any]:
    """The `results.json` of a run folder.

    Raises:
        ValueError: No such run, or one that has not finished.
    """
    path = Path(run)
    if not path.is_dir():
        raise ValueError(f"{path}: no such run folder")
    if not (path / "results.json").is_file():
        raise ValueError(f"{path}: no results.json; the run has not finished")
    try:
        results: dict[str, Any] = json.loads((path / "results.json").read_text(encoding="utf-8"))
        return {key: results[key] for key in ("name", "seed", "samples_seen", "train_seconds")} | {
            "metrics": dict(results["metrics"])
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path / 'results.json'}: not the results of a run ({error!r})"
        ) from error


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean and spread: the sample standard deviation, which one run alone does not have."""
    spread = {"spread": statistics.stdev(values)} if len(values) > 1 else {}
    return {"mean": statistics.fmean(values), **spread}


def compare(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Group runs by name, and set each group against the first.

    Args:
        runs: Results as `read_results` gives them.

    Returns:
        One entry a name, in order of appearance: `name`, `seeds`, and for `samples_seen`,
        `train_seconds` and each metric `mean`, `spread` (with two runs or more) and `difference`
        to the first entry's mean.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["name"], []).append(run)
    entries: list[dict[str, Any]] = []
    for name, members in groups.items():
        entry: dict[str, Any] = {"name": name, "seeds": [member["seed"] for member in members]}
        for key in ("samples_seen", "train_seconds"):
            entry[key] = summary([float(member[key]) for member in members])
        shared = [key for key in members[0]["metrics"] if all(key in m["metrics"] for m in members)]
        entry["metrics"] = {
            key: summary([member["metrics"][key] for member in members]) for key in shared
        }
        for key, value in entry["metrics"].items():
            if key in (reference := (entries or [entry])[0]["metrics"]):
                value["difference"] = value["mean"] - reference[key]["mean"]
        entries.append(entry)
    return entries


def table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """The comparison as a table: a row a metric, a column a name."""
    drawn = Table(title="Accuracies, recalls, AMI and ARI in percent; difference to the first")
    drawn.add_column("metric")
    for entry in entries:
        count = len(entry["seeds"])
        drawn.add_column(
            f"{entry['name']}\n{count} seed{'s' if count > 1 else ''}", justify="right"
        )
    keys = list(dict.fromkeys(key for entry in entries for key in entry["metrics"]))
    for key in keys:
        label, scale, digits = describe(key)
        cells = [
            cell(entry["metrics"].get(key), scale=scale, digits=digits, first=position == 0)
            for position, entry in enumerate(entries)
        ]
        drawn.add_row(label, *cells)
    drawn.add_section()
    drawn.add_row("samples seen", *(f"{e['samples_seen']['mean']:,.0f}" for e in entries))
    reference = entries[0]["train_seconds"]["mean"]
    drawn.add_row(
        "training, seconds (ratio)",
        *(
            f"{mean:,.0f} ({mean / reference:.2f})"
            for mean in (entry["train_seconds"]["mean"] for entry in entries)
        ),
    )
    return drawn


def describe(key: str) -> tuple[str, float, int]:
    """Label, factor and digits of a metric's row."""
    _, _, metric = key.removeprefix("eval/").partition("/")
    if metric in SHARES:
        return SHARES[metric], 100.0, 1
    return metric.replace("modality_gap/", "").replace("_", " "), 1.0, 3


def cell(value: Mapping[str, float] | None, *, scale: float, digits: int, first: bool) -> str:
    if value is None:
        return "-"
    text = f"{value['mean'] * scale:.{digits}f}"
    if "spread" in value:
        text += f" ± {value['spread'] * scale:.{digits}f}"
    if not first and "difference" in value:
        text += f" ({value['difference'] * scale:+.{digits}f})"
    return text


def show(entries: Sequence[Mapping[str, Any]]) -> None:
    """Print the table, as wide as it needs to be where the output is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=40 + 30 * len(entries))
    console.print(table(entries))
