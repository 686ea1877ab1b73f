"""The wheel and the source archive of a release, as whoever has no checkout gets them."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "protoclip"


def output(*words: str | Path, folder: Path) -> str:
    """What a command prints that succeeds in a folder, without what this process can import."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run([*map(str, words)], cwd=folder, env=env, capture_output=True, text=True)
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

    # A fresh environment, which has the libraries of this one by a path, but not its `protoclip`.
    venv.create(tmp_path / "fresh")
    python = tmp_path / "fresh" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    output(*pip, "--no-index", wheel, folder=tmp_path)
    (site,) = tmp_path.glob("fresh/lib/python*/site-packages")
    libraries = [path for path in sys.path if path.endswith("-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries))
    protoclip = python.with_name("protoclip")
    assert output(protoclip, "--version", folder=tmp_path).split()[-1] in wheel.name

    said = output(protoclip, "data", "inspect", "emoji", folder=tmp_path)
    assert "7,077" in said
