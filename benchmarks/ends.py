"""Does a finished command end well on two ranks? Counts exit codes beside busy processes.

`train`, `finetune`, `evaluate` and `embed-teacher` under torchrun, as small as they can be. Linux.

    python benchmarks/ends.py [--runs 50] [--busy 2] [--commands train evaluate] [--out FILE]
"""

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import torch

from protoclip.training import run, run_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from interrupting import quick_config
from testing import tiny_pairs

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
COMMANDS = ["train", "finetune", "evaluate", "embed-teacher"]
SMALL = ["--data.validation", "0", "--run.evaluate", "false", "--run.evaluate_every", "0"]
SMALL += ["--episodes.warm_up", "0"]
SMALL += ["--episodes.size", "16", "--episodes.batch_size", "8", "--episodes.count", "2"]


def commands(folder: Path) -> dict[str, list[str]]:
    """Words of each command; all but `train` take the run of `train`, and write to `out`."""
    data, recipe = folder / "pairs.parquet", folder / "quick.toml"
    pq.write_table(tiny_pairs(48), data)
    recipe.write_text(run_folder.to_toml(quick_config(str(data), folder / "run")), encoding="utf-8")
    trained, out = str(folder / "run"), str(folder / "out")
    source = ["--data.train", str(data)]
    return {
        "train": ["--config", str(recipe), "--run.out", out],
        "finetune": [trained, "--alpha", "1", "--run.out", out, *source, *SMALL],
        "evaluate": [trained, "--data", str(data), "--tasks", "retrieval", "--no-cache"],
        "embed-teacher": ["--teacher", trained, "--out", out, *source],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50, help="of each command")
    parser.add_argument("--busy", type=int, default=2, help="processes that keep cores busy")
    parser.add_argument("--commands", nargs="+", default=COMMANDS, choices=COMMANDS)
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    env, began = {**os.environ, "OMP_NUM_THREADS": "1"}, time.monotonic()
    neighbours = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(arguments.busy)
    ]
    rows, load = [], []
    try:
        with tempfile.TemporaryDirectory(prefix="protoclip-ends-") as name:
            folder = Path(name)
            words = commands(folder)
            run.train(quick_config(str(folder / "pairs.parquet"), folder / "run"))
            for command in arguments.commands:
                codes: Counter[int] = Counter()
                for _ in range(arguments.runs):
                    shutil.rmtree(folder / "out", ignore_errors=True)
                    ended = subprocess.run(
                        [*LAUNCH, "-m", "protoclip", command, *words[command]],
                        capture_output=True,
                        text=True,
                        env=env,
                    )
                    codes[ended.returncode] += 1
                    load.append(os.getloadavg()[0])
                    if ended.returncode:
                        print(ended.stderr[-3000:], file=sys.stderr)
                shown = ", ".join(f"{code} ({times})" for code, times in sorted(codes.items()))
                rows.append(f"| {command} | {arguments.runs} | {shown} |")
                print(rows[-1], flush=True)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
    facts = run_folder.environment(torch.device("cpu"))
    text = "\n".join(
        [
            "# Ends: does a finished command end well on two ranks?",
            "",
            f"`python benchmarks/ends.py --runs {arguments.runs} --busy {arguments.busy} "
            f"--commands {' '.join(arguments.commands)}`, "
            f"{datetime.date.today().isoformat()}; {os.cpu_count()} cores of a "
            f"{platform_of(facts)}, load {min(load):.0f} to {max(load):.0f}; "
            f"{time.monotonic() - began:.0f} s. `torchrun --standalone --nproc-per-node 2` beside "
            f"{arguments.busy} busy processes.",
            "",
            "| command | runs | exit codes (times) |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


def platform_of(facts: dict[str, str]) -> str:
    return f"{facts['device']}, Python {facts['python']}, torch {facts['torch']}"


if __name__ == "__main__":
    main()
