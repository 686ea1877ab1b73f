"""Linear probe and nearest neighbours on frozen features."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from protoclip.evaluation.knn import knn_accuracy, knn_predict
from protoclip.evaluation.linear_probe import (
    REGULARISATIONS,
    fit_linear_probes,
    linear_probe_accuracy,
)


def blobs(count, num_classes, dim, seed, noise=1.0):
    """Unit rows around one random direction a class, the same directions for every seed."""
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    rows = centres[labels] + noise * torch.randn(count, dim, generator=generator)
    return F.normalize(rows, dim=1), labels


def objective(weights, bias, rows, labels, regularisation):
    """Mean cross-entropy plus the penalty, one sample and one class at a time."""
    total = 0.0
    for row, label in zip(rows.double().tolist(), labels.tolist(), strict=True):
        logits = [
            sum(w * x for w, x in zip(of_class, row, strict=True)) + b
            for of_class, b in zip(weights.tolist(), bias.tolist(), strict=True)
        ]
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[label]
    return total / len(rows) + regularisation / 2 * float(weights.square().sum())


def narrow_cone(count, num_classes, seed):
    """Far from the origin, and a thousand times wider along one axis than along the last."""
    rows, labels = blobs(count, num_classes, 12, seed)
    rows = rows.double() * torch.logspace(0, -3, 12, dtype=torch.float64) + 3
    return F.normalize(rows, dim=1), labels


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
        best = LogisticRegression(
            C=half / (strength * len(rows)), solver="newton-cholesky", tol=1e-10, max_iter=1000
        ).fit(rows.double().numpy(), labels.numpy())
        weights, bias = torch.from_numpy(best.coef_), torch.from_numpy(best.intercept_)
        if num_classes == 2:
            weights, bias = torch.cat([-weights, weights]) / 2, torch.cat([-bias, bias]) / 2
        optimum = objective(weights, bias, rows, labels, strength)
        reached = objective(probe.weights, probe.bias, rows, labels, strength)
        assert optimum - 1e-7 <= reached <= optimum + 1e-4
        assert probe.regularisation == strength
        assert probe.gradient <= 3e-4


def test_a_fit_that_stops_early_says_so():
    """Two iterations leave a loss above the optimum, a gradient above the tolerance, a warning."""
    rows, labels = blobs(150, 6, 5, seed=0)
    (best,) = fit_linear_probes(rows, labels, (1e-5,))
    with pytest.warns(UserWarning, match="1.0e-05 did not converge in 2 iterations"):
        (early,) = fit_linear_probes(rows, labels, (1e-5,), max_iterations=2)
    losses = [objective(p.weights, p.bias, rows, labels, 1e-5) for p in (best, early)]
    assert losses[1] > losses[0] + 1e-3
    assert best.gradient <= 3e-4 < early.gradient


def test_a_tolerance_below_single_precision_is_reached():
    """Where float32 gets stuck, float64 goes on: no warning, and the gradient is as asked."""
    rows, labels = blobs(150, 6, 5, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (probe,) = fit_linear_probes(rows, labels, (1e-3,), tolerance=1e-7)
    assert probe.gradient <= 1e-7


def test_probes_fit_where_gradients_are_off():
    """Called from within inference mode the result is the same."""
    rows, labels = blobs(60, 3, 4, seed=0)
    (outside,) = fit_linear_probes(rows, labels, (1e-3,))
    with torch.inference_mode():
        (inside,) = fit_linear_probes(rows, labels, (1e-3,))
    assert torch.equal(inside.weights, outside.weights)


def test_strength_is_chosen_on_validation_alone():
    """Labels of the test rows cannot move the choice; those of the validation rows do."""
    train, validation, test = (blobs(200, 5, 16, seed, noise=2.5) for seed in range(3))
    given = {"regularisations": (1e-6, 1e-1, 1e-3)}
    chosen = linear_probe_accuracy(*train, *validation, *test, **given)
    wrong = (test[0], (test[1] + 1) % 5)
    assert (
        linear_probe_accuracy(*train, *validation, *wrong, **given)["regularisation"]
        == chosen["regularisation"]
    )
    accuracies = {
        p.regularisation: p.accuracy(*validation)
        for p in fit_linear_probes(*train, (1e-1, 1e-3, 1e-6))
    }
    assert accuracies[chosen["regularisation"]] == max(accuracies.values())
    assert len(set(accuracies.values())) > 1
    on_train = linear_probe_accuracy(*train, *train, *test, **given)
    assert on_train["regularisation"] != chosen["regularisation"]


def test_of_equal_strengths_the_strongest_is_taken():
    """Where every strength validates perfectly, the list's order does not matter."""
    rows, labels = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
    result = linear_probe_accuracy(
        rows, labels, rows, labels, rows, labels, regularisations=(1e-4, 1e-2, 1e-3)
    )
    assert result == {"acc1": 1.0, "regularisation": 1e-2}


def test_probe_accuracy_on_permuted_labels_is_near_chance():
    """Shuffled training labels leave nothing to learn, and true ones do not."""
    train, validation, test = (blobs(1500, 10, 12, seed, noise=0.5) for seed in range(3))
    given = {"regularisations": (1e-2, 1e-4)}
    assert linear_probe_accuracy(*train, *validation, *test, **given)["acc1"] > 0.9
    shuffled = train[1][torch.randperm(1500, generator=torch.Generator().manual_seed(3))]
    # Rows of a class get one answer between them, so the classes are what the binomial counts.
    accuracy = linear_probe_accuracy(train[0], shuffled, *validation, *test, **given)["acc1"]
    assert accuracy < 0.1 + 4 * math.sqrt(0.1 * 0.9 / 10)


def test_a_class_absent_from_training_is_never_right():
    """Rows of an unseen class count as wrong, in the probe and among neighbours."""
    rows = torch.eye(3).repeat(3, 1)
    labels = torch.tensor([2, 5, 7]).repeat(3)
    seen = labels != 5
    probe = linear_probe_accuracy(rows[seen], labels[seen], rows, labels, rows, labels)
    assert probe["acc1"] == pytest.approx(2 / 3)
    for absent in (5, 7):
        seen = labels != absent
        knn = knn_accuracy(rows[seen], labels[seen], rows, labels, k=2)
        assert knn["acc1"] == pytest.approx(2 / 3)


def test_constant_features_classify_as_the_prior():
    """Nothing to tell rows apart by: the most frequent training class is always answered."""
    rows, labels = torch.ones(10, 4) / 2, torch.tensor([0] * 6 + [1] * 3 + [2])
    result = linear_probe_accuracy(rows, labels, rows, labels, rows, labels)
    assert result["acc1"] == 0.6
    assert knn_accuracy(rows, labels, rows, labels, k=10)["acc1"] == 0.6


def test_probe_refuses_what_it_cannot_fit():
    """One class, no strength, non-finite features and empty splits are named."""
    rows, labels = blobs(20, 3, 4, seed=0)
    with pytest.raises(ValueError, match="two classes"):
        fit_linear_probes(rows, torch.zeros(20, dtype=torch.int64))
    with pytest.raises(ValueError, match="above 0"):
        fit_linear_probes(rows, labels, (1e-3, 0.0))
    with pytest.raises(ValueError, match="non-finite"):
        fit_linear_probes(rows * math.inf, labels)
    with pytest.raises(ValueError, match="a test row"):
        linear_probe_accuracy(rows, labels, rows, labels, rows[:0], labels[:0])
    assert list(REGULARISATIONS) == sorted(REGULARISATIONS, reverse=True)


def test_knn_votes_match_a_table_worked_by_hand():
    """Two weak votes beat a strong one at a high temperature and lose at a low one."""
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8], [-1.0, 0.0]])
    labels, query = torch.tensor([1, 0, 0, 2]), torch.tensor([[1.0, 0.0]])
    # Votes e^(1/t) for class 1 against 2 e^(0.6/t) for class 0: equal at t = 0.4 / ln 2 = 0.577.
    assert knn_predict(train, labels, query, k=3, temperature=0.6).tolist() == [0]
    assert knn_predict(train, labels, query, k=3, temperature=0.55).tolist() == [1]
    assert knn_predict(train, labels, query, k=1, temperature=100.0).tolist() == [1]


@pytest.mark.parametrize("chunk_elements", [1, 1000, 4_000_000])
def test_knn_equals_scikit_learn(chunk_elements):
    """The weighted vote of scikit-learn's brute-force cosine neighbours gives the same classes."""
    rows, labels = blobs(400, 7, 8, seed=0, noise=2.0)
    queries, truth = blobs(100, 7, 8, seed=1, noise=2.0)
    reference = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(rows.numpy(), labels.numpy())
    found = knn_predict(3 * rows, labels, queries / 5, chunk_elements=chunk_elements)
    assert found.tolist() == reference.predict(queries.numpy()).tolist()
    accuracy = knn_accuracy(rows, labels, queries, truth, chunk_elements=chunk_elements)
    assert accuracy["acc1"] == pytest.approx(reference.score(queries.numpy(), truth.numpy()))
    assert 1 / 7 < accuracy["acc1"] < 1


def test_knn_with_few_rows_and_low_temperatures():
    """More neighbours than rows is all rows; a temperature near zero does not overflow."""
    rows, labels = torch.eye(3), torch.tensor([4, 1, 0])
    assert knn_predict(rows, labels, rows, k=50, temperature=1e-4).tolist() == [4, 1, 0]
    assert knn_accuracy(rows[:1], labels[:1], rows[:1], labels[:1]) == {"acc1": 1.0}


def test_knn_refuses_what_has_no_neighbours():
    """Settings out of range, empty sets and non-finite features are named."""
    rows, labels = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match="k=0"):
        knn_predict(rows, labels, rows, k=0)
    with pytest.raises(ValueError, match="training row"):
        knn_predict(rows[:0], labels[:0], rows)
    with pytest.raises(ValueError, match="non-finite"):
        knn_predict(rows, labels, rows * math.nan)
    with pytest.raises(ValueError, match="a test row"):
        knn_accuracy(rows, labels, rows[:0], labels[:0])


def test_knn_on_permuted_labels_is_near_chance():
    """Shuffled training labels of unclustered rows leave nothing to vote on."""
    rows, labels = blobs(2000, 10, 16, seed=0, noise=100.0)
    queries, truth = blobs(2000, 10, 16, seed=1, noise=100.0)
    accuracy = knn_accuracy(rows, labels, queries, truth)["acc1"]
    assert abs(accuracy - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 2000)
