"""Clustering agreement, modality gap, alignment and uniformity."""

import math

import pytest
import torch
import torch.nn.functional as F

from protoclip.evaluation import retrieval
from protoclip.evaluation.clustering import clustering
from protoclip.evaluation.geometry import modality_gap


def unit_rows(count, dim, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator, dtype=dtype), dim=1)


def slow_uniformity(rows):
    """Every ordered pair of different rows, one at a time."""
    terms = [
        math.exp(-2 * sum((a - b) ** 2 for a, b in zip(x, y, strict=True)))
        for i, x in enumerate(rows.tolist())
        for j, y in enumerate(rows.tolist())
        if i != j
    ]
    return math.log(sum(terms) / len(terms))


@pytest.mark.parametrize("chunk", [1, 100, 4_000_000])
def test_the_modality_gap_equals_a_slow_restatement(chunk, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    images, texts = unit_rows(30, 5, 0), unit_rows(30, 5, 1)
    found = modality_gap(images, texts)
    means = [
        sum(row[d] for row in images.tolist()) / 30 - sum(row[d] for row in texts.tolist()) / 30
        for d in range(5)
    ]
    squares = [
        sum((a - b) ** 2 for a, b in zip(x, y, strict=True))
        for x, y in zip(images.tolist(), texts.tolist(), strict=True)
    ]
    assert found == {
        "gap": pytest.approx(math.hypot(*means)),
        "alignment": pytest.approx(sum(squares) / 30),
        "uniformity_image": pytest.approx(slow_uniformity(images), abs=1e-6),
        "uniformity_text": pytest.approx(slow_uniformity(texts), abs=1e-6),
    }


def test_clusters_that_are_the_classes_score_one():
    """Under any names of the classes."""
    labels = torch.arange(60) % 4
    found = clustering(torch.eye(4)[labels] + 0.01 * unit_rows(60, 4, 0).float(), 10 * labels + 3)
    assert (found["ami"], found["ari"]) == (pytest.approx(1.0), pytest.approx(1.0))


def test_agreement_is_zero_by_chance():
    """For random labels, and for constant features."""
    labels = torch.randint(20, (1000,), generator=torch.Generator().manual_seed(1))
    found = clustering(unit_rows(1000, 8, 0).float(), labels, restarts=2)
    assert abs(found["ami"]) < 0.02
    assert abs(found["ari"]) < 0.02
    assert clustering(torch.ones(12, 4), torch.arange(12) % 3)["ari"] == pytest.approx(0.0)
