"""`protoclip train`: its options, and how the results of any run are printed.

The model is trained in `training/run.py`.
"""

import os
import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from protoclip.cli.spec import JsonOption, Recipes, quick_imports
from protoclip.config import Config, Settings
from protoclip.files import to_json
from protoclip.rules import check, require_paths, require_place
from protoclip.terminal import say, visible


@dataclass(frozen=True, kw_only=True)
class Train(Config, Recipes, JsonOption):
    """Train a model and evaluate it."""

    resume: Literal["never", "auto"] = "never"  # auto continues the run in the folder.

    def __call__(self) -> None:
        config = Config.from_dict(self.settings())
        check(config)
        check_paths(config, resume=self.resume)
        show_results(perform("train", config, resume=self.resume), as_json=self.json)


def perform(command: str, settings: Settings, **options: Any) -> dict[str, Any]:
    """The results of `train`, `align` or `finetune`, after the imports of their libraries."""
    with quick_imports():
        import torch

        from protoclip.training import run

    torch.set_flush_denormal(True)  # CPUs are very slow with the denormals of soft targets
    results: dict[str, Any] = getattr(run, command)(settings, **options)
    return results


def check_paths(config: Config, *, resume: str) -> None:
    """Refuse typos in paths before slow imports; a finished run needs its data no more."""
    # Of several ranks rank 0 reports a mistake, once they know each other.
    if resume == "never" and "RANK" not in os.environ:
        require_paths(config)
    if config.run.out is not None:
        require_place("run.out", config.run.out, is_folder=True)


def show_results(results: Mapping[str, Any], *, as_json: bool, explores: bool = False) -> None:
    """Print the results of a run on rank 0, or where it stands if a signal stopped it.

    With `explores` the last line names the command that shows what the model has learned.
    """
    from protoclip.distributed import collectives

    if collectives.read_launcher()[0] > 0:
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
        command = f"protoclip explore {shlex.quote(results['folder'])}"
        look = f"; look at its pairs with {command}" if explores else ""
        print(f"written to {visible(results['folder'])}{look}")


def exit_if_stopped(results: Mapping[str, Any]) -> None:
    """After a stop by a signal, exit as shells report one: with 128 plus its number."""
    if (name := results.get("stopped")) is not None:
        sys.exit(128 + signal.Signals[name])
