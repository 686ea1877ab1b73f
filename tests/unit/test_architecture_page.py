"""The page on the architecture: its picture, and the files and names that it leads to."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"


def test_the_picture_is_what_the_imports_are():
    command = [sys.executable, str(ROOT / "scripts" / "draw_rooms.py"), "--check"]
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""


def test_files_and_names_are_there():
    """On the page and in the table of CONTRIBUTING.md."""
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = contributing[contributing.index("## How long") : contributing.index("## Rules")]
    pages = PAGE.read_text(encoding="utf-8") + table
    leads = re.findall(r"`([\w/]+\.py)(?:: ([\w.]+))?`", pages)
    assert len(leads) > 25
    for file, name in leads:
        base = ROOT if file.startswith(("scripts/", "tests/")) else ROOT / "src" / "protoclip"
        defined = defined_in(ast.parse((base / file).read_text(encoding="utf-8")))
        found = [path for path in defined if f".{path}".endswith(f".{name}")]
        assert found or not name, (file, name)


def defined_in(node: ast.Module | ast.ClassDef, prefix: str = "") -> set[str]:
    """The functions, classes and constants of a file, and what is in a class as `Class.method`."""
    names = set[str]()
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            names.add(prefix + child.name)
        if isinstance(child, ast.Assign | ast.AnnAssign):
            target = child.targets[0] if isinstance(child, ast.Assign) else child.target
            names.add(prefix + ast.unparse(target))
        if isinstance(child, ast.ClassDef):
            names |= defined_in(child, f"{prefix}{child.name}.")
    return names
