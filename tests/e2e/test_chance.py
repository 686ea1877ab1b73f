"""What says nothing scores near chance."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from protoclip.config import Config
from protoclip.evaluation import datasets, suite
from protoclip.evaluation.knn import knn_accuracy
from protoclip.evaluation.linear_probe import linear_probe_accuracy
from protoclip.models import loading
from protoclip.testing import tiny_config
from protoclip.training import run
from protoclip.training.session import evaluate

RANKED = ("zero_shot/acc", "retrieval/")


def assert_near_chance(metrics: dict[str, float]) -> None:
    """Rankings across the modalities within a factor of two and half a point of chance."""
    for key, chance in suite.chance_levels(datasets.emoji(), "test").items():
        if any(part in key for part in RANKED):
            assert metrics[key] < 2 * chance + 0.005, (key, metrics[key], chance)


@pytest.mark.slow
def test_an_untrained_model_ranks_at_chance() -> None:
    """Zero-shot and retrieval of new weights are at chance on the held-out concepts."""
    config = Config()
    model = loading.model(config.model, seed=0)
    transform, tokenizer = loading.evaluation_transform(model), loading.tokenizer(config.model)
    assert_near_chance(evaluate(model, transform, tokenizer, split="test", show=False))


@pytest.mark.slow
def test_shuffled_captions_teach_nothing_about_concepts(tmp_path: Path) -> None:
    """A model trained on pictures with other pictures' captions ranks at chance."""
    config = tiny_config(out=str(tmp_path / "shuffled"))
    config = replace(
        config,
        data=replace(config.data, shuffle_captions=True),
        episodes=replace(config.episodes, size=512, count=8, batch_size=64),
    )
    assert_near_chance(run.train(config)["metrics"])


def test_probes_of_permuted_labels_are_at_chance() -> None:
    """A linear probe and kNN on real pictures' pixels find nothing in labels dealt at random."""
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(1500, 32, generator=generator), dim=1)
    labels = torch.randint(0, 10, (1500,), generator=generator)
    train, validation, test = (slice(0, 1000), slice(1000, 1250), slice(1250, 1500))
    probe = linear_probe_accuracy(
        features[train],
        labels[train],
        features[validation],
        labels[validation],
        features[test],
        labels[test],
    )
    # Five standard deviations of a fair guess among ten.
    assert abs(probe["acc1"] - 0.1) < 5 * (0.1 * 0.9 / 250) ** 0.5
    near = knn_accuracy(features[train], labels[train], features[test], labels[test])
    assert abs(near["acc1"] - 0.1) < 5 * (0.1 * 0.9 / 250) ** 0.5
