"""What trains takes settings as a recipe holds them, and as a `Config`."""

import inspect
from pathlib import Path

import numpy as np
import pytest

from protoclip.config import (
    Config,
    DataConfig,
    EpisodeConfig,
    ImageTowerConfig,
    ModelConfig,
    TextTowerConfig,
)
from protoclip.training import run
from protoclip.training.presets import choose_before_data, read_given

DATA = {"sources": [{"path": "a.csv", "name": "one"}, {"path": "b.csv"}], "validation": 0.1}
HALVES = {"image": {"name": "test_vit"}, "text": {"name": "minilm"}}
RUN = {"run": {"device": "cpu", "seed": 3}}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("train", {**RUN, "data": DATA, "model": {"image": {"size": 48}}}),
        ("finetune", {**RUN, "data": DATA, "model": {"start": "runs/x", "lora": 2}}),
        ("align", {**RUN, "data": DATA, "model": HALVES}),
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


@pytest.mark.parametrize("as_config", [True, False])
@pytest.mark.parametrize("name", ["train", "align"])
def test_a_run_gets_plain_values(name, as_config):
    """Of NumPy, of paths and of dataclasses as sections, or its files could not hold them."""
    data, episodes = DataConfig(), EpisodeConfig()
    object.__setattr__(data, "train", Path("a.csv"))  # past the type checks of tests
    object.__setattr__(episodes, "count", np.int64(3))
    image, text = ImageTowerConfig(name="test_vit"), TextTowerConfig(name="minilm")
    given = {"data": data, "episodes": episodes, "model": {"image": image, "text": text}}
    model = ModelConfig(image=image, text=text)
    settings = Config(data=data, episodes=episodes, model=model) if as_config else given
    config = choose_before_data(name, read_given(name, settings)).config
    assert type(config.data.train) is str
    assert type(config.episodes.count) is int
