"""The figure of a WiSE-FT sweep. Only this module of training imports matplotlib, an extra.

The sweep itself, which chooses the model, is in `wise_ft.py`.
"""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure

from protoclip.terminal import visible

# Those of Okabe and Ito, which people with any kind of colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def figure(record: Mapping[str, Any]) -> Figure:
    """The score of each data set over alpha, their mean, and the alpha that was chosen.

    Args:
        record: As in `wise_ft.json`.
    """
    points, alpha = record["points"], record["alpha"]
    alphas = [point["alpha"] for point in points]
    drawn = Figure(figsize=(6.0, 4.0), dpi=130, layout="constrained")
    axes = drawn.add_subplot()
    for data, colour in zip(points[0]["scores"], cycle(COLOURS), strict=False):
        values = [100 * point["scores"][data] for point in points]
        name = visible(data).replace("$", r"\$")  # matplotlib reads formulas between dollars
        axes.plot(alphas, values, color=colour, marker="o", markersize=3, label=name)
    means = [100 * point["mean"] for point in points]
    axes.plot(alphas, means, color="black", linestyle="--", label="mean")
    axes.axvline(alpha, color="#888888", linewidth=1, label=f"chosen: {alpha:g}")
    axes.set_xlabel("alpha: 0 is the start, 1 the end of fine-tuning")
    axes.set_ylabel("zero-shot accuracy or mean recall, percent")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    return drawn
