"""Pages and facts: links, pictures, commands, names and versions, held against the code."""

import doctest
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from operator import attrgetter
from pathlib import Path

import pytest
import torch
import yaml

import protoclip
from protoclip.cli import COMMANDS
from protoclip.cli.spec import parse
from protoclip.evaluation.metrics import METRICS
from protoclip.export import card
from protoclip.export.run import export
from protoclip.losses.objective import LossWeights
from scripts_as_modules import script

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)


def test_public_names_are_those_that_stay() -> None:
    """A name that comes or goes is also written down, or struck, on the page of what stays."""
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| Python \| (.+?) \|", page, re.MULTILINE)
    names, of_model = row.split("; and ")
    assert sorted(re.findall(r"`(\w+)`", names)) == sorted(protoclip.__all__)
    assert re.findall(r"`(\w+)`", of_model) == ["encode_image", "encode_text"]
    for name in ("encode_image", "encode_text"):
        assert callable(getattr(protoclip.ProtoCLIP, name))


# The first parameters of each; others with defaults may follow, by name.
PARAMETERS = {
    "train": "config resume",
    "align": "settings resume",
    "finetune": "settings alpha resume",
    "embed": "reference data out",
    "load": "reference",
    "evaluate": "model image_transform tokenizer data tasks",
    "export": "reference folder formats",
    "info_nce": "image_features text_features logit_scale groups",
    "sigmoid_loss": "image_features text_features logit_scale logit_bias groups",
    "prototypical_loss": "student_projections student_centroids teacher_centroids assignments "
    "logit_scale target_temperature",
    "objective": "embeddings targets assignments weights",
    "back_translate": "assignments student_features num_prototypes",
    "kmeans": "features num_clusters iterations restarts seed init spherical",
    "ProtoCLIP.encode_image": "self images normalize",
    "ProtoCLIP.encode_text": "self tokens normalize",
}


def test_public_functions_keep_their_parameters() -> None:
    """Callers outside pass them by name."""
    functions = {name for name in protoclip.__all__ if name[0].islower()}
    assert functions == {name for name in PARAMETERS if "." not in name}
    for name, words in PARAMETERS.items():
        # The package of this name can be called too, and says nothing of parameters.
        function = export if name == "export" else attrgetter(name)(protoclip)
        kept = words.split()
        assert [*inspect.signature(function).parameters][: len(kept)] == kept, name


def test_every_metric_is_explained() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \| (`.+?) \| `(\w+)` \|", page, re.MULTILINE)
    found = [
        (name, key, task)
        for names, keys, task in rows
        for name, key in zip(names.split(", "), keys.split(", "), strict=True)
    ]
    expected = [(f"`{metric.name}`", f"`{metric.key}`", metric.task) for metric in METRICS.values()]
    assert sorted(found) == sorted(expected)


def test_commands_of_pages_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `protoclip` line of a shell block names a command, options and recipes that exist."""
    monkeypatch.chdir(ROOT)
    seen = set()
    for path in PAGES:
        for block in BLOCK.findall(path.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.partition("||")[0].replace("$seed", "0")  # in a loop over seeds
                words = shlex.split(line, comments=True)
                if "protoclip" not in words or words[-1].endswith("pip") or "..." in words:
                    continue
                words = words[words.index("protoclip") + 1 :]
                names = [name for name in COMMANDS if words[: len(name.split())] == name.split()]
                assert names, f"{path.name}: {line}"
                words = words[len(names[0].split()) :]
                recipe = words[words.index("--config") + 1] if "--config" in words else None
                if recipe is None or recipe.startswith("recipes/"):  # others would be read too
                    parse(COMMANDS[names[0]], words)
                    seen.add((path.name, names[0]))
    assert {("README.md", name) for name in ("data inspect", "align", "explore")} <= seen
    assert {("cluster.md", "train"), ("cluster.md", "embed-teacher")} <= seen
    assert len(seen) > 30


def test_lines_for_people_from_open_clip_can_be_read() -> None:
    """The options of `protoclip train` in the right column of its table."""
    page = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    spans = re.findall(r"`(--[^`]+)`", "".join(re.findall(r"^\|.*?\|(.*)\|$", page, re.MULTILINE)))
    lines = [span for span in spans if " " in span]
    assert len(lines) > 12
    for line in lines:
        parse(
            COMMANDS["train"],
            [*([] if "data.train" in line else ["--data.train", "x"]), *shlex.split(line)],
        )


def test_the_repository_has_no_broken_link() -> None:
    with script("scripts/check_docs.py") as check_docs:
        assert check_docs.main() == 0


def test_pages_and_sentences_stay_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")  # where the script finds the other one
    with script("scripts/count_words.py") as count_words:
        assert count_words.main() == 0
        page = "One `a b`, [two](c d).  Three:\n- four\n| five |"
        sentences = list(count_words.split_sentences(page))
    prose = [(sentence, False) for sentence in ("One code, two.", "Three:", "four")]
    assert sentences == [*prose, ("five", True)]


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
        text = (base / file).read_text(encoding="utf-8")
        last = name.rpartition(".")[2]
        assert re.search(rf"^ *(def |class )?{last}\b", text, re.MULTILINE), (file, name)


@pytest.mark.parametrize(
    "name", ["back_translate", "info_nce", "kmeans", "objective", "prototypical_loss"]
)
def test_examples_run(name: str) -> None:
    function = getattr(protoclip, name)
    names = {public: getattr(protoclip, public) for public in protoclip.__all__}
    names |= {"LossWeights": LossWeights, "torch": torch}
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=names)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


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
