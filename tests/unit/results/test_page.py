"""The whole page: runs of any kind and state, and texts that are never markup."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup

from protoclip.cli import COMMANDS, main
from protoclip.cli.spec import parse
from protoclip.models import checkpoint
from protoclip.results import page as report_page
from protoclip.results.page import write_report
from protoclip.results.read import read_run
from protoclip.training.run import finetune
from reported import hostile_pairs, trained


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A ProtoCLIP run and a CLIP run of own data with hostile texts."""
    folder = tmp_path_factory.mktemp("runs")
    data = hostile_pairs(folder / "pairs.parquet")
    trained(folder / "proto", data)
    trained(folder / "clip", data, loss={"prototypical": 0.0})
    return folder


class Page(HTMLParser):
    """Tags with their attributes, and the text of each section."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self._section = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._section = dict(attrs)["id"]

    def handle_data(self, data):
        words = f"{self.sections.get(self._section, '')} {data}"
        self.sections[self._section] = " ".join(words.split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def two(runs, tmp_path_factory) -> Page:
    """The page of both."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    return Page(write_report([runs / "clip", runs / "proto"], out))


def page_of(tmp_path, *folders, **more) -> Page:
    """A page without what is inside its charts, which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_page, "draw_lines", lambda *given, **more: Markup("<svg></svg>"))
        return Page(write_report(folders, tmp_path / "report.html", **more))


def test_a_report_of_two_models_has_every_section(two):
    sections = two.sections
    assert re.search(r"(?:clip|proto) (?:and|is better than) (?:clip|proto)", sections["results"])
    assert re.search(r" [\d.]+ \[[\d.]+, [\d.]+\]", sections["results"])
    assert "finished, 6 steps" in sections["runs"]
    for chart in ("Total loss", "InfoNCE loss", "Accuracy of prototypes", "Temperature of pairs"):
        assert chart in sections["curves"]
    assert "Data Train Extract Cluster Back-translate Other All" in sections["curves"]
    assert "loss.prototypical 0.0 0.25" in sections["settings"]
    assert "No run left out a sample." in sections["data"]
    assert "protoclip compare" in sections["environment"]
    assert "report RUNS --checkpoints measures it" in sections["grouping"]
    assert f"--out {two.path}" in sections["environment"]
    assert "prototypes.number 8 from the data or model" in sections["settings"]


def test_runs_that_are_not_whole_get_sentences(runs, tmp_path):
    """Interrupted, without a checkpoint, and with its data gone."""
    for name in ("stopped", "gone"):
        shutil.copytree(runs / "proto", tmp_path / name)
        text = (tmp_path / name / "config.toml").read_text()
        text = text.replace('name = "proto"', f'name = "{name}"', 1)
        (tmp_path / name / "config.toml").write_text(text)
    (tmp_path / "stopped" / "results.json").unlink()
    shutil.rmtree(tmp_path / "stopped" / "checkpoints")
    gone = (tmp_path / "gone" / "config.toml").read_text()
    (tmp_path / "gone" / "config.toml").write_text(gone.replace("pairs.parquet", "none.parquet"))
    page = page_of(tmp_path, tmp_path / "stopped", tmp_path / "gone")
    assert "Not finished, so without results: stopped ." in page.sections["results"]
    assert "not finished: step 6 of 6" in page.sections["runs"]
    assert page.sections["curves"].count("Total loss") == 1


def test_a_fine_tuned_run_is_shown_with_the_weights_that_were_chosen(runs, tmp_path):
    """Not with its last checkpoint; and the page has the sweep."""
    given = {
        "run": {"out": str(tmp_path / "shop"), "name": "shop", "device": "cpu"},
        "data": {"train": str(runs / "pairs.parquet"), "validation": 0.4, "class_column": "class"},
        "model": {"start": str(runs / "proto")},
        "episodes": {"size": 32, "batch_size": 16, "count": 1},
    }
    finetune(given, alpha=0.25)
    entry = {"step": 2, "features": {"agreement": 0.123}}
    analysis = json.dumps({"data": "mine", "pairs": 77, "checkpoints": [entry]})
    (tmp_path / "shop/analysis.json").write_text(analysis)
    page = page_of(tmp_path, tmp_path / "shop")
    assert "77 pairs of mine, step 2 before WiSE-FT" in page.sections["grouping"]
    assert "Those of alpha 0.25 are the run's model." in page.sections["results"]
    assert not re.search("nothing to compare|best of each", page.sections["results"])  # one run
    changed = r"against its start, in points; .* \(validation\) ?: [+\u2212]\d"
    assert re.search(changed, page.sections["results"])
    again = f"finetune --alpha 0.25 --config {tmp_path}/shop/config.toml --run.out FOLDER"
    assert f"protoclip {again} protoclip compare" in page.sections["environment"]
    command = parse(COMMANDS["finetune"], again.split()[1:])
    assert (command.alpha, command.settings()["model"]["start"]) == (0.25, str(runs / "proto"))


def test_the_command_measures_all_checkpoints_if_asked(runs, tmp_path):
    """And keeps what it measured in the folder of the run."""
    folder, out = tmp_path / "proto", tmp_path / "report.html"
    shutil.copytree(runs / "proto", folder)
    main(["report", str(folder), "--out", str(out), "--samples", "16", "--checkpoints"])
    analysis = json.loads((folder / "analysis.json").read_text())
    measured = analysis["checkpoints"][-1]["features"]["agreement"]
    grouping = Page(out).sections["grouping"]
    assert "protoclip analyze, 16 pairs of validation" in grouping
    assert f"{measured:.3f}".replace("-", "\u2212") in grouping


def with_settings(runs, folder, name: str, *changes: tuple[str, str]) -> Path:
    """A copy of a run, with other lines in its settings."""
    shutil.copytree(runs / name, folder)
    text = (folder / "config.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    (folder / "config.toml").write_text(text)
    return folder


def test_a_run_folder_permits_nothing(runs, tmp_path):
    """Whatever it says, the command line alone does."""
    said = "allow_links = true\nallow_commands = false\ntrain = "  # the second by older versions
    folder = with_settings(runs, tmp_path / "run", "proto", ("train = ", said))
    assert checkpoint.read_config(folder).data.allow_links is False
    config = read_run(folder).config
    assert config is not None
    assert config.data.allow_links is False
    out = tmp_path / "report.html"
    main(["report", str(folder), "--out", str(out), "--data.allow_links", "true"])
    assert "--allow_links" in Page(out).sections["environment"]


def test_an_aligned_run_lists_no_bad_pairs(runs, tmp_path, monkeypatch):
    """What it left out is in no file."""
    folder = with_settings(runs, tmp_path / "run", "clip", ('name = "clip"', 'name = "aligned"'))
    monkeypatch.setattr(checkpoint, "is_aligned", lambda path: folder in path.parents)
    page = page_of(tmp_path, folder, runs / "clip")
    assert "No run lists a sample that it left out. aligned : align" in page.sections["data"]
    assert f"protoclip align --config {folder}/config.toml" in page.sections["environment"]
