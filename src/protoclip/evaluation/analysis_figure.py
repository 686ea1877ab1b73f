"""Figures of `analysis.analyze`: one run, and several runs laid over each other.

Colours are those of Okabe and Ito, which people with any kind of colour vision tell apart. Only
this module imports matplotlib, which is an optional dependency.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from protoclip.terminal import visible

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "^", "s", "D", "v", "P", "X")  # another one where the colours come again
MODALITIES = {"image": ("images", COLOURS[0]), "text": ("texts", COLOURS[1])}
BOTH = ("both together", COLOURS[-1])
RECALL = ("recall@10/image_to_text", "recall@10/text_to_image")

Dash = Literal["-", "--"]
Points = tuple[list[float], list[float]]

DASHES: dict[str, Dash] = {"features": "-", "projections": "--"}


@dataclass(frozen=True)
class Panel:
    """What one panel shows of each checkpoint; a measure's last part tells its modality."""

    title: str
    unit: str
    measures: tuple[str, ...]
    only_of_one_run: bool = False


PANELS = (
    Panel("Image groups against text groups", "AMI", ("agreement",)),
    Panel("Groups against classes", "AMI", ("classes/image", "classes/text")),
    Panel(
        "Neighbours whose partners share a group", "share", ("neighbours/image", "neighbours/text")
    ),
    Panel(
        "Groups against the checkpoint before", "AMI", ("stability/image", "stability/text"), True
    ),
    Panel("Effective rank", "directions", ("effective_rank/image", "effective_rank/text")),
    Panel("Modality gap", "distance of the means", ("gap",)),
    Panel("Recall@10, mean of both ways", "share", RECALL),
    Panel(
        "Prototypes without a held-out sample",
        "prototypes",
        ("prototypes/dead/image", "prototypes/dead/text"),
        True,
    ),
)


def curve(analysis: Mapping[str, Any], space: str, measure: str) -> Points:
    """A measure of each checkpoint that has it, against the samples seen."""
    entries = [e for e in analysis["checkpoints"] if e.get(space, {}).get(measure) is not None]
    return [float(e["samples"]) for e in entries], [e[space][measure] for e in entries]


def curves(analysis: Mapping[str, Any], space: str, panel: Panel) -> dict[str, Points]:
    """The curves of a panel that have points, by measure; recall is one curve, a mean."""
    by_measure = {measure: curve(analysis, space, measure) for measure in panel.measures}
    if panel.measures == RECALL:
        by_measure = {"recall@10": recall(analysis, space)}
    return {measure: points for measure, points in by_measure.items() if points[0]}


def recall(analysis: Mapping[str, Any], space: str) -> Points:
    """The mean of both directions' recall."""
    (samples, one), (_, other) = (curve(analysis, space, measure) for measure in RECALL)
    return samples, [(a + b) / 2 for a, b in zip(one, other, strict=True)]


def grid(titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A figure with one panel a title, in two rows."""
    columns = -(-len(titles) // 2)
    figure = Figure(figsize=(3.6 * columns, 6.8), dpi=130, layout="constrained")
    panels = []
    for number, title in enumerate(titles, 1):
        axes = figure.add_subplot(2, columns, number)
        axes.set_title(title, fontsize=10)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        panels.append(axes)
    return figure, panels


@dataclass(frozen=True)
class Look:
    """How a curve looks."""

    colour: str
    dash: Dash = "-"
    marker: str = MARKERS[0]


def looks_of_runs(number: int) -> list[Look]:
    """A look for each of so many runs."""
    each = [Look(colour, marker=marker) for marker in MARKERS for colour in COLOURS]
    return list(islice(cycle(each), number))


def draw(axes: Axes, points: Points, look: Look) -> None:
    size = 2.6 if look.marker == MARKERS[0] else 4.0  # or its shape is not seen
    axes.plot(
        *points,
        color=look.colour,
        linestyle=look.dash,
        marker=look.marker,
        markersize=size,
        linewidth=1.3,
    )


def plain(name: str) -> str:
    """A name of others as matplotlib takes it for text: it reads formulas between dollars."""
    return visible(name).replace("$", r"\$")


def name_axes(axes: Axes, x: str, y: str, *, samples: bool = False) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if samples:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def legend(figure: Figure, entries: Sequence[tuple[str, Look]], columns: int) -> None:
    """Below the panels: labels with how their curves look, row by row."""
    rows = [entries[first : first + columns] for first in range(0, len(entries), columns)]
    # matplotlib fills columns first.
    ordered = [row[column] for column in range(columns) for row in rows if column < len(row)]
    handles = [
        Line2D(
            [],
            [],
            color=look.colour,
            linestyle=look.dash,
            marker="" if look.marker == MARKERS[0] else look.marker,
            label=plain(label),
        )
        for label, look in ordered
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)


def run_figure(analysis: Mapping[str, Any]) -> Figure:
    """One run: a panel a measure, a colour a modality, dashes for projections."""
    spaces = [space for space in DASHES if space in analysis["checkpoints"][-1]]
    kept = [panel for panel in PANELS if any(curves(analysis, space, panel) for space in spaces)]
    figure, all_axes = grid([panel.title for panel in kept])
    figure.suptitle(
        f"{plain(analysis['name'])}, seed {analysis['seed']}: {analysis['pairs']:,} pairs of "
        f"{plain(analysis['data'])} in {analysis['groups']} groups",
        fontsize=11,
    )
    for panel, axes in zip(kept, all_axes, strict=True):
        for space in spaces:
            for measure, points in curves(analysis, space, panel).items():
                colour = MODALITIES.get(measure.rpartition("/")[2], BOTH)[1]
                draw(axes, points, Look(colour, DASHES[space]))
        name_axes(axes, "samples seen", panel.unit, samples=True)
    whose = [*MODALITIES.values(), BOTH]
    entries = [
        (f"{of}, {space}", Look(colour, DASHES[space])) for space in spaces for of, colour in whose
    ]
    legend(figure, entries, columns=len(whose))
    return figure


def runs_figure(analyses: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Figure:
    """Runs laid over each other, by their features: a colour a run, dashes for texts. After seven
    runs the colours come again, with another marker.

    In the last two panels each point is a checkpoint. They show whether grouping goes with
    alignment: a run whose curve lies higher groups more at the same recall or modality gap.
    """
    kept = [
        panel
        for panel in PANELS
        if not panel.only_of_one_run and any(curves(a, "features", panel) for a in analyses)
    ]
    figure, all_axes = grid(
        [*(p.title for p in kept), "Groups by recall", "Groups by modality gap"]
    )
    figure.suptitle("Features of held-out pairs", fontsize=11)
    *over_time, by_recall, by_gap = all_axes
    looks = looks_of_runs(len(analyses))
    for analysis, look in zip(analyses, looks, strict=True):
        for panel, axes in zip(kept, over_time, strict=True):
            for measure, points in curves(analysis, "features", panel).items():
                draw(axes, points, replace(look, dash="--") if measure.endswith("/text") else look)
        grouped = curve(analysis, "features", "agreement")[1]
        draw(by_recall, (recall(analysis, "features")[1], grouped), look)
        draw(by_gap, (curve(analysis, "features", "gap")[1], grouped), look)
    for panel, axes in zip(kept, over_time, strict=True):
        name_axes(axes, "samples seen", panel.unit, samples=True)
    name_axes(by_recall, "recall@10, mean of both ways", "image against text groups, AMI")
    name_axes(by_gap, "modality gap, distance of the means", "image against text groups, AMI")
    of_runs = list(zip(labels, looks, strict=True))
    images = [(f"{label}, images or both", look) for label, look in of_runs]
    texts = [(f"{label}, texts", replace(look, dash="--")) for label, look in of_runs]
    legend(figure, [*images, *texts], columns=min(4, len(labels)))
    return figure
