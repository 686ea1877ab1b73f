"""Settings: every one is explained, every number has limits, every mistake is named."""

import copy
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from protoclip.cli import COMMANDS
from protoclip.cli.spec import descriptions, options
from protoclip.config import (
    REMOVED,
    Config,
    DataConfig,
    EpisodeConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    SourceConfig,
    TeacherConfig,
    TextTowerConfig,
    build,
    shown,
    without_removed,
)
from protoclip.models.start import split_encoders
from protoclip.rules import check

# Every list has entries and every number is set, so that none of them is left out.
FULL = Config(
    data=DataConfig(sources=[SourceConfig(path="a.tsv"), SourceConfig(path="b.tsv")]),
    teachers=[TeacherConfig(name="one", features="one"), TeacherConfig(name="two", features="two")],
    episodes=EpisodeConfig(size=4096),
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
        check(Config.from_dict(config))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_setting_has_one_sentence_of_help():
    for section in sections():
        described = descriptions(section)
        plain = [name for name, hint in get_type_hints(section).items() if hint not in sections()]
        assert set(plain) == set(described)
        for name, text in described.items():
            assert text.endswith("."), name


def test_every_number_has_limits():
    for section in sections():
        for name, hint in get_type_hints(section, include_extras=True).items():
            inner = () if get_origin(hint) is Annotated else get_args(hint)
            assert not {int, float} & {hint, *inner}, name


@pytest.mark.parametrize(
    "name", ["run.seed", "episodes.micro_batch_size", "optim.betas[1]", "data.sources[1].weight"]
)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, "many", True])
def test_what_is_no_number_is_refused(name, wrong):
    """In sections, lists, tuples and settings that may be unset."""
    assert refusal(with_value(FULL, name, wrong)).startswith(f"{name}: {shown(wrong)} is n")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optim.betas[1]", 1.0, "is too large; below 1"),
        ("run.seed", -1, "is too small; at least 0"),
        ("model.text.heads", 3, "3 does not divide model.text.width"),
        ("prototypes.number", 5000, "prototypes.number: 5000 needs to be between 2 and"),
        ("episodes.batch_size", 8192, "is no multiple of episodes.batch_size (8192); try 8192"),
        ("episodes.count", 1, "episodes.count: 1 is less than"),
        ("loss", LossConfig(info_nce=0.0, prototypical=0.0, teacher=0.0), "all weights are 0"),
        ("model.pretrained", "openai", "model.pretrained: needs model.name"),
        ("data.train", "a.tsv", "data.sources: takes the place of data.train"),
        ("data.sources[1].weight", 1.0, "give every source a weight, or none"),
        ("teacher.features", "emoji", "teachers: take the place of teacher"),
        ("teachers[1].name", "one", "teachers: ['one', 'one'] cannot be"),
        ("run.evaluate", "yes", "run.evaluate: 'yes' is neither true nor false"),
        ("optim.betas", (0.9,), "optim.betas: [0.9] is not 2 values"),
        ("data.read", "fast", "data.read: 'fast' is not one of auto, streaming"),
        ("data.workers", "many", "data.workers: 'many' is not one of auto"),
        ("model.text.pooling", ["mean", "max"], "'max' is not one of mean, cls, last"),
        ("model.image.name", ["a", 3], "model.image.name: 3 is"),
    ],
)
def test_a_wrong_value_is_named(name, value, message):
    assert message in refusal(with_value(FULL, name, value))


def test_a_tree_of_values_becomes_a_configuration():
    """Whole numbers become floats, lists tuples; names that do not exist suggest the closest."""
    tree = {"loss": {"teacher": 2}, "optim": {"betas": [0.5, 0.6]}, "teachers": [{"name": "a"}]}
    config = build(Config, tree)
    assert (config.loss.teacher, type(config.loss.teacher)) == (2.0, float)
    assert config.optim.betas == (0.5, 0.6)
    assert config.teachers == [TeacherConfig(name="a")]
    names = {"model": {"text": {"name": ["a", "b"], "pooling": ["cls", "mean"]}}}
    parts = split_encoders(build(Config, names).model)
    assert [(part.text.name, part.text.pooling) for part in parts] == [("a", "cls"), ("b", "mean")]
    with pytest.raises(ValueError, match=r"^data\.trian: no such setting; did you mean data\.tra"):
        build(Config, {"data": {"trian": "x"}})
    with pytest.raises(ValueError, match=r"^data\.sources\[0\]\.path: is missing"):
        build(Config, {"data": {"sources": [{"weight": 1}]}})


class Frame:
    """A table in memory, which prints several lines."""

    to_parquet = None

    def __repr__(self) -> str:
        return "a\nb"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"data": {"train": Frame()}}, "data.train: Frame is no text"),
        ({"data": Frame()}, "data: Frame is no section; give its settings by name"),
        ({"data": {"read": np.arange(3)}}, "data.read: ndarray is not one of auto, streaming"),
        ({"run": {"guard": [b"a"]}}, "run.guard[0]: bytes is no text"),
        ({"data.train": "a.csv"}, "data.train: no such setting; did you mean data?"),
    ],
)
def test_what_is_written_in_python_is_refused_in_a_line(tree, message):
    with pytest.raises(ValueError, match=r"^.+$") as error:
        build(Config, tree)
    assert str(error.value).startswith(message)


def test_paths_and_numbers_of_numpy_are_taken_as_those_of_python():
    """In sections that are dataclasses, too."""
    episodes = with_value(EpisodeConfig(replacement=False), "count", np.int64(2))
    given = {
        "episodes": with_value(episodes, "replacement", np.bool_(False)),
        "optim": {"betas": (np.float32(0.125), np.float64(0.25)), "weight_decay": np.int32(1)},
        "data": {"train": Path("a/shop.csv"), "workers": np.int8(2), "captions": np.uint8(3)},
        "run": {"guard": [Path("b.csv")], "name": np.str_("x")},
    }
    plain = {
        "episodes": {"count": 2, "replacement": False},
        "optim": {"betas": [0.125, 0.25], "weight_decay": 1.0},
        "data": {"train": str(Path("a/shop.csv")), "workers": 2, "captions": 3},
        "run": {"guard": ["b.csv"], "name": "x"},
    }
    built = build(Config, given)
    assert repr(built) == repr(build(Config, plain))  # types as well
    config = with_value(Config(), "episodes", given["episodes"])
    assert repr(Config.from_dict(config).episodes) == repr(built.episodes)
    with pytest.raises(ValueError, match=r"^episodes\.count: 0 is too small"):
        build(Config, {"episodes": {"count": np.int64(0)}})


def tree_of(name: str, value: object) -> dict[str, Any]:
    """One setting as a recipe holds it."""
    for part in reversed(name.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("row", REMOVED)
def test_a_setting_that_is_gone_is_refused_with_the_way_out(row):
    """Unless a run folder has it at the value that changed nothing."""
    name, _, value = row.partition(" = ")
    way_out, idle = REMOVED[row]
    with pytest.raises(ValueError, match=r"^.+$") as error:
        build(Config, tree_of(name, value or "anything"))
    shown_value = f"'{value}' " if value else ""
    assert str(error.value) == f"{name}: {shown_value}{way_out}"
    for section, setting in re.findall(r"([a-z]+)\.([a-z]\w*)", way_out):
        assert section == "s3" or hasattr(getattr(Config(), section), setting)
    if idle is not None:
        assert build(Config, tree_of(name, idle)) == Config()
    assert build(Config, without_removed(tree_of(name, value or "anything"))) == Config()


def test_settings_and_options_stay_few():
    """A new one earns its place by a measured gain, and may take that of another."""
    settings = len(list(options(Config))) + len(fields(SourceConfig))
    assert settings <= 118
    own = [name for kind in COMMANDS.values() for name, _ in options(kind) if "." not in name]
    assert len(own) <= 183


def test_evaluation_during_training_needs_something_to_evaluate_on():
    config = with_value(Config(), "run.evaluate_every", 1)
    assert check(with_value(config, "run.keep_best", "eval/emoji/knn/acc1")) == []
    never = refusal(with_value(Config(), "run.keep_best", "eval/emoji/knn/acc1"))
    assert never.startswith("run.keep_best: needs run.evaluate_every")
    other = with_value(config, "data.train", "pairs.tsv")
    assert check(other) == []
    nothing = with_value(other, "data.validation", 0.0)
    assert refusal(nothing).startswith("run.evaluate_every: no pairs are held out; set it to 0")
    assert check(with_value(nothing, "run.evaluate_every", 0)) == []
    emoji = with_value(config, "data.validation", 0.1)
    assert refusal(emoji).startswith("data.validation: the emoji have held-out splits")


CLIP = {"loss": LossConfig(prototypical=0.0)}
TEACHER = {
    "loss": LossConfig(prototypical=0.0, teacher=1.0),
    "teacher": TeacherConfig(features="teachers/texts"),
}
NO_PAIRS = {
    "loss": LossConfig(info_nce=0.0),
    "episodes": EpisodeConfig(warm_up=0, locked_image=0),
}


@pytest.mark.parametrize(
    ("settings", "name", "value", "why"),
    [
        (CLIP, "prototypes.iterations", 3, "prototypes.*: no effect, since loss.prototypical is 0"),
        (CLIP, "episodes.warm_up", 2, "since no loss uses prototypes"),
        (TEACHER, "prototypes.back_translation", False, "since teachers need it"),
        ({}, "loss.teacher", 3.0, "no teacher has features"),
        ({}, "teacher.whiten", 0, "teacher.*: no effect, since teacher.features is not set"),
        (CLIP, "loss.strengths", "constant", "since no loss uses prototypes"),
        (NO_PAIRS, "loss.positives", "shared", "since loss.info_nce is 0"),
        ({"model": ModelConfig(name="RN50")}, "model.text.width", 64, "since model.name is RN50"),
        ({"data": DataConfig(workers=2)}, "data.cache_gb", 1.0, "keep no images in memory"),
    ],
)
def test_a_setting_without_effect_draws_one_note(settings, name, value, why):
    config = Config(**settings)
    assert check(config) == []
    (note,) = check(with_value(config, name, value))
    assert ": no effect" in note
    assert why in note


def test_a_locked_text_tower_leaves_no_locked_image_stage():
    """In which nothing but the logit scale would train. New projections of encoders would."""
    config = Config(model=ModelConfig(start="a run", locked=["text"]))
    assert check(config) == [
        "episodes.locked_image = 0, since model.locked keeps the text tower too"
    ]
    assert config.locked_episodes == 0
    joined = ModelConfig(locked=["text"], text=TextTowerConfig(name="bert"))
    assert (check(Config(model=joined)), Config(model=joined).locked_episodes) == ([], 1)
