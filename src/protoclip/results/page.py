"""The page: gathers what the other modules find, and renders `report.html.j2`.

Run folders are read in `runs.py`, charts are drawn in `figures.py`, and how to repeat a run is said
in `repeat.py`.
"""

import base64
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import protoclip
from protoclip.evaluation.metrics import METRICS
from protoclip.evaluation.paired import RunResults, make_reader
from protoclip.files import locked, require_ours, write_atomically
from protoclip.models import saved
from protoclip.progress import Progress, duration
from protoclip.results import MARK, looks
from protoclip.results.compare import compare_runs, differences_in
from protoclip.results.examples import Examples, examples_key, open_examples
from protoclip.results.figures import COLOURS, Series, dash, line_chart, map_chart
from protoclip.results.findings import HEADLINES, compare_headlines, describe_changes
from protoclip.results.looks import Confusions, Look
from protoclip.results.read import (
    TOTAL,
    Curve,
    RunFolder,
    all_curves,
    model_names,
    read_run,
    run_names,
    without_total,
)
from protoclip.results.repeat import commands, settings
from protoclip.results.table import (
    decimals,
    describe_clear,
    sentence_case,
    table_of_runs,
    with_minus,
)
from protoclip.terminal import OBEYED
from protoclip.training.run_folder import named_by, positives_of

HERE = Path(__file__).parent
LONGEST = 160  # characters of a caption, a name or a setting
FEW = 10  # bad samples that are named

# The charts: heading, then title and metric. `*` takes every metric that begins so, and its title
# goes on with the rest of the name.
CHARTS: dict[str, dict[str, str]] = {
    "Losses": {
        TOTAL: "Total loss",
        "train/loss/info_nce": "InfoNCE loss",
        "train/loss/sigmoid": "Sigmoid loss",
        "train/loss/prototypical/*": "Prototypical loss",
        "train/loss/distil/*": "Distance from a teacher's features",
        "train/loss/keep": "Distance from the start",
        "train/loss/geometry": "Distance from the halves' neighbourhoods",
        "train/positives": "Other pairs of a batch that match one",
    },
    "Prototypes": {
        "train/prototypes/accuracy/*": "Accuracy of prototypes",
        "train/prototypes/dead/*": "Share of dead prototypes",
        "train/prototypes/empty/*": "Share of empty prototypes",
        "train/prototypes/agreement/*": "Agreement of groups",
    },
    "Strengths of the prototypical losses": {
        "train/pull/*": "Pull, as a share of InfoNCE's",
        "train/balance/*": "Factor to the weights",
    },
    "The joint space": {
        "temperature": "Temperature of pairs",
        "prototype_temperature": "Temperature of prototypes",
        "train/modality_gap": "Modality gap",
        "train/spread/*": "Spread",
        "features/effective_rank/*": "Effective rank of features",
    },
    "Optimisation": {
        "train/learning_rate": "Learning rate",
        "train/gradient_norm": "Gradient norm",
    },
    "The machines": {
        "train/samples_per_second": "Samples a second",
        "train/share/*": "Share of waiting",
        "train/memory_gb": "Memory (GB)",
        "train/mfu": "Share of the card's peak",
    },
    "Validation": {
        f"eval/*/{metric}": sentence_case(METRICS[metric].label) for metric in HEADLINES
    },
    "Grouping over the checkpoints": {
        "features/agreement": "Image and text groups agree (AMI)",
        "features/stability/*": "Groups agree with those of the checkpoint before (AMI)",
        "features/classes/*": "Groups match the classes (AMI)",
        "features/neighbours/*": "Neighbours in one group",
        "features/recall@10/*": "Recall@10",
        "features/gap": "Modality gap of held-out pairs",
    },
}
TIMES = ("data", "train", "extract", "cluster", "back_translate")
GROUPING = {
    "agreement": "Image groups agree with text groups (AMI)",
    "classes/image": "Image groups match the classes (AMI)",
    "classes/text": "Text groups match the classes (AMI)",
    "neighbours/image": "Nearest images whose texts share a group",
    "neighbours_by_chance/image": "… by chance",
    "neighbours/text": "Nearest texts whose images share a group",
    "neighbours_by_chance/text": "… by chance",
    "effective_rank/image": "Effective rank of images",
    "effective_rank/text": "Effective rank of texts",
    "spread/image": "Spread of images",
    "spread/text": "Spread of texts",
    "gap": "Modality gap",
    "recall@10/image_to_text": "Recall@10, image to text",
    "recall@10/text_to_image": "Recall@10, text to image",
}


@dataclass(frozen=True, kw_only=True)
class Legend:
    """A model in the charts."""

    name: str
    colour: int
    dash: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    title: str
    description: str  # for those who do not see it
    svg: Markup


@dataclass(frozen=True, kw_only=True)
class Charts:
    """The charts under a heading, and in words what has one value in all runs."""

    drawn: list[Chart]
    same: list[str]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A run's look at examples, or the reason why there is none."""

    run: int  # its number among the runs of the page
    label: str
    examples: Examples | None = None
    look: Look | None = None
    problem: str = ""
    images: Callable[[int], str] = str  # row to data URI
    maps: Sequence[Chart] = ()


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """A column of the table of grouping."""

    label: str
    source: str
    values: Mapping[str, float]


def write_report(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    samples: int = 1000,
    minutes: float = 10.0,
    seed: int = 0,
    device: torch.device | None = None,
    overwrite: bool = False,
    allow_links: bool = False,
) -> Path:
    """Write the report of runs to one HTML file, which needs nothing else and asks for nothing.

    Args:
        folders: Run folders, finished or not. The first one's name is what others are compared to.
        out: The file to write, in a folder that exists.
        samples: Example pairs at most, that models are shown on.
        minutes: After this long no further model is run on examples; the page says so.
        seed: Draws the examples.
        overwrite: Replace a file that is no report, or is read-only.
        allow_links: As in `data`, for the examples.

    Raises:
        ValueError: A folder is no run, or `out` cannot be written there or is somebody's.
        OSError: The file cannot be written.
    """
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"--out: {out} is a folder; name a file, such as {out / 'report.html'}")
    if not out.parent.is_dir():
        raise ValueError(f"--out: no folder {out.parent}; make it first")
    if not folders:
        raise ValueError("runs: none given; name one run folder or more")
    with locked(out):
        if not overwrite:
            require_ours(out, MARK)
        page = page_of(
            folders,
            out,
            {"samples": samples, "seed": seed, "minutes": minutes},
            allow_links=allow_links,
            device=device,
        )
        write_atomically(out, page)
    return out


def page_of(
    folders: Sequence[str | Path],
    out: Path,
    options: Mapping[str, Any],
    *,
    allow_links: bool,
    device: torch.device | None,
) -> str:
    """The page of `write_report`, and the command that makes it again."""
    read = {
        os.path.realpath(folder): read_run(folder, allow_links=allow_links) for folder in folders
    }
    command = ["protoclip", "report", *folders, "--out", out]
    command += [word for name, value in options.items() for word in (f"--{name}", value)]
    command += ["--allow_links"] * allow_links
    return render(
        context([*read.values()], **options, device=device)
        | {"command": shlex.join(map(str, command))}
    )


def render(values: Mapping[str, Any]) -> str:
    """The page. Every value passes `printable`, and is escaped."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clip": clipped, "shorten": shortened, "minus": with_minus}
    environment.filters |= {"sentence_case": sentence_case}
    environment.globals |= {"named_rows": named_rows, "number": number}
    style = Markup((HERE / "report.css").read_text(encoding="utf-8"))
    page: str = environment.get_template("report.html.j2").render(style=style, **values)
    return page


def printable(value: Any) -> Any:
    """Text without control characters, marks that turn the text's direction, and half characters.

    Joiners stay, since many scripts and emoji need them.
    """
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    text = value.encode("utf-8", "replace").decode("utf-8")
    return OBEYED.sub("", text.replace("\n", " ").replace("\t", " "))


def clipped(text: Any, length: int = LONGEST) -> str:
    """At most so many characters of a text."""
    whole = str(text)
    return whole if len(whole) <= length else whole[: length - 1].rstrip() + "…"


def shortened(name: str) -> str:
    """At most `LONGEST` characters of a name: of a longer one both ends, since it may end in a
    folder, and folders differ at their ends."""
    half = (LONGEST - 1) // 2
    return name if len(name) <= LONGEST else f"{name[:half]}…{name[-half:]}"


def number(value: float) -> str:
    """Three decimals, or one of larger numbers."""
    small = abs(value) < 10
    return with_minus(decimals(value, 3) if small else f"{value:,.1f}")


def named_rows(confusions: Confusions) -> list[tuple[str, int, list[float]]]:
    """The rows of the table of confusions: class, images, shares; the last one is what is left."""
    rows = zip(confusions.classes, confusions.sizes, confusions.shares, strict=True)
    return [
        (name, size, [*shares, max(0.0, 1 - sum(shares)) if size else 0.0])
        for name, size, shares in rows
    ]


def context(
    runs: Sequence[RunFolder],
    *,
    samples: int,
    minutes: float,
    seed: int,
    device: torch.device | None,
) -> dict[str, Any]:
    """All values of the page."""
    names = [shortened(label) for label in run_names(runs)]
    of_runs = model_names(runs)
    known = list(dict.fromkeys(of_runs))
    of_models: dict[str, list[RunResults]] = {}  # the first one is compared with
    for model, run in zip(of_runs, runs, strict=True):
        if run.results is not None and run.results.metrics:
            of_models.setdefault(model, []).append(run.results)
    entries = compared(of_models)
    shown = show_models(
        runs, names, of_runs, samples=samples, minutes=minutes, seed=seed, device=device
    )
    findings = compare_headlines(entries)
    return {
        "title": " · ".join(map(shortened, known[:4])) + (" · …" if len(known) > 4 else ""),
        "version": protoclip.__version__,
        "made": datetime.now(UTC).strftime("%Y-%m-%d"),
        "runs": [run_facts(run, name) for run, name in zip(runs, names, strict=True)],
        "unfinished": [n for run, n in zip(runs, names, strict=True) if run.results is None],
        "findings": findings,
        "better": [finding for finding in findings if finding.verdict == "better"],
        "entries": entries,
        "table": table_of_runs(entries, mark="●") if entries else None,
        "clear": describe_clear(differences_in(entries)),
        "legend": [legend(number, name) for number, name in enumerate(known)],
        "charts": charts(runs, names, [known.index(model) for model in of_runs]),
        "analyzed": any(run.analysis and len(run.analysis["checkpoints"]) > 1 for run in runs),
        "sweeps": [
            {"label": name, **run.sweep, "changes": describe_changes(run.differences)}
            for run, name in zip(runs, names, strict=True)
            if run.sweep is not None
        ],
        "times": times(runs, names),
        "grouping": (columns := grouping(runs, names, shown)),
        "measures": {
            key: label
            for key, label in GROUPING.items()
            if any(key in column.values for column in columns)
        },
        "shown": shown,
        "constants": looks,
        "seed": seed,
        **settings(runs),
        "names": names,
        "skipped": [
            (name, len({each.get("sample_id") for each in run.skipped}), run.skipped[:FEW])
            for run, name in zip(runs, names, strict=True)
            if run.skipped
        ],
        "unlisted": [n for run, n in zip(runs, names, strict=True) if run.command == "align"],
        "environments": [(name, run.environment) for run, name in zip(runs, names, strict=True)],
        "commands": commands(runs),
    }


def compared(of_models: Mapping[str, Sequence[RunResults]]) -> list[dict[str, Any]]:
    """The entries of `compare_runs` of the results of models' runs.

    A damaged file of samples costs a warning and the intervals that need it.
    """
    results = [(model, of_run) for model, runs in of_models.items() for of_run in runs]
    names = [model for model, _ in results]
    read = make_reader(refuse=False)
    entries = compare_runs([of_run for _, of_run in results], names, read)
    return [entry for entry in entries if entry["metrics"]]


def run_facts(run: RunFolder, label: str) -> dict[str, str]:
    """A row of the table of runs."""
    seen = run.environment.get("samples_seen", run.last_step * run.batch_size)
    spent = max(run.seconds or 0.0, sum(seconds(run).values()))
    time = duration(spent) if run.results else f"at least {duration(spent)}"
    steps = f"{run.last_step:,} steps" if run.curves else "but metrics.jsonl holds no step"
    finished = f"finished, {steps}"
    state = finished if run.results else f"not finished: step {run.last_step:,} of {run.steps:,}"
    return {
        "label": label,
        "state": state,
        "seen": f"{int(seen):,}",
        "time": time if spent else "not known",
        "data": ", ".join(named_by(run.settings, "data.sources", "path", "data.train")),
        "teachers": run.config.uses_of_teachers if run.config is not None else "",
        "positives": positives_of(run.settings),
        "folder": str(run.folder),
    }


# Charts


def legend(number: int, name: str) -> Legend:
    of = dash(number)
    marks = "" if isinstance(of, str) else " ".join(f"{2 * part:g}" for part in of[1])
    return Legend(name=shortened(name), colour=number % COLOURS, dash=marks)


def charts(
    runs: Sequence[RunFolder], names: Sequence[str], numbers: Sequence[int]
) -> dict[str, Charts]:
    """The charts under each heading; those that no run has anything for are left out.

    Args:
        numbers: That of each run's model.
    """
    curves = without_total([all_curves(run) for run in runs])
    known = list(dict.fromkeys(name for of in curves for name in of))
    sections: dict[str, Charts] = {}
    for heading, patterns in CHARTS.items():
        for pattern, title in patterns.items():
            before, star, after = pattern.partition("*")
            fitting = [
                name
                for name in known
                if name.startswith(before) and name.endswith(after)
                if (len(name) > len(before + after) if star else name == pattern)
            ]
            for name in sorted(fitting):
                rest = name[len(before) : len(name) - len(after)].replace("_", " ")
                full = f"{title}, {rest}" if len(fitting) > 1 else title
                section = sections.setdefault(heading, Charts(drawn=[], same=[]))
                values = np.unique(np.concatenate([of[name][1] for of in curves if name in of]))
                if len(values) == 1:
                    section.same.append(f"{clipped(full)}: {values[0]:.3g}")
                else:
                    chart = chart_of(name, clipped(full), runs, curves, names, numbers)
                    section.drawn.append(chart)
    return sections


def chart_of(
    metric: str,
    title: str,
    runs: Sequence[RunFolder],
    curves: Sequence[Mapping[str, Curve]],
    names: Sequence[str],
    numbers: Sequence[int],
) -> Chart:
    series, ends = [], []
    for run, of, name, number in zip(runs, curves, names, numbers, strict=True):
        if metric in of:
            steps, values = of[metric]
            curve = (steps * run.batch_size, values)
            series.append(Series(model=number, curve=curve))
            ends.append(f"{name}: {values[0]:.3g} to {values[-1]:.3g}")
    return Chart(
        title=title,
        description=f"{title} over samples seen, from the first value to the last. "
        + "; ".join(ends),
        svg=line_chart(series),
    )


def seconds(run: RunFolder) -> dict[str, float]:
    """Where the time of a run went, in seconds, by part."""
    named = {part: run.curves.get(f"train/seconds/{part}") for part in TIMES}
    return {part: float(curve[1].sum()) for part, curve in named.items() if curve is not None}


def times(runs: Sequence[RunFolder], names: Sequence[str]) -> list[dict[str, Any]]:
    """A row a run: seconds, and the share of all, of the parts that a run has.

    Parts are logged at the end of an episode, so that one which was cut short tells of none.
    """
    rows = []
    all_spent = [seconds(run) for run in runs]
    logged = [part for part in TIMES if any(part in spent for spent in all_spent)]
    for run, name, spent in zip(runs, names, all_spent, strict=True):
        if known := sum(spent.values()):
            total = max(known, run.seconds or 0.0)
            every = {**{part: spent.get(part, 0.0) for part in logged}, "other": total - known}
            parts = [(part, of, of / total) for part, of in every.items()]
            at_least = run.results is None or run.seconds is None
            rows.append({"label": name, "total": total, "parts": parts, "at_least": at_least})
    return rows


# Models on examples


def show_models(
    runs: Sequence[RunFolder],
    names: Sequence[str],
    of_runs: Sequence[str],
    *,
    samples: int,
    minutes: float,
    seed: int,
    device: torch.device | None,
) -> list[Shown]:
    """Run the first run of each model that has a checkpoint on example pairs."""
    by_model: dict[str, list[int]] = {}
    for index, model in enumerate(of_runs):
        by_model.setdefault(model, []).append(index)
    chosen = [min(of, key=lambda index: not runs[index].checkpoints) for of in by_model.values()]
    progress = Progress("report", len(chosen))

    started, shown = time.monotonic(), []
    # Runs on the same data share their examples, the maps before training, and the images.
    known: dict[str, tuple[Examples, dict[str, looks.Map], Callable[[int], str]]] = {}
    for done, index in enumerate(chosen):
        run, label = runs[index], names[index]
        progress.update(done, printable(label))
        if run.config is None:
            shown.append(Shown(run=index, label=label, problem=run.problem))
            continue
        if done and time.monotonic() - started > 60 * minutes:
            reason = f"left out after {minutes:g} minutes; --minutes allows more"
            shown.append(Shown(run=index, label=label, problem=reason))
            continue
        try:
            data = examples_key(run.config, run.checkpoints)
            if data not in known:
                examples = open_examples(run.folder, run.config, samples, allow_training=True)
                known[data] = examples, {}, cache(partial(data_uri, examples))
            examples, firsts, images = known[data]
            look = looks.look(
                examples,
                run.config,
                run.checkpoints,
                seed=seed,
                device=device or torch.device("cpu"),
                firsts=firsts,
            )
        except (ValueError, OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            shown.append(Shown(run=index, label=label, problem=clipped(reason, 400)))
            continue
        drawn = maps(look, label)
        shown.append(
            Shown(run=index, label=label, examples=examples, look=look, images=images, maps=drawn)
        )
    progress.update(len(chosen))
    return shown


def data_uri(examples: Examples, row: int) -> str:
    """A small image of the examples, as the page holds it."""
    encoded = base64.b64encode(looks.thumbnail(examples.images[row])).decode()
    return f"data:image/webp;base64,{encoded}"


def maps(look: Look, label: str) -> list[Chart]:
    limit = max(float(abs(points).max()) for m in look.maps for points in (m.images, m.texts))
    return [
        Chart(
            title=f"{of.title}: gap {of.gap:.2f}, {100 * of.explained:.0f}% of the variance",
            description=f"{label}, {of.title.lower()}: {len(of.images)} images and their texts in "
            f"two dimensions. The means of the modalities are {of.gap:.2f} apart.",
            svg=map_chart(of, limit=1.05 * limit),
        )
        for of in look.maps
    ]


def grouping(
    runs: Sequence[RunFolder], names: Sequence[str], shown: Sequence[Shown]
) -> list[Grouping]:
    """From `protoclip analyze` where it has seen the newest checkpoint, else from the examples."""
    looked = {of.run: of for of in shown}
    columns = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        of = looked.get(index)
        newest = run.checkpoints[-1].name if run.checkpoints else ""
        last = run.analysis["checkpoints"][-1] if run.analysis else {}
        spaces: Mapping[str, Mapping[str, float]] = {}
        source = ""
        if run.analysis and (not newest or newest == f"step-{last['step']:09}"):
            spaces = {space: last[space] for space in ("features", "projections") if space in last}
            source = f"protoclip analyze, {run.analysis['pairs']:,} pairs of {run.analysis['data']}"
            if (run.folder / saved.MODEL).is_file():  # which fine-tuning chose at its end
                source += f", step {last['step']:,} before WiSE-FT"
        elif of is not None and of.look is not None and of.examples is not None:
            spaces = of.look.grouping
            pairs = of.examples
            source = f"{of.look.state}, {len(pairs.images):,} pairs of {pairs.name}"
        columns += [
            Grouping(label=f"{name}, {space}", source=source, values=values)
            for space, values in spaces.items()
        ]
    return columns
