"""Records of evaluated models: means over data sets, differences, the table and the files.

The results come from `suite.py`; runs are compared by the files that they wrote in `compare.py`.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from protoclip.evaluation import compare
from protoclip.evaluation.compare import cell, print_table, printable
from protoclip.evaluation.metrics import difference, intervals, mark_clear, rests_on_few
from protoclip.evaluation.suite import Result
from protoclip.files import checksum, read_json, require_ours, to_json, write_atomically

LONGEST_NAME = 180  # bytes of a file's name, without its ending
CAPTION = {
    "retrieval": "text_retrieval is from an image to its texts, which runs call image_to_text.",
    "intervals": "In brackets: 95% intervals over groups of samples; wide where few groups are "
    "wrong, or few right.",
    "differences": "Second line: paired difference to {}, * if it is {}; without an interval where "
    "too few groups differ, or too few do not.",
}


def with_means(results: Sequence[Result]) -> list[Result]:
    """The results of one model; and for metrics of several data sets, their mean over those."""
    by_metric: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        for metric in result.record["metrics"]:
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
            "intervals": intervals(values, influences, without),
        }
        for member in filter(lambda of: trained_on([of]), members):
            record["trained_on"] = member.record["trained_on"]
        record["wide"] = [name for name in record["intervals"] if rests_on_few(influences[name])]
        ids = [sample for member in members for sample in member.ids]
        means.append(Result(record=record, influences=influences, ids=ids, without=without))
    return [*results, *means]


def with_differences(
    models: Sequence[Sequence[Result]], reference: Sequence[Result]
) -> list[list[Result]]:
    """The results of models with their paired differences to a reference, by metric.

    They are as `difference` has them; an interval needs the same samples.
    """
    by_key = {key_of(result): result for result in reference}

    def compared(result: Result) -> Result:
        other, record = by_key.get(key_of(result)), dict(result.record)
        if other is not None:
            record["compared_to"] = other.record["model"]
            record["differences"] = {
                metric: difference_of_results(metric, other, result)
                for metric in record["metrics"]
                if metric in other.record["metrics"]
            }
        return replace(result, record=record)

    with_all = [[*map(compared, results)] for results in models]
    mark_clear(differences_in(with_all))
    return with_all


def trained_on(results: Sequence[Result]) -> dict[str, str]:
    """What `trained_pairs` has of the data sets of some results."""
    records = [result.record for result in results]
    return compare.trained_pairs({of["dataset"]: of.get("trained_on", {})} for of in records)


def differences_in(models: Sequence[Sequence[Result]]) -> list[dict[str, Any]]:
    records = [result.record for results in models for result in results]
    return [of for record in records for of in record.get("differences", {}).values()]


def key_of(result: Result) -> tuple[Any, ...]:
    """What two results have in common that can be compared: the task and the data."""
    record = result.record
    return record["task"], record["dataset"], *record.get("datasets", ())


def difference_of_results(metric: str, first: Result, second: Result) -> dict[str, Any]:
    gain = second.record["metrics"][metric] - first.record["metrics"][metric]
    influence = None
    have_influences = metric in first.influences.keys() & second.influences.keys()
    if have_influences and [*first.ids] == [*second.ids]:
        influence = second.influences[metric] - first.influences[metric]
    result = difference([gain], influence)
    if trained_on([first, second]):
        result["p"] = None
    return result


def write_records(
    records: Sequence[dict[str, Any]], folder: Path, *, overwrite: bool = False
) -> None:
    """One file a record, named as CLIP_benchmark names its own; `clip_benchmark build` takes them.

    Raises:
        OSError: The folder cannot be written.
        ValueError: One of the files is somebody else's; none is written then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, dict[str, Any]] = {}
    for record in records:
        words = words_of(record)
        stem = re.sub(r"[^\w.+-]+", "_", "_".join(words)).strip("._")
        if len(encoded := stem.encode()) > LONGEST_NAME:
            start = encoded[:LONGEST_NAME].decode(errors="ignore")
            stem = f"{start}-{checksum(encoded)[:8]}"
        # `runs/x` and `runs_x` are one stem.
        earlier = written.get(stem) or record_in(folder / f"{stem}.json")
        if earlier is not None and words_of(earlier) != words:
            stem += f"-{checksum(to_json(words).encode())[:8]}"
        name = stem
        while name in written:  # two models of one name
            name = f"{stem}-{len(written)}"
        written[name] = record
    for name in written if not overwrite else ():
        require_ours(folder / f"{name}.json", '"intervals"')  # which CLIP_benchmark's lack
    for name, record in written.items():
        write_atomically(folder / f"{name}.json", to_json(record) + "\n")


def words_of(record: Mapping[str, Any]) -> list[str]:
    """What tells a record from others, as the name of its file has it."""
    words = [record[key] for key in ("dataset", "pretrained", "model", "language", "task")]
    return words + ([record["split"]] if record["split"] != "test" else [])


def record_in(file: Path) -> dict[str, Any] | None:
    """The record in a file of ours; None if there is none."""
    with suppress(ValueError, LookupError):
        record = read_json(file)
        words_of(record)
        return record
    return None


def show(models: Sequence[Sequence[Result]]) -> None:
    """Print a table: one column a model, one row a metric of a task of a data set."""
    tasks = {result.record["task"] for results in models for result in results}
    title = "Percent, but for geometry" if "geometry" in tasks else "Percent"
    table = Table("data", "task", "metric", title=None if tasks == {"geometry"} else title)
    rows: dict[tuple[str, str, str], list[str]] = {}
    for number, results in enumerate(models):
        for record in (result.record for result in results):
            scale, digits = (1.0, 3) if record["task"] == "geometry" else (100.0, 1)
            for metric, value in record["metrics"].items():
                given: dict[str, Any] = {"mean": value}
                given["interval"] = record["intervals"].get(metric)
                given["wide"] = metric in record.get("wide", ())
                if metric in record.get("differences", {}):
                    given["difference"] = record["differences"][metric]
                cells = rows.setdefault((record["dataset"], record["task"], metric), [])
                cells += ["-"] * (number - len(cells))
                cells.append(cell(given, scale=scale, digits=digits))
    for results in models:
        record = results[0].record
        name = " ".join([record["model"], *([record["pretrained"]] if named(record) else [])])
        of_sets = [result for result in results if "datasets" not in result.record]
        lines = map(printable, (name, *trained_on(of_sets).values()))
        table.add_column(escape("\n".join(lines)), justify="right")
    previous: tuple[str, ...] = ()
    for (data, task, metric), cells in rows.items():
        if previous and previous != (data, task):
            table.add_section()
        shown = ("", "") if previous == (data, task) else (data, task)
        previous = data, task
        filled = cells + ["-"] * (len(models) - len(cells))
        table.add_row(*map(escape, (*map(printable, shown), metric, *filled)))
    table.caption, table.caption_justify = CAPTION["intervals"], "left"
    if any(metric.startswith("text_retrieval") for _, _, metric in rows):
        table.caption += f" {CAPTION['retrieval']}"
    compared = [r.record["compared_to"] for of in models for r in of if "compared_to" in r.record]
    if compared:
        named_and_tested = escape(printable(compared[0])), compare.clear(differences_in(models))
        differences = CAPTION["differences"].format(*named_and_tested)
        table.caption += f" {differences}"
        table.caption += f" {compare.TRAINED_ON}" * any(map(trained_on, models))
    print_table(table)


def named(record: dict[str, Any]) -> bool:
    return bool(record["pretrained"] not in ("", "none"))
