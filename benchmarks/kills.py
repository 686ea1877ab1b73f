"""Does a run survive SIGKILL? Kills a small run at random moments and compares how it ends.

python benchmarks/kills.py [--kills 20] [--seed 0]
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from protoclip.testing import tiny_pairs
from protoclip.training import run

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from interrupting import WAYS, assert_equal_ends, config_for, kill_at_random, with_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "pairs.parquet", Path(folder) / "run"
        pq.write_table(tiny_pairs(), data)
        config = config_for(str(data), out, run={"save_steps": 1}, **WAYS["queue"])
        kill_at_random(config, arguments.kills, random.Random(arguments.seed))
        run.train(config, resume="auto")
        run.train(with_out(config, f"{out}-whole"))
        assert_equal_ends(out, Path(f"{out}-whole"))
    print(f"{arguments.kills} kills: weights, moments, queue, prototypes and metrics are equal")


if __name__ == "__main__":
    main()
