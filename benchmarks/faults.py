"""What is left when something breaks? Calls commands under seeded faults, and then again without.

Disks that are full or read-only, permissions that are taken away, files that vanish, a clock that
jumps, memory that runs out, processes that are killed or paused: each at a random moment of
`train`, `embed-teacher`, `data pack`, `evaluate`, `export` or `report`. The call must end in a
success or in one line; what was whole before must be whole after it; every file must be valid; and
the next call must make the same as a call that nothing disturbed. What differs in times alone is
the same. Of a pair whose image was gone, it must say that it is left out. Linux only.

    python benchmarks/faults.py [--faults 24] [--seed 0] [--minutes 60] [--out FILE]
"""

import argparse
import datetime
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from protoclip.training import run_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from faulting import COMMANDS, KINDS, Fault, Outcome, Scene, drawn


@dataclass
class Tally:
    """Faults that were met well, of all, by kind and command; and how the calls ended."""

    good: Counter[tuple[str, str]] = field(default_factory=Counter)
    every: Counter[tuple[str, str]] = field(default_factory=Counter)
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, number: int, fault: Fault, first: Outcome, wrong: list[str]) -> None:
        self.every[fault.kind, fault.command] += 1
        self.good[fault.kind, fault.command] += not wrong
        end = "success" if first.code == 0 else "one line" if first.code > 0 else "signal"
        self.ends[fault.kind, end] += 1
        self.failures += [f"{number}, {fault}: {text}" for text in wrong]

    def rows(self) -> list[str]:
        """A Markdown table."""
        lines = [
            f"| fault | from then on | {' | '.join(COMMANDS)} | success | one line | signal |",
            "|" + "---|" * (len(COMMANDS) + 5),
        ]
        for kind, what in KINDS.items():
            cells = [
                f"{self.good[kind, command]} of {self.every[kind, command]}"
                if self.every[kind, command]
                else ""
                for command in COMMANDS
            ]
            cells += [str(self.ends[kind, end]) for end in ("success", "one line", "signal")]
            lines.append(f"| {kind} | {what} | {' | '.join(cells)} |")
        sums = f"{sum(self.good.values())} of {sum(self.every.values())} were met well."
        return [*lines, "", sums, "", *(f"- {text}" for text in self.failures)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no fault after these")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tally, began, facts = Tally(), time.monotonic(), run_folder.environment(torch.device("cpu"))
    text = ""
    with tempfile.TemporaryDirectory(prefix="protoclip-faults-") as folder:
        scene = Scene(Path(folder))
        for number, fault in enumerate(drawn(arguments.faults, arguments.seed)):
            if time.monotonic() - began > 60 * arguments.minutes:
                break
            first, second, wrong = scene.suffer(fault)
            tally.add(number, fault, first, wrong)
            print(f"{number} {fault}: {first.code} {first.last[:200]}; then {second.code}")
            for what in wrong:
                print(f"    WRONG {what}", flush=True)
            lines = [
                "# Faults: what is left when something breaks",
                "",
                f"`python benchmarks/faults.py --faults {arguments.faults} --seed "
                f"{arguments.seed}`, {datetime.date.today().isoformat()}; {facts['device']}, "
                f"Python {facts['python']}, torch {facts['torch']}; the first {number + 1} faults, "
                f"in {time.monotonic() - began:.0f} s. A fault is met well if the call ends in a "
                "success or in one line, what was whole before is whole, every file is valid, and "
                "the next call makes the same bytes as one that nothing disturbed. The last "
                "columns say how the calls under the fault ended.",
                "",
                *tally.rows(),
            ]
            text = "\n".join(lines).rstrip() + "\n"
            if arguments.out:
                arguments.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
