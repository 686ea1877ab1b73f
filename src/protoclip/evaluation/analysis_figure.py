"""Figures of `analysis.analyze`: one run, and several runs laid over each other.

Colours are those of Okabe and Ito, which people with any kind of colour vision tell apart. Only
this module imports matplotlib, which is an optional dependency.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MODALITIES = {"image": ("images", "#0072B2"), "text": ("texts", "#D55E00")}
BOTH = ("both together", "#000000")
DASHES = {"features": "-", "projections": "--"}
RECALL = ("recall@10/image_to_text", "recall@10/text_to_image")
# A panel's title, and its measures. A measure's last part tells the modality.
PANELS = {
    "Image groups against text groups (AMI)": ("agreement",),
    "Groups against classes (AMI)": ("classes/image", "classes/text"),
    "Neighbours with partners in one group": ("neighbours/image", "neighbours/text"),
    "Groups against last checkpoint's (AMI)": ("stability/image", "stability/text"),
    "Effective rank": ("effective_rank/image", "effective_rank/text"),
    "Modality gap": ("gap",),
    "Recall@10, mean of both ways": RECALL,
    "Prototypes without a held-out sample": ("prototypes/dead/image", "prototypes/dead/text"),
}
ONLY_OF_ONE_RUN = ("Groups against last checkpoint's (AMI)", "Prototypes without a held-out sample")

Points = tuple[list[float], list[float]]


def curve(analysis: Mapping[str, Any], space: str, measure: str) -> Points:
    """A measure of each checkpoint that has it, against the samples seen."""
    entries = [e for e in analysis["checkpoints"] if e.get(space, {}).get(measure) is not None]
    return [float(e["samples"]) for e in entries], [e[space][measure] for e in entries]


def recall(analysis: Mapping[str, Any], space: str) -> Points:
    """The mean of both directions' recall."""
    (samples, one), (_, other) = (curve(analysis, space, measure) for measure in RECALL)
    return samples, [(a + b) / 2 for a, b in zip(one, other, strict=True)]


def grid(titles: Sequence[str]) -> tuple[Figure, dict[str, Axes]]:
    """A figure with one panel a title, in two rows."""
    columns = -(-len(titles) // 2)
    figure = Figure(figsize=(3.6 * columns, 6.8), dpi=130, layout="constrained")
    panels = {}
    for place, title in enumerate(titles, 1):
        axes = figure.add_subplot(2, columns, place)
        axes.set_title(title, fontsize=9.5)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("samples seen", fontsize=8.5)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        panels[title] = axes
    return figure, panels


def draw(axes: Axes, points: Points, colour: str, dash: str) -> None:
    axes.plot(*points, color=colour, linestyle=dash, marker="o", markersize=2.6, linewidth=1.3)


def legend(figure: Figure, entries: Sequence[tuple[str, str, str]]) -> None:
    """Below the panels: labels with their colours and dashes."""
    handles = [Line2D([], [], color=c, linestyle=dash, label=label) for label, c, dash in entries]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=9
    )


def run_figure(analysis: Mapping[str, Any]) -> Figure:
    """One run: a panel a measure, a colour a modality, dashes for projections."""
    spaces = [space for space in DASHES if space in analysis["checkpoints"][-1]]
    kept = [
        title
        for title, measures in PANELS.items()
        if any(curve(analysis, space, measures[0])[0] for space in spaces)
    ]
    figure, panels = grid(kept)
    figure.suptitle(
        f"{analysis['name']}, seed {analysis['seed']}: {analysis['pairs']:,} pairs of "
        f"{analysis['data']} in {analysis['groups']} groups",
        fontsize=11,
    )
    for title, axes in panels.items():
        for space in spaces:
            if PANELS[title] == RECALL:
                draw(axes, recall(analysis, space), BOTH[1], DASHES[space])
                continue
            for measure in PANELS[title]:
                colour = MODALITIES.get(measure.rpartition("/")[2], BOTH)[1]
                draw(axes, curve(analysis, space, measure), colour, DASHES[space])
    colours = [*MODALITIES.values(), BOTH]
    legend(
        figure,
        [(f"{who}, {space}", colour, DASHES[space]) for space in spaces for who, colour in colours],
    )
    return figure


def runs_figure(analyses: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Figure:
    """Runs laid over each other, by their features: a colour a run, dashes for texts.

    The last two panels answer whether grouping goes with alignment: each point is a checkpoint.
    """
    last = analyses[0]["checkpoints"][-1]["features"]
    kept = [
        title
        for title, measures in PANELS.items()
        if measures[0] in last and title not in ONLY_OF_ONE_RUN
    ]
    by_recall, by_gap = "AMI of groups, by recall@10", "AMI of groups, by modality gap"
    figure, panels = grid([*kept, by_recall, by_gap])
    figure.suptitle("Features of held-out pairs", fontsize=11)
    colours = [colour for _, colour in zip(analyses, cycle(COLOURS), strict=False)]
    for analysis, colour in zip(analyses, colours, strict=True):
        for title in kept:
            if PANELS[title] == RECALL:
                draw(panels[title], recall(analysis, "features"), colour, "-")
                continue
            for measure in PANELS[title]:
                dash = "--" if measure.endswith("/text") else "-"
                draw(panels[title], curve(analysis, "features", measure), colour, dash)
        grouped = curve(analysis, "features", "agreement")[1]
        draw(panels[by_recall], (recall(analysis, "features")[1], grouped), colour, "-")
        draw(panels[by_gap], (curve(analysis, "features", "gap")[1], grouped), colour, "-")
    for title, name in ((by_recall, "recall@10, mean of both ways"), (by_gap, "modality gap")):
        panels[title].set_xlabel(name, fontsize=8.5)
        panels[title].set_ylabel("image groups against text groups", fontsize=8.5)
    texts = [
        (f"{label}, texts", colour, "--") for label, colour in zip(labels, colours, strict=True)
    ]
    images = [(label, colour, "-") for label, colour in zip(labels, colours, strict=True)]
    legend(figure, [*images, *texts])
    return figure
