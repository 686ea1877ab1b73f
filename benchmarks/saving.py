"""What does saving cost? Training with checkpoints against training without, in alternation.

The demonstration's arm with a teacher, two counted episodes after one of warm-up: without a
checkpoint, and with one at the end of every episode, far more often than by default: those at ends
are 15 seconds and 100 times their writing no_sync, and 10 minutes bring one besides. Then what one
checkpoint takes of the training thread, and what its thread writes, for the demonstration's model
and for an RN50, and the share that makes of the default's cadence.

    python benchmarks/saving.py [--repeats 3] [--out FILE]
"""

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from protoclip.cli import demo
from protoclip.config import Config, ModelConfig
from protoclip.data import sources
from protoclip.data.loader import SkipLog
from protoclip.models import loading
from protoclip.progress import Progress
from protoclip.training import build, run, saver, session, snapshot
from protoclip.training.state import TrainState

MODELS = {"demonstration": None, "RN50": "RN50"}


def config_of(out: Path) -> Config:
    config = demo.arms()["ProtoCLIP + teacher"]
    return replace(
        config,
        run=replace(config.run, out=str(out), device="cpu", evaluate=False),
        episodes=replace(config.episodes, count=3, locked_image=0),
    )


def training_seconds(*, saving: bool) -> float:
    """Wall clock of the last two of three episodes, the saving thread's rest included."""
    ends: list[float] = []
    due: Callable[..., bool] = saver.Saver.due
    save = session.Session.save

    def at_every_end(self: saver.Saver, step: int, *, episode_end: bool) -> bool:
        return saving and episode_end

    def and_count(self: session.Session, state: TrainState, grouping: Any) -> bool:
        stop = save(self, state, grouping)
        if state.batch == 0:
            if state.episode == 3:
                self.saver.finish()
            ends.append(time.perf_counter())
        return stop

    saver.Saver.due = at_every_end  # type: ignore[method-assign]
    session.Session.save = and_count  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            run.train(config_of(Path(folder) / "run"))
    finally:
        saver.Saver.due = due  # type: ignore[method-assign]
        session.Session.save = save  # type: ignore[method-assign]
    return ends[2] - ends[0]


def one_checkpoint(model_name: str | None) -> tuple[float, float, float]:
    """Seconds that the training thread waits, seconds that the other one writes, megabytes."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder) / "run")
        if model_name is not None:
            config = replace(config, model=ModelConfig(name=model_name))
        device = torch.device("cpu")
        model = loading.to_device(loading.model(config.model, seed=0), device)
        samples = sources.pairs(config)
        skips = SkipLog(Path(folder) / "skipped.jsonl", max_share=1.0, at_least=1)
        beside = session.Session(
            config,
            folder=Path(folder),
            model=model,
            samples=samples,
            skips=skips,
            arithmetic={},
        )
        trainer = build.trainer(
            config,
            model=model,
            samples=samples,
            precision="fp32",
            log=beside.log,
            save=beside.save,
            evaluate=beside.evaluate,
            on_step=beside.on_step,
            on_read=skips.add,
            diverged=Path(folder) / "diverged.json",
        )
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        trainer.optimizer.step()  # makes the moments, which a checkpoint holds
        state = TrainState(step=1)
        began = time.perf_counter()
        beside.saver.save(1, snapshot.take(trainer, state, None))
        waited = time.perf_counter() - began
        beside.saver.finish()
        written = time.perf_counter() - began - waited
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / 1e6
        return waited, written, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    progress = Progress("benchmark: saving", 2 * arguments.repeats)
    for repeat in range(arguments.repeats):
        for saving in seconds:
            seconds[saving].append(training_seconds(saving=saving))
            progress.update(2 * repeat + saving + 1)
    facts = run.environment(torch.device("cpu"))
    base = statistics.median(seconds[False])
    lines = [
        "# Saving: checkpoints beside training",
        "",
        f"`python benchmarks/saving.py --repeats {arguments.repeats}`, "
        f"{datetime.date.today().isoformat()}; {facts['device']}, torch {facts['torch']}. Two "
        f"episodes of 4,096 pairs (5 s), median [least, most] of {arguments.repeats}.",
        "",
        "| checkpoints | seconds | to none |",
        "|---|---|---|",
    ]
    for saving, spent in seconds.items():
        median = statistics.median(spent)
        lines.append(
            f"| {'after every episode' if saving else 'none'} "
            f"| {median:.2f} [{min(spent):.2f}, {max(spent):.2f}] "
            f"| {100 * (median / base - 1):+.1f}% |"
        )
    lines += [
        "",
        "One checkpoint, median of 3. Its share of wall clock counts all that both threads spend, "
        "as if no core were free for the second.",
        "",
        "| model | MB | training waits | written beside | at 10 minutes | most at ends |",
        "|---|---|---|---|---|---|",
    ]
    for name, model_name in MODELS.items():
        found = [one_checkpoint(model_name) for _ in range(3)]
        waited, written, size = (statistics.median(part) for part in zip(*found, strict=True))
        pause = max(saver.EPISODE_PAUSE, saver.EPISODE_FACTOR * written)
        shares = [f"{100 * (waited + written) / every:.2f}%" for every in (600, pause)]
        lines.append(
            f"| {name} | {size:.0f} | {1000 * waited:.0f} ms | {1000 * written:.0f} ms "
            f"| {' | '.join(shares)} |"
        )
    text = "\n".join([*lines, ""])
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
