"""Every setting is explained."""

import ast
import dataclasses
from pathlib import Path

import pytest

import protoclip.config
from protoclip.cli import main
from protoclip.config import Config, LossConfig, PrototypeConfig, TeacherConfig


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


def test_prototypes_come_from_the_queue_where_a_teacher_groups() -> None:
    """Unless a source is asked for."""
    teacher = TeacherConfig(features="emoji")
    assert Config().prototype_source == "extract"
    assert Config(teacher=teacher).prototype_source == "queue"
    assert Config(teacher=teacher, loss=LossConfig(teacher=0.0)).prototype_source == "extract"
    asked = PrototypeConfig(source="extract")
    assert Config(teacher=teacher, prototypes=asked).prototype_source == "extract"
