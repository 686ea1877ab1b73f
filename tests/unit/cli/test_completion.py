"""`protoclip completion`: what bash offers at Tab, and what the other shells ask."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from protoclip.cli import COMMANDS, main
from protoclip.cli.completion import ASKS, complete

TAB = """
source <(protoclip completion bash)
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_protoclip
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def press_tab(tmp_path: Path):
    """What bash completes the last of some words to."""
    command = tmp_path / "protoclip"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m protoclip "$@"\n')
    command.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"

    def press(*words: str) -> list[str]:
        shell = ["bash", "--norc", "-c", TAB, "bash", "protoclip", *words]
        environment = {**os.environ, "PATH": path}
        done = subprocess.run(shell, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.split()

    return press


def test_bash_completes_a_command_an_option_and_a_choice(press_tab):
    assert press_tab("al") == ["align"]
    assert press_tab("data", "sc") == ["score"]
    assert press_tab("align", "--model.image.nam") == ["--model.image.name"]
    assert press_tab("explore", "run", "--map", "u") == ["umap"]
    assert press_tab("evaluate", "run") == []  # files may follow, which bash itself completes


def test_every_command_and_its_options_are_offered():
    assert {*complete(COMMANDS, [])} == {name.split()[0] for name in COMMANDS}
    for name in COMMANDS:
        assert ("--json" in complete(COMMANDS, name.split())) == (name != "completion")
    assert complete(COMMANDS, ["trian"]) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_asks_the_command(shell, capsys):
    main(["completion", shell])
    assert f"{ASKS}=1" in capsys.readouterr().out
