"""What a release says of itself, in every place that says it."""

import re
import tomllib
from pathlib import Path

import yaml

import protoclip

ROOT = Path(__file__).resolve().parents[2]


def test_the_version_is_one():
    """`__version__` is where it is said; hatch reads it from there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "src/protoclip/__init__.py"
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.findall(r"^## \[(\d.*)\] - (.*)$", changes, re.MULTILINE)[0]
    assert (
        (cited["version"], cited["date-released"]) == newest == (protoclip.__version__, newest[1])
    )


def test_each_version_since_1_0_0_left_a_run_that_later_ones_open():
    """tests/e2e/test_compatibility.py opens those that are there."""
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[([1-9]\d*\.\d+\.\d+)\] - ", changes, re.MULTILINE)
    assert "1.0.0" in released
    for version in released:
        for kind in ("tar.xz", "json"):
            assert (ROOT / "tests" / "fixtures" / f"run-{version}.{kind}").is_file()


def test_only_the_job_that_publishes_may_do_so():
    """It has no checkout and runs no code of ours; the others may read, and keep no token."""
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow[True] == {"push": {"tags": ["v[0-9]+.[0-9]+.[0-9]+"]}}  # `on` is true in YAML
    assert workflow["permissions"] == {}
    publish = workflow["jobs"]["publish"]
    assert publish["environment"] == "pypi"
    may = {"id-token": "write", "attestations": "write", "contents": "read"}
    assert publish["permissions"] == may
    used = [step.get("uses", "").split("@")[0] for step in publish["steps"]]
    assert used == [
        "actions/download-artifact",
        "actions/attest-build-provenance",
        "pypa/gh-action-pypi-publish",
    ]
    assert [publish["needs"], workflow["jobs"]["test"]["needs"]] == ["test", "build"]
    for job in (workflow["jobs"]["build"], workflow["jobs"]["test"]):
        assert job["permissions"] == {"contents": "read"}
        checkouts = [step for step in job["steps"] if "checkout" in step.get("uses", "")]
        assert [step["with"] for step in checkouts] == [{"persist-credentials": False}]
    commands = [step.get("run") for step in workflow["jobs"]["build"]["steps"]]
    assert commands[-3:-1] == ["python -m build", "python -m twine check --strict dist/*"]
    pins = re.findall(r"uses: \S+@(\S+)", text)
    assert all(re.fullmatch(r"v\d+|release/v\d+|[0-9a-f]{40}", pin) for pin in pins), pins
    assert "secrets." not in text
    named = re.findall(r"\btests/\S+", text)
    assert named
    assert all((ROOT / path).exists() for path in named)
