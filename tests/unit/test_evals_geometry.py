"""Clustering agreement, modality gap, alignment and uniformity."""

import math

import pytest
import torch
import torch.nn.functional as F

from protoclip.evaluation.clustering import clustering_agreement
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


@pytest.mark.parametrize("chunk_elements", [1, 100, 4_000_000])
def test_uniformity_equals_a_slow_restatement(chunk_elements):
    """Any chunking gives the mean over pairs without a row's pair with itself."""
    rows = unit_rows(37, 6, 0)
    assert uniformity(rows, chunk_elements=chunk_elements) == pytest.approx(
        slow_uniformity(rows), abs=1e-6
    )


def test_uniformity_of_pairs_worked_by_hand():
    """Equal rows give 0, opposite rows -8; one row has no pair."""
    assert uniformity(torch.ones(3, 4) / 2) == pytest.approx(0.0, abs=1e-6)
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8.0)
    with pytest.raises(ValueError, match="two samples or more, not 1"):
        uniformity(torch.ones(1, 4) / 2)


def test_modality_gap_of_pairs_worked_by_hand():
    """Images at the first axis, texts at the second: gap sqrt 2, alignment 2."""
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    texts = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    found = modality_gap(images, texts)
    assert found["gap"] == pytest.approx(math.sqrt(2))
    assert found["alignment"] == pytest.approx(2.0)
    assert modality_gap(images, images)["gap"] == modality_gap(images, images)["alignment"] == 0.0


def test_modality_gap_equals_a_slow_restatement():
    """Means, pair distances and both uniformities agree with loops; pairing matters."""
    images, texts = unit_rows(30, 5, 0), unit_rows(30, 5, 1)
    found = modality_gap(images, texts)
    means = [
        sum(row[d] for row in images.tolist()) / 30 - sum(row[d] for row in texts.tolist()) / 30
        for d in range(5)
    ]
    assert found["gap"] == pytest.approx(math.hypot(*means))
    squares = [
        sum((a - b) ** 2 for a, b in zip(x, y, strict=True))
        for x, y in zip(images.tolist(), texts.tolist(), strict=True)
    ]
    assert found["alignment"] == pytest.approx(sum(squares) / 30)
    assert found["uniformity_image"] == pytest.approx(slow_uniformity(images), abs=1e-6)
    assert found["uniformity_text"] == pytest.approx(slow_uniformity(texts), abs=1e-6)
    turned = modality_gap(images, texts.roll(1, dims=0))
    assert turned["alignment"] != pytest.approx(found["alignment"])
    assert turned["gap"] == pytest.approx(found["gap"])


def test_clusters_that_are_the_classes_score_one():
    """Tight, far-apart classes under any names are found exactly."""
    labels = torch.arange(60) % 4
    rows = torch.eye(4)[labels] + 0.01 * unit_rows(60, 4, 0).float()
    found = clustering_agreement(rows, 10 * labels + 3)
    assert found == {"ami": pytest.approx(1.0), "ari": pytest.approx(1.0)}


def test_agreement_of_a_table_worked_by_hand():
    """Six points on a line, one in the wrong class: ARI from the pair counts."""
    rows = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    # Pairs together in both: 1 + 3 = 4; in clusters: 6; in classes: 1 + 6 = 7; of 15.
    expected = 6 * 7 / 15
    ari = (4 - expected) / ((6 + 7) / 2 - expected)
    assert clustering_agreement(rows, labels)["ari"] == pytest.approx(ari)


def test_agreement_with_random_labels_is_near_zero():
    """Both indices are adjusted for chance."""
    labels = torch.randint(20, (1000,), generator=torch.Generator().manual_seed(1))
    found = clustering_agreement(unit_rows(1000, 8, 0).float(), labels, restarts=2)
    assert abs(found["ami"]) < 0.02
    assert abs(found["ari"]) < 0.02


def test_clustering_depends_on_the_seed_alone():
    """Equal seeds give equal scores, and the global generator is neither read nor moved."""
    rows = unit_rows(200, 8, 0).float()
    labels = torch.randint(15, (200,), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    first = clustering_agreement(rows, labels, seed=3, restarts=1)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert clustering_agreement(rows, labels, seed=3, restarts=1) == first
    assert clustering_agreement(rows, labels, seed=4, restarts=1) != first
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_clustering_of_degenerate_inputs():
    """Constant features carry nothing; one sample is trivially right; none is refused."""
    labels = torch.arange(12) % 3
    assert clustering_agreement(torch.ones(12, 4), labels)["ari"] == pytest.approx(0.0)
    assert clustering_agreement(torch.ones(1, 4), torch.tensor([5]))["ami"] == 1.0
    with pytest.raises(ValueError, match="needs a sample"):
        clustering_agreement(torch.ones(0, 4), labels[:0])
    with pytest.raises(ValueError, match="non-finite"):
        clustering_agreement(torch.ones(12, 4) * math.nan, labels)
