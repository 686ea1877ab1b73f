"""What does grouping cost? Wall clock of ProtoCLIP over CLIP at equal samples, and where it goes.

The three arms of the demonstration, in alternation, each for one episode of warm-up (not counted)
and two counted episodes; the ratio of medians over all repeats is printed as a table.

    python benchmarks/step_cost.py [--repeats 3] [--out FILE]
"""

import argparse
import datetime
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from protoclip import build, demo, run
from protoclip.config import Config
from protoclip.data.pairs import ImageTextPairs
from protoclip.progress import Progress
from protoclip.train.precision import resolve
from protoclip.train.state import TrainState

COUNTED = 2


def episode_seconds(config: Config, samples: ImageTextPairs) -> dict[str, list[float]]:
    """Seconds of each counted episode, and of the extraction and the grouping in it."""
    config = replace(
        config, episodes=replace(config.episodes, count=1 + COUNTED, warm_up=1, locked_image=0)
    )
    device = build.device(config.run.device)
    parts: dict[str, list[float]] = defaultdict(list)
    ends: list[float] = []

    def log(state: TrainState, metrics: Mapping[str, float]) -> None:
        for part in ("extract", "group"):
            if f"train/seconds/{part}" in metrics:
                parts[part].append(metrics[f"train/seconds/{part}"])

    build.trainer(
        config,
        model=build.place(build.model(config.model, seed=0), device),
        samples=samples,
        precision=resolve(config.run.precision, device),
        log=log,
        save=lambda state: ends.append(state.seconds),
        evaluate=lambda state: {},
        on_step=lambda state, stage: None,
    ).fit(TrainState())
    parts["episode"] = [end - start for start, end in pairwise(ends)]
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    arms = demo.arms()
    seconds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in arms}
    samples = build.pairs(arms["CLIP"])
    for row in range(len(samples)):
        samples.image(row)  # all arms find the pictures decoded
    progress = Progress("benchmark: step cost", arguments.repeats * len(arms))
    for repeat in range(arguments.repeats):
        for number, (name, config) in enumerate(arms.items()):
            for part, values in episode_seconds(config, samples).items():
                seconds[name][part] += values
            progress.update(repeat * len(arms) + number + 1, name)

    config = arms["CLIP"]
    device = build.device(config.run.device)
    facts = run.environment(device)
    lines = [
        "# Step cost: ProtoCLIP over CLIP at equal samples",
        "",
        f"`python benchmarks/step_cost.py --repeats {arguments.repeats}`, "
        f"{datetime.date.today().isoformat()}; {facts['device']}, torch {facts['torch']}, "
        f"{resolve(config.run.precision, device)}; episodes of {config.episodes.size} pairs, "
        f"batch {config.episodes.batch_size}, {config.model.image.name} at "
        f"{config.model.image.size} px, {config.prototypes.number} prototypes a space. "
        f"Median [least, most] seconds of {arguments.repeats * COUNTED} episodes, arms in turn.",
        "",
        "| arm | episode | ratio to CLIP | extraction | grouping |",
        "|---|---|---|---|---|",
    ]
    baseline = statistics.median(seconds["CLIP"]["episode"])
    for name, parts in seconds.items():
        spans = [
            f"{statistics.median(v):.2f} [{min(v):.2f}, {max(v):.2f}]" if v else "-"
            for v in (parts["episode"], parts["extract"], parts["group"])
        ]
        ratio = statistics.median(parts["episode"]) / baseline
        lines.append(f"| {name} | {spans[0]} | {ratio:.2f} | {spans[1]} | {spans[2]} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
