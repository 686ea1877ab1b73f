"""Settings: every one is explained, every number has limits, every mistake is named."""

import copy
import math
from dataclasses import replace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from protoclip.cli.parsing import descriptions
from protoclip.config import (
    RENAMED,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PrototypeConfig,
    Range,
    SourceConfig,
    TeacherConfig,
    build,
    check,
)

# Every list has entries and every number is set, so that none of them is left out.
FULL = Config(
    data=DataConfig(sources=[SourceConfig(path="a.tsv"), SourceConfig(path="b.tsv")]),
    teachers=[TeacherConfig(name="one", features="one"), TeacherConfig(name="two", features="two")],
    optim=OptimConfig(betas=(0.9, 0.98)),
)


def sections(kind: type = Config) -> list[type]:
    """A section and all sections in it."""
    found = [kind]
    for hint in get_type_hints(kind).values():
        for inner in (hint, *get_args(hint)):
            if hasattr(inner, "__dataclass_fields__"):
                found += sections(inner)
    return found


def numbers(kind: type, prefix: str = "") -> dict[str, Range]:
    """Dotted names of all numbers, found by their annotations; of a list the second entry."""
    found: dict[str, Range] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner = next((a for a in (hint, *get_args(hint)) if get_origin(a) is Annotated), None)
        section = next((a for a in (hint, *get_args(hint)) if a in sections()), None)
        listed = "[1]" if get_origin(hint) is list or "tuple" in str(hint) else ""
        if section is not None:
            found |= numbers(section, f"{prefix}{name}{listed}.")
        elif "tuple" in str(hint):
            found[f"{prefix}{name}[1]"] = get_args(get_args(get_args(hint)[0])[0])[1]
        elif inner is not None:
            found[prefix + name] = get_args(inner)[1]
        else:
            assert not {int, float} & {hint, *get_args(hint)}, f"{prefix}{name} has no limits"
    return found


NUMBERS = numbers(Config)
assert {"optim.betas[1]", "data.sources[1].weight", "episodes.micro_batch_size"} <= set(NUMBERS)


def with_value(settings: Any, name: str, value: object) -> Any:
    """The settings with one value replaced, past the type checks of tests."""
    head, _, rest = name.partition(".")
    field, listed, _ = head.partition("[")
    before = getattr(settings, field)
    after = with_value(before[1] if listed else before, rest, value) if rest else value
    changed = copy.copy(settings)
    object.__setattr__(changed, field, type(before)([before[0], after]) if listed else after)
    return changed


def refusal(config: Config) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the callers look at the message
        check(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_setting_has_one_sentence_of_help() -> None:
    for section in sections():
        described = descriptions(section)
        plain = [name for name, hint in get_type_hints(section).items() if hint not in sections()]
        assert set(plain) == set(described)
        for name, text in described.items():
            assert text.endswith("."), name
            assert len(text) < 130, name


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_is_finite_and_within_limits(name: str) -> None:
    for wrong in (math.nan, math.inf, -math.inf, "many", True):
        assert refusal(with_value(FULL, name, wrong)).startswith(f"{name}: {wrong!r} is n")
    limits = NUMBERS[name]
    below = math.floor(limits.least) - 1
    assert refusal(with_value(FULL, name, below)).startswith(f"{name}: {below}")
    if limits.most < math.inf:
        above = math.floor(limits.most) + 1
        assert refusal(with_value(FULL, name, above)).startswith(f"{name}: {above}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optim.betas[1]", 1.0, "is too large; below 1"),
        ("data.max_bad_share", 1.01, "is too large; at most 1"),
        ("run.seed", -1, "is too small; at least 0"),
        ("model.image.size", 1, "is too small; at least 2"),
        ("model.text.heads", 3, "3 heads do not divide model.text.width (128)"),
        ("prototypes.number", 5000, "prototypes.number: 5000 needs to be between 2 and"),
        ("teachers", [TeacherConfig(features="a", number=5000)], "teacher.number: 5000"),
        ("episodes.batch_size", 8192, "episodes.batch_size: 8192 is larger than episodes.size"),
        ("episodes.size", 1000, "try 768"),
        ("episodes.count", 1, "episodes.count: 1 is less than"),
        ("loss", LossConfig(info_nce=0.0, prototypical=0.0, teacher=0.0), "all weights are 0"),
        ("loss.info_nce", 0.0, "loss.info_nce: 0 leaves the warm-up and locked-image stages"),
        ("model.pretrained", "openai", "model.pretrained: needs model.name"),
        ("data.train", "a.tsv", "data.sources: takes the place of data.train"),
        ("data.sources[1].weight", 1.0, "give every source a weight, or none"),
        ("teacher.features", "emoji", "teachers: take the place of teacher"),
        ("teachers[1].name", "one", "teachers: 'one' is taken"),
        ("teachers[1].features", None, "teachers: 'two' has no features"),
        ("prototypes.target_temperature", 0.0, "needs to be above 0; for hard targets set"),
        ("run.evaluate", "yes", "run.evaluate: 'yes' is neither true nor false"),
        ("run.name", 3, "run.name: 3 is no text"),
        ("run", 3, "run: 3 is no table"),
        ("data.sources", "a.tsv", "data.sources: 'a.tsv' is not a list"),
        ("optim.betas", (0.9,), "optim.betas: (0.9,) is not 2 values"),
        ("data.read", "fast", "data.read: 'fast' is not one of auto, indexed, streaming"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: object, message: str) -> None:
    assert message in refusal(with_value(FULL, name, value))


def test_a_tree_of_values_becomes_a_configuration() -> None:
    """Whole numbers become floats, lists tuples; names that do not exist suggest the closest."""
    tree = {"loss": {"teacher": 2}, "optim": {"betas": [0.5, 0.6]}, "teachers": [{"name": "a"}]}
    config = build(Config, tree)
    assert (config.loss.teacher, type(config.loss.teacher)) == (2.0, float)
    assert config.optim.betas == (0.5, 0.6)
    assert config.teachers == [TeacherConfig(name="a")]
    with pytest.raises(ValueError, match=r"^data\.trian: no such setting; did you mean data\.tra"):
        build(Config, {"data": {"trian": "x"}})
    with pytest.raises(ValueError, match=r"^data\.sources\[0\]\.path: is missing"):
        build(Config, {"data": {"sources": [{"weight": 1}]}})


@pytest.mark.parametrize("name", RENAMED)
def test_settings_of_earlier_versions_are_explained(name: str) -> None:
    """The new name, if there is one, is a setting."""
    section, _, setting = name.partition(".")
    with pytest.raises(ValueError, match=f"^{name}: is ") as error:
        build(Config, {section: {setting: 1}})
    known = {f"{section}.{field}" for field in get_type_hints(type(getattr(Config(), section)))}
    assert name not in known
    assert "is gone; " in str(error.value) or str(error.value).split()[2].rstrip(",") in known


def test_prototypes_come_from_the_queue_with_a_teacher() -> None:
    """Unless the setting says otherwise."""
    teacher = TeacherConfig(features="emoji")
    assert Config().prototype_source == "extract"
    assert Config(teacher=teacher).prototype_source == "queue"
    assert Config(teacher=teacher, loss=LossConfig(teacher=0.0)).prototype_source == "extract"
    asked = PrototypeConfig(source="extract")
    assert Config(teacher=teacher, prototypes=asked).prototype_source == "extract"


def test_evaluation_during_training_needs_something_to_evaluate_on() -> None:
    config = with_value(Config(), "run.evaluate_every", 1)
    assert check(with_value(config, "run.keep_best", "eval/emoji/knn/acc1")) == []
    never = refusal(with_value(Config(), "run.keep_best", "eval/emoji/knn/acc1"))
    assert never.startswith("run.keep_best: nothing is evaluated during training")
    other = with_value(config, "data.train", "pairs.tsv")
    assert refusal(other).startswith("run.evaluate_every: data.train has no held-out split")


CLIP = {"loss": LossConfig(prototypical=0.0)}
TEACHER = {"teacher": TeacherConfig(features="emoji")}


@pytest.mark.parametrize(
    ("settings", "name", "value", "why"),
    [
        (CLIP, "prototypes.iterations", 3, "prototypes.*: no effect, since loss.prototypical is 0"),
        (CLIP | TEACHER, "prototypes.number", 3, "since loss.prototypical is 0"),
        (CLIP, "optim.heads_weight_decay", 0.1, "since no loss uses prototypes"),
        (CLIP, "optim.heads_lr_scale", 1.0, "since no loss uses prototypes"),
        (CLIP, "episodes.warm_up", 2, "since no loss uses prototypes"),
        (TEACHER, "prototypes.extract_transform", "training", "come from the queue"),
        ({}, "loss.teacher", 2.0, "without teacher.features"),
        (TEACHER, "loss.teacher", 0.0, "teacher.*: no effect, since loss.teacher is 0"),
        ({"model": ModelConfig(name="RN50")}, "model.text.width", 64, "since model.name is RN50"),
        ({"data": DataConfig(workers=2)}, "data.cache_gb", 1.0, "keep no images in memory"),
        (
            {"episodes": replace(Config().episodes, locked_image=0)},
            "optim.locked_learning_rate",
            1e-4,
            "since episodes.locked_image is 0",
        ),
        (
            {"prototypes": PrototypeConfig(hard_targets=True)},
            "prototypes.target_temperature",
            0.5,
            "with prototypes.hard_targets",
        ),
    ],
)
def test_a_setting_without_effect_draws_one_note(
    settings: dict[str, Any], name: str, value: object, why: str
) -> None:
    config = Config(**settings)
    assert check(config) == []
    (note,) = check(with_value(config, name, value))
    assert ": no effect" in note
    assert why in note
