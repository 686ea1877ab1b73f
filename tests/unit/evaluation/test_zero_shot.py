"""Prompts, classifiers and metrics of zero-shot classification."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score

from protoclip.evaluation.metrics import SampleResults
from protoclip.evaluation.zero_shot import (
    average_precisions,
    fill_templates,
    mean_average_precision,
    zero_shot_classifier,
    zero_shot_ranks,
)


def test_a_classifier_is_the_mean_of_unit_prompts(generator):
    """Against a loop; classes and templates of any number."""
    features = torch.randn(3, 4, 5, generator=generator)
    found = zero_shot_classifier(features)
    for row, of_class in zip(found, features, strict=True):
        mean = sum(prompt / prompt.norm() for prompt in of_class) / 4
        torch.testing.assert_close(row, mean / mean.norm())


def test_of_two_classes_of_one_name_the_first_comes_first(generator):
    """As by a stable sort of the similarities; other ties count against the image."""
    images, classes = (torch.randn(n, 6, generator=generator) for n in (200, 12))
    labels, names = torch.arange(200) % 12, [*"abcdefghijk", "c"]
    classes = classes / classes.norm(dim=1, keepdim=True)
    images[2] = images[11] = classes[11] = classes[2]
    scores = images @ classes.T
    scores[:, 11] = scores[:, 2]  # which rounding may tell apart
    order = scores.argsort(dim=1, descending=True, stable=True)
    expected = (order == labels[:, None]).int().argmax(dim=1)
    ranks = zero_shot_ranks(images, classes, labels, names)
    assert ranks.tolist() == expected.tolist()
    assert (ranks[2], ranks[11]) == (0, 1)
    assert zero_shot_ranks(images, torch.ones(12, 6), labels, names).min() == 10


def test_accuracies_equal_scikit_learn(generator):
    """acc1, acc5 and mean per-class recall; some classes have no image."""
    images, classes = (torch.randn(n, 6, generator=generator) for n in (200, 12))
    labels = torch.randint(9, (200,), generator=generator)
    scores = images @ classes.T
    ranks = zero_shot_ranks(images, classes, labels)
    columns = {"zero_shot_rank": ranks.numpy(), "zero_shot_class": labels.numpy()}
    results = SampleResults(images={"sample_id": np.arange(200), **columns})
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, scores, k=k, labels=range(12))
        assert results.means[f"zero_shot/acc{k}"] == pytest.approx(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes that are predicted and have no image
        expected = balanced_accuracy_score(labels, scores.argmax(1))
    assert results.means["zero_shot/mean_per_class_recall"] == pytest.approx(expected)


@pytest.mark.parametrize("levels", [3, 1000])
def test_average_precision_equals_scikit_learn(levels):
    """With equal scores, with a class that no image has or one has, and without each image."""
    generator = np.random.default_rng(0)
    scores = generator.integers(levels, size=(80, 5)).astype(np.float64)
    present = generator.random((80, 5)) < 0.3
    present[:, 2:4] = False
    present[4, 3] = True

    def expected(rows):
        columns = zip(present[rows].T, scores[rows].T, strict=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [average_precision_score(*column) for column in columns]

    values, without = average_precisions(scores, present)
    np.testing.assert_allclose(values, expected(np.arange(80)))
    assert np.isnan(without[4, 3])
    without[4, 3] = 0.0
    for row in range(80):
        np.testing.assert_allclose(without[row], expected(np.arange(80) != row), atol=1e-12)
    mean, _ = mean_average_precision(torch.tensor(scores), torch.tensor(present))
    assert mean == pytest.approx(np.mean(expected(np.arange(80))))


def test_a_template_is_filled_with_every_class_and_has_a_place_for_it():
    filled = fill_templates(["cat", "{dog}"], ["a {c}", "{c} {x}"])
    assert filled == ["a cat", "cat {x}", "a {dog}", "{dog} {x}"]
    with pytest.raises(
        ValueError, match=r"'a photo' has no place for the class; write \{c\} there$"
    ):
        fill_templates(["cat"], ["a {c}", "a photo"])
