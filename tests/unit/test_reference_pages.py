"""Pages that readers look things up in: made from the code, or held against it."""

import inspect
import re
import shlex
from operator import attrgetter
from pathlib import Path

import pytest

import protoclip
from protoclip.cli import COMMANDS
from protoclip.cli.spec import parse
from protoclip.evaluation.metrics import METRICS
from protoclip.export.run import export

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
