"""Options as people type them, recipes, and what `--help` costs and shows."""

import re
import subprocess
import sys
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest

import protoclip
from protoclip.cli import COMMANDS, fail, main
from protoclip.cli.spec import options, parse
from protoclip.config import Config, SourceConfig, TeacherConfig


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Parses a command line up to the command, which is returned and not run."""

    def parsed(line: str) -> Any:
        found: list[Any] = []
        for kind in COMMANDS.values():
            monkeypatch.setattr(kind, "__call__", lambda command: found.append(command))
        main(line.split())
        return found[0]

    return parsed


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("compare a b --json", {"runs": ["a", "b"], "json": True}),
        ("compare a --json=false", {"runs": ["a"], "json": False}),
        ("evaluate a --tasks knn --tasks zero_shot", {"tasks": ("knn", "zero_shot")}),
        ("evaluate --split=validation a", {"models": ["a"], "split": "validation"}),
        ("data inspect --every true --samples 3 a", {"source": "a", "samples": 3}),
        ("train --seed 3 --no-evaluate", {"run.seed": 3, "run.evaluate": False}),
        ("match --images a --texts b --data c --data.root d", {"data": "c", "root": "d"}),
        ("train --run.no-evaluate", {"run.evaluate": False}),
        ("train --run.evaluate false --json", {"run.evaluate": False, "json": True}),
        ("train --data.allow-links --resume auto", {"data.allow_links": True, "resume": "auto"}),
        ("train --optim.learning-rate 1e-3", {"optim.learning_rate": 1e-3}),
        ("train --optim.betas 0.5 .6 --json", {"optim.betas": (0.5, 0.6), "json": True}),
        ("train --optim.betas [0.5,0.6]", {"optim.betas": (0.5, 0.6)}),
        ("train --data.caption_column a", {"data.caption_column": "a"}),
        ("train --data.validation 0.1", {"data.validation": 0.1}),
        ('train --data.caption_column ["a","b"]', {"data.caption_column": ["a", "b"]}),
        ("train --data.caption_column a b --seed 1", {"data.caption_column": ["a", "b"]}),
        ("embed m --data d --caption_column a b --out o", {"caption_column": ["a", "b"]}),
        # An argument that is needed may come last.
        ("evaluate --caption_column a m", {"caption_column": "a", "models": ["m"]}),
        ("evaluate --caption_column a b m --json", {"caption_column": ["a", "b"], "models": ["m"]}),
        ("evaluate --tasks knn m", {"tasks": ("knn",), "models": ["m"]}),
        (
            'train --data.sources [{"path":"a","weight":2}]',
            {"data.sources": [SourceConfig(path="a", weight=2.0)]},
        ),
        ("train --run.name 3 --run.out none", {"run.name": "3", "run.out": None}),
        ("align --model.text.name a b --seed 1", {"model.text.name": "a & b", "run.seed": 1}),
        ("align --model.text.name a", {"model.text.name": "a"}),
        (
            "train --teachers minilm timm:a/b.pt --seed 1",
            {
                "teachers": [
                    TeacherConfig(name="minilm", features="minilm"),
                    TeacherConfig(name="b", features="timm:a/b.pt"),
                ],
                "run.seed": 1,
            },
        ),
    ],
)
def test_options_as_people_type_them(line, expected, run):
    command = run(line)
    for name, value in expected.items():
        found = command
        for part in name.split("."):
            found = getattr(found, part)
        assert found == value


def test_recipes_are_read_in_order_and_below_options(tmp_path, run, capsys):
    """Commands on data take a recipe's sections on data and leave the others."""
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text('[run]\nname = "a"\nseed = 1\n[data]\nworkers = 2\n[loss]\nteacher = 3\n')
    second.write_text('[run]\nname = "b"\nlog_every = 2\n')
    config = run(f"train --config {first} --run.seed 7 --config={second} --run.log-every 3")
    assert (config.run.name, config.run.seed, config.run.log_every) == ("b", 7, 3)
    assert (config.data.workers, config.loss.teacher) == (2, 3.0)
    assert run(f"data index pairs.tsv --config {first}").data.workers == 2
    with pytest.raises(SystemExit):
        run(f"compare a --config {first}")
    assert "config: no such setting" in capsys.readouterr().err


def test_a_home_folder_is_found_in_recipes_and_options(tmp_path, monkeypatch):
    """Also behind an equals sign, where shells leave it as it is."""
    recipe = tmp_path / "r.toml"
    recipe.write_text("[[data.sources]]\npath = '~/a.tsv'\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--config", str(recipe), "--data.root=~/images"]
    data = parse(COMMANDS["train"], words).data
    assert (data.sources[0].path, data.root) == (f"{tmp_path}/a.tsv", f"{tmp_path}/images")


def test_arguments_and_options_may_mix_in_any_order():
    for words in permutations(["a", "b", "--data x", "--data=y", "--json"]):
        found = parse(COMMANDS["evaluate"], " ".join(words).split())
        assert found.models == [word for word in words if word in ("a", "b")]
        assert [*found.data] == [word[-1] for word in words if "--data" in word]
        assert found.json


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("how", ["--help", "--help all"])
def test_help_fits_the_terminal(command, how, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), *how.split()])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("     ")], "a setting takes one line"
    assert lines[0].startswith(f"usage: protoclip {command}".rstrip())
    assert len(lines) > 5
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("command", ["train", "align", "finetune"])
def test_help_shows_the_settings_that_people_use(command, capsys):
    """Twenty of them, and the command's own options; `--help all` shows each one once."""
    shown = []
    for words in ([command, "--help"], [command, "--help", "all"]):
        with pytest.raises(SystemExit):
            main(words)
        shown.append(re.findall(r"^  --([\w.]+)", capsys.readouterr().out, re.MULTILINE))
    usual, every = shown
    names = [name for name, _ in options(COMMANDS[command]) if name != "start"]
    assert sorted(every) == sorted(names)
    assert sum("." in name for name in usual) == 20
    assert {*every} - {*usual} <= {name for name, _ in options(Config)}


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"protoclip {protoclip.__version__}\n"


def test_the_command_line_needs_no_torch():
    code = """
import sys, protoclip, protoclip.cli
print("torch" in sys.modules, protoclip.Config.__name__)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False Config\n"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train", "set episodes.micro_batch_size"),
        ("embed", "out of memory: lower --batch_size, and give the command again"),
        ("report", "out of memory: lower --samples, and give the command again"),
    ],
)
def test_a_command_without_memory_names_what_it_can_lower(command, says, capsys):
    """Its own options: one that does not train has no settings of a run."""
    with pytest.raises(SystemExit):
        fail(MemoryError(), command)
    assert says in capsys.readouterr().err
