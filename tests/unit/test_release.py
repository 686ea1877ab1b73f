"""What a release says of itself, in every place that says it."""

import re
import tomllib
from pathlib import Path

import yaml

import protoclip
from protoclip.export import card

ROOT = Path(__file__).resolve().parents[2]


def test_the_version_is_one():
    """`__version__` is where it is said; hatch reads it from there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "src/protoclip/__init__.py"
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == protoclip.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest, date = re.findall(r"^## \[(\d.*)\] - (.*)$", changes, re.MULTILINE)[0]
    assert parts(newest) <= parts(protoclip.__version__)
    assert newest != protoclip.__version__ or date == cited["date-released"]


def test_the_address_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["urls"]["Source"] == cited["repository-code"] == card.ADDRESS
    assert f"]({card.ADDRESS}/security)" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def parts(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
