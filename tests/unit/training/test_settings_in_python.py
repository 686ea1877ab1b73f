"""What trains takes settings as a recipe holds them, and as a `Config`."""

import inspect
from pathlib import Path

import pytest

from protoclip.config import Config, DataConfig
from protoclip.training import run
from protoclip.training.presets import choose_before_data, read_given

DATA = {"sources": [{"path": "a.csv", "name": "one"}, {"path": "b.csv"}], "validation": 0.1}
ENCODERS = {"image": {"name": "test_vit"}, "text": {"name": "minilm"}}
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
