"""What `align` chooses before its data are opened."""

from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numbered import Numbered

from protoclip.data.summary import Summary
from protoclip.models.start import Start
from protoclip.training import presets
from protoclip.training.presets import choose_before_data, choose_with_data
from protoclip.training.run_folder import add_begun
from testing import tiny_pairs
from tiny_align import changed, rows_of, tiny_alignment

HALVES = {"image": {"name": "test_vit"}, "text": {"name": "minilm"}}
PAIRS = {"data": {"train": "pairs.tsv"}}
FILE = {"teacher": {"features": "teacher"}}
SEVERAL = {"teachers": [{"name": "a", "features": "a"}, {"name": "b", "features": "b"}]}


@pytest.mark.parametrize(
    ("given", "weight"),
    [({}, 0.0), (FILE, 2.0), (SEVERAL, 2.0), ({**FILE, "loss": {"teacher": 0.25}}, 0.25)],
)
def test_groups_of_an_external_teacher_have_the_weight_of_earlier_versions(given, weight, tmp_path):
    """Unless another one is given, or a run that began with one goes on."""
    settings: dict[str, Any] = {"model": HALVES, **PAIRS, **given}
    assert choose_before_data("align", settings).config.loss.teacher == weight
    (tmp_path / "config.toml").write_text("[loss]\nteacher = 0.5\n")
    begun = choose_before_data("align", add_begun("align", settings, tmp_path)).config
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
    monkeypatch.setattr(presets, "note_exports", lambda *_: [])
    choices = choose_before_data("align", {"model": HALVES, **PAIRS})
    config, _ = choose_with_data(
        choices, choices.config, Mock(Start), Numbered(rows, 1), Mock(Summary), is_judged=False
    )
    assert (config.episodes.size, config.episodes.count) == (size, count)


@pytest.mark.parametrize(
    ("images", "captions", "said"),
    [(1, 1, "fewer than two pairs differ"), (1, 9, "all images are"), (9, 1, "all captions are")],
)
def test_pairs_without_a_difference_are_told(images, captions, said, tmp_path):
    """Their files have names of their own."""
    settings, table = tiny_alignment(tmp_path), tiny_pairs(9)
    columns = {"image": table["image"].to_pylist(), "caption": table["caption"].to_pylist()}
    for name, number in (("image", images), ("caption", captions)):
        columns[name] = [columns[name][row % number] for row in range(9)]
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    few = {"size": 8, "count": 1, "batch_size": 2}
    settings = changed(settings, episodes=few, loss={"prototypical": 0.0, "teacher": 0.0})
    if images == captions:
        with pytest.raises(ValueError, match=said):
            rows_of(settings)
    else:
        assert any(said in note for note in rows_of(settings)[0].notes)
