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
    leads = re.findall(r"`([\w/]+\.py)(?:: ([\w.]+))?`", PAGE.read_text(encoding="utf-8"))
    assert len(leads) > 25
    for file, name in leads:
        base = ROOT if file.startswith("scripts/") else ROOT / "src" / "protoclip"
        defined = set()
        for node in ast.walk(ast.parse((base / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
        assert set(filter(None, name.split("."))) <= defined, (file, name)
