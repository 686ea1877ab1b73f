"""`protoclip train`: its options, and how the results of any run are printed.

The model is trained in `training/run.py`.
"""

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from protoclip.cli.imports import quick_imports
from protoclip.cli.spec import JsonOption, Recipes
from protoclip.config import Config
from protoclip.files import to_json
from protoclip.rules import check, require_paths, require_place
from protoclip.terminal import quote_word, say, visible

SECTIONS = {section.name for section in fields(Config)}


@dataclass(frozen=True, kw_only=True)
class Train(Config, Recipes, JsonOption):
    """Train a model and evaluate it."""

    resume: Literal["never", "auto"] = "never"  # auto continues the run in the folder.

    def __call__(self) -> None:
        config = Config.from_dict(self.settings())
        check(config)
        # A finished run needs its data no more, and of several ranks one shall tell a mistake.
        if self.resume == "never" and "RANK" not in os.environ:
            require_paths(config)
        if config.run.out is not None:
            require_place("run.out", config.run.out, is_folder=True)
        with quick_imports():
            import torch

            from protoclip.training import run

        torch.set_flush_denormal(True)  # CPUs are very slow with the denormals of soft targets
        results = run.train(config, resume=self.resume)
        show_results(results, as_json=self.json)

    def settings(self) -> dict[str, Any]:
        """What recipes and the command line set."""
        return {name: value for name, value in self.given.items() if name in SECTIONS}


def show_results(results: Mapping[str, Any], *, as_json: bool, explores: bool = False) -> None:
    """Print the results of a run on rank 0, or where it stands if a signal stopped it.

    With `explores` the last line names the command that shows what the model has learned.
    """
    from protoclip.distributed import collectives

    if collectives.launched()[0] > 0:
        exit_if_stopped(results)
        return
    if as_json:
        print(to_json(results, indent=2))
    else:
        for name, value in results["metrics"].items():
            print(f"{visible(name):<45} {'-' if value is None else format(value, '.4f')}")
    if "stopped" in results:
        say(
            f"{results['stopped']}: stopped after step {results['steps']}; the same command "
            "with --resume auto goes on"
        )
        exit_if_stopped(results)
    elif not as_json:
        command = f"protoclip explore {quote_word(results['folder'])}"
        look = f"; look at its pairs with {command}" if explores else ""
        print(f"written to {visible(results['folder'])}{look}")


def exit_if_stopped(results: Mapping[str, Any]) -> None:
    """After a stop by a signal, exit as shells report one: with 128 plus its number."""
    if (name := results.get("stopped")) is not None:
        sys.exit(128 + signal.Signals[name])
