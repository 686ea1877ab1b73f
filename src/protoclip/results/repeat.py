"""How to repeat runs: the settings that tell them apart, and commands that train them again.

What a run folder says of its command is read in `runs.py`.
"""

import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from protoclip.config import Config
from protoclip.results.read import RunFolder
from protoclip.training.plan import make_plan
from protoclip.training.run_folder import flat, to_toml

# Settings that say where and not how a run was made.
NAMES_OF_RUN = ("run.out", "run.name", "run.sync")
FOLLOWS = "from the data or model"  # instead of a default
OPEN = (None, "auto")  # values that leave a setting to the plan


def settings(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Settings that differ between the runs, and those that all share but `train` has others.

    Shared ones are `(value, default of train)`; `FOLLOWS` where `train` fills them.
    """
    usual, given = flat(tomllib.loads(to_toml(make_plan(Config()).config))), flat(asdict(Config()))
    towers = towers_of(runs)
    planned = [as_planned(run, towers) for run in runs]
    keys = sorted({key for each in planned for key in each} - set(NAMES_OF_RUN))
    values = {key: [each.get(key) for each in planned] for key in keys}
    differ = {key: of for key, of in values.items() if any(value != of[0] for value in of)}
    filled = {key for key, value in usual.items() if given.get(key) in OPEN and value not in OPEN}
    filled.add("teacher.tower")  # of a teacher, which the usual run has none of
    shared = {
        key: (of[0], FOLLOWS if key in filled else usual.get(key))
        for key, of in values.items()
        if key not in differ and of[0] != usual.get(key)
    }
    return {"differ": differ, "shared": shared}


def towers_of(runs: Sequence[RunFolder]) -> dict[str, str]:
    """The towers that learn teachers, by the features that these have, where a run names one."""
    distilled = [run.config.distilled_teachers for run in runs if run.config is not None]
    teachers = [teacher for each in distilled for teacher in each.values()]
    return {str(each.features): each.tower for each in teachers if each.tower is not None}


def as_planned(run: RunFolder, towers: Mapping[str, str]) -> dict[str, Any]:
    """A run's settings, with what its plan filled by its teachers; earlier versions left it open.

    Args:
        towers: As `towers_of` gives them.
    """
    if run.config is None:
        return dict(run.settings)

    def with_tower(teacher: Mapping[str, Any]) -> dict[str, Any]:
        tower = towers.get(teacher.get("features", "")) if teacher.get("distil") else None
        return dict(teacher) if tower is None else {"tower": tower, **teacher}

    settings = {**run.settings, "prototypes.source": run.config.prototype_source}
    if "teachers" in settings:
        settings["teachers"] = [with_tower(teacher) for teacher in settings["teachers"]]
    prefix = "teacher."
    teacher = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
    return settings | flat(with_tower(teacher), prefix)


def commands(runs: Sequence[RunFolder]) -> list[str]:
    """Commands that train the runs again, compare them, and measure their grouping."""
    again = [
        f"{program(run)} {run.command} --config {shlex.quote(str(run.folder / 'config.toml'))} "
        "--run.out FOLDER" + " --run.sync none" * ("run.sync" in run.settings)  # it holds this run
        for run in runs
    ]
    folders = shlex.join(str(run.folder) for run in runs)
    return [*again, f"protoclip compare {folders}", f"protoclip analyze {folders}"]


def program(run: RunFolder) -> str:
    """What to type before a run's command: with several ranks torchrun, on each of its hosts."""
    known = (run.environment.get(name, "") for name in ("hosts", "ranks"))
    hosts, ranks = (int(number) if number.isdecimal() else 1 for number in known)
    if ranks == 1:
        return "protoclip"
    nodes = f"--nnodes {hosts} --rdzv-backend c10d --rdzv-endpoint HOST:29500 " * (hosts > 1)
    return f"torchrun {nodes}--nproc-per-node {-(-ranks // max(1, hosts))} -m protoclip"
