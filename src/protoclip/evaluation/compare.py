"""Runs side by side: the table of `protoclip compare`, with paired differences.

It reads what finished runs wrote; what `protoclip evaluate` judged is compared in `records.py`.
"""

import json
import math
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from protoclip.evaluation.metrics import (
    METRICS,
    SHOWN,
    Floats,
    difference,
    interval,
    is_share,
    label,
    mark_clear,
    rests_on_few,
)
from protoclip.evaluation.samples import (
    Columns,
    SampleResults,
    decided_by_candidates,
    influences,
)
from protoclip.files import has_changed, read_json, read_local
from protoclip.terminal import say

SECOND_LINE = "Second line: difference to the first, with its 95% interval; * if that is {}."
# By what an interval covers, with room for the number of samples.
INTERVALS = {
    "seeds and samples": "Several seeds: over seeds (paired, Student's t) and over {} test samples "
    "by groups, together.",
    "seeds": "Without results by sample: over seeds alone; it does not cover other samples.",
    "samples": "One seed: over {} test samples by groups; it does not cover other seeds.",
}
OTHERS = (
    "Where other samples judged the models, a difference has no interval, and is not of the models "
    "alone."
)
ON_FEW = (
    "A difference has no interval where too few groups of test samples differ, or too few do not."
)
TRAINED_ON = (
    "A model that was trained on some of the images that evaluate it does too well on them, so no "
    "difference of it is marked."
)
COMMON = "†"  # of a difference that is not that of the means above it
OF_COMMON = f"{COMMON}: of the seeds that both have, and not the difference of the means shown."
FEW = 3  # runs that are named
WIDEST = 1 << 20  # letters; no table is as wide
BRACKETS = (
    "In brackets: 95% intervals over groups of test samples, and over seeds if there are several; "
    "wide where few groups are wrong, or few right."
)
SPREAD = "±: sample standard deviation over seeds."
SEARCHES = ("retrieval", "geometry")  # tasks that images and texts judge together
Run = Mapping[str, Any]
WithInfluences = tuple[SampleResults, dict[str, Floats]]  # the influences by metric
Reader = Callable[[Path], WithInfluences | None]


class Common(NamedTuple):
    """What judged two runs by a metric.

    Attributes:
        samples: The results by sample of the first one.
        same: Whether the same samples judged the second one.
        moved: How much more each group moves the second one `(groups,)`, where that is known.
    """

    samples: SampleResults
    same: bool
    moved: Floats | None


def models_of(runs: Iterable[tuple[str, int, str]]) -> list[str]:
    """What to call the model of each run, given the run's name, its seed and its folder.

    Runs of one name are seeds of one model. Where a seed of a name repeats, each of its runs is a
    model of its own, named with its folder.
    """
    known = list(runs)
    counts = Counter((name, seed) for name, seed, _ in known)
    repeated = {name for (name, _), count in counts.items() if count > 1}
    return [f"{name} ({folder})" if name in repeated else name for name, _, folder in known]


def read_results(run: str | Path) -> dict[str, Any]:
    """The `results.json` of a finished run, with finite `metrics`, its `folder`, its `machines` in
    words, and `samples`: the files with the results of each test sample, by data set.

    Raises:
        ValueError: There is no such run, or it has not finished.
    """
    path = Path(run) / "results.json"
    if not path.exists():
        require_no_records(path.parent)
        reason = "no such run folder"
        if path.parent.exists():
            reason = "is a file, not a run folder"
        if path.parent.is_dir():
            reason = runs_inside(path.parent) or "no results.json; the run has not finished"
        raise ValueError(f"{path.parent}: {reason}")
    try:
        results = json.loads(read_local(path))
        if not isinstance(results["name"], str) or not isinstance(results["seed"], int):
            raise TypeError("name or seed")
        metrics = {key: number(value) for key, value in dict(results["metrics"]).items()}
        counts = {key: number(results[key]) for key in ("samples_seen", "train_seconds")}
        trained_on = {  # versions up to 1.0.0 wrote none
            data: {key: int(number(of[key]) or 0) for key in ("pairs", "images")}
            for data, of in dict(results.get("trained_on", {})).items()
        }
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path}: not the results of a run ({reason}); restore it, or leave the run out"
        ) from error
    if has_changed(results):  # people may edit it
        say(f"warning: {path}: not what the run wrote: its checksum differs")
    validation, test = (samples_of(path.parent, split) for split in ("validation", "test"))
    return {
        **{"name": results["name"], "seed": results["seed"], **counts, "folder": str(path.parent)},
        "metrics": {key: value for key, value in metrics.items() if value is not None},
        "machines": machines_of(results.get("environment")),
        "samples": validation | test,
        "trained_on": trained_on,
    }


def require_no_records(path: Path) -> None:
    """Refuse what `protoclip evaluate --out` wrote, a file or the folder: it has no results by
    sample, so that models could not be compared by it."""
    files = path.glob("*.json") if path.is_dir() else [path] * (path.suffix == ".json")
    if any(map(is_record, files)):
        raise ValueError(
            f"{path}: was written by protoclip evaluate, and is no run folder; to compare models "
            "by such records, give protoclip evaluate MODEL --compare-to OTHER --data DATA"
        )


def runs_inside(folder: Path) -> str:
    """Says which runs a folder holds, if it is none itself; empty if it holds none."""
    inside = sorted(str(config.parent) for config in folder.glob("*/config.toml"))
    if not inside or (folder / "config.toml").is_file():
        return ""
    named = shlex.join(inside[:FEW]) + " ..." * (len(inside) > FEW)
    return f"not a run folder; it holds runs: name them, as {named}"


def is_record(file: Path) -> bool:
    """Whether `protoclip evaluate` wrote a JSON file."""
    try:
        return {"dataset", "task", "intervals"} <= read_json(file).keys()
    except ValueError:
        return False


def machines_of(environment: Any) -> str:
    """On what a run trained, one after the other; of versions up to 1.0.0 the device alone."""
    known = environment if isinstance(environment, dict) else {}
    listed = known.get("machines")
    names = listed if isinstance(listed, list) else [known.get("device")]
    return ", then ".join(str(name) for name in names if name)


def samples_of(folder: Path, split: str) -> dict[str, Path]:
    """The files with the results of each sample of a split, by data set."""
    files = sorted((folder / "results").glob(f"*-{split}.parquet"))
    return {file.name.removesuffix(f"-{split}.parquet"): file for file in files}


def reader(*, refuse: bool) -> Reader:
    """Reads a file of `results["samples"]`, each once; what is damaged is refused, or else None.

    Then there is a warning.
    """

    @cache
    def read(path: Path) -> WithInfluences | None:
        try:
            samples = SampleResults.read(path)
        except ValueError as error:
            if refuse:
                raise
            say(f"warning: {error}")
            return None
        return samples, influences(samples)

    return read


def intervals_of(runs: Sequence[Run], read: Reader | None = None) -> dict[str, dict[str, Any]]:
    """The 95% `interval` of metrics of a model over samples and seeds, and whether it is `wide`.

    Only of metrics that the same samples judged in all of its runs. A file that is damaged raises
    `ValueError`, unless `read` says otherwise.
    """
    read, by_key = read or reader(refuse=True), dict[str, dict[str, Any]]()
    for data in {*runs[0].get("samples", {})}.intersection(*(of.get("samples", {}) for of in runs)):
        judged = [read(run["samples"][data]) for run in runs]
        known = [each for each in judged if each is not None]
        decided = {metric for each in known for metric in decided_by_candidates(*each)}
        for metric in METRICS.keys() - decided:
            key = f"eval/{data}/{metric}"
            values = [run["metrics"][key] for run in runs if key in run["metrics"]]
            moved = [
                influence[metric]
                for samples, influence in known
                if metric in influence and same_samples(samples, known[0][0], metric)
            ]
            if len(values) == len(moved) == len(runs) and len({*map(len, moved)}) == 1:
                wide = rests_on_few(np.mean(moved, axis=0))
                by_key[key] = {"interval": interval(values, np.stack(moved)), "wide": wide}
    return by_key


def number(value: Any) -> float | None:
    """A number from JSON; None for null, infinity and NaN. Raises `TypeError` for anything else."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(f"{value!r} is not a number")
    return float(value) if value is not None and math.isfinite(value) else None


@np.errstate(over="ignore", invalid="ignore")
def compare(
    runs: Sequence[Run], models: Sequence[str] | None = None, read: Reader | None = None
) -> list[dict[str, Any]]:
    """Group runs by model, and compare each model with the first.

    A run that is given twice counts once.

    Args:
        runs: As `read_results` returns them.
        models: The model of each, for runs that differ; unset, by `models_of`.
        read: Reads results by sample; unset, a damaged file is refused, unless there are several
            seeds: then an interval over these is left.

    Returns:
        One entry a model: `name`, `seeds`, the different `machines` of its runs, and for
        `samples_seen`, `train_seconds` and each of `metrics` a `summary`; and `trained_pairs`.
        Metrics have what `intervals_of` finds, and those of later entries a `difference`.
    """
    if models is None:
        runs = list({os.path.realpath(run["folder"]): run for run in runs}.values())
        models = models_of((run["name"], run["seed"], run["folder"]) for run in runs)
    groups: dict[str, dict[int, Run]] = {}
    for model, run in zip(models, runs, strict=True):
        groups.setdefault(model, {})[run["seed"]] = run
    reference = next(iter(groups.values()), {})
    several = any(len(members) > 1 for members in groups.values())
    read = read or reader(refuse=not several)
    entries = []
    for name, members in groups.items():
        entry: dict[str, Any] = {"name": name, "seeds": list(members), "metrics": {}}
        for key in ("samples_seen", "train_seconds"):
            entry[key] = summary([run[key] for run in members.values()])
        entry["trained_on"] = trained_pairs(run.get("trained_on", {}) for run in members.values())
        entry["machines"] = sorted({run.get("machines", "") for run in members.values()} - {""})
        listed = [run["metrics"] for run in members.values()]
        ends = intervals_of([*members.values()], read)
        for key in listed[0]:
            if not all(key in metrics for metrics in listed):
                continue
            of_seeds = summary([metrics[key] for metrics in listed])
            value: dict[str, Any] = {**of_seeds, **ends.get(key, {})}
            if members is not reference and any(key in r["metrics"] for r in reference.values()):
                value["difference"] = difference_of_runs(key, reference, members, read)
            entry["metrics"][key] = value
        entries.append(entry)
    mark_clear(differences_in(entries))
    return entries


def differences_in(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The differences of all metrics of the entries of `compare`."""
    values = [value for entry in entries for value in entry["metrics"].values()]
    return [value["difference"] for value in values if "difference" in value]


def clear(differences: Iterable[Mapping[str, Any]]) -> str:
    """What `mark_clear` finds, in words."""
    number = sum(each.get("p", each["interval"]) is not None for each in differences)
    return f"clear by Holm's test of all {number} differences that can be tested, at 5%"


def trained_pairs(counts: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, str]:
    """In words, how many pairs of a data set models were trained on, where they were on some."""
    return {
        data: f"trained on {of['images']:,} of {of['pairs']:,} pairs of {data}"
        for each in counts
        for data, of in each.items()
        if of.get("images")
    }


def summary(values: Sequence[float | None]) -> dict[str, float | None]:
    """`mean`, and of two values or more `spread`, the sample standard deviation."""
    known = np.asarray([value for value in values if value is not None], dtype=np.float64)
    spread = {"spread": float(known.std(ddof=1))} if len(known) > 1 else {}
    return {"mean": float(known.mean()) if len(known) else None, **spread}


def difference_of_runs(
    key: str,
    first: Mapping[int, Run],
    second: Mapping[int, Run],
    read: Reader,
) -> dict[str, Any]:
    """How much higher a metric of the second runs is than that of the first runs.

    Returns:
        `mean` over the common seeds, or else the difference of means; `interval`, its 95% interval,
        if the metric can have one; `kind`, what that covers, a key of `INTERVALS`, or None;
        `seeds`, the number of common seeds; `samples`, that of test samples, if it covers them;
        `n`, the one of both that stands first in `kind`; `p` and `beyond`, as `difference` has
        them; `of_some`, whether either model has other seeds too, which count in its mean alone;
        and `other_samples`, whether other samples are known to have judged the runs.
    """
    one, two = values_by_seed(key, first), values_by_seed(key, second)
    seeds = [seed for seed in two if seed in one]
    pairs = [(seed, seed) for seed in seeds] or [(next(iter(one)), next(iter(two)))]
    judged = [in_common(key, first[left], second[right], read) for left, right in pairs]
    common = [each for each in judged if each is not None]
    others = not all(each.same for each in common)
    if not seeds:
        gain = float(np.mean(list(two.values())) - np.mean(list(one.values())))
        no_seeds = {"n": 0, "seeds": 0, "samples": None, "kind": None, "of_some": False}
        return {**difference([gain]), **no_seeds, "other_samples": others}
    name = key.split("/", 2)[-1]
    gains = [float(two[seed] - one[seed]) for seed in seeds]
    influence = influence_on_difference(common, name, number=len(seeds))
    metric = METRICS.get(name)
    # On other samples, as of other data, it is not the models alone that differ.
    if others or (metric is not None and not metric.has_interval):
        gains, influence = [float(np.mean(gains))], None  # one gain alone has no interval
    samples = None if influence is None else len(common[0].samples.rows(name)["sample_id"])
    covered_by = {"seeds": len(gains)} if len(gains) > 1 else {}
    if samples is not None:
        covered_by["samples"] = samples
    result, data = difference(gains, influence), key.removeprefix("eval/").partition("/")[0]
    if data in trained_pairs(
        of.get("trained_on", {}) for of in (*first.values(), *second.values())
    ):
        result["p"] = None  # it is not of the models alone either
    return {
        **result,
        "n": next(iter(covered_by.values()), len(seeds)),
        "seeds": len(seeds),
        "samples": samples,
        "kind": " and ".join(covered_by) or None,
        "of_some": len(seeds) < max(len(one), len(two)),
        "other_samples": others,
    }


def values_by_seed(key: str, runs: Mapping[int, Run]) -> dict[int, np.float64]:
    """The values of a metric, of the runs that have it."""
    metrics = {seed: run["metrics"] for seed, run in runs.items()}
    return {seed: np.float64(known[key]) for seed, known in metrics.items() if key in known}


def influence_on_difference(common: Sequence[Common], metric: str, *, number: int) -> Floats | None:
    """How much each group of samples moves the difference of each pair of runs `(pairs, groups)`.

    None unless the same samples, with known results, judged all of so many pairs.
    """
    moved = [each.moved for each in common if each.moved is not None]
    if len(moved) < number:
        return None
    first = common[0].samples
    if not all(same_samples(each.samples, first, metric) for each in common):
        return None
    return np.stack(moved)


def in_common(key: str, one: Run, two: Run, read: Reader) -> Common | None:
    """What judged two runs by a metric; None unless both have results by sample."""
    if key.count("/") < 2:
        return None
    _, data, metric = key.split("/", 2)
    files = [run.get("samples", {}).get(data) for run in (one, two)]
    if None in files or metric not in METRICS:
        return None
    of_one, of_two = map(read, files)
    if of_one is None or of_two is None:
        return None
    (samples, influence), (other_samples, other_influence) = of_one, of_two
    if not same_samples(samples, other_samples, metric):
        return Common(samples, same=False, moved=None)
    if metric not in influence.keys() & other_influence.keys():
        return Common(samples, same=True, moved=None)
    if len(influence[metric]) != len(other_influence[metric]):  # groups of texts that only one has
        return Common(samples, same=False, moved=None)
    return Common(samples, same=True, moved=other_influence[metric] - influence[metric])


def same_samples(one: SampleResults, two: SampleResults, metric: str) -> bool:
    """Whether the same samples, in the same groups, judge both by a metric.

    What a query is searched among decides as much as the queries. Images of one id are the same if
    they show the same and, where classes judge, have the same class; as far as both say so.
    """
    sides, shown = [(one.rows(metric), two.rows(metric))], [*SHOWN]
    if METRICS[metric].task in SEARCHES:
        sides = [(one.images, two.images), (one.texts, two.texts)]
        shown.remove("class_name")
    for left, right in sides:
        both = [name for name in shown if name in left and name in right]
        if identified(left, both) != identified(right, both):
            return False
    return True


def identified(rows: Columns, shown: Sequence[str]) -> list[tuple[Any, ...]]:
    """Samples, each with its group and these columns, in a fixed order."""
    groups = rows.get("group", rows["sample_id"])
    return sorted(zip(rows["sample_id"], groups, *(rows[name] for name in shown), strict=True))


def covered(gains: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the intervals of differences cover, in words, and why some have none."""
    lines = []
    for kind, text in INTERVALS.items():
        of_kind = [gain for gain in gains if gain["kind"] == kind and gain["interval"] is not None]
        counts = sorted(gain["samples"] for gain in of_kind if gain["samples"] is not None)
        many = " to ".join(f"{n:,}" for n in dict.fromkeys(counts[:1] + counts[-1:]))
        lines += [text.format(many)] * bool(of_kind)
    lines += [ON_FEW] * any(map(rests_on_few_groups, gains))
    return lines + [OTHERS] * any(gain["other_samples"] for gain in gains)


def rests_on_few_groups(gain: Mapping[str, Any]) -> bool:
    """Whether a difference is of known test samples, of which too few tell the models apart."""
    return gain["interval"] is None and gain["samples"] is not None


def show(entries: Sequence[Mapping[str, Any]]) -> None:
    """Print a table with one row a metric and one column an entry."""
    values = [value for entry in entries for value in entry["metrics"].values()]
    gains = differences_in(entries)
    lines = [BRACKETS] * any("interval" in value for value in values)
    lines += [SPREAD] * any("spread" in value for value in values)
    lines += [SECOND_LINE.format(clear(gains))] * bool(gains) + covered(gains)
    lines += [TRAINED_ON] * any(entry["trained_on"] for entry in entries)
    lines += [OF_COMMON] * any(gain["of_some"] for gain in gains)
    if any(gain["seeds"] == 0 for gain in gains):
        lines.append("Models without a common seed: the difference of the means shown.")
    table = Table("metric", title="Accuracies, recalls, AMI and ARI in percent")
    table.caption, table.caption_justify = " ".join(lines) or None, "left"
    for entry in entries:
        count = len(entry["seeds"])
        name = printable(entry["name"])
        trained = map(printable, entry["trained_on"].values())
        heading = "\n".join([name, f"{count} seed{'s' if count > 1 else ''}", *trained])
        table.add_column(escape(heading), justify="right")
    keys = list(dict.fromkeys(key for entry in entries for key in entry["metrics"]))
    several = len({key.removeprefix("eval/").partition("/")[0] for key in keys}) > 1
    for key in keys:
        data, _, metric = key.removeprefix("eval/").partition("/")
        name = printable(f"{data}: " * several + label(metric, data))
        scale, digits = (100.0, 1) if is_share(metric) else (1.0, 3)
        row = [entry["metrics"].get(key) for entry in entries]
        table.add_row(escape(name), *(escape(cell(v, scale=scale, digits=digits)) for v in row))
    table.add_section()
    seen = [entry["samples_seen"]["mean"] for entry in entries]
    table.add_row("samples seen", *("-" if mean is None else f"{mean:,.0f}" for mean in seen))
    seconds = [entry["train_seconds"]["mean"] for entry in entries]
    ratios = [f" ({s / seconds[0]:.2f})" if s is not None and seconds[0] else "" for s in seconds]
    shown = ["-" if s is None else f"{s:,.0f}{r}" for s, r in zip(seconds, ratios, strict=True)]
    table.add_row("training, seconds (ratio)", *shown)
    machines = [printable("; ".join(entry["machines"])) for entry in entries]
    if len({*machines}) > 1:
        table.add_row("machines", *(escape(each or "not known") for each in machines))
    print_table(table)


def printable(name: str) -> str:
    """A name that any terminal can show."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def print_table(table: Table) -> None:
    """Print a table, outside a terminal as wide as it needs.

    On a narrow terminal long words go on in the next line: names that are cut may look alike, as
    those of metrics do.
    """
    for column in table.columns:
        column.overflow = "fold"
    console = Console()
    if not console.is_terminal:
        unlimited = console.options.update_width(WIDEST)
        console = Console(width=console.measure(table, options=unlimited).maximum)
    console.print(table)


def cell(value: Mapping[str, Any] | None, *, scale: float, digits: int) -> str:
    """Mean, and spread or interval; on a second line the difference, as `+3.4 [+2.8, +4.0]*`."""
    if value is None:
        return "-"
    text = decimals(value["mean"] * scale, digits)
    if value.get("interval") is not None:
        low, high = (decimals(end * scale, digits) for end in value["interval"])
        text += f" [{low}, {high}]" + " wide" * value["wide"]
    if "spread" in value:
        text += f" ± {decimals(value['spread'] * scale, digits)}"
    if "difference" in value:
        mean, ends, beyond = (value["difference"][k] for k in ("mean", "interval", "beyond"))
        mark = COMMON * value["difference"].get("of_some", False)
        text += f"\n{decimals(mean * scale, digits, '+')}{mark}"
        if ends is not None:
            low, high = (decimals(end * scale, digits, "+") for end in ends)
            text += f" [{low}, {high}]" + "*" * beyond
    return text


def decimals(number: float, digits: int, sign: str = "") -> str:
    """A number with so many decimals, and a `+` if that is its sign; what rounds to 0 has no -."""
    return f"{round(number, digits) + 0.0:{sign}.{digits}f}"
