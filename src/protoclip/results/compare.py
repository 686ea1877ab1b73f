"""Models side by side: runs by their files, and evaluated models by their records.

Differences of two runs are computed in `evaluation/paired.py`, and `table.py` shows the results.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from protoclip.evaluation import paired
from protoclip.evaluation.metrics import difference, interval, mark_clear, rests_on_few
from protoclip.evaluation.suite import Result
from protoclip.files import checksum, require_ours, to_json, write_atomically

LONGEST_NAME = 180  # bytes of a file's name, without its ending
Entry = Mapping[str, Any]  # a model, as `compare_runs` returns it


# Runs


def name_runs(runs: Iterable[tuple[str, int, str]]) -> list[tuple[str, str]]:
    """Names the model of each run, and the run itself, given its name, its seed and its folder.

    Runs of one name are seeds of one model. If a seed of a name repeats, each run of that name is a
    model of its own, named with its folder.
    """
    runs = list(runs)
    counts = Counter((name, seed) for name, seed, _ in runs)
    repeated = {name for (name, _), count in counts.items() if count > 1}
    models = [f"{name} ({folder})" if name in repeated else name for name, _, folder in runs]
    several = {model for model, count in Counter(models).items() if count > 1}
    return [
        (model, f"{model}, seed {seed}" if model in several else model)
        for model, (_, seed, _) in zip(models, runs, strict=True)
    ]


@np.errstate(over="ignore", invalid="ignore")
def compare_runs(
    runs: Sequence[paired.RunResults], models: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Group runs by model, and compare each model with the first.

    A run that is given twice counts once. A damaged file of results by sample costs a warning, and
    the intervals that need it. Unless they are given, models are named by `name_runs`.

    Returns one entry a model: metrics, as `compute_intervals`, a `difference` to the first, and for
    recalls `among` how many candidates they are, if all runs of the model have as many.
    """
    if models is None:
        runs = list({os.path.realpath(run.folder): run for run in runs}.values())
        names = name_runs((run.name, run.seed, run.folder) for run in runs)
        models = [model for model, _ in names]
    groups: dict[str, dict[int, paired.RunResults]] = {}
    for model, run in zip(models, runs, strict=True):
        groups.setdefault(model, {})[run.seed] = run
    reference = next(iter(groups.values()), {})
    reader, entries = cache(paired.read_samples), []
    for name, by_seed in groups.items():
        members = [*by_seed.values()]
        ends, metrics = paired.compute_intervals(members, reader), dict[str, Any]()
        for key in members[0].metrics:
            if not all(key in run.metrics for run in members):
                continue
            metrics[key] = summarize([run.metrics[key] for run in members]) | ends.get(key, {})
            recall = key.partition("@")[0]
            among = {run.facts.get("candidates", {}).get(recall) for run in members}
            if len(among) == 1 and None not in among:
                metrics[key]["among"] = among.pop()
            if by_seed is not reference and any(key in run.metrics for run in reference.values()):
                metrics[key]["difference"] = paired.compare_metric(key, reference, by_seed, reader)
        entries.append(
            {
                "name": name,
                "seeds": list(by_seed),
                "metrics": metrics,
                "samples_seen": summarize([run.samples_seen for run in members]),
                "train_seconds": summarize([run.train_seconds for run in members]),
                "trained_on": paired.describe_leaks(run.trained_on for run in members),
                "machines": sorted({run.machines for run in members} - {""}),
            }
        )
    mark_clear(differences_in(entries))
    return entries


def summarize(values: Sequence[float | None]) -> dict[str, Any]:
    """`mean`, and from two values on `spread`, the sample standard deviation."""
    numbers = np.asarray([value for value in values if value is not None], dtype=np.float64)
    spread = {"spread": float(numbers.std(ddof=1))} if len(numbers) > 1 else {}
    return {"mean": float(numbers.mean()) if len(numbers) else None, **spread}


def differences_in(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The differences of all metrics of the entries of `compare_runs`."""
    values = [value for entry in entries for value in entry["metrics"].values()]
    return [value["difference"] for value in values if "difference" in value]


# Evaluated models


def add_means(results: Sequence[Result]) -> list[Result]:
    """The results of one model, and the means of metrics that several data sets have."""
    by_metric: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        for metric in result.record["metrics"] if "column" not in result.record else ():
            by_metric.setdefault((result.record["task"], metric), []).append(result)
    # One record for the metrics of a task that the same data sets have.
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (task, metric), members in by_metric.items():
        if len(members) > 1:
            names = tuple(result.record["dataset"] for result in members)
            groups.setdefault((task, names), []).append(metric)
    means = []
    for (task, names), metrics in groups.items():
        members = by_metric[task, metrics[0]]
        values = {m: float(np.mean([r.record["metrics"][m] for r in members])) for m in metrics}
        influences = {
            metric: np.concatenate([r.influences[metric] for r in members]) / len(members)
            for metric in metrics
            if all(metric in r.influences for r in members)
        }
        without = {metric for member in members for metric in member.without}
        first = members[0].record
        record = {
            "dataset": f"mean of {len(names)}",
            "model": first["model"],
            "pretrained": first["pretrained"],
            "task": task,
            "metrics": values,
            "language": first["language"],
            "split": first["split"],
            "datasets": list(names),
            "intervals": {
                name: interval(values[name], influences[name])
                for name in influences
                if name not in without
            },
        }
        for member in members:
            if find_leaks([member]):
                record["trained_on"] = member.record["trained_on"]
        record["wide"] = [name for name in record["intervals"] if rests_on_few(influences[name])]
        ids = [sample for member in members for sample in member.ids]
        means.append(Result(record=record, influences=influences, ids=ids, without=without))
    return [*results, *means]


def add_differences(
    models: Sequence[Sequence[Result]], reference: Sequence[Result]
) -> list[list[Result]]:
    """The results of models with their paired differences to a reference, by metric."""
    by_key = {make_key(result): result for result in reference}

    def add_difference(result: Result) -> Result:
        other, record = by_key.get(make_key(result)), dict(result.record)
        if other is None:
            return result
        record |= {"compared_to": other.record["model"], "differences": {}}
        has_same = [*result.ids] == [*other.ids]
        for metric, value in other.record["metrics"].items():
            if metric not in record["metrics"]:
                continue
            gain, influence = record["metrics"][metric] - value, None
            if has_same and metric in result.influences.keys() & other.influences.keys():
                influence = result.influences[metric] - other.influences[metric]
            change = record["differences"][metric] = difference([gain], influence)
            if find_leaks([other, result]):
                change["p"] = None
        return replace(result, record=record)

    compared = [[*map(add_difference, results)] for results in models]
    mark_clear(record_differences(compared))
    return compared


def make_key(result: Result) -> tuple[Any, ...]:
    """Task and data of a result: equal for results that can be compared."""
    record = result.record
    return record["task"], record["dataset"], *record.get("datasets", ())


def record_differences(models: Sequence[Sequence[Result]]) -> list[dict[str, Any]]:
    """The differences of all metrics of all records."""
    records = [result.record for results in models for result in results]
    return [change for record in records for change in record.get("differences", {}).values()]


def find_leaks(results: Sequence[Result]) -> dict[str, str]:
    """`describe_leaks` of the data sets of some results."""
    records = [result.record for result in results]
    return paired.describe_leaks(
        {record["dataset"]: record.get("trained_on", {})} for record in records
    )


def write_records(
    records: Sequence[dict[str, Any]], folder: Path, *, overwrite: bool = False
) -> None:
    """Write a file a record, named as CLIP_benchmark names them; `clip_benchmark build` reads it.

    Raises:
        OSError: The folder cannot be written.
        ValueError: One of the files is not ours; none is written then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_name, seen = dict[str, dict[str, Any]](), Counter[str]()
    for record in records:
        words = [record[key] for key in ("dataset", "pretrained", "model", "language", "task")]
        words += [record["split"]] * (record["split"] != "test")
        stem = re.sub(r"[^\w.+-]+", "_", "_".join(words)).strip("._")
        if len(encoded := stem.encode()) > LONGEST_NAME:
            start = encoded[:LONGEST_NAME].decode(errors="ignore")
            stem = f"{start}-{checksum(encoded)[:8]}"
        seen[stem] += 1
        by_name[stem if seen[stem] == 1 else f"{stem}-{seen[stem]}"] = record
    for name in by_name if not overwrite else ():
        require_ours(folder / f"{name}.json", '"intervals"')  # CLIP_benchmark's files lack it
    for name, record in by_name.items():
        write_atomically(folder / f"{name}.json", to_json(record) + "\n")
