"""The pages that errors name."""

import runpy
from pathlib import Path

import pytest

from protoclip import cli
from protoclip.cli.spec import SECTIONS

ROOT = Path(__file__).parents[3]


def test_every_page_is_there() -> None:
    """Of every command, and of every section of the settings that is one."""
    anchors = runpy.run_path(str(ROOT / "scripts" / "check_docs.py"))["anchors"]
    for page in map(cli.page_of, {*cli.COMMANDS, *SECTIONS}):
        path, _, anchor = page.partition("#")
        assert (ROOT / "docs" / path).is_file(), page
        assert not anchor or anchor in anchors(ROOT / "docs" / path), page


@pytest.mark.parametrize(
    ("words", "page"),
    [
        (["train", "--data.train", "nothing"], "docs/data.md"),
        (["export", "x"], "docs/models.md#export"),
        (["train", "--optim.betas", "2", "1"], "docs/training.md#the-model-and-what-follows"),
        (["train", "--teacher.whiten", "-1"], "docs/teachers.md"),
        (["trian"], ""),
        (["train", "--model.text.name", "no/model"], "docs/align.md#without-a-network"),
    ],
)
def test_an_error_names_the_page_that_explains_it(
    words: list[str], page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("protoclip: error: ")
    assert f"({page}" in line if page else "docs/" not in line


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
        cli.fail(MemoryError(), command)
    assert says in capsys.readouterr().err
