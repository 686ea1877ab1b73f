"""What `align` chooses before its data are opened."""

from typing import Any
from unittest.mock import Mock

import pytest
from numbered import Numbered

from protoclip.data.summary import Summary
from protoclip.models.start import Start
from protoclip.training import presets
from protoclip.training.folder import keep_chosen, read_begun
from protoclip.training.presets import choose_before_data, choose_with_data

ENCODERS = {"image": {"name": "test_vit"}, "text": {"name": "minilm"}}
PAIRS = {"data": {"train": "pairs.tsv"}}
FILE = {"teacher": {"features": "teacher"}}
SEVERAL = {"teachers": [{"name": "a", "features": "a"}, {"name": "b", "features": "b"}]}


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
    monkeypatch.setattr(presets, "open_listing", lambda _: Mock(rows=range(rows)))
    choices = choose_before_data("align", {"model": ENCODERS, **PAIRS})
    config, _ = choose_with_data(
        choices, choices.config, Mock(Start), Numbered(rows, 1), Mock(Summary), is_evaluated=False
    )
    assert (config.episodes.size, config.episodes.count) == (size, count)
