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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE, PAGE = ROOT / "src" / "protoclip", ROOT / "docs" / "architecture.md"
NOT_DRAWN = {"__init__", "__main__", "testing", "progress", "terminal", "signals", "files"}
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


def picture(used: dict[str, set[str]]) -> str:
    """A Mermaid graph without the arrows that follow from others."""
    lines = ["graph TD"]
    for room, imported in used.items():
        by_others = {far for near in imported for far in reachable(used, near)}
        lines += [f"  {room} --> {other}" for other in sorted(imported - by_others)]
    return "\n".join(lines) + "\n"


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
