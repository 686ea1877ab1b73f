"""What is left when something breaks? Calls commands under seeded faults, and then again without.

Disks that are full or read-only, permissions that are taken away, files that vanish, a clock that
jumps, memory that runs out, processes that are killed or paused: each at a random moment of
`train`, `embed-teacher`, `data pack`, `evaluate`, `export` or `report`. The call must end in a
success or in one line; what was whole before must be whole after it; every file must be valid; and
the next call must make the same as a call that nothing disturbed. Linux only.

    python benchmarks/faults.py [--faults 24] [--seed 0] [--minutes 60] [--out FILE]
"""

import argparse
import datetime
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from protoclip.training import run

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from faulting import COMMANDS, HAS_WORKERS, KINDS, Scene, drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="pass over so many faults")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no fault after these")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    good: Counter[tuple[str, str]] = Counter()
    every: Counter[tuple[str, str]] = Counter()
    ends: Counter[tuple[str, str]] = Counter()
    failures, began = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="protoclip-faults-") as folder:
        scene = Scene(Path(folder))
        for number, fault in enumerate(drawn(arguments.faults, arguments.seed)):
            if number < arguments.first or time.monotonic() - began > 60 * arguments.minutes:
                continue
            first, second, wrong = scene.suffer(fault)
            every[fault.kind, fault.command] += 1
            good[fault.kind, fault.command] += not wrong
            end = "success" if first.code == 0 else "one line" if first.code > 0 else "ended"
            ends[fault.kind, end] += 1
            print(f"{number} {fault}: {first.code} {first.last[:200]}; then {second.code}")
            for text in wrong:
                failures.append(f"{number}, {fault.command}, {fault.kind}: {text}")
                print(f"    WRONG {text}", flush=True)
    facts = run.environment(torch.device("cpu"))
    lines = [
        "# Faults: what is left when something breaks",
        "",
        f"`python benchmarks/faults.py --faults {arguments.faults} --seed {arguments.seed}`, "
        f"{datetime.date.today().isoformat()}; {facts['device']}, Python {facts['python']}, torch "
        f"{facts['torch']}; {time.monotonic() - began:.0f} s. Faults that were met well, of all. A "
        "call under a fault is met well if it ends in a success or in one line, what was whole "
        "before is whole, every file is valid, and the next call makes the same bytes as one that "
        "nothing disturbed and leaves no hidden file. The last columns say how the calls "
        "under the fault ended: with success, with one line, or by a signal.",
        "",
        f"| fault | from then on | {' | '.join(COMMANDS)} | success | one line | signal |",
        "|" + "---|" * (len(COMMANDS) + 5),
    ]
    for kind, what in KINDS.items():
        cells = [
            f"{good[kind, command]} of {every[kind, command]}"
            if kind != "worker killed" or command in HAS_WORKERS
            else ""
            for command in COMMANDS
        ]
        cells += [str(ends[kind, end]) for end in ("success", "one line", "ended")]
        lines.append(f"| {kind} | {what} | {' | '.join(cells)} |")
    lines += ["", f"{sum(good.values())} of {sum(every.values())} were met well.", ""]
    lines += [f"- {text}" for text in failures]
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
