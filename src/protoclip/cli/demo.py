"""`protoclip demo`: CLIP, ProtoCLIP, and ProtoCLIP with an external teacher, side by side.

`quick.py` has `--quick`.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protoclip.cli.demo_runs import is_finished, write_report
from protoclip.cli.train import exit_if_stopped
from protoclip.config import Config, EpisodeConfig, LossConfig, RunConfig, Seed, TeacherConfig
from protoclip.files import require_ours, to_json, write_atomically
from protoclip.progress import duration
from protoclip.rules import require_place
from protoclip.terminal import visible

# Fourteen passes take twelve minutes on two slow cores, and are enough to tell the arms apart.
EPISODES = 24
EXAMPLES = 600  # pairs in the report, which takes ten seconds so


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train and compare CLIP and ProtoCLIP, also with a teacher."""

    out: str | None = None  # Folder of the runs; else runs/demo, or runs/quick.
    seed: Seed = 0  # Seed of all of them.
    quick: bool = False  # One small model in about a minute, to look at.

    def __call__(self) -> None:
        out = self.out or ("runs/quick" if self.quick else "runs/demo")
        require_place("--out", out, is_folder=True)
        import torch

        from protoclip.cli.quick import quick

        torch.set_flush_denormal(True)
        (quick if self.quick else demo)(out, seed=self.seed)


def arms(*, seed: int = 0, out: str | None = None) -> dict[str, Config]:
    """The three runs, with the same seed, samples, augmentation, optimizer and schedule.

    `recipes/emoji_*.toml` are the same runs with 20 passes.
    """
    from protoclip.training.run_folder import slug

    losses = {
        "CLIP": (LossConfig(prototypical=0.0), TeacherConfig()),
        "ProtoCLIP": (LossConfig(), TeacherConfig()),
        "ProtoCLIP + teacher": (LossConfig(), TeacherConfig(features="emoji")),
    }
    return {
        name: Config(
            run=RunConfig(name=name, seed=seed, out=f"{out}/{slug(name)}" if out else None),
            episodes=EpisodeConfig(count=EPISODES),
            loss=loss,
            teacher=teacher,
        )
        for name, (loss, teacher) in losses.items()
    }


def demo(out: str | Path = "runs/demo", *, seed: int = 0) -> list[dict[str, Any]]:
    """Train and evaluate the three arms; return their comparison, as written to `results.json`.

    Finished arms of an earlier call are kept; an interrupted one continues.

    Raises:
        ValueError: The folder holds something else than this demonstration.
    """
    from protoclip.evaluation.paired import read_results
    from protoclip.results import MARK
    from protoclip.results.compare import compare_runs
    from protoclip.results.table import print_table, table_of_runs
    from protoclip.training import run

    started, out = time.monotonic(), Path(out)
    require_ours(out / "results.json", '"seeds"', "with --out")
    require_ours(out / "report.html", MARK, "with --out")
    configs = arms(seed=seed, out=str(out))
    folders = {name: Path(config.run.out or "") for name, config in configs.items()}
    for name, config in configs.items():
        if is_finished(config):
            shown = visible(str(folders[name]))
            print(f"{name}: finished earlier, kept ({shown}; remove it to train again)")
            continue
        exit_if_stopped(run.train(config, resume="auto"))
    entries = compare_runs([read_results(folder) for folder in folders.values()])
    write_atomically(out / "results.json", to_json(entries, indent=2) + "\n")
    print_table(table_of_runs(entries))
    print("One seed: another one moves a result by a point or two; docs/LOG.md has more seeds.")
    report = write_report(folders.values(), out / "report.html", samples=EXAMPLES)
    print(f"Done in {duration(time.monotonic() - started)}. Where to look:")
    shown = visible(str(out))
    if report:
        print(f"  {shown}/report.html           the runs to look at, in a browser")
    print(f"  {shown}/results.json          this table")
    print(f"  {shown}/protoclip-teacher/    configuration, metrics and checkpoint of one run")
    print(f"  tensorboard --logdir {shown}  curves")
    return entries
