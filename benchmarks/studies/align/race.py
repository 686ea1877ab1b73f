"""How long do CLIP from scratch and `align` take, and what do they find then?

    python benchmarks/studies/align/race.py --train TABLE --validation TABLE --image-weights FILE
        [--root FOLDER] [--image-size 224] [--pairs 100 300 1000] [--seeds 0 1 2]
        [--folder runs/race] [--out JSON] [-- SETTINGS of `protoclip train`]

From scratch CLIP learns from all pairs of TRAIN, and `align` from the first so many of an order
drawn by the seed, between EfficientNet-Lite0 and MiniLM. Each is a command in a process of its own,
in fp32 on the CPU, from an empty cache, without pairs held out and without evaluation: its seconds
are those of the whole command, start and encoding included. Then both are judged on the same
validation pairs by the mean of the six recalls. A command that has ended is not given again.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from study import of_halves, write_ids

from protoclip.config import DataConfig, SourceConfig
from protoclip.data.sources import open_source

COMMAND = [sys.executable, "-m", "protoclip"]


def seconds_of(command: list[str], run: Path) -> float:
    """The wall clock of a command that trains a run, once for all."""
    clock, cache = run.with_suffix(".json"), run.with_suffix(".cache")
    facts = json.loads(clock.read_text(encoding="utf-8")) if clock.exists() else {}
    if facts.get("command") != command or not (run / "results.json").exists():
        for folder in (run, cache):
            shutil.rmtree(folder, ignore_errors=True)
        environment, began = {**os.environ, "PROTOCLIP_CACHE": str(cache)}, time.monotonic()
        subprocess.run([*COMMAND, *command, "--run.out", str(run)], env=environment, check=True)
        facts = {"command": command, "seconds": time.monotonic() - began}
        clock.write_text(json.dumps(facts), encoding="utf-8")
        shutil.rmtree(cache)
    return float(facts["seconds"])


def recall(run: Path, options: list[str]) -> float:
    """The mean of the six recalls on validation pairs, in percent."""
    given = [*COMMAND, "evaluate", str(run), "--tasks", "retrieval", "--device", "cpu", "--json"]
    shown = subprocess.run([*given, *options], check=True, capture_output=True, text=True).stdout
    (record,) = json.loads(shown)
    return 100 * float(np.mean([*record["metrics"].values()]))


def main() -> None:
    parser = of_halves(str(__doc__))
    parser.add_argument("--image-size", type=int, default=224, help="of the image half")
    parser.add_argument("--pairs", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/race"))
    parser.add_argument("--out", type=Path, help="JSON of the table")
    parser.add_argument("settings", nargs="*", help="of the run from scratch, behind --")
    given = parser.parse_args()
    source = SourceConfig(path=given.train)
    ids = [*open_source(DataConfig(root=given.root), source).sample_ids()]
    given.folder.mkdir(parents=True, exist_ok=True)
    root = [] if given.root is None else [given.root]
    judged = ["--data", given.validation, *(word for path in root for word in ("--root", path))]
    shared = ["--data.train", given.train, "--data.validation", "0", "--run.evaluate", "false"]
    shared += ["--run.device", "cpu", "--run.precision", "fp32"]
    shared += [word for path in root for word in ("--data.root", path)]
    halves = ["--model.image.name", "tf_efficientnet_lite0", "--model.text.name", "minilm"]
    halves += ["--model.image.weights", given.image_weights]
    halves += ["--model.image.size", str(given.image_size)]
    rows: list[dict[str, Any]] = []
    print("| seed | way | pairs | seconds | of those from scratch | mean recall |")
    print("|---|---|---|---|---|---|")
    for seed in given.seeds:
        ways = [("scratch", len(ids)), *(("aligned", size) for size in given.pairs)]
        of_scratch = 0.0
        for way, size in ways:
            run = given.folder / f"{way}-{size}-{seed}"
            options = [*shared, "--run.seed", str(seed)]
            if way == "aligned":
                write_ids(only := given.folder / f"{size}-{seed}.csv", ids, size, seed)
                options += [*halves, "--data.only", str(only)]
                seconds = seconds_of(["align", *options], run)
            else:
                options += ["--loss.prototypical", "0", *given.settings]
                of_scratch = seconds = seconds_of(["train", *options], run)
            row = {"seed": seed, "way": way, "pairs": size, "seconds": seconds}
            row |= {"share": seconds / of_scratch, "mean recall": recall(run, judged)}
            rows.append(row)
            print(
                f"| {seed} | {way} | {size:,} | {seconds:.0f} | {row['share']:.1%} | "
                f"{row['mean recall']:.1f} |",
                flush=True,
            )
    if given.out is not None:
        facts = {name: value for name, value in vars(given).items() if not isinstance(value, Path)}
        content = {"question": str(__doc__).partition("\n")[0], "command": facts, "rows": rows}
        machine = {"machine": platform.machine(), "threads": os.environ.get("OMP_NUM_THREADS")}
        content |= {**machine, "load": os.getloadavg()[1]}
        given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
