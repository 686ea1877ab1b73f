"""Episodes and prototypes follow from the data by one rule, which is said at the start."""

from dataclasses import replace
from pathlib import Path

import pytest
from numbered import Numbered

import protoclip
from protoclip.config import (
    Config,
    EpisodeConfig,
    ImageTowerConfig,
    LossConfig,
    ModelConfig,
    PrototypeConfig,
    TeacherConfig,
)
from protoclip.testing import tiny_config, tiny_model
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
        f"model.image.size = 40, by {min(rows, 256)} of the samples",
        f"model.text.context_length = 16, by {min(rows, 256)} of the samples",
        f"episodes.size = {size}, for {rows:,} pairs",
        f"prototypes.number = {number}, {reason}",
    ]


@pytest.mark.parametrize(
    ("side", "words", "sizes_found"),
    [
        (64, 5, (40, 16)),
        (79, 5, (40, 16)),
        (80, 5, (64, 16)),
        (500, 20, (64, 32)),
        (20, 99, (40, 64)),
    ],
)
def test_small_towers_suit_the_images_and_captions(side, words, sizes_found, monkeypatch):
    """Photographs of 80 pixels get 64, and captions are hardly ever cut."""
    samples = Numbered(1000, 10**9, words=words, side=side)
    monkeypatch.setattr(sizes.sources, "pairs", lambda config: samples)
    monkeypatch.setattr(sizes, "judged", lambda config, pairs: type("", (), {"training": pairs}))
    model = sized(Config())[0].model
    assert (model.image.size, model.text.context_length) == sizes_found
    given = Config(model=ModelConfig(image=ImageTowerConfig(size=48)))
    model = sized(given)[0].model
    assert (model.image.size, model.text.context_length) == (48, sizes_found[1])
    for other in (ModelConfig(name="RN50"), ModelConfig(start="open_clip:RN50")):
        assert sized(Config(model=other))[0].model == other


def test_the_demonstration_keeps_its_sizes():
    model = sized(Config())[0].model
    assert (model.image.size, model.text.context_length) == (40, 16)


def test_notes_name_what_is_decided_and_nothing_else():
    prototypes = PrototypeConfig(number=500)
    teacher = TeacherConfig(features="emoji")
    usual = Config(model=tiny_model(), episodes=EpisodeConfig(size=4096))
    assert sized(replace(usual, prototypes=prototypes))[1] == []
    (note,) = sized(replace(usual, prototypes=prototypes, teacher=teacher))[1]
    assert note == "teacher.number = 409, a tenth of an episode"
    (note,) = sized(replace(usual, teacher=teacher))[1]
    assert note.startswith("prototypes.number and teacher.number = 409, ")
    # Groups of images and texts measure how far to trust the teacher; constant weights need none.
    alone = replace(usual, teacher=teacher, loss=LossConfig(prototypical=0.0))
    assert "prototypes.number" in sized(alone)[1][0]
    constant = replace(alone, loss=replace(alone.loss, strengths="constant"))
    assert "prototypes.number" not in sized(constant)[1][0]


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
