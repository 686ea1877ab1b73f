"""Reads run folders, finished or not: a report may also be of interrupted runs.

What a run itself checks before it goes on in its folder is in `training/run_folder.py`.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protoclip.config import Config
from protoclip.evaluation.paired import (
    RunResults,
    name_runs_inside,
    read_results,
    require_no_records,
)
from protoclip.files import has_changed, read_json, read_local, read_toml
from protoclip.models import saved
from protoclip.results.compare import name_models, name_runs
from protoclip.terminal import say
from protoclip.training.run_folder import as_kept, flat

Numbers = npt.NDArray[np.float64]
# A metric over the run: steps, and its value at each.
Curve = tuple[Numbers, Numbers]
ANALYSIS = "analysis.json"  # what `protoclip analyze` writes, in the folder of a run
# What reading JSON of another shape than ours raises.
MISSHAPEN = (ValueError, LookupError, TypeError, AttributeError, OverflowError)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run, finished or not.

    Attributes:
        model, label: What to call its model, and the run itself, among the runs that are shown.
        settings: By dotted name.
        config: None if another version of the package wrote it; then `problem` says so.
        curves: Those of `metrics.jsonl`; temperatures from logit scales; and, from two checkpoints
            on, measures of `protoclip analyze` as `features/...`.
        results: None for a run that has not finished.
        analysis: What `protoclip analyze` wrote.
        sweep: Over alpha, at the end of fine-tuning.
        differences: Differences of a fine-tuned model to its start, by metric.
        command: The command that makes such a run, such as `finetune`.
        seconds: Training time in all, or until the newest checkpoint; None if not known.
    """

    folder: Path
    name: str
    seed: int
    settings: Mapping[str, Any]
    config: Config | None
    problem: str
    curves: Mapping[str, Curve]
    results: RunResults | None
    environment: Mapping[str, Any]
    skipped: Sequence[Mapping[str, Any]]
    analysis: Mapping[str, Any] | None
    sweep: Mapping[str, Any] | None
    differences: Mapping[str, Mapping[str, Any]]
    checkpoints: Sequence[Path]
    command: str
    seconds: float | None
    model: str = ""
    label: str = ""

    @property
    def batch_size(self) -> int:
        return get_int(self.settings, "episodes.batch_size", 1)

    @property
    def steps(self) -> int:
        """Steps that the run was to make."""
        size, count = (get_int(self.settings, f"episodes.{key}", 0) for key in ("size", "count"))
        return count * (size // max(1, self.batch_size))

    @property
    def last_step(self) -> int:
        """The last step that is logged."""
        return int(max((steps[-1] for steps, _ in self.curves.values()), default=0))


def read_runs(paths: Iterable[str | Path], *, allow_links: bool = False) -> list[RunFolder]:
    """Read run folders, each once, and name their models as `compare` does."""
    by_path = {os.path.realpath(path): read_run(path, allow_links=allow_links) for path in paths}
    facts = [(run.name, run.seed, str(run.folder)) for run in by_path.values()]
    return [
        replace(run, model=model, label=label)
        for run, model, label in zip(
            by_path.values(), name_models(facts), name_runs(facts), strict=True
        )
    ]


def read_run(path: str | Path, *, allow_links: bool = False) -> RunFolder:
    """Read a run folder. It may come from others, so its own settings permit nothing.

    Args:
        allow_links: As in `data`.

    Raises:
        ValueError: This is no run folder, or its files are damaged.
    """
    folder = Path(path)
    if not folder.exists():
        raise ValueError(f"{folder}: no such run folder")
    config_file = folder / "config.toml"
    if not config_file.is_file():
        require_no_records(folder)
        reason = name_runs_inside(folder) or "not a run folder; a run has a config.toml"
        raise ValueError(f"{folder}: {reason}")
    tree = read_toml(config_file)
    config, problem = None, ""
    try:
        config = Config.from_dict(tree)
        config = replace(config, data=replace(config.data, allow_links=allow_links))
    except ValueError as error:
        problem = f"another version of protoclip wrote this run ({error})"
    settings = flat(as_kept(tree))
    results = read_results(folder) if (folder / "results.json").exists() else None
    analysis, curves = read_analysis(folder / ANALYSIS), read_curves(folder / "metrics.jsonl")
    if results is not None and not curves:
        say(f"warning: {folder / 'metrics.jsonl'}: holds no step, so the run has no curves")
    checkpoints, environment = saved.checkpoints(folder), describe_environment(results)
    return RunFolder(
        folder=folder,
        name=str(settings.get("run.name", folder.name)),
        seed=get_int(settings, "run.seed", 0),
        settings=settings,
        config=config,
        problem=problem,
        curves=curves | derive_temperatures(curves) | list_analysis_curves(analysis),
        results=results,
        environment=environment,
        skipped=[
            sample for file in sorted(folder.glob("skipped*.jsonl")) for sample in read_lines(file)
        ],
        analysis=analysis,
        sweep=read_sweep(folder / "wise_ft.json"),
        differences=read_start_differences(results),
        checkpoints=checkpoints,
        command=infer_command(folder, checkpoints, settings, ended=results is not None),
        seconds=environment.get("train_seconds", read_train_seconds(checkpoints)),
    )


def read_train_seconds(checkpoints: Sequence[Path]) -> float | None:
    """Seconds that a run has trained until the newest checkpoint; None if not known."""
    spent: Any = None
    with suppress(ValueError):
        spent = read_json(checkpoints[-1] / saved.STATE).get("seconds") if checkpoints else None
    return float(spent) if is_number(spent) else None


def infer_command(
    folder: Path, checkpoints: Sequence[Path], settings: Mapping[str, Any], *, ended: bool
) -> str:
    """The command that made a run, as far as its files tell."""
    if (path := folder / "wise_ft.json").is_file():
        with suppress(ValueError):
            sweep = read_json(path)
            if is_number(alpha := sweep.get("alpha")) and alpha != sweep.get("best_alpha"):
                return f"finetune --alpha {alpha}"  # which the rule would not choose
        return "finetune"
    starts = settings.get("model.start") or settings.get("model.pretrained")
    ends = ended and "run.overfit" not in settings  # such a fine-tuning has a `wise_ft.json`
    if starts and not ends and settings.get("model.frozen_batch_norm") is True:
        return "finetune"  # only its defaults freeze BatchNorm
    return "align" if checkpoints and saved.is_aligned(checkpoints[-1]) else "train"


def get_int(settings: Mapping[str, Any], name: str, default: int) -> int:
    """A setting of another version, if it is a whole number there too."""
    value = settings.get(name, default)
    return value if type(value) is int else default


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without lines that are damaged.

    Raises:
        ValueError: The file exists, but cannot be read.
    """
    objects = []
    try:
        text = read_local(path, errors="replace") if path.exists() else ""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: {reason}; restore it, or leave the run out") from None
    for line in text.split("\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects


def read_curves(path: Path) -> dict[str, Curve]:
    """The finite values of each metric in `metrics.jsonl`, by name."""
    by_step: dict[str, dict[float, float]] = {}
    for line in read_lines(path):
        step: Any = line.get("step")
        if not is_number(step):
            continue
        for name, value in line.items():
            if "/" in name and is_number(value):
                by_step.setdefault(name, {})[step] = value
    curves = {}
    for name, values in by_step.items():
        steps = sorted(values)
        points = [values[step] for step in steps]
        curves[name] = (np.array(steps, np.float64), np.array(points, np.float64))
    return curves


def derive_temperatures(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """The temperatures of pairs and of prototypes: the inverse of the logit scales."""
    scales = {
        "temperature": "train/logit_scale",
        "prototype_temperature": "train/prototype_logit_scale",
    }
    return {
        name: (curves[scale][0], 1 / np.maximum(curves[scale][1], 1e-12))
        for name, scale in scales.items()
        if scale in curves
    }


def list_analysis_curves(analysis: Mapping[str, Any] | None) -> dict[str, Curve]:
    """What `protoclip analyze` measured of the features of two checkpoints or more."""
    checkpoints = analysis["checkpoints"] if analysis else []
    curves = {}
    for key in checkpoints[-1]["features"] if len(checkpoints) > 1 else ():
        entries = [entry for entry in checkpoints if key in entry["features"]]
        steps = np.array([entry["step"] for entry in entries], np.float64)
        values = np.array([entry["features"][key] for entry in entries], np.float64)
        curves[f"features/{key}"] = (steps, values)
    return curves


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a finite number."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return numeric and abs(value) < 1e300 and math.isfinite(value)


def describe_environment(results: RunResults | None) -> dict[str, Any]:
    """Hardware and versions, and how the run ended; empty if it has not."""
    if results is None:
        return {}
    entries, facts = results.facts.get("environment"), results.facts
    environment: dict[str, Any] = {}
    if isinstance(entries, dict):
        environment = {str(name): str(value) for name, value in entries.items()}
    environment |= {"machines": results.machines} if results.machines else {}
    numbers = ("train_seconds", "samples_seen", "samples_skipped")
    environment |= {name: facts[name] for name in numbers if is_number(facts.get(name))}
    return environment | ({"precision": str(facts["precision"])} if "precision" in facts else {})


def read_start_differences(results: RunResults | None) -> dict[str, dict[str, Any]]:
    """The finite differences of a fine-tuned model to its start; without them none."""
    differences: dict[str, dict[str, Any]] = {}
    with suppress(*MISSHAPEN):
        for name, change in (results.facts if results is not None else {})["differences"].items():
            ends = change["interval"]
            if all(map(is_number, (change["mean"], *(ends or ())))) and len(ends or (0, 0)) == 2:
                differences[str(name)] = {"mean": change["mean"], "interval": ends}
    return differences


def read_analysis(path: Path) -> dict[str, Any] | None:
    """What `protoclip analyze` wrote; None if it did not, or the file is damaged."""
    try:
        analysis = read_json(path)
        checkpoints = [
            {"step": int(entry["step"]), **read_spaces(entry)} for entry in analysis["checkpoints"]
        ]
        source = {"data": str(analysis["data"]), "pairs": int(analysis["pairs"])}
        return {**source, "checkpoints": checkpoints} if checkpoints[-1]["features"] else None
    except MISSHAPEN:
        return None


def read_spaces(entry: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The finite measures of a checkpoint in each space; `features` are always there."""
    return {
        space: {str(k): float(v) for k, v in dict(entry[space]).items() if is_number(v)}
        for space in ("features", "projections")
        if space == "features" or space in entry
    }


def read_sweep(path: Path) -> dict[str, Any] | None:
    """The chosen alpha and each point's scores by data set; None without a whole sweep."""
    try:
        sweep = read_json(path)
        if has_changed(sweep):  # people may edit it
            say(f"warning: {path}: not what the run wrote: its checksum differs")
        points = [
            {
                "alpha": float(point["alpha"]),
                "scores": {str(name): float(value) for name, value in point["scores"].items()},
                "mean": float(point["mean"]),
            }
            for point in sweep["points"]
        ]
        return {"alpha": float(sweep["alpha"]), "points": points} if points else None
    except MISSHAPEN:
        return None
