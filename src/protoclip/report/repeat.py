"""How to repeat runs: the settings that tell them apart, and commands that train them again.

What a run folder says of its command is read in `runs.py`.
"""

import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from protoclip.config import Config
from protoclip.report.runs import RunFolder
from protoclip.training.plan import make_plan
from protoclip.training.run_folder import flat, to_toml

# Settings that say where and not how a run was made.
NAMES_OF_RUN = ("run.out", "run.name", "run.sync")
FOLLOWS = "from the data or model"  # instead of a default


def settings(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Settings that differ between the runs, and those that all share but `train` has others.

    Shared ones are `(value, default of train)`; `FOLLOWS` where `train` fills them.
    """
    usual, given = flat(tomllib.loads(to_toml(make_plan(Config()).config))), flat(asdict(Config()))
    keys = sorted({key for run in runs for key in run.settings} - set(NAMES_OF_RUN))
    values = {key: [run.settings.get(key) for run in runs] for key in keys}
    differ = {key: of for key, of in values.items() if any(value != of[0] for value in of)}
    filled = {key for key, value in usual.items() if given.get(key) is None}
    shared = {
        key: (of[0], FOLLOWS if key in filled else usual.get(key))
        for key, of in values.items()
        if key not in differ and of[0] != usual.get(key)
    }
    return {"differ": differ, "shared": shared}


def commands(runs: Sequence[RunFolder]) -> list[str]:
    """Commands that train the runs again, compare them, and measure their grouping."""
    again = [
        f"protoclip {run.command} --config {shlex.quote(str(run.folder / 'config.toml'))} "
        "--run.out FOLDER" + " --run.sync none" * ("run.sync" in run.settings)  # it holds this run
        for run in runs
    ]
    folders = shlex.join(str(run.folder) for run in runs)
    return [*again, f"protoclip compare {folders}", f"protoclip analyze {folders}"]
