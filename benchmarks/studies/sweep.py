"""Train the bundled data under several settings and seeds, and compare them in one table.

    python benchmarks/studies/sweep.py STUDY [--seeds 0 1 2] [--split validation] [--jobs 2]

Studies: source (CLIP, extraction, queue), demo (its three arms), heads (their learning rate),
number (of prototypes), episode (its size), targets (soft or hard), translation (PBT on or off),
norm (prototypes as they are or of unit norm). Runs are kept in runs/studies/ and not repeated. Each
has one thread; `--jobs` of them run at a time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from protoclip import demo
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
        f"heads at {scale} of the rate": {**TEACHER, "optim.heads_scale": scale}
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
    "norm": {
        "prototypes as they are": TEACHER,
        "of unit norm": {**TEACHER, "prototypes.unit_norm": True},
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


def measure(settings: Mapping[str, object], seed: int, split: str) -> dict[str, float]:
    """Train unless that was done, evaluate unless that was done; metrics and training seconds."""
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
    metrics: dict[str, float] = json.loads(found.read_text(encoding="utf-8"))["metrics"]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {**metrics, "seconds": results["train_seconds"]}


def cell(values: list[float]) -> str:
    percent = [100 * value for value in values]
    spread = f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):.1f}{spread}"


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
        waiting = [pool.submit(measure, arms[a], seed, arguments.split) for a, seed in tasks]
        found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
        for done, ((arm, _), result) in enumerate(zip(tasks, waiting, strict=True), 1):
            found[arm].append(result.result())
            progress.update(done, arm)
    print(f"| {arguments.split}, seeds {arguments.seeds} | " + " | ".join(SHOWN) + " | seconds |")
    print("|---" * (len(SHOWN) + 2) + "|")
    for arm, runs in found.items():
        cells = [cell([run[f"eval/emoji/{metric}"] for run in runs]) for metric in SHOWN.values()]
        seconds = statistics.mean(run["seconds"] for run in runs)
        print(f"| {arm} | " + " | ".join(cells) + f" | {seconds:.0f} |")


if __name__ == "__main__":
    main()
