"""The table of results: the same cells in a terminal, on the page of a report and on a model card.

Its values are computed in `compare.py`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.console import Console
from rich.markup import escape

from protoclip.evaluation.metrics import is_share, label
from protoclip.evaluation.suite import Result
from protoclip.results.compare import Entry, differences_in, find_leaks, record_differences
from protoclip.terminal import visible

WIDEST = 1 << 20  # letters; no table is as wide
COMMON = "†"  # marks a difference that is not the difference of the means above it
# For each thing that an interval covers, with room for the number of samples.
INTERVALS = {
    "seeds and samples": "Several seeds: over seeds (paired, Student's t) and over {} test samples "
    "by groups, together.",
    "seeds": "Without results by sample: over seeds alone; it does not cover other samples.",
    "samples": "One seed: over {} test samples by groups; it does not cover other seeds.",
}
OTHERS = (
    "Where models were evaluated on different samples, a difference has no interval, and is not "
    "due to the models alone."
)
ON_FEW = (
    "A difference has no interval where too few groups of test samples differ, or too few do not."
)
TRAINED_ON = (
    "A model that was trained on some of the test images does too well on them, so none of its "
    "differences is marked."
)
OF_COMMON = f"{COMMON}: of the seeds that both have, and not the difference of the means shown."
NO_COMMON = "Models without a common seed: the difference of the means shown."
BRACKETS = (
    "In brackets: 95% intervals over groups of test samples, and over seeds if there are several; "
    "wide where few groups are wrong, or few right."
)
OF_GROUPS = (
    "In brackets: 95% intervals over groups of samples; wide where few groups are wrong, or few "
    "right."
)
SPREAD = "±: sample standard deviation over seeds."
RETRIEVAL = "text_retrieval is from an image to its texts, which runs call image_to_text."


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
    """A table of results.

    Attributes:
        heading: Headings of the columns that name a row.
        columns: The heading of each other column, line by line.
        footer: Rows below the metrics, such as costs.
        notes: Sentences below the table.
    """

    title: str | None
    heading: Sequence[str]
    columns: Sequence[Sequence[str]]
    rows: Sequence[Row]
    footer: Sequence[Row] = ()
    notes: Sequence[str] = ()


def format_cell(
    value: Mapping[str, Any] | None, *, scale: float, digits: int, is_best: bool = False
) -> Cell:
    """The `mean` of a metric, its `interval` and `spread`, and its `difference` to another model.

    Args:
        value: As `compare.compare_runs` has it, or None if it is not known.
        scale: 100 for percent.
        digits: Decimals.
    """
    if value is None:
        return Cell()

    def show_interval(ends: Sequence[float], sign: str = "") -> str:
        low, high = (decimals(end * scale, digits, sign) for end in ends)
        return f"[{low}, {high}]"

    around = []
    if value.get("interval") is not None:
        around.append(show_interval(value["interval"]) + " wide" * value["wide"])
    if "spread" in value:
        around.append(f"± {decimals(value['spread'] * scale, digits)}")
    difference, change = "", value.get("difference")
    if change is not None:
        difference = decimals(change["mean"] * scale, digits, "+")
        difference += COMMON * change.get("of_some", False)
        if change["interval"] is not None:
            difference += f" {show_interval(change['interval'], '+')}"
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
    notes += describe_intervals(differences)
    notes += [TRAINED_ON] * any(entry["trained_on"] for entry in entries)
    notes += [OF_COMMON] * any(change["of_some"] for change in differences)
    notes += [NO_COMMON] * any(change["seeds"] == 0 for change in differences)
    keys = dict.fromkeys(key for entry in entries for key in entry["metrics"])
    names = [split_key(key) for key in keys]
    several = len({data for data, _ in names}) > 1
    rows = []
    for key, (data, metric) in zip(keys, names, strict=True):
        row = [entry["metrics"].get(key) for entry in entries]
        scale, digits = (100.0, 1) if is_share(metric) else (1.0, 3)
        best = find_best_mean(row) if is_share(metric) else None
        cells = [
            format_cell(
                value,
                scale=scale,
                digits=digits,
                is_best=value is not None and value["mean"] == best,
            )
            for value in row
        ]
        rows.append(Row(heading=[data] * several + [label(metric, data)], cells=cells))
    return Table(
        title="Accuracies, recalls, AMI and ARI in percent",
        heading=["data"] * several + ["metric"],
        columns=[
            [
                entry["name"],
                f"{len(entry['seeds'])} seed{'s' if len(entry['seeds']) > 1 else ''}",
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
    means = [value["mean"] for value in values if value is not None]
    # Only a value of the first model says whether the others have the same samples.
    is_comparable = values[0] is not None or len(means) < 2
    if not is_comparable or any(map(is_of_other_samples, values)) or max(means) == min(means):
        return None
    return float(max(means))


def is_of_other_samples(value: Mapping[str, Any] | None) -> bool:
    """Whether a metric of a model comes from other samples than that of the first model."""
    return value is not None and value.get("difference", {}).get("other_samples", False)


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
                key = record["dataset"], record["task"], metric
                cells = rows.setdefault(key, [Cell()] * len(models))
                cells[number] = format_cell(value, scale=scale, digits=digits)
    columns = []
    for results in models:
        record = results[0].record
        weights = [record["pretrained"]] * (record["pretrained"] not in ("", "none"))
        counts = find_leaks([result for result in results if "datasets" not in result.record])
        columns.append([" ".join([record["model"], *weights]), *counts.values()])
    notes = [OF_GROUPS]
    notes += [RETRIEVAL] * any(metric.startswith("text_retrieval") for _, _, metric in rows)
    records = [result.record for results in models for result in results]
    if first := next(filter(None, (record.get("compared_to") for record in records)), None):
        notes.append(
            f"Second line: paired difference to {visible(first)}, * if it is "
            f"{describe_clear(record_differences(models))}; without an interval where too few "
            "groups differ, or too few do not."
        )
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
    return f"clear by Holm's test of all {number} differences that can be tested, at 5%"


def describe_intervals(differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on what the intervals of differences cover, and why some have none."""
    lines = []
    for kind, text in INTERVALS.items():
        changes = [
            change
            for change in differences
            if change["kind"] == kind and change["interval"] is not None
        ]
        counts = sorted(change["samples"] for change in changes if change["samples"] is not None)
        samples = " to ".join(f"{n:,}" for n in dict.fromkeys(counts[:1] + counts[-1:]))
        lines += [text.format(samples)] * bool(changes)
    lines += [ON_FEW] * any(map(rests_on_few_groups, differences))
    return lines + [OTHERS] * any(change["other_samples"] for change in differences)


def rests_on_few_groups(difference: Mapping[str, Any]) -> bool:
    """Whether too few test samples tell two models apart for an interval."""
    return difference["interval"] is None and difference["samples"] is not None


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
    print_rich(drawn)


def print_rich(table: rich.table.Table) -> None:
    """Print a table of `rich`, outside a terminal as wide as it needs.

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


def markdown_lines(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table of a model card, line by line; the cells are Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows)]
