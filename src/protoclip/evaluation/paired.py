"""Finished runs: reads their results, and computes how their metrics differ.

Differences are paired by seed, and by test sample if both runs have the same.
"""

import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from protoclip.evaluation.metrics import (
    METRICS,
    MULTILABEL,
    NEEDS,
    SHOWN,
    Columns,
    Floats,
    SampleResults,
    compute_influences,
    difference,
    interval,
    rests_on_few,
)
from protoclip.files import has_changed, read_json, read_local
from protoclip.terminal import say

FEW = 3  # runs that are named
Counts = Mapping[str, Mapping[str, int]]
# With the influences by metric, and the metrics whose candidates are crowded.
WithInfluences = tuple[SampleResults, dict[str, Floats], set[str]]
Reader = Callable[[Path], WithInfluences | None]  # `read_samples`, which may keep what it read


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """The results of a run."""

    name: str
    seed: int
    folder: str
    metrics: Mapping[str, float]  # finite values, by `eval/<data set>/<task>/<metric>`
    #: The files with the results of each test sample, by data set.
    samples: Mapping[str, Path] = field(default_factory=dict)
    samples_seen: float | None = None
    train_seconds: float | None = None
    #: By data set, the number of its `pairs`, and of those whose `images` the run was trained on.
    trained_on: Counts = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # the content of `results.json`

    @property
    def machines(self) -> str:
        """The machines of the run, in order; version 1.0.0 wrote the device."""
        environment = self.facts.get("environment") or {}
        names = environment.get("machines") or [environment.get("device")]
        return ", then ".join(str(name) for name in names if name)


def read_results(run: str | Path) -> RunResults:
    """Read `results.json` of a finished run.

    Raises:
        ValueError: There is no such run, or it has not finished.
    """
    folder = Path(run)
    path = folder / "results.json"
    if not path.exists():
        reason = "no results.json; the run has not finished"
        raise ValueError(f"{folder}: {explain_no_run(folder) or reason}")
    try:
        facts = json.loads(read_local(path))
        if not isinstance(facts["name"], str) or not isinstance(facts["seed"], int):
            raise TypeError("name or seed")
        metrics = {key: finite_number(value) for key, value in facts["metrics"].items()}
        results = RunResults(
            name=facts["name"],
            seed=facts["seed"],
            folder=str(folder),
            metrics={key: value for key, value in metrics.items() if value is not None},
            samples=find_samples(folder),
            samples_seen=finite_number(facts["samples_seen"]),
            train_seconds=finite_number(facts["train_seconds"]),
            trained_on=facts.get("trained_on", {}),  # version 1.0.0 wrote none
            facts=facts,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path}: not the results of a run ({reason}); restore it, or leave the run out"
        ) from error
    if has_changed(facts):  # people may edit it
        say(f"warning: {path}: not what the run wrote: its checksum differs")
    return results


def explain_no_run(path: Path) -> str:
    """What a file or folder is that is no run; empty for a run."""
    if (path / "config.toml").is_file():
        return ""
    for pattern in ("*/config.toml", "*/*/config.toml"):
        if runs := sorted(str(config.parent) for config in path.glob(pattern)):
            names = shlex.join(runs[:FEW]) + " ..." * (len(runs) > FEW)
            return f"not a run folder; it holds runs: name them, as {names}"
    for file in path.glob("*.json") if path.is_dir() else [path] * (path.suffix == ".json"):
        with suppress(ValueError):
            if {"dataset", "task", "intervals"} <= read_json(file).keys():
                return (
                    "was written by protoclip evaluate, and is no run folder; to compare models by "
                    "such records, give protoclip evaluate MODEL --compare-to OTHER --data DATA"
                )
    return "not a run folder; a run has a config.toml" if path.exists() else "no such run folder"


def finite_number(value: Any) -> float | None:
    """A number from JSON; None for null, infinity and NaN. Raises `TypeError` for anything else."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(f"{value!r} is not a number")
    return float(value) if value is not None and math.isfinite(value) else None


def find_samples(folder: Path) -> dict[str, Path]:
    """The files with the results of each sample, by data set; `test` wins over `validation`."""
    return {
        file.name.removesuffix(f"-{split}.parquet"): file
        for split in ("validation", "test")
        for file in sorted((folder / "results").glob(f"*-{split}.parquet"))
    }


def read_samples(path: Path) -> WithInfluences | None:
    """Results by sample with their influences; for a damaged file a warning, and None."""
    try:
        samples = SampleResults.read(path)
    except ValueError as error:
        say(f"warning: {error}")
        return None
    return samples, *compute_influences(samples)


def compute_intervals(runs: Sequence[RunResults], read: Reader) -> dict[str, dict[str, Any]]:
    """The 95% `interval` of metrics of a model over samples and seeds, and whether it is `wide`.

    Only for metrics that all of its runs computed on the same samples.
    """
    by_key = dict[str, dict[str, Any]]()
    for data in {*runs[0].samples}.intersection(*(run.samples for run in runs)):
        files = [read(run.samples[data]) for run in runs]
        readable = [file for file in files if file is not None]
        crowded = {metric for *_, metrics in readable for metric in metrics}
        for metric in METRICS.keys() - crowded:
            key = f"eval/{data}/{metric}"
            values = [run.metrics[key] for run in runs if key in run.metrics]
            rows = [
                influence[metric]
                for samples, influence, _ in readable
                if metric in influence and have_same_samples(samples, readable[0][0], metric)
            ]
            if len(values) == len(rows) == len(runs) and len({*map(len, rows)}) == 1:
                wide = rests_on_few(np.mean(rows, axis=0))
                by_key[key] = {"interval": interval(values, np.stack(rows)), "wide": wide}
    return by_key


def describe_leaks(counts: Iterable[Counts]) -> dict[str, str]:
    """In words, how many pairs of each data set a model was trained on, if it was on any."""
    return {
        data: f"trained on {number['images']:,} of {number['pairs']:,} pairs of {data}"
        for run_counts in counts
        for data, number in run_counts.items()
        if number.get("images")
    }


def compare_metric(
    key: str, first: Mapping[int, RunResults], second: Mapping[int, RunResults], read: Reader
) -> dict[str, Any]:
    """How much higher a metric, as `eval/emoji/knn/acc1`, is in the second runs, by seed.

    Returns:
        `mean` over the common seeds, or else the difference of means; `interval`, its 95% interval,
        if the metric can have one; `kind`, what the interval covers, `seeds`, `samples` or `seeds
        and samples`, or None; `seeds`, the number of common seeds; `samples`, that of test samples,
        if covered; `n`, the first of both numbers that `kind` names; `p` and `beyond`, as in
        `difference`; `of_some`, whether either model has more seeds, which count only in its mean;
        and `other_samples`, whether the runs are known to have different samples.
    """
    one, two = (
        {seed: np.float64(run.metrics[key]) for seed, run in runs.items() if key in run.metrics}
        for runs in (first, second)
    )
    _, data, name = key.split("/", 2) if key.count("/") > 1 else ("", "", key)
    seeds = [seed for seed in two if seed in one]
    # How each group of samples moves the metric from one run to another.
    common, changes, others = list[SampleResults](), list[Floats](), False
    for left, right in [(s, s) for s in seeds] or [(next(iter(one)), next(iter(two)))]:
        runs = [run for run in (first[left], second[right]) if data in run.samples]
        files = [file for run in runs if (file := read(run.samples[data])) is not None]
        if name not in METRICS or len(files) < 2:
            continue
        (samples, before, _), (other, after, _) = files
        is_same = have_same_samples(samples, other, name)
        if is_same and name in before and name in after:
            is_same = len(before[name]) == len(after[name])  # or only one has groups of texts
            changes += [after[name] - before[name]] if is_same else []
        common.append(samples)
        others |= not is_same
    if not seeds:
        gain = float(np.mean(list(two.values())) - np.mean(list(one.values())))
        no_seeds = {"n": 0, "seeds": 0, "samples": None, "kind": None, "of_some": False}
        return {**difference([gain]), **no_seeds, "other_samples": others}
    gains = [float(two[seed] - one[seed]) for seed in seeds]
    # The influence of each group of samples on the difference of each pair of runs `(pairs,
    # groups)`: known if all runs have results of the same samples.
    influence = None
    if len(changes) == len(seeds) and all(
        have_same_samples(samples, common[0], name) for samples in common
    ):
        influence = np.stack(changes)
    metric = METRICS.get(name)
    # On different samples, the models are not the only difference.
    has_interval = metric is None or metric.column is not None or name == MULTILABEL
    if others or not has_interval:
        gains, influence = [float(np.mean(gains))], None  # one gain alone has no interval
    counts = {"seeds": len(gains)} if len(gains) > 1 else {}
    if influence is not None:
        counts["samples"] = len(common[0].rows(name)["sample_id"])
    result = difference(gains, influence)
    if data in describe_leaks(run.trained_on for run in (*first.values(), *second.values())):
        result["p"] = None  # here, too, the models are not the only difference
    return {
        **result,
        "n": next(iter(counts.values()), len(seeds)),
        "seeds": len(seeds),
        "samples": counts.get("samples"),
        "kind": " and ".join(counts) or None,
        "of_some": len(seeds) < max(len(one), len(two)),
        "other_samples": others,
    }


def have_same_samples(one: SampleResults, two: SampleResults, metric: str) -> bool:
    """Whether both have the same samples in the same groups for a metric.

    The candidates of a search matter as much as the queries. Images of one id are the same if their
    content is equal, and also their class for classification; as far as both files have these.
    """
    sides, shown = [(one.rows(metric), two.rows(metric))], [*SHOWN]
    if "captions" in NEEDS[METRICS[metric].task]:
        sides = [(one.images, two.images), (one.texts, two.texts)]
        shown.remove("class_name")
    for left, right in sides:
        both = [name for name in shown if name in left and name in right]
        if sort_samples(left, both) != sort_samples(right, both):
            return False
    return True


def sort_samples(rows: Columns, shown: Sequence[str]) -> list[tuple[Any, ...]]:
    """Samples with their group and these columns, in a fixed order."""
    groups = rows.get("group", rows["sample_id"])
    return sorted(zip(rows["sample_id"], groups, *(rows[name] for name in shown), strict=True))
