"""The report of runs as one page: gathers its values, and renders `report.html.j2`."""

import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

import protoclip
from protoclip.config import Config, flatten
from protoclip.evaluation.metrics import METRICS
from protoclip.files import read_toml, require_ours, write_atomically
from protoclip.models.checkpoint import MODEL
from protoclip.progress import duration
from protoclip.results import MARK, table
from protoclip.results.compare import compare_runs, differences_in
from protoclip.results.figures import COLOURS, dashes, draw_lines
from protoclip.results.read import RunFolder, read_runs
from protoclip.terminal import counted, visible
from protoclip.training.folder import list_names, to_toml
from protoclip.training.plan import make_plan

HERE = Path(__file__).parent
LONGEST = 160  # characters of a name
FEW = 10  # bad samples that are named
TOTAL, SINGLE = "train/loss/total", ("train/loss/info_nce", "train/loss/sigmoid")

LABELS = read_toml(HERE / "charts.toml")
CHARTS, GROUPING = LABELS["charts"], LABELS["grouping"]
CHARTS["Validation"] = {
    f"eval/*/{metric}": table.sentence_case(METRICS[metric].label) for metric in table.HEADLINES
}
TIMES = ("data", "train", "extract", "cluster", "back_translate")
NAMES_OF_RUN = ("run.out", "run.name", "run.sync")  # settings that say where, not how
FOLLOWS = "from the data or model"  # instead of a default
OPEN = (None, "auto")  # values that leave a setting to the plan


def write_report(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    overwrite: bool = False,
    allow_links: bool = False,
) -> Path:
    """Write the report of runs to one HTML file, which needs no other file and no network.

    Args:
        folders: Run folders, finished or not. The others are compared to the model of the first.
        overwrite: Replace a file that is no report.
        allow_links: As in `data`; the page names a run's settings with it.

    Raises:
        ValueError: A folder is no run, or `out` is not ours.
        OSError: The file cannot be written.
    """
    out = Path(out)
    if not overwrite:
        require_ours(out, MARK)
    runs = [
        replace(
            run, model=table.shorten(run.model, LONGEST), label=table.shorten(run.label, LONGEST)
        )
        for run in read_runs(folders, allow_links=allow_links)
    ]
    command = shlex.join(["protoclip", "report", *map(str, folders), "--out", str(out)])
    command += " --allow_links" * allow_links

    def make_visible(value: Any) -> Any:
        """Text in which marks that turn or end it are escapes."""
        is_text = isinstance(value, str) and not isinstance(value, Markup)
        return visible(value) if is_text else value

    environment = table.make_environment(HERE, finalize=make_visible)
    environment.filters |= {
        "minus": table.write_minus,
        "number": format_number,
        "sentence_case": table.sentence_case,
    }
    values = make_context(runs) | {"command": command}
    style = Markup((HERE / "report.css").read_text(encoding="utf-8"))
    page = environment.get_template("report.html.j2").render(style=style, **values)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    return out


def format_number(value: float) -> str:
    """Three decimals, or one of larger numbers."""
    return table.write_minus(table.decimals(value, 3) if abs(value) < 10 else f"{value:,.1f}")


def make_context(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """The values of the page that follow from the runs."""
    models = list(dict.fromkeys(run.model for run in runs))
    results = [(run.results, run.model) for run in runs if run.results and run.results.metrics]
    # All are compared with the first model that has results.
    entries = compare_runs([run for run, _ in results], [model for _, model in results])
    findings, columns = table.compare_headlines(entries), list_groupings(runs)
    again = [
        f"protoclip {run.command} --config {shlex.quote(str(run.folder / 'config.toml'))} "
        "--run.out FOLDER" + " --run.sync none" * ("run.sync" in run.settings)  # it holds this run
        for run in runs
    ]
    folders = shlex.join(str(run.folder) for run in runs)
    return {
        "title": " · ".join(models[:4]) + " · …" * (len(models) > 4),
        "version": protoclip.__version__,
        "made": datetime.now(UTC).strftime("%Y-%m-%d"),
        "runs": runs,
        "facts": [describe_run(run) for run in runs],
        "findings": findings,
        "better": [finding for finding in findings if finding.verdict == "better"],
        "entries": entries,
        "table": table.table_of_runs(entries, mark="●") if entries else None,
        "clear": table.describe_clear(differences_in(entries)),
        "legend": [
            {"name": model, "colour": number % COLOURS, "dashes": dashes(number)}
            for number, model in enumerate(models)
        ],
        "charts": draw_charts(runs, models),
        "times": list_times(runs),
        "sweeps": [
            {"label": run.label, **run.sweep, "changes": table.describe_changes(run.differences)}
            for run in runs
            if run.sweep and run.sweep["points"]
        ],
        "grouping": columns,
        "measures": {
            key: name
            for key, name in GROUPING.items()
            if any(key in column["values"] for column in columns)
        },
        **compare_settings(runs),
        "skipped": [
            (run.label, len({sample.get("sample_id") for sample in run.skipped}), run.skipped[:FEW])
            for run in runs
            if run.skipped
        ],
        "commands": [*again, f"protoclip compare {folders}", f"protoclip analyze {folders}"],
    }


def describe_run(run: RunFolder) -> dict[str, str]:
    """A row of the table of runs."""
    seen = run.last_step * run.config.episodes.batch_size
    spent = max(run.seconds or 0.0, sum(seconds_by_part(run).values()))
    state, time = (
        f"not finished: step {run.last_step:,} of {run.steps:,}",
        f"at least {duration(spent)}",
    )
    if run.results is not None:
        seen, time = int(run.results.samples_seen or seen), duration(spent)
        state = f"finished, {counted(run.last_step, 'step')}"
    return {
        "label": run.label,
        "state": state,
        "seen": f"{seen:,}",
        "time": time if spent else "not known",
        "data": ", ".join(list_names(run.settings, "data.sources", "path", "data.train")),
        "teachers": run.config.uses_of_teachers,
        "positives": str(run.settings.get("loss.positives", "pair")),
        "folder": str(run.folder),
    }


# Charts


def draw_charts(runs: Sequence[RunFolder], models: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The charts under each heading, and the values that are equal in all runs, in words.

    Headings without values are left out, and so is the total loss if each run has a single loss.
    """
    names = dict.fromkeys(name for run in runs for name in run.curves)
    if all(
        any(np.array_equal(run.curves[TOTAL], run.curves.get(name, ())) for name in SINGLE)
        for run in runs
        if TOTAL in run.curves
    ):
        names.pop(TOTAL, None)
    sections: dict[str, dict[str, Any]] = {}
    for heading, patterns in CHARTS.items():
        for pattern, title in patterns.items():
            before, star, after = pattern.partition("*")
            fitting = [
                name
                for name in names
                if name.startswith(before) and name.endswith(after)
                if (len(name) > len(before + after) if star else name == pattern)
            ]
            for name in sorted(fitting):
                rest = name[len(before) : len(name) - len(after)].replace("_", " ")
                full = table.shorten(f"{title}, {rest}" if len(fitting) > 1 else title, LONGEST)
                section = sections.setdefault(heading, {"drawn": [], "same": []})
                values = [run.curves[name][1] for run in runs if name in run.curves]
                if len(unique := np.unique(np.concatenate(values))) == 1:
                    section["same"].append(f"{full}: {unique[0]:.3g}")
                else:
                    section["drawn"].append(draw_chart(name, full, runs, models))
    return sections


def draw_chart(
    metric: str, title: str, runs: Sequence[RunFolder], models: Sequence[str]
) -> dict[str, Any]:
    """A metric of all runs that have it, over samples seen, with a description in words."""
    curves, ends = [], []
    for run in runs:
        if metric in run.curves:
            steps, values = run.curves[metric]
            samples = steps * run.config.episodes.batch_size
            curves.append((models.index(run.model), (samples, values)))
            ends.append(f"{run.label}: {values[0]:.3g} to {values[-1]:.3g}")
    words = f"{title} over samples seen, from the first value to the last. {'; '.join(ends)}"
    return {"title": title, "description": words, "svg": draw_lines(curves)}


def seconds_by_part(run: RunFolder) -> dict[str, float]:
    """Where the time of a run went, in seconds, by part."""
    curves = {part: run.curves.get(f"train/seconds/{part}") for part in TIMES}
    return {part: float(curve[1].sum()) for part, curve in curves.items() if curve is not None}


def list_times(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """A row a run: seconds, and the share of all, of the parts that a run has.

    Parts are logged at the end of an episode, so an episode that was cut short has none.
    """
    rows, seconds = [], [seconds_by_part(run) for run in runs]
    logged = [part for part in TIMES if any(part in spent for spent in seconds)]
    for run, spent in zip(runs, seconds, strict=True):
        if busy := sum(spent.values()):
            total = max(busy, run.seconds or 0.0)
            every = {**{part: spent.get(part, 0.0) for part in logged}, "other": total - busy}
            parts = [(part, value, value / total) for part, value in every.items()]
            at_least = run.results is None or run.seconds is None
            rows.append({"label": run.label, "total": total, "parts": parts, "at_least": at_least})
    return rows


def list_groupings(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """How each run groups, by space, where `protoclip analyze` has seen its newest checkpoint."""
    columns = []
    for run in runs:
        newest = run.checkpoints[-1].name if run.checkpoints else ""
        last = run.analysis["checkpoints"][-1] if run.analysis else {}
        spaces: Mapping[str, Mapping[str, float | None]] = {}
        source = ""
        if run.analysis and (not newest or newest == f"step-{last['step']:09}"):
            spaces = {space: last[space] for space in ("features", "projections") if space in last}
            source = f"protoclip analyze, {run.analysis['pairs']:,} pairs of {run.analysis['data']}"
            if (run.folder / MODEL).is_file():  # which fine-tuning chose at its end
                source += f", step {last['step']:,} before WiSE-FT"
        columns += [
            {"label": f"{run.label}, {space}", "source": source, "values": values}
            for space, values in spaces.items()
        ]
    return columns


# How to repeat runs


def compare_settings(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Settings that differ between the runs, and those that all share but are no defaults.

    Shared ones are `(value, default of train)`; the default is `FOLLOWS` where `train` fills it.
    """
    usual = flatten(tomllib.loads(to_toml(make_plan(Config()).config)))
    empty = flatten(asdict(Config()))
    # Versions up to 1.0.0 left the source of prototypes open.
    settings = [{**run.settings, "prototypes.source": run.config.prototype_source} for run in runs]
    keys = sorted({key for values in settings for key in values} - set(NAMES_OF_RUN))
    rows = {key: [values.get(key) for values in settings] for key in keys}
    differ = {key: row for key, row in rows.items() if any(value != row[0] for value in row)}
    filled = {key for key, value in usual.items() if empty.get(key) in OPEN and value not in OPEN}
    filled.add("teacher.tower")  # the default run has no teacher
    shared = {
        key: (row[0], FOLLOWS if key in filled else usual.get(key))
        for key, row in rows.items()
        if key not in differ and row[0] != usual.get(key)
    }
    return {"differ": differ, "shared": shared}
