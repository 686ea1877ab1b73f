"""Which model is better on what, by how much: sentences, and the table of all metrics.

The differences are computed in `evaluation/compare.py`, and the page is laid out by `page.py`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from protoclip.evaluation.compare import decimals, rests_on_few_groups
from protoclip.evaluation.metrics import is_share, label
from protoclip.evaluation.validation import NAME

# The measures of the sentences, by the end of their names, and how a sentence names them.
HEADLINES = {
    "zero_shot/acc1": "zero-shot classification",
    "retrieval/image_to_text@1": "finding the caption of an image",
    "retrieval/text_to_image@1": "finding an image for a caption",
    "linear_probe/acc1": "the linear probe",
    "knn/acc1": "nearest-neighbour classification",
    "clustering/ami": "grouping images by class (AMI)",
}
Entry = Mapping[str, Any]  # as `compare.compare` returns them
Interval = Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence: `model` is `verdict` `rest`."""

    verdict: Literal["better", "open"]
    model: str
    rest: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A metric of a model, as text; each part may be empty."""

    value: str
    interval: str = ""
    difference: str = ""
    best: bool = False
    beyond: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    metric: str
    data: str
    cells: Sequence[Cell]


def findings(entries: Sequence[Entry]) -> list[Finding]:
    """One sentence a headline measure: the best model against the first one.

    If the first one is the best, against the one that comes next.
    """
    sentences: list[Finding] = []
    if len(entries) < 2:
        return sentences
    first = entries[0]
    for key in first["metrics"]:
        data, metric = parts(key)
        known = [entry for entry in entries if key in entry["metrics"]]
        is_part = data.startswith(f"{NAME}-")  # a source of a mixture
        if metric not in HEADLINES or len(known) < 2 or is_part:
            continue
        ranked = sorted(known, key=lambda entry: -entry["metrics"][key]["mean"])
        best = ranked[0]
        other = ranked[1] if best is first else first
        difference = (other if best is first else best)["metrics"][key]["difference"]
        mean, ends = difference["mean"], difference["interval"]
        if best is first:
            mean, ends = -mean, None if ends is None else [-ends[1], -ends[0]]
        better = bool(difference["beyond"]) and ends is not None and ends[0] > 0
        one, two = (100 * entry["metrics"][key]["mean"] for entry in (best, other))
        on = HEADLINES[metric] + (f" ({data})" if data != "emoji" else "")
        of_all = abs(100 * mean - (one - two)) < 0.05
        points = f"{decimals(100 * mean, 1, '+')} points" + " over the seeds of both" * (not of_all)
        numbers = f"{one:.1f} against {two:.1f} percent, {points} {basis(difference, ends)}"
        says = f"is better than {other['name']} on {on}: {numbers}."
        leaks = [of for of in (best, other) if data in of["trained_on"]]
        if leaks:
            why = " and ".join(f"{of['name']} was {of['trained_on'][data]}" for of in leaks)
            says = f"and {other['name']} cannot be compared on {on}: {numbers}; {why}."
        elif not better:
            says = f"and {other['name']} cannot be told apart on {on}: {numbers}."
        verdict: Literal["better", "open"] = "better" if better else "open"
        sentences.append(Finding(verdict=verdict, model=best["name"], rest=minus(says)))
    return sentences


def changes(differences: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Each headline measure, and by how many points fine-tuning changed it."""
    lines = []
    for key, change in differences.items():
        data, metric = parts(key)
        if metric in HEADLINES and not data.startswith(f"{NAME}-"):
            numbers = [100 * end for end in (change["mean"], *(change["interval"] or ()))]
            mean, *ends = (decimals(number, 1, "+") for number in numbers)
            interval = f" [{', '.join(ends)}]" if ends else ""
            lines.append((f"{HEADLINES[metric]} ({data})", minus(f"{mean}{interval}")))
    return lines


def parts(key: str) -> tuple[str, str]:
    """The data set and the metric of `eval/emoji/knn/acc1`."""
    data, _, metric = key.removeprefix("eval/").partition("/")
    return data, metric


def sentence_case(label: str) -> str:
    """With a capital, but for `kNN`."""
    return label if label[1:2].isupper() else label[:1].upper() + label[1:]


def minus(text: str) -> str:
    """A text with minus signs before its numbers, where Python writes hyphens."""
    return re.sub(r"(?<![\w-])-(?=\d)", "\u2212", text)


def basis(difference: Mapping[str, Any], ends: Interval | None) -> str:
    """The interval of a difference, and over what it is paired."""
    if ends is None:
        why = "too little is known of other samples"
        if difference["other_samples"]:
            why = "other samples judged each"
        elif not difference["seeds"]:
            why = "the runs share no seed"
        elif rests_on_few_groups(difference):
            why = "too few groups of test samples differ, or too few do not"
        return f"(no interval: {why})"
    near = any(abs(end) < 0.0005 for end in ends)
    digits = 2 if near and difference["beyond"] else 1  # "+0.0" is not beyond 0
    low, high = (decimals(100 * end, digits, "+") for end in ends)
    over = [f"{difference['seeds']} seeds"] if difference["seeds"] > 1 else []
    if difference["samples"] is not None:
        over.append(f"{difference['samples']:,} test samples")
    return f"[{low}, {high}], paired over {' and '.join(over)}"


def table(entries: Sequence[Entry]) -> list[Row]:
    """All metrics of all models."""
    keys = dict.fromkeys(key for entry in entries for key in entry["metrics"])
    rows = []
    for key in keys:
        data, metric = parts(key)
        given = [entry["metrics"].get(key) for entry in entries]
        percent = is_share(metric)
        # Where the first model has no value, nothing says whether the same samples judged the rest.
        known = given[0] is not None or sum(value is not None for value in given) < 2
        means = [value["mean"] for value in given if value is not None]
        ranked = percent and known and not any(map(judged_by_others, given))
        cells = []
        for value in given:
            best = ranked and value is not None and value["mean"] == max(means) > min(means)
            cells.append(cell(value, percent=percent, best=best))
        rows.append(Row(metric=sentence_case(label(metric, data)), data=data, cells=cells))
    return rows


def judged_by_others(value: Mapping[str, Any] | None) -> bool:
    """Whether other samples judged a metric of a model than that of the first one."""
    return value is not None and value.get("difference", {}).get("other_samples", False)


def cell(value: Mapping[str, Any] | None, *, percent: bool, best: bool) -> Cell:
    """A metric as text: in percent with one digit, or as it is with three."""
    if value is None:
        return Cell(value="–")
    scale, digits = (100.0, 1) if percent else (1.0, 3)

    def text(number: float, sign: str = "") -> str:
        return minus(decimals(number * scale, digits, sign))

    around = []
    if "interval" in value:
        low, high = map(text, value["interval"])
        around.append(f"[{low}, {high}]" + " wide" * value["wide"])
    if "spread" in value:
        around.append(f"± {text(value['spread'])}")
    difference, beyond = "", False
    if "difference" in value:
        given = value["difference"]
        difference, beyond = text(given["mean"], "+"), bool(given["beyond"])
        if given["interval"] is not None:
            low, high = (text(end, "+") for end in given["interval"])
            difference += f" [{low}, {high}]"
    return Cell(
        value=text(value["mean"]),
        interval=" ".join(around),
        difference=difference,
        best=best,
        beyond=beyond,
    )
