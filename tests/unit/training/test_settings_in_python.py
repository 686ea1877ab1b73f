"""What trains takes settings as a recipe holds them, and as a `Config`."""

import pytest

from protoclip.config import Config
from protoclip.training import align, finetune, run

DATA = {"sources": [{"path": "a.csv", "name": "one"}, {"path": "b.csv"}], "validation": 0.1}
HALVES = {"image": {"name": "test_vit"}, "text": {"name": "minilm"}}
RUN = {"run": {"device": "cpu", "seed": 3}}


@pytest.mark.parametrize(
    ("module", "name", "given"),
    [
        (run, "train", {**RUN, "data": DATA, "model": {"image": {"size": 48}}}),
        (finetune, "finetune", {**RUN, "data": DATA, "model": {"start": "runs/x", "lora": 2}}),
        (align, "align", {**RUN, "data": DATA, "model": HALVES}),
    ],
)
def test_both_kinds_of_settings_are_the_same_run(module, name, given, monkeypatch):
    """Of fine-tuning and aligning, settings of a `Config` at their default are not given."""
    config = Config.from_dict(given)
    monkeypatch.setattr(module, "train_together", lambda config, *_, **__: {"config": config})
    one, other = (getattr(module, name)(settings)["config"] for settings in (given, config))
    assert one == other
    assert one.data.sources == config.data.sources


def test_a_config_without_pairs_is_no_run_to_fine_tune():
    with pytest.raises(ValueError, match=r"data\.train"):
        finetune.finetune(Config.from_dict({"model": {"start": "runs/x"}}))
