"""Every setting is explained."""

import ast
import dataclasses
from pathlib import Path

import pytest

import protoclip.config
from protoclip.cli import main


def test_every_field_has_a_docstring_that_becomes_help(capsys) -> None:
    """Each field of each section is followed by a docstring, whose words `--help` shows."""
    tree = ast.parse(Path(protoclip.config.__file__).read_text(encoding="utf-8"))
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    shown = "".join(capsys.readouterr().out.split())
    sections = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and node.name not in ("Config", "ModelConfig", "SourceConfig")
    ]
    assert len(sections) == 11
    for section in sections:
        fields = dataclasses.fields(getattr(protoclip.config, section.name))
        documented = {
            target.target.id: following.value.value
            for target, following in zip(section.body, section.body[1:], strict=False)
            if isinstance(target, ast.AnnAssign) and isinstance(following, ast.Expr)
        }
        assert set(documented) == {field.name for field in fields}
        for name, text in documented.items():
            assert "".join(text.split()) in shown, (section.name, name)
