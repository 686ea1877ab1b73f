"""Episodes and prototypes follow from the data by one rule, which is said at the start."""

from dataclasses import replace
from pathlib import Path

import pytest
from numbered import Numbered

import protoclip
from protoclip.config import Config, EpisodeConfig, PrototypeConfig, TeacherConfig
from protoclip.testing import tiny_config
from protoclip.training import run, sizes
from protoclip.training.sizes import sized


@pytest.mark.parametrize(
    ("rows", "captions", "batch", "size", "number"),
    [
        (7_077, 10**9, 256, 4096, 409),
        (8_192, 10**9, 256, 8192, 819),
        (10**6, 10**9, 256, 131_072, 13_107),
        (30_000, 300, 256, 16_384, 300),  # captions repeat
        (5_000, 10**9, 300, 3_900, 390),  # a multiple of the batch
        (100, 10**9, 256, 256, 25),  # at least a batch
        (20, 1, 16, 16, 2),
    ],
)
def test_sizes_follow_from_the_data(rows, captions, batch, size, number, monkeypatch):
    samples = Numbered(rows, captions)
    monkeypatch.setattr(sizes.sources, "pairs", lambda config: samples)
    monkeypatch.setattr(sizes, "judged", lambda config, pairs: type("", (), {"training": pairs}))
    config, notes = sized(Config(episodes=EpisodeConfig(batch_size=batch)))
    assert config.episodes.size == size
    assert config.prototypes.number == config.teacher.number == number
    reason = "since captions repeat" if number < size // 10 else "a tenth of an episode"
    assert notes == [
        f"episodes.size = {size}, for {rows:,} pairs",
        f"prototypes.number = {number}, {reason}",
    ]


def test_what_is_set_stays():
    """Without a look at the data, if nothing is left open."""
    teachers = [TeacherConfig(name="a", number=7), TeacherConfig(name="b")]
    config = Config(
        episodes=EpisodeConfig(size=512), prototypes=PrototypeConfig(number=9), teachers=teachers
    )
    found = sized(config)[0]
    assert (found.episodes.size, found.prototypes.number) == (512, 9)
    assert [teacher.number for teacher in found.teachers] == [7, 51]
    whole = replace(found, data=replace(found.data, train="no such file"))
    assert sized(whole) == (whole, [])


def test_a_run_that_goes_on_keeps_its_sizes(tmp_path: Path, capsys):
    """Also where its data have gone; and it says the sizes as it starts."""
    config = tiny_config(out=str(tmp_path / "run"))
    config = replace(
        config,
        run=replace(config.run, evaluate=False),
        episodes=EpisodeConfig(batch_size=16, count=2, size=0, warm_up=1, locked_image=1),
        prototypes=PrototypeConfig(),
    )
    small = replace(config, episodes=replace(config.episodes, size=32))
    protoclip.train(small)
    assert "note: prototypes.number = 8, a tenth of an episode" in capsys.readouterr().err
    gone = replace(small, data=replace(small.data, train="no such file"))
    assert run.resolved(gone, before=tmp_path / "run")[0].prototypes.number == 8
