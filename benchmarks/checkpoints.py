"""What does saving cost a sharded model: by a part from each rank, against gathering it on rank 0?

open_clip's ViT-B-32 in two processes of one thread (FSDP2, gloo) makes steps. Some begin a
checkpoint at their end, which is written while the next ones are computed; others follow when it is
written. For both ways: how long a step takes that begins one, that meets one being written, and
that meets none; and how far saving raises the highest memory of each process. A busy machine makes
all of these longer, so the load before and after is told.

    python benchmarks/checkpoints.py [--model ViT-B-32] [--batch 8] [--saves 3]
        [--ways parts gathered] [--out FILE]

A way takes 4 + 5 SAVES steps, and more where writing lasts longer than one.
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
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from protoclip.config import Config
from protoclip.data.loader import Batch
from protoclip.distributed import collectives, parallel
from protoclip.training import run, run_folder
from protoclip.training.checkpoint import CheckpointWriter
from protoclip.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from testing import tiny_config, tiny_pairs

WAYS = {"parts": "each rank its part", "gathered": "gathered on rank 0"}
KINDS = ("begins one", "meets one", "meets none")
FREE = 3  # steps without a checkpoint before the next one begins


def config_of(model: str, batch: int, folder: Path, way: str) -> Config:
    """More steps than it takes; when all checkpoints are written, the run is over."""
    config = tiny_config(str(folder / "pairs.parquet"), out=str(folder / way))
    return replace(
        config,
        run=replace(config.run, evaluate=False, save_minutes=0.0, log_every=1),
        model=replace(config.model, name=model, image=replace(config.model.image, size=None)),
        episodes=replace(
            config.episodes,
            **{"size": 1000 * batch, "batch_size": batch, "count": 1, "warm_up": 1},
            locked_image=0,
        ),
        prototypes=replace(config.prototypes, number=2),
        parallel=replace(config.parallel, strategy="fsdp"),
    )


def gather() -> None:
    """Save as `ddp` does: rank 0 gathers weights and moments, and writes them alone."""
    parallel.own_weights, parallel.own_moments = parallel.weights, parallel.moments
    if collectives.launched()[0]:
        CheckpointWriter.save = lambda *_: None  # type: ignore[method-assign]


def highest() -> float:
    """Gigabytes that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


class Enough(Exception):
    """All checkpoints are written."""


def train(config: Config, saves: int, out: Path) -> None:
    """One process: writes the seconds of its steps of each kind, and its peaks."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    peaks: list[float] = []
    train_step = Trainer.train_step
    began, free, meets = 0.0, -1, False  # the first step makes the moments

    def and_clock(self: Trainer, batch: Batch, **more: Any) -> dict[str, float]:
        nonlocal began
        began = time.perf_counter()
        return train_step(self, batch, **more)

    def and_save(self: run.Run) -> bool:
        nonlocal free, meets, saves
        thread = self.writer._thread
        (writing,) = collectives.any_rank([thread is not None and thread.is_alive()])
        saving = saves > 0 and free == FREE and not writing
        if saving:
            peaks.append(highest())
            self.save()
            saves -= 1
        kind = KINDS[0] if saving else KINDS[1] if meets else KINDS[2]
        if free >= 0:
            seconds[kind].append(time.perf_counter() - began)
        free = 0 if saving or meets else free + 1
        meets = saving or writing  # the step that comes next
        if saves == 0 and free == FREE:
            rank, _, _ = collectives.launched()
            found = {"seconds": seconds, "peaks": [peaks[0], highest()]}
            (out / f"{rank}.json").write_text(json.dumps(found))
            raise Enough
        return False

    Trainer.train_step = and_clock  # type: ignore[method-assign]
    run.Run.save_if_due = and_save  # type: ignore[method-assign]
    with suppress(Enough):
        run.train(config)


def measured(arguments: argparse.Namespace, way: str, folder: Path) -> list[dict[str, Any]]:
    """What each process of a run found."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(__file__, "--model", arguments.model, "--batch", str(arguments.batch)),
        *("--saves", str(arguments.saves), "--way", way, "--folder", str(folder)),
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step, of both processes")
    parser.add_argument("--saves", type=int, default=3, help="checkpoints by each way")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS], help="both, or one")
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        if arguments.way == "gathered":
            gather()
        config = config_of(arguments.model, arguments.batch, arguments.folder, arguments.way)
        train(config, arguments.saves, arguments.folder)
        return
    facts, load = run_folder.environment(torch.device("cpu")), [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(tiny_pairs(16), Path(folder) / "pairs.parquet")
        found = {way: measured(arguments, way, Path(folder)) for way in arguments.ways}
    load.append(os.getloadavg()[0])
    lines = [
        "# Checkpoints of a sharded model",
        "",
        f"`python benchmarks/checkpoints.py --model {arguments.model} --batch {arguments.batch} "
        f"--saves {arguments.saves} --ways {' '.join(arguments.ways)}`, "
        f"{datetime.date.today().isoformat()}; "
        f"{facts['device'].split(',')[0]}, {os.cpu_count()} cores, torch {facts['torch']}, gloo, "
        "FSDP2 in two processes of one thread, fp32. Processes that were ready to run on the "
        f"machine: {load[0]:.1f} before, {load[1]:.1f} after.",
        "",
        "Seconds of a step of rank 0, median [least, most]; in brackets how many, and how long the "
        "median is against that of steps that meet no checkpoint.",
        "",
        f"| way | {' | '.join(f'a step that {kind}' for kind in KINDS)} |",
        "|---|---|---|---|",
    ]
    for way, ranks in found.items():
        seconds = ranks[0]["seconds"]
        plain = statistics.median(seconds[KINDS[-1]])
        cells = [
            f"{statistics.median(each):.2f} [{min(each):.2f}, {max(each):.2f}] ({len(each)}, "
            f"{statistics.median(each) / plain:.2f})"
            if each
            else "-"
            for each in (seconds[kind] for kind in KINDS)
        ]
        lines.append(f"| {WAYS[way]} | {' | '.join(cells)} |")
    lines += [
        "",
        "The highest resident memory in gigabytes: before the first checkpoint, and how much more "
        "when all were written.",
        "",
        "| way | rank 0 | rank 1 |",
        "|---|---|---|",
    ]
    for way, ranks in found.items():
        peaks = [f"{a:.2f}, {b - a:.2f} more" for a, b in (rank["peaks"] for rank in ranks)]
        lines.append(f"| {WAYS[way]} | {' | '.join(peaks)} |")
    text = "\n".join([*lines, ""])
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
