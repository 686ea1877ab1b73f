"""Figures of runs: SVG for the page of a report, and a PNG that goes beside a model card.

matplotlib draws the SVG with stand-in colours, which become CSS variables. So one figure suits
light, dark and paper, and needs no script. Names and captions stay text of the page.
"""

import io
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, FuncFormatter

from protoclip.evaluation.metrics import label
from protoclip.results.read import Curve, read_run
from protoclip.results.table import is_headline, split_key
from protoclip.terminal import visible

COLOURS = 8  # of models, in report.css
DASHES: Any = ("solid", (0, (5, 2)), (0, (1.6, 1)), (0, (6, 1.5, 1.6, 1.5)))
MOST_POINTS = 300  # of a curve; more are averaged in equal parts
MOST_CURVES = 4  # in the chart of a model card
LOSS, HELD_OUT = "Total loss", "On held-out data"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "protoclip",
    "font.size": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.6,
    "path.simplify_threshold": 0.5,
}
# Stand-ins for the page's colours.
INK, GRID = "#abc0f0", "#abc0f1"
VARIABLES = {INK: "--quiet", GRID: "--line"}
_numbers = count()


def draw_lines(curves: Sequence[tuple[int, Curve]]) -> Markup:
    """Curves over samples seen, each with the number of its model. Seeds of a model look alike."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.5, 2.0), dpi=72)  # SVG's points
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_facecolor("none")
        axes.tick_params(colors=INK)
        for spine in axes.spines.values():
            spine.set_color(INK)
        for model, curve in curves:
            draw_curve(axes, curve, model=model, color=f"#abc0{model % COLOURS:02x}")
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        return render_svg(figure)


def draw_run(folder: Path) -> tuple[bytes, str] | None:
    """A PNG of a run's total loss and of its headline measures, and the same in words.

    None if the run logged no steps. Raises `ValueError` if the folder is damaged.
    """
    run = read_run(folder)
    charts: dict[str, dict[str, Curve]] = {LOSS: {}, HELD_OUT: {}}
    ends = []
    for name, (steps, values) in run.curves.items():
        data, metric = split_key(name)
        # A run that is evaluated only at its end has no curve.
        is_measure = name.startswith("eval/") and is_headline(name) and len(steps) > 1
        if name == "train/loss/total":
            title, shown = LOSS, LOSS
        elif is_measure and len(charts[HELD_OUT]) < MOST_CURVES:
            title, shown = HELD_OUT, f"{data}: {label(metric, data)}"
        else:
            continue
        charts[title][shown] = steps * run.config.episodes.batch_size, values
        ends.append(f"{shown} from {values[0]:.3g} to {values[-1]:.3g}")
    charts = {title: curves for title, curves in charts.items() if curves}
    if not charts:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(charts), 2.6), dpi=150, layout="constrained")
        all_axes = figure.subplots(1, len(charts), squeeze=False)[0]
        for axes, (title, curves) in zip(all_axes, charts.items(), strict=True):
            for number, (name, curve) in enumerate(curves.items()):
                # Between dollars matplotlib would read a formula.
                escaped = visible(name).replace("$", r"\$")
                draw_curve(axes, curve, model=number, color=f"C{number}", label=escaped)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("samples seen")
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            if len(curves) > 1:
                axes.legend(fontsize=7)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue(), "Over the samples seen: " + "; ".join(ends)


def draw_curve(axes: mpl.axes.Axes, curve: Curve, *, model: int, **line: Any) -> None:
    """One curve over samples seen, of at most `MOST_POINTS` points, each the mean of its part."""
    parts = min(len(curve[0]), MOST_POINTS)
    x, y = (np.array([part.mean() for part in np.array_split(v, parts)]) for v in curve)
    mark = "o" if len(x) < 3 else None
    axes.plot(x, y, ls=DASHES[dash_number(model)], marker=mark, ms=3, **line)
    axes.margins(x=0.02)
    axes.locator_params(nbins=5)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def dash_number(model: int) -> int:
    """Index into `DASHES` for a model's curves, which tell models apart without colour too."""
    return (model + model // COLOURS) % len(DASHES)


def dashes(model: int) -> str:
    """The dashes of a model as SVG writes them; empty for a solid line."""
    dash = DASHES[dash_number(model)]
    return "" if isinstance(dash, str) else " ".join(f"{2 * part:g}" for part in dash[1])


def render_svg(figure: Figure) -> Markup:
    """The figure as a part of the page: without a size, with unique ids, in the page's colours.

    The page wraps it and describes it, so it is hidden from screen readers.
    """
    # A figure that has the layout engine itself is drawn twice, and laid out each time.
    ConstrainedLayoutEngine().execute(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # matplotlib's style sheet would style the whole page; report.css has its two rules.
    for part in ("metadata", "style"):
        text = re.sub(rf"<{part}\b.*?</{part}>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
    text = re.sub(r"\s*\n\s*", "\n", text)
    used = set(re.findall(r"#([\w-]+)[\")]", text))
    prefix = f"f{next(_numbers)}-"
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'href="#', f'href="#{prefix}', text)
    text = re.sub(r"url\(#", f"url(#{prefix}", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"#abc0(0[0-7])", lambda m: f"var(--model-{int(m[1])})", text)
    # "none" keeps fonts as text; the page's own font suits it better than matplotlib's.
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    return Markup(text)  # (matplotlib's own, with numbers and our words only)
