"""A model that knows nothing about concepts ranks them at chance."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import protoclip
from protoclip.evaluation import datasets, suite
from protoclip.evaluation.zero_shot import class_features, zero_shot_ranks
from protoclip.models import loading
from protoclip.testing import tiny_config, tiny_model
from protoclip.training import run


def relative_rank(model, transform, tokenizer) -> float:
    """How far down an unseen image's concept stands among the concept names, in the mean: from 0,
    always first, to 1. By chance 0.5, with a standard deviation of about 0.02."""
    test = datasets.emoji().test
    labels = list(test.column("label"))
    rows, names = range(0, len(labels), 3), sorted(set(labels))

    def encode(forward, inputs, items):
        return suite.encode(
            partial(forward, normalize=True),
            inputs,
            items,
            stage="test",
            batch_size=256,
            device="cpu",
            report=lambda *_: None,
        )

    images = encode(
        model.encode_image,
        lambda batch: torch.stack([transform(test.image(row)) for row in batch]),
        rows,
    )
    classes = class_features(
        lambda texts: encode(model.encode_text, lambda batch: tokenizer(list(batch)), texts),
        [[name] for name in names],
    )
    own = datasets.positions([labels[row] for row in rows], names)
    return float(zero_shot_ranks(images, classes, own).double().mean()) / (len(names) - 1)


def test_an_untrained_model_ranks_at_chance() -> None:
    config = tiny_model()
    model = loading.model(config, seed=0).eval()
    transform, tokenizer = loading.evaluation_transform(model), loading.tokenizer(config)
    assert abs(relative_rank(model, transform, tokenizer) - 0.5) < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [True, False])
def test_shuffled_captions_teach_nothing_about_concepts(shuffled: bool, tmp_path: Path) -> None:
    """As many steps with the images' own captions teach something."""
    config = tiny_config(out=str(tmp_path / "run"))
    config = replace(
        config,
        run=replace(config.run, evaluate=False),
        data=replace(config.data, shuffle_captions=shuffled),
        episodes=replace(config.episodes, size=1024, count=4, batch_size=64),
    )
    run.train(config)
    rank = relative_rank(*protoclip.load(tmp_path / "run"))
    assert abs(rank - 0.5) < 0.08 if shuffled else rank < 0.42
