"""What does saving cost? Training with checkpoints against training without, in alternation.

The demonstration's arm with a teacher, two counted episodes after one of warm-up: without a
checkpoint, and with one at the end of every episode. By default they are much rarer: every 10
minutes, and at the end of an episode if the last one is older than 15 seconds and than 100 times
the time that it took to write. Then, for the demonstration's model and for an RN50: how long the
training thread waits for one checkpoint, how long its thread writes, and the share of both of the
wall clock.

    python benchmarks/saving.py [--repeats 3] [--out FILE]
"""

import argparse
import datetime
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from protoclip.cli import demo
from protoclip.config import Config, ModelConfig
from protoclip.models import loading
from protoclip.progress import Progress
from protoclip.training import checkpoint, run, run_folder
from protoclip.training.checkpoint import CheckpointWriter
from protoclip.training.plan import make_plan

MODELS = {"demonstration": None, "RN50": "RN50"}


def config_of(out: Path) -> Config:
    config = make_plan(demo.arms()["ProtoCLIP + teacher"]).config
    return replace(
        config,
        run=replace(config.run, out=str(out), device="cpu", evaluate=False),
        episodes=replace(config.episodes, count=3, locked_image=0),
    )


def training_seconds(*, saving: bool) -> float:
    """Wall clock of the last two of three episodes, including the rest of the saving thread."""
    ends: list[float] = []
    due, save_if_due = CheckpointWriter.due, run.Run.save_if_due

    def at_every_end(self: CheckpointWriter, step: int, *, episode_end: bool) -> bool:
        return saving and episode_end

    def and_count(self: run.Run) -> bool:
        stop = save_if_due(self)
        if self.trainer.batch == 0:
            if self.trainer.episode == 3:
                self.writer.wait()
            ends.append(time.perf_counter())
        return stop

    CheckpointWriter.due = at_every_end  # type: ignore[method-assign]
    run.Run.save_if_due = and_count  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            run.train(config_of(Path(folder) / "run"))
    finally:
        CheckpointWriter.due = due  # type: ignore[method-assign]
        run.Run.save_if_due = save_if_due  # type: ignore[method-assign]
    return ends[2] - ends[0]


def one_checkpoint(model_name: str | None) -> tuple[float, float, float]:
    """Seconds that the training thread waits, seconds that the other one writes, megabytes."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder) / "run")
        if model_name is not None:
            config = replace(config, model=ModelConfig(name=model_name))
        model = loading.model(config.model, seed=0)
        built = run.Run(make_plan(config), model, folder=Path(folder))
        built.open_log(0)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        built.trainer.optimizer.step()  # makes the moments, which a checkpoint holds
        began = time.perf_counter()
        built.save()
        waited = time.perf_counter() - began
        built.writer.wait()
        written = time.perf_counter() - began - waited
        built.log.close()
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
    facts = run_folder.environment(torch.device("cpu"))
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
        pause = max(checkpoint.EPISODE_PAUSE, checkpoint.EPISODE_FACTOR * written)
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
