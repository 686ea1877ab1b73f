"""The wheel and the source archive of a release, as whoever has no checkout gets them."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "protoclip"
TRAIN = """
train --run.out run --run.no-evaluate --model.image.name test_resnet --model.image.size 32
--episodes.size 64 --episodes.count 2 --episodes.batch_size 32 --prototypes.number 4
"""
# The installed script, once for each command, in one process: it takes seconds to import PyTorch.
COMMANDS = """
import runpy, sys

script, *commands = sys.argv[1:]
for command in commands:
    sys.argv = [script, *command.split()]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""
SCRIPT = """
import protoclip

reveal_type(protoclip.load)
reveal_type(protoclip.info_nce)
"""
# Strictly, but without the libraries' types, which take a minute to read.
SETTINGS = """
[mypy]
strict = True
follow_imports = skip
[mypy-protoclip.*]
follow_imports = silent
"""


def python(*words: str | Path, folder: Path) -> str:
    """What a Python command prints that succeeds in a folder, with what is installed there."""
    ended = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "installed")},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_what_a_release_uploads(tmp_path):
    # The wheel is built of the source archive. The tools may be on the path of this process alone.
    options = ["--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run([sys.executable, "-m", "build", *options], check=True)
    wheel, archive = sorted((tmp_path / "dist").iterdir())
    checked = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(archive)]
    subprocess.run(checked, check=True)

    ours = {p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    names = {str(path.relative_to(PACKAGE.parent)) for path in ours}
    assert {"protoclip/py.typed", "protoclip/data/emoji/emoji.parquet"} < names
    with zipfile.ZipFile(wheel) as opened:
        assert names <= set(opened.namelist())

    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", "installed"]
    python(*pip, wheel, folder=tmp_path)
    protoclip = tmp_path / "installed" / "bin" / "protoclip"
    assert "\n  train  " in python(protoclip, "--help", folder=tmp_path)
    assert "--quick" in python(protoclip, "demo", "--help", folder=tmp_path)
    commands = [TRAIN, "report run --out report.html"]
    python("-c", COMMANDS, protoclip, *commands, folder=tmp_path)
    assert "<style>" in (tmp_path / "report.html").read_text(encoding="utf-8")

    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    types = python("-m", "mypy", "--cache-dir", os.devnull, "script.py", folder=tmp_path)
    assert 'note: Revealed type is "def (reference: str | pathlib.Path) -> tuple[proto' in types
    assert "positives: Literal['pair'] | Literal['masked'] | Literal['shared'] =" in types
