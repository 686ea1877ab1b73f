"""Draw the rooms of the package, and who uses whom, into docs/architecture.md.

    python scripts/draw_rooms.py [--check]

An arrow leads from a room to one that it imports. One that follows from others is left out, so that
the picture shows the shortest way down. `--check` only says whether the picture is what the imports
are now; the exit code is 1 if not.
"""

import argparse
import ast
import re
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE, PAGE = ROOT / "src" / "protoclip", ROOT / "docs" / "architecture.md"
NOT_DRAWN = {"__init__", "__main__", "testing", "progress"}
NOT_DRAWN |= {"terminal", "signals", "values", "files"}
BEGIN, END = "```mermaid\n", "```\n"


def rooms() -> dict[str, set[str]]:
    """Each folder or file of the package, with those that it imports."""
    used: dict[str, set[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        imported = used.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
                if node.module == "protoclip":
                    names = [f"protoclip.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            parts = (name.split(".") for name in names)
            imported |= {part[1] for part in parts if part[0] == "protoclip" and len(part) > 1}
    drawn = used.keys() - NOT_DRAWN
    return {room: (used[room] & drawn) - {room} for room in sorted(drawn)}


def reachable(used: dict[str, set[str]], room: str) -> set[str]:
    """The rooms that a room uses, by itself or through others."""
    seen: set[str] = set()
    waiting = [*used[room]]
    while waiting:
        if (one := waiting.pop()) not in seen:
            seen.add(one)
            waiting += used[one]
    return seen


def arrows(used: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Who uses whom, without what follows from others."""
    found = []
    for room, imported in used.items():
        by_others = {far for near in imported for far in reachable(used, near)}
        found += [(room, other) for other in sorted(imported - by_others)]
    return found


def picture(used: dict[str, set[str]]) -> str:
    """A Mermaid graph of the arrows."""
    return "\n".join(["graph TD", *(f"  {a} --> {b}" for a, b in arrows(used))]) + "\n"


def svg(used: dict[str, set[str]]) -> str:
    """The same as SVG, for pages that must not load a script: a room below all that use it."""
    edges = arrows(used)
    level = dict.fromkeys(used, 0)
    for _ in used:
        for above, below in edges:
            level[below] = max(level[below], level[above] + 1)
    # A long arrow passes through the levels between by a place of its own in each.
    rows: list[list[str]] = [[] for _ in range(max(level.values()) + 1)]
    for room, number in level.items():
        rows[number].append(room)
    paths = []
    for above, below in edges:
        stops = [f"{above}>{below}>{number}" for number in range(level[above] + 1, level[below])]
        for number, stop in enumerate(stops, start=level[above] + 1):
            rows[number].append(stop)
        paths.append([above, *stops, below])
    near: dict[str, list[str]] = {}
    for path in paths:
        for one, other in pairwise(path):
            near.setdefault(one, []).append(other)
            near.setdefault(other, []).append(one)
    width, height = 130, 62

    def place(row: list[str]) -> dict[str, float]:
        return {name: (index - (len(row) - 1) / 2) * width for index, name in enumerate(row)}

    x = {name: where for row in rows for name, where in place(row).items()}
    for _ in range(20):  # each towards the middle of its neighbours
        for row in rows:
            row.sort(key=lambda name: sum(x[n] for n in near[name]) / len(near[name]))
            x |= place(row)
    y = {name: number * height + 30 for number, row in enumerate(rows) for name in row}
    half = max(map(abs, x.values())) + width / 2
    box = f"{-half:.0f} 0 {2 * half:.0f} {len(rows) * height:.0f}"
    title = "The rooms of the package. " + ", ".join(f"{a} uses {b}" for a, b in edges)
    parts = [f'<svg class="rooms" viewBox="{box}" role="img" aria-label="{title}">']
    for path in paths:
        line = f"M{x[path[0]]:.0f} {y[path[0]] + 14}"
        for one, other in pairwise(path):
            start, end = y[one] + 14, y[other] - 14
            bend = (start + end) / 2
            line += f" C{x[one]:.0f} {bend} {x[other]:.0f} {bend} {x[other]:.0f} {end}"
            if other != path[-1]:
                line += f" L{x[other]:.0f} {end + 28}"
        parts.append(f'<path d="{line}"/>')
        tip = f"M{x[path[-1]] - 4:.0f} {y[path[-1]] - 20} l4 6 l4 -6"
        parts.append(f'<path d="{tip}"/>')
    for room in used:
        parts.append(
            f'<rect x="{x[room] - 52:.0f}" y="{y[room] - 14}" width="104" height="28" rx="5"/>'
        )
        parts.append(f'<text x="{x[room]:.0f}" y="{y[room]}">{room}</text>')
    return "".join([*parts, "</svg>"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    graph = BEGIN + picture(rooms()) + END
    drawn = re.sub(re.escape(BEGIN) + ".*?" + END, lambda _: graph, page, count=1, flags=re.DOTALL)
    if arguments.check:
        if drawn != page:
            print(f"{PAGE}: not what the imports are; run scripts/draw_rooms.py", file=sys.stderr)
        return int(drawn != page)
    PAGE.write_text(drawn, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
