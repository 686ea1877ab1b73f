"""Count the lines of each room of the package beside its budget.

    python scripts/count_rooms.py [--write]

The exit code is 1 if all rooms together have more than LIMIT lines. A budget is a guide: one room
may lend to another. `--write` puts the table into docs/architecture.md.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE, PAGE = ROOT / "src" / "protoclip", ROOT / "docs" / "architecture.md"
LIMIT = 36_000
BUDGETS = {
    "data": 6_000,
    "training": 4_700,
    "evaluation": 4_100,
    "models": 3_800,
    "results": 2_600,
    "encode": 2_500,
    "explore": 2_250,
    "cli": 1_950,
    "losses": 1_500,
    "top level": 1_450,
    "export": 1_400,
    "prototypes": 980,
    "distributed": 800,
}
TABLE = re.compile(r"\| room \| files \| lines \| budget \|\n(\|.*\n)+")


def count_lines() -> tuple[Counter[str], Counter[str]]:
    """Files and lines of each room; files beside the rooms are the top level."""
    files, lines = Counter[str](), Counter[str]()
    for path in SOURCE.rglob("*.py"):
        first, *inside = path.relative_to(SOURCE).parts
        room = first if inside else "top level"
        files[room] += 1
        lines[room] += len(path.read_text(encoding="utf-8").splitlines())
    return files, lines


def format_table(files: Counter[str], lines: Counter[str]) -> str:
    """The rooms as a table in Markdown, in the order of their budgets, and their sum."""
    rooms = sorted(lines, key=lambda room: -BUDGETS.get(room, 0))
    rows = [
        f"| {room} | {files[room]} | {lines[room]:,} | {BUDGETS.get(room, 0):,} |" for room in rooms
    ]
    total = f"| **sum** | {files.total()} | {lines.total():,} | {sum(BUDGETS.values()):,} |"
    head = ["| room | files | lines | budget |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, total]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    write = parser.parse_args().write
    files, lines = count_lines()
    table = format_table(files, lines)
    print(table, end="")
    if write:
        page, tables = TABLE.subn(table, PAGE.read_text(encoding="utf-8"))
        assert tables == 1, f"{PAGE} has {tables} tables of rooms"
        PAGE.write_text(page, encoding="utf-8")
    if lines.total() > LIMIT:
        print(f"src has {lines.total():,} lines; at most {LIMIT:,} may stay", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
