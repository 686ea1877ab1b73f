"""Does anything pile up? Trains for hours with evaluation, saving and resuming, and watches.

Two small runs take turns: one of a table, with a worker process and
prototypes of an extraction; and one of a stream of tar shards, with prototypes of the queue. Each
turn is a fresh process that goes on with its run, evaluates, saves every half minute, and is asked
to stop by SIGTERM. Counted over the process and its workers: resident memory, open files and
threads; on disk the run folder, without what is logged for each step, and the caches. Linux only.

    python benchmarks/soak.py [--minutes 4] [--turn 1] [--out FILE]
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow.parquet as pq
import torch

from protoclip.config import Config
from protoclip.data import pack
from protoclip.data.pairs import ImageTextPairs
from protoclip.models.saved import checkpoints, damage
from protoclip.training import run_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from testing import tiny_config, tiny_pairs

PAIRS, EVERY = 600, 5.0  # seconds between two looks
LOGS = ("metrics.jsonl", "tensorboard")  # these grow by a line a step, as they should


@dataclass
class Turn:
    """What was seen while one process trained."""

    name: str
    times: list[float] = field(default_factory=list)  # seconds
    memory: list[float] = field(default_factory=list)  # MB
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    steps: int = 0
    evaluations: int = 0
    saves: int = 0
    disk: float = 0.0  # MB, at the end
    logs: float = 0.0


def configs(folder: Path) -> dict[str, Config]:
    """Runs that never end by themselves."""
    table, shards = folder / "pairs.parquet", folder / "shards"
    pq.write_table(tiny_pairs(PAIRS), table)
    pq.write_table(tiny_pairs(60, seed=1), folder / "held_out.parquet")
    pack.pack(ImageTextPairs(tiny_pairs(PAIRS), name="tiny"), shards, samples_per_shard=100)
    found = {}
    for name, train, source in (("table", table, "extract"), ("stream", shards, "queue")):
        config = tiny_config(str(train), out=str(folder / name))
        found[name] = replace(
            config,
            run=replace(
                config.run,
                name=name,
                save_minutes=0.5,
                log_every=10,
                evaluate_every=10,
                keep_best="eval/validation/retrieval/image_to_text@1",
            ),
            data=replace(
                config.data,
                validation=str(folder / "held_out.parquet"),
                workers=1 if name == "table" else 0,
                read="auto" if name == "table" else "streaming",
                shuffle_buffer=100,
            ),
            episodes=replace(config.episodes, count=10**6),
            prototypes=replace(config.prototypes, source=source),
        )
    return found


def descendants(process: int) -> list[int]:
    """A process and all that it started."""
    found = [process]
    for own in found:
        for children in Path(f"/proc/{own}/task").glob("*/children"):
            with suppress(OSError):
                found += map(int, children.read_text().split())
    return found


def look(process: int, turn: Turn) -> None:
    """Add up the memory, open files and threads of a process and its workers."""
    memory, files, threads = 0.0, 0, 0
    for own in descendants(process):
        with suppress(OSError):  # it has ended
            status = Path(f"/proc/{own}/status").read_text(encoding="utf-8").splitlines()
            facts = dict(line.split(":", 1) for line in status)
            memory += int(facts.get("RssAnon", "0").split()[0]) / 1e3  # none if it has just ended
            threads += int(facts["Threads"])
            files += len(list(Path(f"/proc/{own}/fd").iterdir()))
    turn.times.append(time.monotonic())
    turn.memory.append(memory)
    turn.files.append(files)
    turn.threads.append(threads)


def size(paths: Sequence[Path]) -> float:
    """Megabytes of files, which may vanish meanwhile."""
    total = 0
    for path in paths:
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total / 1e6


def train(name: str, recipe: Path, out: Path, seconds: float) -> Turn:
    """Let a process go on with a run for some time, and look at it."""
    turn = Turn(name=name)
    command = [sys.executable, "-m", "protoclip", "train", "--config", str(recipe)]
    before = steps(out)
    with (out.parent / f"{name}.log").open("w") as log:
        process = subprocess.Popen([*command, "--resume", "auto"], stderr=log, stdout=log)
        while len(steps(out)) == len(before) and process.poll() is None:
            time.sleep(1.0)  # the turn counts from its first step
        ends, newest = time.monotonic() + seconds, set[str]()
        while time.monotonic() < ends and process.poll() is None:
            time.sleep(EVERY)
            look(process.pid, turn)
            newest |= {path.name for path in checkpoints(out)}
        process.send_signal(signal.SIGTERM)
        process.wait(600)  # it saves first, which takes long on a busy machine
    said = (out.parent / f"{name}.log").read_text(encoding="utf-8")
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "goes on" in said, said
    intact = [damage(path) for path in checkpoints(out)]
    assert not any(intact), intact
    everything = [*out.rglob("*"), *(out.parent / "cache").rglob("*")]
    logs = [path for path in everything if set(path.relative_to(out.parent).parts) & set(LOGS)]
    turn.logs = size(logs)
    turn.disk = size(everything) - turn.logs
    after = steps(out)
    assert len(set(after)) == len(after), "a step is logged twice"
    assert after == sorted(after)
    turn.steps = after[-1] - (before[-1] if before else 0)
    turn.saves = len(newest)
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    turn.evaluations = text.count('"eval/validation/retrieval/image_to_text@1"')
    return turn


def steps(out: Path) -> list[int]:
    """The steps whose loss is logged, in the order of the file."""
    path = out / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line)["step"] for line in lines if "train/loss/total" in line]


def table(turns: Sequence[Turn]) -> list[str]:
    lines = [
        "| turn | run | minutes | steps | evaluations so far | checkpoints seen "
        "| least memory, MB: first third | second | last "
        "| open files | threads | MB on disk | logs |",
        "|" + "---|" * 13,
    ]
    for number, turn in enumerate(turns, 1):
        third, half = max(1, len(turn.times) // 3), len(turn.times) // 2
        parts = (turn.memory[:third], turn.memory[third : 2 * third], turn.memory[2 * third :])

        def span(values: Sequence[int]) -> str:
            return (
                f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"
            )

        cells = [
            *(str(number), turn.name, f"{(turn.times[-1] - turn.times[0] + EVERY) / 60:.1f}"),
            *(f"{turn.steps:,}", str(turn.evaluations), str(turn.saves)),
            *(f"{min(part or turn.memory):.0f}" for part in parts),
            *(span(turn.files[half:]), span(turn.threads[half:])),
            *(f"{turn.disk:.2f}", f"{turn.logs:.2f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4.0, help="how long to train in all")
    parser.add_argument("--turn", type=float, default=1.0, help="minutes until the next process")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1"}
    turns: list[Turn] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="protoclip-soak-") as folder:
        os.environ["PROTOCLIP_CACHE"] = f"{folder}/cache"
        recipes = {}
        for name, config in configs(Path(folder)).items():
            recipes[name] = Path(folder) / f"{name}.toml"
            recipes[name].write_text(run_folder.to_toml(config), encoding="utf-8")
        while time.monotonic() - began < 60 * arguments.minutes - 1:
            name = ("table", "stream")[len(turns) % 2]
            turns.append(train(name, recipes[name], Path(folder) / name, 60 * arguments.turn))
            print(table(turns)[-1], flush=True)
    facts = run_folder.environment(torch.device("cpu"))
    lines = [
        "# Soak: training with evaluation, saving and resuming",
        "",
        f"`python benchmarks/soak.py --minutes {arguments.minutes:g} --turn {arguments.turn:g}`, "
        f"{datetime.date.today().isoformat()}; {facts['device']}, Python {facts['python']}, torch "
        f"{facts['torch']}. It ran for {(time.monotonic() - began) / 60:.0f} minutes. Memory is "
        "anonymous resident memory of the process and its workers, the least of each third of a "
        "turn: saving and evaluating take more for a while, and a leak would raise the least too. "
        "Evaluation has workers of its own while it reads. Open files and threads are those of all "
        "together, over the second half of a turn. Each turn began "
        "where the last one of its run stopped, all checkpoints were intact after each, and no "
        "step was logged twice.",
        "",
        *table(turns),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
