"""Every setting is explained."""

import ast
import copy
import dataclasses
import math
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import protoclip.config
from protoclip.checks import LIMITS, check
from protoclip.cli import main
from protoclip.config import (
    Config,
    DataConfig,
    LossConfig,
    OptimConfig,
    PrototypeConfig,
    SourceConfig,
    TeacherConfig,
)
from protoclip.evaluation.suite import metric_names


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


# A configuration in which every list of sections has an entry, so that none of its numbers hides.
FULL = Config(
    data=DataConfig(sources=[SourceConfig(path="a.tsv"), SourceConfig(path="b.tsv")]),
    teachers=[TeacherConfig(name="one", features="one"), TeacherConfig(name="two", features="two")],
    optim=OptimConfig(betas=(0.9, 0.98)),
)


def numeric_fields(kind: type, prefix: str = "") -> list[str]:
    """Dotted names of all fields that may hold a number, found by their annotations alone; the
    last entry of a list or tuple stands for all."""
    found = []
    for name, hint in get_type_hints(kind).items():
        entry = get_args(hint)[0] if get_args(hint) else hint
        where = prefix + name + ("[1]" if str(hint).startswith(("list[", "tuple[")) else "")
        if dataclasses.is_dataclass(entry):
            found += numeric_fields(entry, f"{where}.")
        elif re.search(r"\b(int|float)\b", str(hint)):
            found.append(where)
    return found


def with_value(settings, name: str, value: object):
    """The settings with the number of that dotted name replaced."""
    head, _, rest = name.partition(".")
    field, listed, _ = head.partition("[")
    before = getattr(settings, field)
    after = with_value(before[1] if listed else before, rest, value) if rest else value
    if listed:
        after = type(before)([before[0], after])
    changed = copy.copy(settings)
    object.__setattr__(changed, field, after)  # the tests' type checks would be the first to refuse
    return changed


NUMBERS = numeric_fields(Config)


def refusal(config: Config) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the callers look at the message
        check(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_numbers_are_found() -> None:
    """The reflection that the next tests stand on sees nested, listed and optional numbers."""
    some = {"run.seed", "run.save_minutes", "optim.betas[1]", "model.text.width"}
    some |= {"data.sources[1].weight", "teachers[1].number", "episodes.micro_batch_size"}
    assert some <= set(NUMBERS)
    assert len(NUMBERS) == len(set(NUMBERS)) > 45


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_finite_number_is_refused(name: str) -> None:
    """NaN, the infinities, text and flags, wherever a setting is a number; it is named."""
    for wrong in (math.nan, math.inf, -math.inf, "many", True):
        assert refusal(with_value(FULL, name, wrong)).startswith(f"{name}: {wrong!r} is n")


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_limits(name: str) -> None:
    """What lies beyond them is refused in a line that names the setting."""
    least, most = LIMITS[name.replace("[1]", "")]
    whole = "float" not in str(type(getattr_dotted(FULL, name)))
    below = math.floor(least) - 1 if whole else least - 1e-9
    assert refusal(with_value(FULL, name, below)).startswith(f"{name}: {below} ")
    if most < math.inf:
        above = math.floor(most) + 1
        assert refusal(with_value(FULL, name, above)).startswith(f"{name}: {above} is too large")


def getattr_dotted(settings, name: str):
    for part in name.split("."):
        field, listed, _ = part.partition("[")
        settings = getattr(settings, field)[1] if listed else getattr(settings, field)
    return settings


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optim.betas[1]", 1.0, "is too large; below 1"),
        ("data.max_bad_share", 1.01, "is too large; at most 1"),
        ("run.seed", -1, "is too small; at least 0"),
        ("run.seed", 2**64, "is too large"),
        ("model.image.size", 1, "is too small; at least 2"),
        ("model.text.width", -128, "is too small; at least 1"),
        ("model.text.heads", 0, "is too small; at least 1"),
        ("model.text.heads", 3, "3 heads do not divide model.text.width (128)"),
        ("model.text.context_length", 100_000, "is too large; at most 4096"),
        ("prototypes.target_temperature", 0.0, "needs to be above 0; for hard targets set"),
    ],
)
def test_numbers_that_cannot_be(name: str, value: float, message: str) -> None:
    assert message in refusal(with_value(FULL, name, value))


def test_not_a_number_on_the_command_line_and_in_a_recipe(tmp_path: Path, capsys) -> None:
    """Both ways end in one line, before anything is read or written."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[loss]\ninfo_nce = nan\n")
    for given in (["--config", str(recipe)], ["--loss.info_nce", "nan"]):
        with pytest.raises(SystemExit) as stop:
            main(["train", *given, "--run.out", str(tmp_path / "run")])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.match(r"protoclip: error: .*loss\.info_nce.* nan", line)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


def test_the_best_by_a_metric_that_does_not_exist() -> None:
    """A typo is refused before training, with the nearest names; and so is a best of nothing."""
    config = with_value(Config(), "run.evaluate_every", 1)
    assert check(with_value(config, "run.keep_best", "eval/emoji/knn/acc1")) == []
    assert refusal(with_value(config, "run.keep_best", "eval/emoij/knn/acc")).startswith(
        "run.keep_best: no metric 'eval/emoij/knn/acc'; the closest are eval/emoji/knn/acc1, "
    )
    never = refusal(with_value(Config(), "run.keep_best", "eval/emoji/knn/acc1"))
    assert "run.keep_best: nothing is evaluated during training; set run.evaluate_every" in never
    other = with_value(config, "data.train", "pairs.tsv")
    assert refusal(other).startswith("run.evaluate_every: data.train has no held-out split")
    assert len(metric_names("emoji")) == 18
