"""How a run groups images and texts, at each of its checkpoints: `protoclip analyze`.

The measures are in `evaluation/grouping.py`, and the page of a report draws their curves.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from protoclip.config import Config, DataConfig
from protoclip.evaluation.grouping import Assignments, group_sizes
from protoclip.files import locked, require_ours, to_json, write_atomically
from protoclip.models import saved
from protoclip.progress import Progress
from protoclip.prototypes.nearest import nearest
from protoclip.results.compare import name_runs
from protoclip.results.examples import PAIRS_PER_GROUP, embed_checkpoint, open_examples
from protoclip.results.read import ANALYSIS
from protoclip.results.table import Cell, Row, Table
from protoclip.terminal import say

FEW = 100  # pairs; with fewer a note says that numbers say little
HINT = "train with --run.save_steps N --run.keep_checkpoints 100"


def analyze_runs(
    runs: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Measure the checkpoints of runs, and write a JSON file for each run.

    Args:
        out: Folder for the files; unset, each is `analysis.json` in the folder of its run.
        overwrite: Replace files that this function did not write.
        options: As `analyze_run` takes them.

    Raises:
        ValueError: As `analyze_run`; or a file is not ours, or another process writes it.
    """
    folders = [Path(run) for run in runs]
    files = choose_files(folders, out)
    for folder in folders:  # before minutes of work on the first one
        open_run(folder)
    with ExitStack() as stack:
        for file in {path.resolve(): path for path in files}.values():
            stack.enter_context(locked(file))
            if not overwrite:
                require_ours(file, '"checkpoints"')
        analyses = []
        for folder in folders:
            try:
                analyses.append(analyze_run(folder, **options))
            except ValueError as error:  # names the run, where there are several
                if len(runs) == 1 or str(error).startswith((f"{folder}:", f"{folder}/")):
                    raise
                raise ValueError(f"{folder}: {error}") from error
        for file, analysis in zip(files, analyses, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, to_json(analysis, indent=2) + "\n")
            note_limits(analysis)
            say(f"written to {file}")
    if len({(analysis["digest"], analysis["groups"]) for analysis in analyses}) > 1:
        say("note: the runs differ in data or in the number of groups; see --data and --groups")
    return analyses


def choose_files(folders: Sequence[Path], out: str | Path | None) -> list[Path]:
    """The file of each run; in the folder `out` it is named as the run's folder."""
    if out is None:
        return [folder / ANALYSIS for folder in folders]
    names, chosen = [folder.resolve().name for folder in folders], list[str]()
    for name in names:
        # A numbered name may be the name of another run.
        numbered = (f"{name}-{number}" for number in count(2))
        free = (choice for choice in numbered if choice not in (*chosen, *names))
        chosen.append(next(free) if name in chosen else name)
    return [Path(out) / f"{name}.json" for name in chosen]


def note_limits(analysis: dict[str, Any]) -> None:
    """Print notes on an analysis whose numbers say little."""
    notes = [*analysis["notes"]]
    if len(analysis["checkpoints"]) == 1:
        notes.append(f"a single checkpoint, so no curves; {HINT}")
    if analysis["pairs"] < FEW:
        pairs = analysis["pairs"]
        notes.append(f"only {pairs} pairs, whose groups say little; --data names others")
    for text in notes:
        say(f"note: {analysis['folder']}: {text}")


def analyze_run(
    run: Path,
    *,
    data: DataConfig | None = None,
    samples: int = 5000,
    num_groups: int | None = None,
    allow_links: bool = False,
    device: torch.device,
) -> dict[str, Any]:
    """Measure every checkpoint of a run on held-out pairs.

    Features always; projections too if the run trains its heads. `prototypes/...` are the sizes of
    the run's own prototypes, where a checkpoint has some: how many held-out samples are nearest to
    each. `grouping.measure` describes the other values.

    Args:
        run: A run folder.
        data: Other pairs, as in `data.train`, and how to read them, with an `allow_links` of its
            own; the emoji mean their validation split. Unset, the run's validation set: its
            held-out pairs, or that split.
        samples: Most pairs to use: drawn evenly, or the first ones of a stream.
        num_groups: Groups of each modality; else the run's number of prototypes, but at least five
            pairs to a group.
        allow_links: As in `data`, for the run's own pairs; its folder does not grant it.

    Returns:
        A JSON value. Its `digest` is equal for equal pairs; versions up to 1.0.0 wrote none.

    Raises:
        ValueError: This is no run, it has no checkpoint or no held-out data, or pairs or groups are
            too few.
    """
    config, checkpoints = open_run(run)
    config = replace(config, data=replace(config.data, allow_links=allow_links))
    pairs = open_examples(run, config, samples, data=data)
    most = len(pairs.images) // PAIRS_PER_GROUP
    number = num_groups or min(config.prototypes.number or most, most)
    if not 2 <= number <= most:
        raise ValueError(f"{number} groups: choose from 2 to {most} with --groups")
    entries, previous = [], dict[str, Assignments]()
    progress = Progress(f"analyze {config.run.name}", len(checkpoints))
    for done, checkpoint in enumerate(checkpoints, 1):
        step = int(checkpoint.name.removeprefix("step-"))
        entry: dict[str, Any] = {"step": step, "samples": step * config.episodes.batch_size}
        spaces = embed_checkpoint(checkpoint, pairs, project=config.uses_prototypes, device=device)
        for space, rows in spaces.items():
            entry[space], previous[space] = pairs.measure_grouping(
                rows,
                number,
                classes=pairs.classes,
                previous=previous.get(space),
                seed=config.run.seed,
            )
        prototypes = saved.read_prototypes(checkpoint) if "projections" in spaces else {}
        for modality, centroids in prototypes.items():
            projections = spaces["projections"][f"{modality}s"]
            sizes = group_sizes(nearest(projections, centroids)[0], len(centroids))
            for name, size in sizes.items():
                entry["projections"][f"prototypes/{name}/{modality}"] = size
        entries.append(entry)
        progress.update(done)
    return {
        "name": config.run.name,
        "seed": config.run.seed,
        "folder": str(run),
        "data": pairs.name,
        "pairs": len(pairs.images),
        "digest": pairs.digest,
        "skipped": pairs.skipped,
        "notes": pairs.notes,
        "groups": number,
        "checkpoints": entries,
    }


def open_run(run: Path) -> tuple[Config, list[Path]]:
    """The settings of a run and its checkpoints, oldest first.

    Raises:
        ValueError: This is no run, or it has no checkpoint.
    """
    if not (run / saved.SETTINGS).is_file():
        raise ValueError(f"{run}: not a run folder, which has a {saved.SETTINGS}")
    config = saved.read_config(run)
    checkpoints = saved.checkpoints(run)
    if not checkpoints:
        raise ValueError(f"{run}: no checkpoint to analyse; {HINT}")
    return config, checkpoints


def table_of_groupings(analyses: Sequence[dict[str, Any]]) -> Table:
    """The measures of the last checkpoints: one row a measure, one column a run and space."""
    names = name_runs((one["name"], one["seed"], one["folder"]) for one in analyses)
    measures: list[dict[str, float]] = []
    columns = []
    for analysis, name in zip(analyses, names, strict=True):
        last = analysis["checkpoints"][-1]
        for space in ("features", "projections"):
            if space in last:
                measures.append(last[space])
                columns.append([name, f"{space}, step {last['step']}"])
    rows = []
    for measure in sorted({key for values in measures for key in values}):
        digits = ".4g" if measure.startswith(("groups/", "prototypes/")) else ".3f"
        row = [values.get(measure) for values in measures]
        cells = [Cell(value="" if value is None else format(value, digits)) for value in row]
        rows.append(Row(heading=[measure], cells=cells))
    title = "Last checkpoint, held-out pairs"
    return Table(title=title, heading=["measure"], columns=columns, rows=rows)
