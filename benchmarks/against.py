"""Is this checkout slower than another? A benchmark of both, in turn, with ratios.

    git worktree add ../before COMMIT
    python benchmarks/against.py ../before losses [--rounds 3] [--columns ms] [--out FILE] \\
        [-- OPTIONS]

Runs `benchmarks/NAME.py OPTIONS` of the other checkout and of this one, round by round, so that
both have a share of what else the machine does; where the other one has no such file, this one's
(`public` asks for what both can do). Tables and columns that both print are compared,
row by row, by the medians over rounds. The installed packages are those of this Python for both.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
RULE = re.compile(r"\|[-:| ]+\|")
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
Cell = tuple[str, str, str]  # words that name the row, number of the row of these words, column


def numbers(printed: str) -> dict[Cell, float]:
    """The number that each cell of the Markdown tables begins with."""
    found: dict[Cell, float] = {}
    lines = printed.splitlines()
    header: list[str] = []
    times: dict[str, int] = defaultdict(int)
    for number, line in enumerate(lines):
        if not line.startswith("|"):
            header = []
        elif not header:
            header = split(line) if RULE.fullmatch((lines[number + 1 :] or [""])[0]) else []
        elif not RULE.fullmatch(line):
            cells = split(line)
            more = (cell for cell in cells[1:3] if cell and not NUMBER.match(cell))
            words = ", ".join([cells[0], *more])
            times[words] += 1
            for column, cell in zip(header, cells, strict=False):
                if match := NUMBER.match(cell):
                    found[words, str(times[words]), column] = float(match[0].replace(",", ""))
    return found


def split(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def measure(checkout: Path, name: str, options: list[str], cache: Path) -> dict[Cell, float]:
    """What a benchmark of a checkout prints, with caches of its own."""
    variables = {
        **os.environ,
        "PYTHONPATH": str(checkout / "src"),
        "PROTOCLIP_CACHE": str(cache),
    }
    scripts = [folder / "benchmarks" / f"{name}.py" for folder in (checkout, HERE)]
    script = next((path for path in scripts if path.is_file()), scripts[0])
    command = [sys.executable, str(script), *options]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return numbers(done.stdout)


def main() -> None:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options = words[end + 1 :]
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("name", help="a benchmark, such as losses")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--columns", nargs="+", help="those to show (by default all)")
    parser.add_argument("--out", type=Path, help="also append the table to this Markdown file")
    given = parser.parse_args(words[:end])
    checkouts = {"before": given.before.resolve(), "now": HERE}
    measured: dict[str, list[dict[Cell, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds):
            order = [*checkouts.items()]
            for which, checkout in order if number % 2 == 0 else reversed(order):
                cache = Path(folder) / which
                measured[which].append(measure(checkout, given.name, options, cache))
    lines = ["| row | column | before | now | now / before |", "|---|---|---|---|---|"]
    all_cells = {cell: None for rounds in measured.values() for cells in rounds for cell in cells}
    cells = [cell for cell in all_cells if not given.columns or cell[2] in given.columns]
    left_out = 0
    for cell in cells:
        values = [[cells[cell] for cells in measured[w] if cell in cells] for w in checkouts]
        if not all(len(rounds) == given.rounds for rounds in values):
            left_out += 1
            continue
        before, now = (statistics.median(rounds) for rounds in values)
        ratio = f"{now / before:.2f}" if before else "-"
        row = cell[0] if cell[1] == "1" else f"{cell[0]} ({cell[1]})"
        lines.append(f"| {row} | {cell[2]} | {before:g} | {now:g} | {ratio} |")
    command = f"python benchmarks/against.py BEFORE {given.name} --rounds {given.rounds}"
    command += f" -- {' '.join(options)}" * bool(options)
    table = "\n".join(["", f"`{command}`", "", *lines, ""])
    print(table)
    if len(lines) == 2:
        raise SystemExit(f"{given.name}: nothing that both print could be compared")
    if left_out:
        print(f"{left_out} of {len(cells)} numbers are not printed by both in every round")
    if given.out is not None:
        with given.out.open("a", encoding="utf-8") as file:
            file.write(table)


if __name__ == "__main__":
    main()
