"""Results for people: one table for terminal, page and model card, and sentences on who is better.

The values are computed in `compare.py`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.table
from rich.console import Console
from rich.markup import escape

from protoclip.evaluation.metrics import is_share, label
from protoclip.evaluation.suite import Result
from protoclip.evaluation.validation import NAME
from protoclip.results.compare import Entry, differences_in, find_leaks, record_differences
from protoclip.terminal import counted, visible

if TYPE_CHECKING:
    from jinja2 import Environment

WIDEST = 1 << 20  # letters; no table is as wide
COMMON = "†"  # marks a difference that is not the difference of the means above it
OTHERS = (
    "Where models were evaluated on different samples, a difference has no interval, and is not "
    "due to the models alone."
)
TRAINED_ON = (
    "A model that was trained on some of the test images does too well on them, so none of its "
    "differences is marked."
)
OF_COMMON = f"{COMMON}: of the seeds that both have, and not the difference of the means shown."
BRACKETS = (
    "In brackets: 95% intervals over groups of test samples, and over seeds if there are several; "
    "wide where few groups are wrong, or few right; none where it would not be reliable."
)
NO_INTERVAL = (
    "A difference has no interval if the models have no seed in common, if too few groups of test "
    "samples tell them apart, or if the metric needs several seeds."
)
SPREAD = "±: sample standard deviation over seeds."
RETRIEVAL = "text_retrieval is from an image to its texts, which runs call image_to_text."
# The measures that sentences compare, by the end of their names, and how a sentence names them.
HEADLINES = {
    "zero_shot/acc1": "zero-shot classification",
    "retrieval/image_to_text@1": "finding the caption of an image",
    "retrieval/text_to_image@1": "finding an image for a caption",
    "linear_probe/acc1": "the linear probe",
    "knn/acc1": "nearest-neighbour classification",
    "clustering/ami": "grouping images by class (AMI)",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A metric of a model, as text; unknown parts are empty."""

    value: str = ""
    interval: str = ""  # and the spread over seeds
    difference: str = ""
    is_best: bool = False
    is_clear: bool = False  # the difference

    @property
    def text(self) -> str:
        """The whole cell: `54.3 [50.1, 58.4]`, and on a second line `+3.4 [+2.8, +4.0]*`."""
        first = " ".join(part for part in (self.value or "-", self.interval) if part)
        return f"{first}\n{self.difference}{'*' * self.is_clear}" if self.difference else first


@dataclass(frozen=True, kw_only=True)
class Row:
    """The names of a row, such as data set and metric, and a cell for each model."""

    heading: Sequence[str]
    cells: Sequence[Cell]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of results."""

    title: str | None
    heading: Sequence[str]  # of the columns that name a row
    columns: Sequence[Sequence[str]]  # headings of the others, line by line
    rows: Sequence[Row]
    footer: Sequence[Row] = ()  # such as costs
    notes: Sequence[str] = ()  # sentences below


def format_cell(
    value: Mapping[str, Any] | None, *, scale: float, digits: int, is_best: bool = False
) -> Cell:
    """The `mean` of a metric, its `interval`, its `spread` and its `difference` to another model.

    They are as `compare.compare_runs` has them, or None if they are not known.
    """
    if value is None:
        return Cell()
    around = []
    if value.get("interval") is not None:
        around.append(format_interval(value["interval"], scale, digits) + " wide" * value["wide"])
    if "spread" in value:
        around.append(f"± {decimals(value['spread'] * scale, digits)}")
    difference, change = "", value.get("difference")
    if change is not None:
        difference = decimals(change["mean"] * scale, digits, "+")
        difference += COMMON * change.get("of_some", False)
        if change["interval"] is not None:
            difference += f" {format_interval(change['interval'], scale, digits, '+')}"
    return Cell(
        value=decimals(value["mean"] * scale, digits),
        interval=" ".join(around),
        difference=difference,
        is_best=is_best,
        is_clear=change is not None and bool(change["beyond"]),
    )


def decimals(number: float, digits: int, sign: str = "") -> str:
    """A number with `digits` decimals, and a `+` if `sign` is one; never `-0.0`."""
    return f"{round(number, digits) + 0.0:{sign}.{digits}f}"


def format_interval(ends: Sequence[float], scale: float, digits: int, sign: str = "") -> str:
    low, high = (decimals(end * scale, digits, sign) for end in ends)
    return f"[{low}, {high}]"


def write_minus(text: str) -> str:
    """A text with minus signs before its numbers, where Python writes hyphens."""
    return re.sub(r"(?<![\w-])-(?=\d)", "\u2212", text)


def sentence_case(label: str) -> str:
    """With a capital, except for `kNN`."""
    return label if label[1:2].isupper() else label[:1].upper() + label[1:]


# Tables of runs and of evaluated models


def table_of_runs(entries: Sequence[Entry], *, mark: str = "*") -> Table:
    """All metrics of models, as `compare.compare_runs` returns them; differences to the first.

    Args:
        mark: Marks a clear difference.
    """
    values = [value for entry in entries for value in entry["metrics"].values()]
    differences = differences_in(entries)
    notes = [BRACKETS] * any("interval" in value for value in values)
    notes += [SPREAD] * any("spread" in value for value in values)
    if differences:
        notes.append(
            "Second line: difference to the first, with its 95% interval; "
            f"{mark} if that is {describe_clear(differences)}."
        )
    notes += [NO_INTERVAL] * any(change["interval"] is None for change in differences)
    notes += [OTHERS] * any(change["other_samples"] for change in differences)
    notes += [TRAINED_ON] * any(entry["trained_on"] for entry in entries)
    notes += [OF_COMMON] * any(change["of_some"] for change in differences)
    keys = dict.fromkeys(key for entry in entries for key in entry["metrics"])
    names = [split_key(key) for key in keys]
    several = len({data for data, _ in names}) > 1
    rows = []
    for key, (data, metric) in zip(keys, names, strict=True):
        row = [entry["metrics"].get(key) for entry in entries]
        scale, digits = (100.0, 1) if is_share(metric) else (1.0, 3)
        best = find_best_mean(row) if is_share(metric) else None
        numbers = {value.get("among") for value in row if value is not None}
        among = [f"among {number:,}" for number in numbers if number and len(numbers) == 1]
        cells = [
            format_cell(
                value,
                scale=scale,
                digits=digits,
                is_best=value is not None and value["mean"] == best,
            )
            for value in row
        ]
        named = " ".join([label(metric, data), *among])
        rows.append(Row(heading=[data] * several + [named], cells=cells))
    return Table(
        title="Accuracies, recalls, AMI and ARI in percent",
        heading=["data"] * several + ["metric"],
        columns=[
            [
                entry["name"],
                counted(len(entry["seeds"]), "seed"),
                *entry["trained_on"].values(),
            ]
            for entry in entries
        ],
        rows=rows,
        footer=list_costs(entries, several=several),
        notes=notes,
    )


def find_best_mean(values: Sequence[Mapping[str, Any] | None]) -> float | None:
    """The highest mean of a metric; None if all are equal, or if the test samples differ."""
    entries = [value for value in values if value is not None]
    means = [value["mean"] for value in entries]
    # Only a value of the first model says whether the others have the same samples.
    is_comparable = values[0] is not None or len(means) < 2
    others = any(value.get("difference", {}).get("other_samples", False) for value in entries)
    if not is_comparable or others or max(means) == min(means):
        return None
    return float(max(means))


def list_costs(entries: Sequence[Entry], *, several: bool) -> list[Row]:
    """Samples and seconds of training, and the machines if they differ."""
    seen = [entry["samples_seen"]["mean"] for entry in entries]
    seconds = [entry["train_seconds"]["mean"] for entry in entries]
    ratios = [f" ({s / seconds[0]:.2f})" if s is not None and seconds[0] else "" for s in seconds]
    costs = {
        "samples seen": ["" if mean is None else f"{mean:,.0f}" for mean in seen],
        "training, seconds (ratio)": [
            "" if s is None else f"{s:,.0f}{ratio}"
            for s, ratio in zip(seconds, ratios, strict=True)
        ],
    }
    machines = ["; ".join(entry["machines"]) for entry in entries]
    if len({*machines}) > 1:
        costs["machines"] = [visible(machine or "not known") for machine in machines]
    return [
        Row(heading=[""] * several + [name], cells=[Cell(value=text) for text in texts])
        for name, texts in costs.items()
    ]


def table_of_records(models: Sequence[Sequence[Result]]) -> Table:
    """All metrics of evaluated models: a row a metric of a task of a data set."""
    tasks = {result.record["task"] for results in models for result in results}
    title = "Percent, except geometry" if "geometry" in tasks else "Percent"
    rows: dict[tuple[str, str, str], list[Cell]] = {}
    for number, results in enumerate(models):
        for record in (result.record for result in results):
            scale, digits = (1.0, 3) if record["task"] == "geometry" else (100.0, 1)
            for metric, mean in record["metrics"].items():
                value = {
                    "mean": mean,
                    "interval": record["intervals"].get(metric),
                    "wide": metric in record.get("wide", ()),
                    "difference": record.get("differences", {}).get(metric),
                }
                among = record.get("samples" if metric.startswith("image_") else "captions")
                is_among = "_recall@" in metric and among is not None
                named = f"{metric} among {among:,}" if is_among else metric
                key = record["dataset"], record["task"], named
                cells = rows.setdefault(key, [Cell()] * len(models))
                cells[number] = format_cell(value, scale=scale, digits=digits)
    columns = []
    for results in models:
        record = results[0].record
        weights = [record["pretrained"]] * (record["pretrained"] not in ("", "none"))
        counts = find_leaks([result for result in results if "datasets" not in result.record])
        columns.append([" ".join([record["model"], *weights]), *counts.values()])
    notes = [BRACKETS]
    notes += [RETRIEVAL] * any(metric.startswith("text_retrieval") for _, _, metric in rows)
    records = [result.record for results in models for result in results]
    if first := next(filter(None, (record.get("compared_to") for record in records)), None):
        notes.append(
            f"Second line: paired difference to {visible(first)}, * if it is "
            f"{describe_clear(record_differences(models))}."
        )
        notes.append(NO_INTERVAL)
        notes += [TRAINED_ON] * any(map(find_leaks, models))
    return Table(
        title=None if tasks == {"geometry"} else title,
        heading=["data", "task", "metric"],
        columns=columns,
        rows=[Row(heading=key, cells=cells) for key, cells in rows.items()],
        notes=notes,
    )


def split_key(key: str) -> tuple[str, str]:
    """The data set and the metric of `eval/emoji/knn/acc1`."""
    data, _, metric = key.removeprefix("eval/").partition("/")
    return data, metric


def describe_clear(differences: Iterable[Mapping[str, Any]]) -> str:
    """What `metrics.mark_clear` marks, in words."""
    number = sum(change.get("p", change["interval"]) is not None for change in differences)
    return f"clear at 5%, corrected for all {number} differences that can be tested (Holm)"


# Sentences


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence: `model`, then `rest`; `verdict` is `better`, or `open`."""

    verdict: str
    model: str
    rest: str


def compare_headlines(entries: Sequence[Entry]) -> list[Finding]:
    """One sentence a headline measure: the best model against the first one.

    If the first one is the best, it is compared with the second best.
    """
    findings = []
    for key in filter(is_headline, entries[0]["metrics"] if entries else ()):
        rivals = [entry for entry in entries if key in entry["metrics"]]
        if len(rivals) > 1:
            best, second, *_ = sorted(rivals, key=lambda entry: -entry["metrics"][key]["mean"])
            if best is entries[0]:
                findings.append(compare_two(key, best, second, sign=-1))
            else:
                findings.append(compare_two(key, best, entries[0], sign=1))
    return findings


def is_headline(key: str) -> bool:
    """Whether a metric has a sentence; metrics of single sources of a mixture have none."""
    data, metric = split_key(key)
    return metric in HEADLINES and not data.startswith(f"{NAME}-")


def compare_two(key: str, best: Entry, other: Entry, *, sign: int) -> Finding:
    """A sentence on two models.

    Args:
        sign: 1 if the entry of `best` holds the difference to `other`, -1 for the reverse.
    """
    data, metric = split_key(key)
    difference = (best if sign > 0 else other)["metrics"][key]["difference"]
    mean, ends = sign * difference["mean"], difference["interval"]
    if ends is not None:
        ends = sorted(sign * end for end in ends)
    is_better = bool(difference["beyond"]) and ends is not None and ends[0] > 0
    one, two = (100 * entry["metrics"][key]["mean"] for entry in (best, other))
    on = HEADLINES[metric] + (f" ({data})" if data != "emoji" else "")
    points = f"{decimals(100 * mean, 1, '+')} points"
    if abs(100 * mean - (one - two)) >= 0.05:
        points += " over the seeds of both"
    numbers = f"{one:.1f} against {two:.1f} percent, {points} {describe_basis(difference, ends)}"
    leaks = [
        f"{entry['name']} was {entry['trained_on'][data]}"
        for entry in (best, other)
        if data in entry["trained_on"]
    ]
    verdict, reason = f"and {other['name']} cannot be told apart on {on}", ""
    if leaks:
        verdict, reason = f"and {other['name']} cannot be compared on {on}", " and ".join(leaks)
    elif is_better:
        verdict = f"is better than {other['name']} on {on}"
    return Finding(
        verdict="better" if is_better else "open",
        model=best["name"],
        rest=write_minus(f"{verdict}: {numbers}{reason and f'; {reason}'}."),
    )


def describe_basis(difference: Mapping[str, Any], ends: Sequence[float] | None) -> str:
    """The interval of a difference, and over what it is paired."""
    if ends is None:
        why = "too few groups of test samples differ, or the metric never has one"
        if difference["other_samples"]:
            why = "they were evaluated on different samples"
        elif not difference["seeds"]:
            why = "the runs share no seed"
        return f"(no interval: {why})"
    near = any(abs(end) < 0.0005 for end in ends)
    digits = 2 if near and difference["beyond"] else 1  # "+0.0" is not beyond 0
    over = [f"{difference['seeds']} seeds"] if difference["seeds"] > 1 else []
    if difference["samples"] is not None:
        over.append(f"{difference['samples']:,} test samples")
    return f"{format_interval(ends, 100.0, digits, '+')}, paired over {' and '.join(over)}"


def describe_changes(differences: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Each headline measure, and by how many points fine-tuning changed it."""
    lines = []
    for key in filter(is_headline, differences):
        data, metric = split_key(key)
        cell = format_cell({"mean": 0.0, "difference": differences[key]}, scale=100.0, digits=1)
        lines.append((f"{HEADLINES[metric]} ({data})", write_minus(cell.difference)))
    return lines


# Where tables are shown


def print_table(table: Table) -> None:
    """Print a table to the terminal, or outside of one as wide as it needs."""
    drawn = rich.table.Table(*map(escape, table.heading), title=table.title)
    drawn.caption, drawn.caption_justify = escape(" ".join(table.notes)) or None, "left"
    for lines in table.columns:
        drawn.add_column(escape("\n".join(map(visible, lines))), justify="right")
    previous: Sequence[str] | None = None
    for row in table.rows:
        *groups, name = row.heading
        if previous not in (None, groups):
            drawn.add_section()
        heading = [""] * len(groups) if groups == previous else groups
        previous = groups
        cells = [cell.text for cell in row.cells]
        drawn.add_row(*map(escape, [*map(visible, [*heading, name]), *cells]))
    drawn.add_section()
    for row in table.footer:
        drawn.add_row(*map(escape, [*row.heading, *(cell.text for cell in row.cells)]))
    for column in drawn.columns:
        column.overflow = "fold"  # names that are cut may look alike
    console = Console()
    if not console.is_terminal:
        unlimited = console.options.update_width(WIDEST)
        console = Console(width=console.measure(drawn, options=unlimited).maximum)
    console.print(drawn)


def markdown_lines(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table of a model card, line by line; the cells are Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows)]


# What pages share


def shorten(value: object, limit: int = 300) -> str:
    """Cut a user's text to one line, and make visible what would turn or break lines."""
    text = str(value)
    cut = visible(" ".join(text[: 2 * limit].split()))
    return cut if len(cut) <= limit and len(text) <= 2 * limit else f"{cut[: limit - 1]}…"


def make_environment(folder: Path, **options: Any) -> "Environment":
    """The templates in a folder, which show every text escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # extras install it

    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    environment.filters["shorten"] = shorten
    return environment
