"""Does a run survive SIGKILL? Kills small runs at random moments and compares how they end.

Of tables, indexed shards, streamed shards and mixtures, with prototypes of an extraction and of the
queue. Each killed run goes on until it is killed again, and at last to its end. Linux only.

With --hosts, torchrun runs each on two hosts (network namespaces, so as root) and a rank or a whole
host is killed in each part of a run; torchrun starts the run anew, on one host if need be.

    python benchmarks/kills.py [--hosts] [--kills 16] [--seed 0] [--out FILE]
"""

import argparse
import datetime
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from threading import Timer
from typing import Any

import pyarrow.parquet as pq
import torch

from protoclip import cli
from protoclip.config import Config
from protoclip.data import pack, tables
from protoclip.data.emoji import emoji_table
from protoclip.data.pairs import ImageTextPairs
from protoclip.models import saved
from protoclip.models.saved import find_checkpoint, read_tensors
from protoclip.prototypes.features import ExtractedFeatures
from protoclip.training import run, run_folder
from protoclip.training.run import Run
from protoclip.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "hosts"))
from namespaces import Part, at, codes, hosts, kill_this, launch, until

from interrupting import (
    assert_equal_ends,
    kill_at_random,
    matrix,
    quick_config,
    relative_difference,
    with_changes,
    with_out,
)
from testing import tiny_pairs

# Where ranks are killed: a function that begins the part, and the ranks that call it.
PARTS: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "indexing": (tables, "open_files", (0, 1)),
    "encoding": (ExtractedFeatures, "features", (0, 1)),
    "clustering": (Run, "cluster", (0, 1)),
    "training": (Trainer, "train_step", (0, 1)),
    "saving": (saved, "write_checkpoint", (0,)),
    "evaluation": (Run, "results", (0, 1)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", action="store_true", help="on two hosts, as root")
    parser.add_argument("--kills", type=int, default=16, help="of all runs together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="protoclip-kills-") as folder:
        kill = kills_of_hosts if arguments.hosts else kills_of_processes
        about, header, rows = kill(Path(folder), arguments.kills, arguments.seed)
    facts = run_folder.environment(torch.device("cpu"))
    command = "python benchmarks/kills.py" + " --hosts" * arguments.hosts
    text = "\n".join(
        [
            "# Kills: does a run survive SIGKILL?",
            "",
            f"`{command} --kills {arguments.kills} --seed {arguments.seed}`, "
            f"{datetime.date.today().isoformat()}; {facts['device']}, Python {facts['python']}, "
            f"torch {facts['torch']}; {time.monotonic() - began:.0f} s. {about}",
            "",
            header,
            re.sub("[^|]+", "---", header),
            *rows,
            "",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


def kills_of_processes(folder: Path, total: int, seed: int) -> tuple[str, str, list[str]]:
    """What was done, the header of a table, and a row a kind of source and prototypes."""
    rows, data, shards = [], folder / "pairs.parquet", folder / "shards"
    pq.write_table(tiny_pairs(48), data)
    pack.pack(ImageTextPairs(tiny_pairs(48), name="tiny"), shards, samples_per_shard=16)
    ways = matrix(str(data), str(shards))
    for number, (way, changes) in enumerate(ways.items()):
        kills, out = (total + number) // len(ways), folder / f"run-{number}"
        config = quick_config(str(data), out, **{"run": {"save_steps": 1}, **changes})
        kill_at_random(config, kills, random.Random(seed + number))
        run.train(config, resume="auto")
        run.train(with_out(config, f"{out}-whole"))
        assert_equal_ends(out, Path(f"{out}-whole"), 6)
        rows.append(f"| {way.replace(', ', ' | ')} | {kills} | equal |")
        print(rows[-1], flush=True)
    about = (
        "Runs of 6 steps that save after each, killed at random moments of their processor time. "
        "Equal: every bit of weights, moments, queue and prototypes at the end, and every metric, "
        "is that of a run that nothing interrupted."
    )
    return about, "| source | prototypes | kills | at the end |", rows


def kills_of_hosts(folder: Path, total: int, seed: int) -> tuple[str, str, list[str]]:
    """The same for kills of ranks and of hosts, a row a kill."""
    generator, rows = random.Random(seed), []
    pq.write_table(emoji_table("train").take(list(range(0, 7000, 70))), folder / "pairs.parquet")
    ended = on_hosts(folder / "whole", folder / "pairs.parquet", None)
    assert ended.endswith("written to " + str(folder / "whole" / "run")), ended
    for number in range(total):
        part = [*PARTS][number // 2 % len(PARTS)]
        owner, name, ranks = PARTS[part]
        whole_host = number % 2 == 1
        rank, call = (
            generator.choice(ranks),
            generator.choice((1, 2, 3) if part == "training" else (1,)),
        )
        place, out = (owner, name, call), folder / f"run-{number}"
        began = time.monotonic()
        said = on_hosts(out, folder / "pairs.parquet", (place, rank, whole_host))
        took = time.monotonic() - began
        if not (out / "run" / "results.json").exists():
            result = f"**not finished**: {said[-300:]}"
        elif whole_host:
            config = host_config(folder / "pairs.parquet", out / "run")
            one, two = (
                read_tensors(find_checkpoint(each / "run") / "model.safetensors")
                for each in (out, folder / "whole")
            )
            result = f"{relative_difference(one, two, config):.0e} of the way"
        else:
            assert_equal_ends(out / "run", folder / "whole" / "run", 6)
            result = "equal"
        what = "host 1" if whole_host else f"rank {rank}"
        rows.append(f"| {number + 1} | {part} | {what} | {took:.0f} | {result} |")
        print(rows[-1], flush=True)
    about = (
        "`torchrun --nnodes 1:2 --max-restarts 3 ... train --resume auto` on two hosts with a rank "
        "each, made of network namespaces, each with a scratch folder of its own; runs of 6 steps "
        "that save after each, with an evaluation. torchrun ran in this process and forked its "
        "ranks. SIGKILL came up to 0.2 s after a part began (of training, one of three steps). A "
        "rank is started anew; host 1 stays away. Equal: every bit of weights, moments and "
        "prototypes at the end, and every metric, is that of a run that nothing interrupted. One "
        "rank rounds differently: then the distance of all weights to those of that run, as a "
        "share of the way that they went."
    )
    return about, "| | killed in | what | seconds | at the end |", rows


def host_config(data: Path, out: Path) -> Config:
    config = quick_config(str(data), out)
    sections = {
        "run": {"save_steps": 1, "evaluate": True},
        "data": {"validation": 0.2},
        "parallel": {"sync_batch_norm": True},
        "optim": {"eps": 1e-2, "warm_up_steps": 0},
    }
    return with_changes(config, sections)


def on_hosts(folder: Path, data: Path, kill: tuple[Part, int, bool] | None) -> str:
    """Train on two hosts, with a kill on the way; returns what the first one said."""
    folder.mkdir()
    once, recipe = folder / "once", folder / "recipe.toml"
    recipe.write_text(run_folder.to_toml(host_config(data, folder / "run")), encoding="utf-8")
    delay = random.Random(str(folder)).uniform(0, 0.2)

    def work() -> None:
        if kill is not None:
            place, rank, whole_host = kill
            at(place, rank, (lambda: None) if whole_host else Timer(delay, kill_this).start, once)
        cli.main(["train", "--config", str(recipe), "--resume", "auto"])

    options = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3"]
    options += ["--monitor-interval", "0.1"]
    with hosts(2, folder / "hosts") as both:
        running = [launch(host, options, work) for host in both]
        if kill is not None and kill[2]:
            until(once, running, both)
            time.sleep(delay)
            both[1].kill()
        codes(running, 300)
        assert kill is None or once.exists(), "nothing was killed"
        return both[0].said.strip()


if __name__ == "__main__":
    main()
