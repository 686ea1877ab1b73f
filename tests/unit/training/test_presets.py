"""What `align` and `finetune` decide about settings that are left out, and of no other one."""

import inspect
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from numbered import Numbered

from protoclip.cli.train import Finetune
from protoclip.config import Config, DataConfig, SourceConfig
from protoclip.data.pairs import SampleStream
from protoclip.data.sources import join_sources, open_entry
from protoclip.data.summary import Summary, summarize
from protoclip.distributed import collectives
from protoclip.models.start import Start
from protoclip.rules import check, without_effect
from protoclip.training import presets, run
from protoclip.training.folder import keep_chosen, read_begun
from protoclip.training.presets import (
    Choices,
    choose_before_data,
    choose_with_data,
    fill_episodes,
    read_given,
)

LOOKS: dict[str, Any] = {**{"looks_at_images": False, "compares_images": True}}


def planned(
    given: dict[str, Any], number: int | None = 40_000, different: int = 10**9
) -> tuple[Config, list[str]]:
    """The settings with which fine-tuning on so many pairs begins, and its notes."""
    samples: Any = Mock(SampleStream) if number is None else Numbered(number, different)
    choices = choose_before_data("finetune", given)
    start = Mock(Start, heads_are_new=":" in str(choices.config.model.start))
    config, notes = choose(choices, start, samples)
    return fill_episodes(config, number, None if number is None else samples)[0], notes


def choose(choices: Choices, start: Start, samples: Any) -> tuple[Config, list[str]]:
    is_stream = isinstance(samples, SampleStream)
    summary = Mock(Summary, rows=None) if is_stream else summarize(samples, **LOOKS)
    return choose_with_data(choices, choices.config, start, samples, summary, is_evaluated=True)


def settings(rows: int | None = 40_000, **sections: dict[str, Any]) -> Config:
    model = {"start": "open_clip:RN50/openai", **sections.pop("model", {})}
    return planned({"model": model, **sections}, rows)[0]


@pytest.mark.parametrize(
    ("number", "given", "expected"),
    [  # batch, episode and episodes
        (40_000, {}, (512, 39_936, 5)),
        (1_000_000, {}, (512, 199_680, 25)),
        (10**8, {}, (512, 199_680, 256)),  # 100,000 steps
        (5_000, {}, (128, 4_992, 5)),
        (300, {}, (16, 288, 5)),
        (7, {}, (7, 7, 5)),
        (40_000, {"size": 1_000}, (10, 1_000, 200)),
        (1_000_000, {"size": 10_000}, (250, 10_000, 500)),
        (40_000, {"batch_size": 100}, (100, 40_000, 5)),
        (300, {"size": 640, "count": 2}, (16, 640, 2)),
        (None, {"size": 64_000, "count": 3}, (512, 64_000, 3)),
    ],
)
def test_episodes_are_passes_over_the_pairs(number, given, expected):
    found = settings(number, episodes=given).episodes
    assert (found.batch_size, found.size, found.count) == expected
    assert found.replacement is (number is None or found.size > number)


@pytest.mark.parametrize(
    ("captions", "images", "expected"),
    [
        (5, 1_000, (16, 1_008, 5)),  # about one pass over 5,000 rows
        (20, 1_000, (64, 3_968, 5)),  # all rows are seen
        (20, 15, (16, 288, 5)),  # few rows: enough steps
    ],
)
def test_passes_count_images_where_each_has_several_rows(captions, images, expected, tmp_path):
    """A table with a row a caption takes as long as one with a row an image."""
    lines = [f"{row // captions}.png\tcaption {row}" for row in range(captions * images)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["image\tcaption", *lines]))
    pairs = open_entry(DataConfig(), SourceConfig(path=f"{tmp_path}/pairs.tsv"))
    choices = choose_before_data("finetune", {"model": {"start": "open_clip:RN50/openai"}})
    config, notes = choose(choices, Mock(Start), pairs)
    found = config.episodes
    assert (found.batch_size, found.size, found.count) == expected
    assert found.replacement is False
    assert any("pairs show fewer images" in note for note in notes) is (images > 15)


def test_images_are_counted_by_source(tmp_path):
    """Each weighs as much as it has rows."""
    opened = list[Any]()
    for captions, rows in ((5, 10_000), (1, 5_000)):
        lines = [f"{row // captions}.png\tcaption {row}" for row in range(rows)]
        path = tmp_path / f"{rows}.tsv"
        path.write_text("\n".join(["image\tcaption", *lines]))
        opened.append(open_entry(DataConfig(), SourceConfig(path=str(path))))
    mixture = join_sources(opened)
    assert summarize(mixture, **LOOKS).images == pytest.approx(7_000, rel=0.01)


@pytest.mark.parametrize(
    ("ranks", "number", "size", "batch"),
    [(3, 300, None, 15), (16, 300, None, 32), (3, 40_000, 1_200, 30), (6, 40_000, None, 510)],
)
def test_ranks_share_the_batch_that_is_chosen(ranks, number, size, batch, monkeypatch):
    monkeypatch.setattr(collectives, "world_size", lambda: ranks)
    given = {} if size is None else {"size": size}
    config = settings(number, episodes=given)
    assert config.episodes.batch_size == batch
    check(config)


def test_what_is_given_stays():
    """Also where it is the value that `train` would take."""
    given: dict[str, Any] = {
        "run": {"name": "mine", "evaluate_every": 2},
        "model": {"frozen_batch_norm": False},
        "optim": {"layer_decay": 1.0, "heads_lr_scale": 0.01, "learning_rate": 1e-3},
        "episodes": {"warm_up": 1, "locked_image": 1, "replacement": True},
        "prototypes": {"number": 400},
        "teacher": {"features": None},
    }
    config = settings(**given)
    for section, values in given.items():
        for name, value in values.items():
            assert getattr(getattr(config, section), name) == value, name
    assert (config.optim.weight_decay, config.optim.warm_up_steps) == (0.1, 19)


@pytest.mark.parametrize(("guard", "every"), [([], 0), (["emoji"], 1)])
def test_a_run_that_nothing_evaluates_is_not_evaluated(guard, every):
    """Or `run.evaluate_every`, which nobody gave, would be refused."""
    config = settings(data={"train": "pairs.tsv", "validation": 0.0}, run={"guard": guard})
    assert config.run.evaluate_every == every
    check(config)


def test_help_shows_what_fine_tuning_chooses():
    """Without pairs, which have to be named."""
    config, _ = planned({"model": {"start": "open_clip:RN50/openai"}})
    assert Finetune.defaults["data.train"] is None
    for name, value in Finetune.defaults.items():
        section, _, setting = name.partition(".")
        if name != "data.train" and not isinstance(value, str):
            assert getattr(getattr(config, section), setting) == value


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"loss": {"prototypical": 0.0, "teacher": 0.0}}, {"warm_up": 1, "heads": None}),
        ({"teacher": {"features": None}}, {"warm_up": 1, "heads": 1.0}),
        ({"teacher": {"features": "emoji"}}, {"warm_up": 1, "heads": 1.0}),
        ({"teachers": [{"name": "a", "features": "a"}]}, {"warm_up": 1, "heads": 1.0}),
        ({"model": {"start": "runs/small"}}, {"warm_up": 0, "heads": 0.01}),  # has heads
        ({"model": {"lora": 4}}, {"warm_up": 0, "heads": 1.0, "rate": 1e-4, "decay": 1.0}),
    ],
)
def test_defaults_follow_what_is_given(given, expected):
    """No setting is decided that has no effect."""
    config = settings(**given)
    found = {
        "warm_up": config.episodes.warm_up,
        "heads": config.optim.heads_lr_scale,
        "rate": config.optim.learning_rate,
        "decay": config.optim.layer_decay,
    }
    assert found == {"rate": 1e-5, "decay": 0.7} | expected


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize(("begun", "rate"), [(None, 1e-3), (1e-5, 1e-5)])
def test_small_towers_learn_at_a_rate_of_their_own(lora, begun, rate, tmp_path):
    """They were trained from scratch, at a hundred times the rate that suits published models. A
    run that was begun at that one goes on with it."""
    if begun is not None:
        (tmp_path / "config.toml").write_text(f"[optim]\nlearning_rate = {begun}\n")
    given = {"model": {"start": "runs/small", "lora": lora}}
    before = read_begun(tmp_path)
    settings = given if before is None else keep_chosen("finetune", given, before)
    choices = choose_before_data("finetune", settings)
    start = Mock(Start, heads_are_new=False, tower_kind=None)
    pairs = Numbered(400, 10**9)
    config, _ = choose(choices, start, pairs)
    assert config.optim.learning_rate == rate


@pytest.mark.parametrize(
    ("number", "different", "prototypes"),
    [(4, 4, 4), (50, 50, 8), (900_000, 900_000, 19_968), (40_000, 81, 81), (40_000, 1, 2)],
)
def test_prototypes_are_a_tenth_of_an_episode(number, different, prototypes):
    """But no more than there are captions."""
    config, _ = planned({"model": {"start": "open_clip:RN50/openai"}}, number, different)
    assert config.prototypes.number == config.teacher.number == prototypes


ENCODERS = {"image": {"name": "test_vit"}, "text": {"name": "minilm"}}
PAIRS = {"data": {"train": "pairs.tsv"}}
FILE = {"teacher": {"features": "teacher"}}
SEVERAL = {"teachers": [{"name": "a", "features": "a"}, {"name": "b", "features": "b"}]}


def test_settings_of_the_teacher_are_those_of_all_teachers_that_set_none():
    """`train --teachers a b --teacher.distil 0`; they were ignored before."""
    given = {
        "teacher": {"distil": 0.0, "number": 7, "whiten": 0},
        "teachers": [
            {"name": "a", "features": "a"},
            {"name": "b", "features": "b", "distil": 2.0, "whiten": 8},
        ],
    }
    config = Config.from_dict(given)
    teachers = fill_episodes(config, 1000)[0].teachers
    assert [(one.number, one.distil, one.whiten) for one in teachers] == [(7, 0.0, 0), (7, 2.0, 8)]
    assert not any("teacher.*" in note for note in without_effect(config))


@pytest.mark.parametrize(
    ("given", "weight"),
    [({}, 0.0), (FILE, 2.0), (SEVERAL, 2.0), ({**FILE, "loss": {"teacher": 0.25}}, 0.25)],
)
def test_groups_of_an_external_teacher_have_the_weight_of_earlier_versions(given, weight, tmp_path):
    """Unless another one is given, or a run that began with one goes on."""
    settings: dict[str, Any] = {"model": ENCODERS, **PAIRS, **given}
    assert choose_before_data("align", settings).config.loss.teacher == weight
    (tmp_path / "config.toml").write_text("[loss]\nteacher = 0.5\n")
    begun = choose_before_data("align", keep_chosen("align", settings, read_begun(tmp_path))).config
    assert begun.loss.teacher == (weight if "loss" in given else 0.5)


@pytest.mark.parametrize(
    ("rows", "size", "count"),
    [
        (10_000, 9_216, 33),
        (300_000, 131_072, 69),  # 30 passes
        (3_600_000, 131_072, 781),  # 100,000 steps
    ],
)
def test_episodes_and_steps_have_limits(rows, size, count, monkeypatch):
    """The prototypes of a teacher are a tenth of an episode."""
    monkeypatch.setattr(presets, "write_listing", lambda *_: None)
    listing = Mock(rows=range(rows), captions=range(rows))
    monkeypatch.setattr(presets, "open_listing", lambda _: listing)
    choices = choose_before_data("align", {"model": ENCODERS, **PAIRS})
    config, _ = choose_with_data(
        choices, choices.config, Mock(Start), Numbered(rows, 1), Mock(Summary), is_evaluated=False
    )
    assert (config.episodes.size, config.episodes.count) == (size, count)


DATA = {"sources": [{"path": "a.csv", "name": "one"}, {"path": "b.csv"}], "validation": 0.1}
RUN = {"run": {"device": "cpu", "seed": 3}}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("train", {**RUN, "data": DATA, "model": {"image": {"size": 48}}}),
        ("finetune", {**RUN, "data": DATA, "model": {"start": "runs/x", "lora": 2}}),
        ("align", {**RUN, "data": DATA, "model": ENCODERS}),
    ],
)
def test_both_kinds_of_settings_are_the_same_run(name, given):
    """Of fine-tuning and aligning, settings of a `Config` at their default are not given."""
    config = Config.from_dict(given)
    one, other = (
        choose_before_data(name, read_given(name, settings)).config for settings in (given, config)
    )
    assert one == other
    assert one.data.sources == config.data.sources


@pytest.mark.parametrize("function", [run.train, run.finetune, run.align])
@pytest.mark.parametrize("settings", ["shop.csv", Path("base.toml"), None, DataConfig()])
def test_what_holds_no_settings_is_refused(function, settings):
    with pytest.raises(ValueError, match=r"^settings: .* is no Config and no dictionary; give "):
        inspect.unwrap(function)(settings)  # past the type checks of tests
