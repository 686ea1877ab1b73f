"""Does a run survive SIGKILL? Kills small runs at random moments and compares how they end.

Of tables, indexed shards, streamed shards and mixtures, with prototypes of an extraction and of the
queue. Each killed run goes on until it is killed again, and at last to its end. Linux only.

    python benchmarks/kills.py [--kills 16] [--seed 0] [--out FILE]
"""

import argparse
import datetime
import random
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch

from protoclip.data import pack
from protoclip.data.pairs import ImageTextPairs
from protoclip.testing import tiny_pairs
from protoclip.training import run, run_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from interrupting import assert_equal_ends, kill_at_random, matrix, quick_config, with_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=16, help="of all runs together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, began = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="protoclip-kills-") as folder:
        data, shards = Path(folder) / "pairs.parquet", Path(folder) / "shards"
        pq.write_table(tiny_pairs(48), data)
        pairs = ImageTextPairs(tiny_pairs(48), name="tiny")
        pack.pack(pairs, shards, samples_per_shard=16)
        ways = matrix(str(data), str(shards))
        for number, (way, changes) in enumerate(ways.items()):
            kills = (arguments.kills + number) // len(ways)
            out = Path(folder) / f"run-{number}"
            config = quick_config(str(data), out, **{"run": {"save_steps": 1}, **changes})
            kill_at_random(config, kills, random.Random(arguments.seed + number))
            run.train(config, resume="auto")
            run.train(with_out(config, f"{out}-whole"))
            assert_equal_ends(out, Path(f"{out}-whole"), 6)
            rows.append(f"| {way.replace(', ', ' | ')} | {kills} | equal |")
            print(rows[-1], flush=True)
    facts = run_folder.environment(torch.device("cpu"))
    text = "\n".join(
        [
            "# Kills: does a run survive SIGKILL?",
            "",
            f"`python benchmarks/kills.py --kills {arguments.kills} --seed {arguments.seed}`, "
            f"{datetime.date.today().isoformat()}; {facts['device']}, Python {facts['python']}, "
            f"torch {facts['torch']}; {time.monotonic() - began:.0f} s. Runs of 6 steps that save "
            "after each, killed at random moments of their processor time. Equal: every bit of "
            "weights, moments, queue and prototypes at the end, and every metric, is that of a run "
            "that nothing interrupted.",
            "",
            "| source | prototypes | kills | at the end |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
