"""Which model is better on what, by how much, in sentences.

The differences are computed in `compare.py`, and `page.py` shows the sentences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from protoclip.evaluation.validation import NAME
from protoclip.results.compare import Entry
from protoclip.results.table import decimals, rests_on_few_groups, split_key, write_minus

# The measures of the sentences, by the end of their names, and how a sentence names them.
HEADLINES = {
    "zero_shot/acc1": "zero-shot classification",
    "retrieval/image_to_text@1": "finding the caption of an image",
    "retrieval/text_to_image@1": "finding an image for a caption",
    "linear_probe/acc1": "the linear probe",
    "knn/acc1": "nearest-neighbour classification",
    "clustering/ami": "grouping images by class (AMI)",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence: `model` is `verdict` `rest`."""

    verdict: Literal["better", "open"]
    model: str
    rest: str


def compare_headlines(entries: Sequence[Entry]) -> list[Finding]:
    """One sentence a headline measure: the best model against the first one.

    If the first one is the best, it is compared with the second best.
    """
    first = entries[0] if len(entries) > 1 else {"metrics": ()}
    findings = []
    for key in filter(is_headline, first["metrics"]):
        rivals = [entry for entry in entries if key in entry["metrics"]]
        if len(rivals) > 1:
            ranked = sorted(rivals, key=lambda entry: -entry["metrics"][key]["mean"])
            best = ranked[0]
            other = ranked[1] if best is first else first
            findings.append(compare_two(key, best, other, sign=-1 if best is first else 1))
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
    sentence = f"is better than {other['name']} on {on}: {numbers}."
    leaks = [
        f"{entry['name']} was {entry['trained_on'][data]}"
        for entry in (best, other)
        if data in entry["trained_on"]
    ]
    if leaks:
        why = " and ".join(leaks)
        sentence = f"and {other['name']} cannot be compared on {on}: {numbers}; {why}."
    elif not is_better:
        sentence = f"and {other['name']} cannot be told apart on {on}: {numbers}."
    return Finding(
        verdict="better" if is_better else "open", model=best["name"], rest=write_minus(sentence)
    )


def describe_basis(difference: Mapping[str, Any], ends: Sequence[float] | None) -> str:
    """The interval of a difference, and over what it is paired."""
    if ends is None:
        why = "too little is known of other samples"
        if difference["other_samples"]:
            why = "they were evaluated on different samples"
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


def describe_changes(differences: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Each headline measure, and by how many points fine-tuning changed it."""
    lines = []
    for key in filter(is_headline, differences):
        change, (data, metric) = differences[key], split_key(key)
        numbers = [100 * end for end in (change["mean"], *(change["interval"] or ()))]
        mean, *ends = (decimals(number, 1, "+") for number in numbers)
        interval = f" [{', '.join(ends)}]" if ends else ""
        lines.append((f"{HEADLINES[metric]} ({data})", write_minus(f"{mean}{interval}")))
    return lines
