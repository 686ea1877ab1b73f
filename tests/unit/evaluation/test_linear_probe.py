"""Linear probe and nearest neighbours on frozen features."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from protoclip.evaluation import probes, retrieval
from protoclip.evaluation.probes import best_linear_probe, count_votes, fit_linear_probes


def blobs(count, num_classes, dim, seed, noise=1.0):
    """Unit rows around one random direction a class, the same directions for every seed."""
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    rows = centres[labels] + noise * torch.randn(count, dim, generator=generator)
    return F.normalize(rows, dim=1), labels


def narrow_cone(count, num_classes, seed):
    """Far from the origin, and a thousand times wider along one axis than along the last."""
    rows, labels = blobs(count, num_classes, 12, seed)
    rows = rows.double() * torch.logspace(0, -3, 12, dtype=torch.float64) + 3
    return F.normalize(rows, dim=1), labels


def objective(weights, bias, rows, labels, strength):
    """Mean cross-entropy plus the penalty, in float64."""
    logits = rows.double() @ weights.double().T + bias.double()
    return float(F.cross_entropy(logits, labels) + strength / 2 * weights.double().square().sum())


@pytest.mark.parametrize("num_classes", [2, 6])
@pytest.mark.parametrize(
    "features", [lambda c: blobs(150, c, 5, 0), lambda c: narrow_cone(150, c, 0)]
)
def test_probes_reach_the_optimum_of_scikit_learn(num_classes, features):
    """Each strength's loss is that of a tight Newton fit from scratch, within 1e-4."""
    rows, labels = features(num_classes)
    strengths = (1e-2, 1e-3, 1e-5)
    for probe, strength in zip(fit_linear_probes(rows, labels, strengths), strengths, strict=True):
        # For two classes scikit-learn penalises the difference w of the rows +w/2 and -w/2, whose
        # squared norms sum to |w|^2 / 2.
        half = 2 if num_classes == 2 else 1
        # scikit-learn before 1.6 fits several classes at once by this Newton solver alone.
        best = LogisticRegression(
            C=half / (strength * len(rows)), solver="newton-cg", tol=1e-10, max_iter=1000
        ).fit(rows.double().numpy(), labels.numpy())
        weights, bias = torch.from_numpy(best.coef_), torch.from_numpy(best.intercept_)
        if num_classes == 2:
            weights, bias = torch.cat([-weights, weights]) / 2, torch.cat([-bias, bias]) / 2
        optimum = objective(weights, bias, rows, labels, strength)
        reached = objective(probe.weights, probe.bias, rows, labels, strength)
        assert optimum - 1e-7 <= reached <= optimum + 1e-4
        assert probe.gradient <= 3e-4


def test_a_fit_goes_on_in_float64_where_float32_gets_stuck(monkeypatch):
    """Whatever can be fitted; a single class cannot."""
    monkeypatch.setattr(probes, "TOLERANCE", 1e-7)
    rows, labels = blobs(150, 6, 5, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (probe,) = fit_linear_probes(rows, labels, (1e-3,))
    assert probe.gradient <= 1e-7
    with pytest.raises(ValueError, match="two classes"):
        fit_linear_probes(rows, torch.zeros_like(labels))


def test_the_strength_is_chosen_on_validation_and_all_rows_are_fitted():
    """As CLIP_benchmark's `lp_acc1`: the strength that is best on validation after a fit to the
    training rows, in a fit to both."""
    train, validation = (blobs(200, 5, 16, seed, noise=2.5) for seed in range(2))
    fits = fit_linear_probes(*train)
    for other in (validation, train):
        accuracies = [probe.accuracy(*other) for probe in fits]
        assert len(set(accuracies)) > 1
        both = [torch.cat(parts) for parts in zip(train, other, strict=True)]
        expected = fit_linear_probes(*both)[accuracies.index(max(accuracies))]
        assert torch.equal(best_linear_probe(*train, *other).weights, expected.weights)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_probe_is_fitted_on_the_device_of_the_features():
    """With the answers of a CPU."""
    (rows, labels), (others, own) = (narrow_cone(400, 5, seed) for seed in range(2))
    here = best_linear_probe(rows, labels)
    there = best_linear_probe(rows.cuda(), labels.cuda())
    assert there.weights.is_cuda
    assert there.predict(others).device.type == "cpu"
    assert torch.equal(there.predict(others), here.predict(others))
    assert torch.equal(there.ranks(others, own), here.ranks(others, own))


def test_without_validation_a_fifth_of_train_chooses(monkeypatch):
    """By a seed; then all rows are fitted at the chosen strength."""
    rows, labels = blobs(200, 5, 16, 0, noise=2.5)
    fits = []
    fit = probes.fit_linear_probes
    monkeypatch.setattr(
        probes,
        "fit_linear_probes",
        lambda *arguments: fits.append(len(arguments[1])) or fit(*arguments),
    )
    found = best_linear_probe(rows, labels, seed=1)
    assert fits == [160, 200]
    whole = fit(rows, labels)
    assert any(torch.equal(found.weights, probe.weights) for probe in whole)
    assert torch.equal(best_linear_probe(rows, labels, seed=1).weights, found.weights)


def test_ranks_of_the_probe_are_those_of_its_logits():
    """Rank 0 is right; the best five are scikit-learn's."""
    rows, labels = blobs(300, 9, 8, 0, noise=2.0)
    (probe,) = fit_linear_probes(rows, labels, (1e-3,))
    logits = rows.double() @ probe.weights.T + probe.bias
    ranks = probe.ranks(rows, labels)
    assert torch.equal(ranks == 0, probe.predict(rows) == labels)
    expected = top_k_accuracy_score(labels, logits, k=5)
    assert float((ranks < 5).double().mean()) == pytest.approx(expected)


@pytest.mark.parametrize("absent", [2, 5, 7])
def test_a_class_absent_from_training_is_never_right(absent):
    """Neither by the probe nor among neighbours."""
    rows, labels = torch.eye(3).repeat(3, 1), torch.tensor([2, 5, 7]).repeat(3)
    seen = labels != absent
    expected = seen.tolist()
    probe = best_linear_probe(rows[seen], labels[seen], rows[seen], labels[seen])
    assert (probe.predict(rows) == labels).tolist() == expected
    assert (probe.ranks(rows, labels) == 0).tolist() == expected
    assert (probe.ranks(rows, labels) < 5).tolist() == expected  # though there are two classes
    assert (
        count_votes(rows[seen], labels[seen], rows, k=2).argmax(1) == labels
    ).tolist() == expected


@pytest.mark.parametrize("chunk", [1, 1000, 4_000_000])
def test_knn_equals_scikit_learn(chunk, monkeypatch):
    """The weighted vote of brute-force cosine neighbours, whatever the norms and the chunks."""
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    rows, labels = blobs(400, 7, 8, seed=0, noise=2.0)
    queries, _ = blobs(100, 7, 8, seed=1, noise=2.0)
    reference = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(rows.numpy(), labels.numpy())
    found = count_votes(3 * rows, labels, queries / 5).argmax(1)
    assert found.tolist() == reference.predict(queries.numpy()).tolist()
