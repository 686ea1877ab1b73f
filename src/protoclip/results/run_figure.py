"""The figure of a run that goes beside its model card: its loss, and what held-out data said.

Charts of the report are drawn in `figures.py`, and the card is written by `export/card.py`.
"""

from collections.abc import Mapping
from pathlib import Path

from protoclip.evaluation.metrics import label
from protoclip.results.figures import picture
from protoclip.results.findings import is_headline
from protoclip.results.read import Curve, read_run
from protoclip.results.table import split_key

MOST = 4  # measures that one chart can hold
LOSS, HELD_OUT = "Total loss", "On held-out data"


def main_figure(folder: Path) -> tuple[bytes, str] | None:
    """A PNG of a run's total loss and of its headline measures, and the same in words.

    None if the run logged no steps. Raises `ValueError` if the folder is damaged.
    """
    run = read_run(folder)
    curves: Mapping[str, Curve] = {
        name: (steps * run.batch_size, values) for name, (steps, values) in run.curves.items()
    }
    measures = [
        name
        for name, (steps, _) in curves.items()
        if name.startswith("eval/") and is_headline(name)
        if len(steps) > 1  # a run that is judged at its end alone has no curve of it
    ]
    charts: dict[str, dict[str, Curve]] = {}
    if "train/loss/total" in curves:
        charts[LOSS] = {LOSS: curves["train/loss/total"]}
    if measures:
        charts[HELD_OUT] = {named(name): curves[name] for name in measures[:MOST]}
    if not charts:
        return None
    ends = [
        f"{name} from {values[0]:.3g} to {values[-1]:.3g}"
        for of in charts.values()
        for name, (_, values) in of.items()
    ]
    return picture(charts), "Over the samples seen: " + "; ".join(ends)


def named(metric: str) -> str:
    """What a chart calls a metric, with the data that it is of."""
    data, rest = split_key(metric)
    return f"{data}: {label(rest, data)}"
