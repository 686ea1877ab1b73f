"""Clustering agreement, modality gap, alignment and uniformity."""

import math

import pytest
import torch
import torch.nn.functional as F

from protoclip.evaluation import retrieval
from protoclip.evaluation.clustering import clustering
from protoclip.evaluation.geometry import modality_gap, uniformity


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
def test_uniformity_equals_a_slow_restatement(chunk, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    rows = unit_rows(37, 6, 0)
    assert uniformity(rows) == pytest.approx(slow_uniformity(rows), abs=1e-6)


def test_geometry_of_pairs_worked_by_hand():
    """Equal rows have uniformity 0, opposite rows -8; one row has no pair."""
    assert uniformity(torch.ones(3, 4) / 2) == pytest.approx(0.0, abs=1e-6)
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8.0)
    with pytest.raises(ValueError, match="two samples or more, not 1"):
        uniformity(torch.ones(1, 4) / 2)
    first, second = torch.eye(2).repeat_interleave(2, 0).split(2)
    found = modality_gap(first, second)
    assert found["gap"] == pytest.approx(math.sqrt(2))
    assert found["alignment"] == pytest.approx(2.0)
    assert modality_gap(first, first)["gap"] == modality_gap(first, first)["alignment"] == 0.0


def test_the_modality_gap_equals_a_slow_restatement():
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


def test_agreement_of_a_table_worked_by_hand():
    """Six points on a line, one in the wrong class: ARI from the pair counts."""
    rows = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
    found = clustering(rows, torch.tensor([0, 0, 1, 1, 1, 1]))
    # Pairs together in both: 1 + 3 = 4; in clusters: 6; in classes: 1 + 6 = 7; of 15.
    expected = 6 * 7 / 15
    assert found["ari"] == pytest.approx((4 - expected) / ((6 + 7) / 2 - expected))


def test_agreement_is_zero_by_chance():
    """For random labels, and for constant features."""
    labels = torch.randint(20, (1000,), generator=torch.Generator().manual_seed(1))
    found = clustering(unit_rows(1000, 8, 0).float(), labels, restarts=2)
    assert abs(found["ami"]) < 0.02
    assert abs(found["ari"]) < 0.02
    assert clustering(torch.ones(12, 4), torch.arange(12) % 3)["ari"] == pytest.approx(0.0)


def test_clustering_depends_on_its_seed_alone():
    rows = unit_rows(200, 8, 0).float()
    labels = torch.randint(15, (200,), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, other = (clustering(rows, labels, seed=s, restarts=1)["ami"] for s in (3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert clustering(rows, labels, seed=3, restarts=1)["ami"] == first != other
