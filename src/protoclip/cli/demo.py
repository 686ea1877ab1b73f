"""The demonstration: CLIP, ProtoCLIP, and ProtoCLIP with an external teacher, side by side."""

import time
from pathlib import Path
from typing import Any

from protoclip.config import (
    Config,
    EpisodeConfig,
    LossConfig,
    RunConfig,
    TeacherConfig,
)
from protoclip.evaluation import compare
from protoclip.files import to_json
from protoclip.progress import duration
from protoclip.training import optim, run

# Fourteen passes: few enough for twelve minutes on two slow cores, and enough for the arms to part.
EPISODES = 24


def arms(*, seed: int = 0, out: str | None = None) -> dict[str, Config]:
    """The three runs: same seed, samples, augmentation, optimizer and schedule.

    `recipes/emoji_*.toml` are the same with the 20 passes of docs/LOG.md.
    """
    losses = {
        "CLIP": (LossConfig(prototypical=0.0), TeacherConfig()),
        "ProtoCLIP": (LossConfig(), TeacherConfig()),
        "ProtoCLIP + teacher": (LossConfig(teacher=2.0), TeacherConfig(features="emoji")),
    }
    configs = {}
    for name, (loss, teacher) in losses.items():
        folder = f"{out}/{run.slug(name)}" if out else None
        configs[name] = Config(
            run=RunConfig(name=name, seed=seed, out=folder),
            episodes=EpisodeConfig(count=EPISODES),
            loss=loss,
            teacher=teacher,
        )
    return configs


def demo(out: str | Path = "runs/demo", *, seed: int = 0) -> list[dict[str, Any]]:
    """Train and evaluate the three arms, print their table and say where to look.

    Arms that an earlier call finished are kept; one that was interrupted goes on.

    Args:
        out: Folder of the demonstration.
        seed: Seed of all three arms.

    Returns:
        The comparison, as written to `results.json` in the folder.

    Raises:
        ValueError: The folder holds something else than this demonstration.
    """
    started, out = time.monotonic(), Path(out)
    configs = arms(seed=seed, out=str(out))
    folders = {name: Path(config.run.out or "") for name, config in configs.items()}
    for name, config in configs.items():
        folder = folders[name]
        if folder.exists():
            if stored(folder) != run.to_toml(optim.resolved(config)[0]):
                raise ValueError(
                    f"{folder}: holds another run than this demonstration's; remove it, or choose "
                    "another folder with --out"
                )
            if (folder / "results.json").is_file():
                print(f"{name}: finished earlier, kept ({folder}; remove it to train again)")
                continue
        if "stopped" in run.train(config, resume="auto"):
            raise KeyboardInterrupt
    entries = compare.compare([compare.read_results(folder) for folder in folders.values()])
    (out / "results.json").write_text(to_json(entries, indent=2) + "\n", encoding="utf-8")
    compare.show(entries)
    print("One seed: another one moves a result by a point or two; docs/LOG.md has more seeds.")
    print(f"Done in {duration(time.monotonic() - started)}. Where to look:")
    print(f"  {out}/results.json          this table")
    print(f"  {out}/protoclip-teacher/    configuration, metrics and checkpoint of one run")
    print(f"  tensorboard --logdir {out}  curves")
    return entries


def stored(folder: Path) -> str | None:
    path = folder / "config.toml"
    return path.read_text(encoding="utf-8") if path.is_file() else None
