"""Train the bundled data under several settings and seeds, and compare them in one table.

    python benchmarks/studies/sweep.py STUDY [--seeds 0 1 2] [--split validation] [--jobs 2]

Studies: source (CLIP, extraction, queue), demo (its three arms), heads (their learning rate),
number (of prototypes), episode (its size), targets (soft or hard), translation (PBT on or off).
Runs are kept in runs/studies/ and not repeated. Each has one thread; `--jobs` of them run at a
time. Differences are to the first arm, paired by seed, or by sample where there is one seed; with
95% intervals, and a star where these leave out 0.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from protoclip.cli import demo
from protoclip.evaluation import compare
from protoclip.progress import Progress

TEACHER = {"teacher.features": "emoji", "loss.teacher": 2.0}
CLIP = {"loss.prototypical": 0.0}
ONE_SAMPLE_COUNT = 35 * 4096
STUDIES: dict[str, dict[str, Mapping[str, object]]] = {
    "source": {
        "CLIP": CLIP,
        "ProtoCLIP, queue": {"prototypes.source": "queue"},
        "ProtoCLIP, extract": {"prototypes.source": "extract"},
        "teacher, queue": {**TEACHER, "prototypes.source": "queue"},
        "teacher, extract": {**TEACHER, "prototypes.source": "extract"},
    },
    "demo": {
        arm: {**settings, "episodes.count": demo.EPISODES}
        for arm, settings in {"CLIP": CLIP, "ProtoCLIP": {}, "teacher": TEACHER}.items()
    },
    "heads": {
        f"heads at {scale} of the rate": {**TEACHER, "optim.heads_lr_scale": scale}
        for scale in (1.0, 0.1, 0.01, 0.001)
    },
    "number": {
        f"K = episode / {round(4096 / k)}": {**TEACHER, "prototypes.number": k, "teacher.number": k}
        for k in (102, 205, 400, 819)
    },
    "episode": {
        f"episodes of {size}": {
            **TEACHER,
            "episodes.size": size,
            "episodes.count": ONE_SAMPLE_COUNT // size,
            "episodes.warm_up": max(1, 4096 // size),
            "episodes.locked_image": max(1, 4096 // size),
            "prototypes.number": size // 10,
            "teacher.number": size // 10,
        }
        for size in (1024, 2048, 4096, 7168)
    },
    "targets": {
        "soft between modalities, hard of the teacher": TEACHER,
        "hard everywhere": {**TEACHER, "prototypes.hard_targets": True},
        "soft everywhere": {**TEACHER, "teacher.hard_targets": False},
    },
    "translation": {
        "PBT": TEACHER,
        "without PBT": {**TEACHER, "prototypes.back_translation": False},
        "no teacher, PBT": {},
        "no teacher, without PBT": {"prototypes.back_translation": False},
    },
}
SHOWN = {
    "zero-shot acc1": "zero_shot/acc1",
    "acc5": "zero_shot/acc5",
    "image-to-text@1": "retrieval/image_to_text@1",
    "text-to-image@1": "retrieval/text_to_image@1",
    "linear probe": "linear_probe/acc1",
    "kNN": "knn/acc1",
    "AMI": "clustering/ami",
}


def measure(arm: str, settings: Mapping[str, object], seed: int, split: str) -> dict[str, Any]:
    """Train unless that was done, evaluate unless that was done; a run as `report` compares it."""
    name = "-".join(f"{key}={value}" for key, value in sorted(settings.items())) or "default"
    folder = Path("runs/studies") / f"{name}-{seed}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "protoclip"]
    if not (folder / "results.json").exists():
        options = {**settings, "run.seed": seed, "run.out": str(folder), "run.evaluate": "false"}
        arguments = [f"--{key}={value}" for key, value in options.items()]
        subprocess.run(
            [*command, "train", *arguments], check=True, env=environment, capture_output=True
        )
    found = folder / f"{split}.json"
    if not found.exists():
        done = subprocess.run(
            [*command, "evaluate", str(folder), "--split", split, "--json"],
            check=True,
            env=environment,
            capture_output=True,
            text=True,
        )
        found.write_text(done.stdout, encoding="utf-8")
    return {
        **compare.read_results(folder),
        "name": arm,
        "metrics": json.loads(found.read_text(encoding="utf-8"))["metrics"],
        "samples": compare.samples_of(folder, split),
    }


def cell(value: Mapping[str, Any]) -> str:
    """Percent, and the difference to the first arm."""
    return compare.cell(value, scale=100.0, digits=1).replace("\n", "<br>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    arms = STUDIES[arguments.study]
    tasks = [(arm, seed) for seed in arguments.seeds for arm in arms]
    progress = Progress(f"study: {arguments.study}", len(tasks))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        waiting = [pool.submit(measure, a, arms[a], seed, arguments.split) for a, seed in tasks]
        runs = []
        for done, ((arm, _), result) in enumerate(zip(tasks, waiting, strict=True), 1):
            runs.append(result.result())
            progress.update(done, arm)
    print(f"| {arguments.split}, seeds {arguments.seeds} | " + " | ".join(SHOWN) + " | seconds |")
    print("|---" * (len(SHOWN) + 2) + "|")
    for entry in compare.compare(runs):
        cells = [cell(entry["metrics"][f"eval/emoji/{metric}"]) for metric in SHOWN.values()]
        seconds = entry["train_seconds"]["mean"]
        print(f"| {entry['name']} | " + " | ".join(cells) + f" | {seconds:.0f} |")


if __name__ == "__main__":
    main()
