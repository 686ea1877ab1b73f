"""What memory does a process take: a model spread over two (FSDP2) against a whole copy in each?

A short run of open_clip's ViT-B-32 in two processes of one thread: one step, and one checkpoint at
the end. For each process the highest resident memory up to three moments, less what it had before
the model was built: CPU memory here, where a GPU's would hold the same tensors. Then what checking
a checkpoint's weights adds to loading them, with the file in the page cache, in alternation.

    python benchmarks/memory.py [--model ViT-B-32] [--repeats 5] [--out FILE]
"""

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

import protoclip
from protoclip.config import Config
from protoclip.distributed import collectives
from protoclip.models import loading, start
from protoclip.training import run, watch
from protoclip.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from testing import tiny_config, tiny_pairs

MOMENTS = ("model built", "first step", "checkpoint written")


def config_of(model: str, strategy: str, folder: Path) -> Config:
    config = tiny_config(str(folder / "pairs.parquet"), out=str(folder / strategy))
    return replace(
        config,
        run=replace(config.run, evaluate=False),
        model=replace(config.model, name=model, image=replace(config.model.image, size=None)),
        episodes=replace(config.episodes, size=4, batch_size=4, count=1, warm_up=1, locked_image=0),
        prototypes=replace(config.prototypes, number=2),
        parallel=replace(config.parallel, strategy=strategy),
    )


def highest() -> float:
    """Gigabytes that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def train(config: Config, out: Path) -> None:
    """One process of the run: writes its peaks."""
    peaks: list[float] = []
    training_model, train_step = loading.training_model, Trainer.train_step

    def and_measure_building(*arguments: Any) -> Any:
        peaks.append(highest())
        built = training_model(*arguments)
        peaks.append(highest())
        return built

    def and_measure_step(*arguments: Any, **settings: Any) -> Any:
        report = train_step(*arguments, **settings)
        peaks.append(highest())
        return report

    loading.training_model = and_measure_building
    Trainer.train_step = and_measure_step  # type: ignore[method-assign]
    run.train(config)
    peaks.append(highest())
    rank, _, _ = collectives.read_launcher()
    before, *after = peaks
    (out / f"{rank}.json").write_text(json.dumps([peak - before for peak in after]))


def peaks_of(model: str, strategy: str, folder: Path) -> list[list[float]]:
    """Peaks by rank."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(__file__, "--model", model, "--train", strategy, "--folder", str(folder)),
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@contextmanager
def unchecked() -> Iterator[None]:
    """Loading without the check of the weights' checksum."""
    require_intact = start.require_intact
    start.require_intact = lambda folder, *names: None
    try:
        yield
    finally:
        start.require_intact = require_intact


def loading_seconds(folder: Path, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds that `protoclip.load` takes without and with the check."""
    spent: tuple[list[float], list[float]] = ([], [])
    protoclip.load(folder)  # the file is in the page cache from here on
    for _ in range(repeats):
        for checked in (False, True):
            began = time.perf_counter()
            if checked:
                protoclip.load(folder)
            else:
                with unchecked():
                    protoclip.load(folder)
            spent[checked].append(time.perf_counter() - began)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        config = config_of(arguments.model, arguments.train, arguments.folder)
        train(config, arguments.folder)
        return
    facts = watch.describe_environment(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(tiny_pairs(16), Path(folder) / "pairs.parquet")
        found = {way: peaks_of(arguments.model, way, Path(folder)) for way in ("ddp", "fsdp")}
        size = next(Path(folder).rglob("model.safetensors")).stat().st_size / 1e9
        plain, checked = loading_seconds(Path(folder) / "ddp", arguments.repeats)
    lines = [
        "# Memory: a model in two processes",
        "",
        f"`python benchmarks/memory.py --model {arguments.model} --repeats {arguments.repeats}`, "
        f"{datetime.date.today().isoformat()}; {facts['device'].split(',')[0]}, torch "
        f"{facts['torch']}, gloo, one thread a process, fp32, 4 pairs a step. The weights take "
        f"{size:.2f} GB. Gigabytes at most until then, and to rank 0 of `ddp`.",
        "",
        f"| strategy | rank | {' | '.join(MOMENTS)} |",
        "|---|---|---|---|---|",
    ]
    for way, ranks in found.items():
        for rank, peaks in enumerate(ranks):
            cells = [
                f"{peak:.2f} ({peak / base:.2f})"
                for peak, base in zip(peaks, found["ddp"][0], strict=True)
            ]
            lines.append(f"| {way} | {rank} | {' | '.join(cells)} |")
    slow, fast = statistics.median(checked), statistics.median(plain)
    lines += [
        "",
        f"Loading these weights, median [least, most] of {arguments.repeats}, on all cores: "
        f"{fast:.2f} s [{min(plain):.2f}, {max(plain):.2f}] unchecked, {slow:.2f} s "
        f"[{min(checked):.2f}, {max(checked):.2f}] with their checksum verified: "
        f"{slow / fast:.2f} times.",
    ]
    text = "\n".join([*lines, ""])
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
