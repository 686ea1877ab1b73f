"""The page on the architecture: its picture, and the files and names that it leads to."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
PAGE = ROOT / "docs" / "architecture.md"


def test_the_picture_is_what_the_imports_are():
    command = [sys.executable, str(ROOT / "scripts" / "draw_rooms.py"), "--check"]
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""


def test_files_and_names_are_there():
    leads = re.findall(r"`([\w/]+\.py)(?:: ([\w.]+))?`", PAGE.read_text(encoding="utf-8"))
    assert len(leads) > 25
    for file, name in leads:
        base = ROOT if file.startswith("scripts/") else ROOT / "src" / "protoclip"
        defined = defined_in(ast.parse((base / file).read_text(encoding="utf-8")))
        found = [path for path in defined if f".{path}".endswith(f".{name}")]
        assert found or not name, (file, name)


def defined_in(node: ast.Module | ast.ClassDef, prefix: str = "") -> set[str]:
    """The functions and classes of a file, and what is in a class as `Class.method`."""
    names = set[str]()
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            names.add(prefix + child.name)
        if isinstance(child, ast.ClassDef):
            names |= defined_in(child, f"{prefix}{child.name}.")
    return names


def test_no_two_files_import_each_other():
    """Nor inside of functions; the package itself gathers names from all of them."""
    paths = {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in SOURCE.rglob("*.py")
    }
    paths.pop("protoclip")
    imported = {name: imports_of(path, {*paths}) for name, path in paths.items()}
    assert len(imported) > 50
    mutual = [(a, b) for a, used in imported.items() for b in used if a < b and a in imported[b]]
    assert mutual == []


def imports_of(path: Path, known: set[str]) -> set[str]:
    """The known modules that a file imports, or takes a name from."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            taken = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= taken & known or {node.module}
    return names & known
