"""Reads run folders, finished or not: a report may also be of interrupted runs.

What a run itself checks before it goes on in its folder is in `training/run_folder.py`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protoclip.config import Config, flatten
from protoclip.evaluation.paired import RunResults, explain_no_run, read_results
from protoclip.files import read_json, read_json_lines, read_toml
from protoclip.models import checkpoint
from protoclip.results.compare import name_runs

Numbers = npt.NDArray[np.float64]
# A metric over the run: steps, and its value at each.
Curve = tuple[Numbers, Numbers]
# The inverse of logit scales.
TEMPERATURES = {
    "temperature": "train/logit_scale",
    "prototype_temperature": "train/prototype_logit_scale",
}
ANALYSIS = "analysis.json"  # what `protoclip analyze` writes, in the folder of a run


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run, finished or not."""

    folder: Path
    config: Config
    settings: Mapping[str, Any]  # by dotted name, as `config.toml` has them
    # Those of `metrics.jsonl`; temperatures from logit scales; and, from two checkpoints on,
    # measures of `protoclip analyze` as `features/...`.
    curves: Mapping[str, Curve]
    results: RunResults | None  # None for a run that has not finished
    environment: Mapping[str, str]  # empty for such a run
    skipped: Sequence[Mapping[str, Any]]
    analysis: Mapping[str, Any] | None
    sweep: Mapping[str, Any] | None  # over alpha, at the end of fine-tuning
    checkpoints: Sequence[Path]
    seconds: float | None  # training time in all, or until the newest checkpoint; None if not known
    model: str = ""  # what to call its model among the runs that are shown
    label: str = ""  # what to call the run itself there

    @property
    def steps(self) -> int:
        """Steps that the run was to make."""
        episodes = self.config.episodes
        return (episodes.count or 0) * ((episodes.size or 0) // episodes.batch_size)

    @property
    def last_step(self) -> int:
        """The last step that is logged."""
        return int(max((steps[-1] for steps, _ in self.curves.values()), default=0))

    @property
    def differences(self) -> dict[str, Any]:
        """Differences of a fine-tuned model to its start, by metric."""
        return self.results.facts.get("differences", {}) if self.results else {}

    @property
    def command(self) -> str:
        """The command that makes such a run, as far as its files tell."""
        if self.sweep is not None:
            alpha = self.sweep["alpha"]
            chosen = alpha == self.sweep.get("best_alpha")
            return "finetune" if chosen else f"finetune --alpha {alpha}"
        model = self.config.model
        if model.start is not None and model.frozen_batch_norm:
            return "finetune"  # only its defaults freeze BatchNorm
        return "align" if any(map(checkpoint.is_aligned, self.checkpoints[-1:])) else "train"


def read_runs(paths: Iterable[str | Path], *, allow_links: bool = False) -> list[RunFolder]:
    """Read run folders, each once, and name their models as `compare` does."""
    by_path = {os.path.realpath(path): read_run(path, allow_links=allow_links) for path in paths}
    runs = [*by_path.values()]
    facts = [(run.config.run.name, run.config.run.seed, str(run.folder)) for run in runs]
    return [
        replace(run, model=model, label=label)
        for run, (model, label) in zip(runs, name_runs(facts), strict=True)
    ]


def read_run(path: str | Path, *, allow_links: bool = False) -> RunFolder:
    """Read a run folder. It may come from others, so its own settings permit nothing.

    Raises `ValueError` if this is no run folder, or its files are damaged.
    """
    folder = Path(path)
    if not (folder / checkpoint.SETTINGS).is_file():
        raise ValueError(f"{folder}: {explain_no_run(folder)}")
    config = checkpoint.read_config(folder, allow_links=allow_links)
    checkpoints = checkpoint.checkpoints(folder)
    results = read_results(folder) if (folder / "results.json").exists() else None
    analysis, sweep = (
        read_json(folder / name) if (folder / name).exists() else None
        for name in (ANALYSIS, "wise_ft.json")
    )
    try:
        seconds, environment = None, dict[str, Any]()
        if results is not None:
            environment = {**(results.facts.get("environment") or {})}
            environment |= {"machines": results.machines}
            environment |= {"precision": results.facts.get("precision")}
            seconds = results.train_seconds
        elif checkpoints and (state := checkpoints[-1] / checkpoint.STATE).exists():
            seconds = float(read_json(state).get("seconds") or 0.0)
        return RunFolder(
            folder=folder,
            config=config,
            settings=flatten(read_toml(folder / checkpoint.SETTINGS)),
            curves=read_curves(folder, analysis),
            results=results,
            environment={name: str(value) for name, value in environment.items() if value},
            skipped=[
                line
                for path in sorted(folder.glob("skipped*.jsonl"))
                for line in read_json_lines(path)
            ],
            analysis=analysis,
            sweep=sweep,
            checkpoints=checkpoints,
            seconds=seconds,
        )
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{folder}: a file in it is not what the run wrote ({error!r}); restore it, or leave "
            "the run out"
        ) from error


def make_curves(points: Iterable[tuple[str, int, float | None]]) -> dict[str, Curve]:
    """Each metric's name, steps and finite values; of a repeated step the last value counts."""
    by_name: dict[str, dict[int, float]] = {}
    for name, step, value in points:
        if value is not None:
            by_name.setdefault(name, {})[step] = value
    curves = {}
    for name, values in by_name.items():
        steps = np.array(sorted(values), np.float64)
        curves[name] = steps, np.array([values[step] for step in steps], np.float64)
    return curves


def read_curves(folder: Path, analysis: Mapping[str, Any] | None) -> dict[str, Curve]:
    """What a run logged, its temperatures, and what `protoclip analyze` measured of the features of
    two checkpoints or more."""
    lines = read_json_lines(folder / "metrics.jsonl")
    logged = ((name, line) for line in lines for name in line if "/" in name)
    curves = make_curves((name, line["step"], line[name]) for name, line in logged)
    for name, scale in TEMPERATURES.items():
        if scale in curves:
            curves[name] = curves[scale][0], 1 / np.maximum(curves[scale][1], 1e-12)
    entries = analysis["checkpoints"] if analysis else []
    if len(entries) > 1:
        measured = ((name, entry) for entry in entries for name in entry["features"])
        curves |= make_curves(
            (f"features/{name}", entry["step"], entry["features"][name]) for name, entry in measured
        )
    return curves
