"""Clusters of an episode, and back-translation as the paper defines it."""

import inspect
import math
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from protoclip import KMeans, back_translate, kmeans
from protoclip.config import Config
from protoclip.losses.prototypical import make_targets
from protoclip.prototypes.features import ExtractedFeatures
from protoclip.prototypes.targets import agreement, cluster_spaces
from protoclip.training.trainer import EpisodePrototypes


def targets_of(
    clusters: dict[str, KMeans], image: Tensor, text: Tensor, temperatures: dict[str, float], **more
):
    projections = {"image_projections": image, "text_projections": text}
    return make_targets(clusters, target_temperatures=temperatures, **projections, **more)


def test_back_translation_is_the_mean_over_each_assignment(generator):
    """An empty cluster is a zero row; the gradient is that of a mean."""
    features = torch.randn(50, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    assignments = torch.randint(0, 8, (50,), generator=generator)
    assignments[assignments == 5] = 2
    translated = back_translate(assignments, features, 9)
    weights = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((translated * weights).sum(), features)
    for k in (0, 1, 2, 3, 4, 6, 7):
        members = features[assignments == k]
        torch.testing.assert_close(translated[k], members.mean(0), atol=1e-9, rtol=0)
        share = (weights[k] / len(members)).expand(len(members), 6)
        torch.testing.assert_close(gradient[assignments == k], share, atol=1e-9, rtol=0)
    assert not translated[[5, 8]].any()


@pytest.mark.parametrize(
    ("assignments", "features"),
    [
        ([0, 1, 7, 3], (4, 5)),
        ([0, 1, -1, 3], (4, 5)),
        ([0, 1, 2], (4, 5)),
        ([True, False], (2, 5)),
        ([0, 1], (2,)),
    ],
)
def test_assignments_that_name_no_prototype_are_refused(assignments, features):
    with pytest.raises(ValueError, match=r"^assignments: .+$"):
        inspect.unwrap(back_translate)(torch.tensor(assignments), torch.ones(features), 4)


def test_nothing_is_translated_into_empty_prototypes():
    assert not back_translate(torch.zeros(0).long(), torch.ones(0, 5), 4).any()


@pytest.mark.parametrize("back_translation", [True, False])
def test_each_student_learns_from_every_other_space(back_translation, generator):
    """Never from itself."""
    image, text = torch.randn(12, 4, generator=generator), torch.randn(12, 4, generator=generator)
    clusters = {
        space: KMeans(
            centroids=torch.randn(3, width, generator=generator),
            assignments=torch.arange(12) % 3,
            inertia=0.0,
            history=(),
        )
        for space, width in {"image": 4, "text": 4, "bert": 7}.items()
    }
    temperatures = {"image": 0.1, "text": 0.2, "bert": 0.3}
    targets = targets_of(clusters, image, text, temperatures, back_translation=back_translation)
    pairs = [("text", "image"), ("image", "text"), ("image", "bert"), ("text", "bert")]
    assert list(targets) == pairs
    for (student, teacher), target in targets.items():
        found = clusters[teacher]
        centroids = found.centroids
        if back_translation or teacher == "bert":
            projections = {"image": image, "text": text}[student]
            centroids = back_translate(found.assignments, projections, 3)
        torch.testing.assert_close(target.classes, centroids)
        similarities = found.centroids @ found.centroids.T / temperatures[teacher]
        torch.testing.assert_close(target.lookup, similarities.softmax(1) @ centroids)


def test_samples_that_a_teacher_does_not_know_are_left_out():
    """They have no prototype and no part in its translation. A teacher that knows none has none."""
    points, nothing = torch.randn(6, 3), torch.full((6, 3), float("nan"))
    points[[1, 4]] = float("nan")

    def two(space: str, rows: Tensor, positions: Tensor | None) -> KMeans:
        assert positions is None
        return kmeans(rows, 2, iterations=3, seed=0)

    clusters = cluster_spaces({"bert": points, "other": nothing}, two)
    assert list(clusters) == ["bert"]
    assignments = clusters["bert"].assignments
    assert (assignments == -1).tolist() == [False, True, False, False, True, False]
    projections = torch.randn(6, 4)
    targets = targets_of(clusters, projections, projections, {"bert": 0.0})
    for k in range(2):
        mean = projections[assignments == k].mean(0)
        torch.testing.assert_close(targets["text", "bert"].lookup[k], mean)


def slow_agreement(by: list[int], other: list[int]) -> float:
    """Over all ordered pairs, one by one."""
    rows = range(len(by))
    pairs = [(i, j) for i in rows for j in rows if i != j]
    inside = [pair for pair in pairs if by[pair[0]] == by[pair[1]]]
    share = sum(other[i] == other[j] for i, j in inside) / len(inside)
    chance = sum(other[i] == other[j] for i, j in pairs) / len(pairs)
    return math.sqrt(max(0.0, (share - chance) / (1 - chance)))


def test_agreement_is_the_root_of_the_share_of_pairs_above_chance(generator):
    by = torch.randint(0, 5, (40,), generator=generator)
    other = torch.where(torch.rand(40, generator=generator) < 0.6, by // 2, by)
    expected = slow_agreement(by.tolist(), other.tolist())
    assert 0.1 < expected < 0.9
    assert agreement(by, other) == pytest.approx(expected)
    # Unknown samples and repeated ones have no part.
    more = torch.tensor([-1, 3, 4]), torch.tensor([2, -1, 0])
    keys = torch.arange(43) % 42
    longer = [torch.cat([first, rest]) for first, rest in zip((by, other), more, strict=True)]
    assert agreement(*longer, torch.where(keys < 42, keys, 0)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("by", "other", "expected"),
    [
        ([0, 1] * 5, [1, 0] * 5, 1.0),
        ([0, 1] * 4 + [0, 2], [1, 0] * 4 + [1, 2], 0.0),  # of 9 samples that share a group
        ([0, 0, 1, 1] * 8, [0, 1, 0, 1] * 8, 0.0),  # less than chance
        ([0, 0, 1, 1] * 8, [0] * 32, 0.0),  # one group tells nothing
        ([0, 1, 2, 3], [0, 0, 1, 1], 0.0),  # groups of one sample tell nothing
        ([0, -1], [0, 0], 0.0),
        ([], [], 0.0),
    ],
)
def test_agreement_of_few_samples(by, other, expected):
    by, other = (torch.tensor(groups, dtype=torch.long) for groups in (by, other))
    assert agreement(by, other) == expected


@pytest.mark.parametrize(
    ("number", "found", "captions", "expected"),
    [
        (40, 400, 1, 40),  # all of them
        (40, 100, 1, 10),  # a tenth of what it knows
        (5, 100, 1, 5),  # as for captions that repeat
        (200, 100, 1, 50),  # more than a tenth, as asked
        (40, 500, 5, 10),  # a row a caption, of 100 images
        (40, 15, 1, 2),
        (40, 1, 1, 1),
    ],
)
def test_prototypes_of_a_teacher_follow_from_the_pairs_that_it_knows(
    number, found, captions, expected
):
    """Or each sample would be a group of its own."""
    teacher = {"features": "teacher.npy", "number": number}
    config = Config.from_dict({"episodes": {"size": 400}, "teacher": teacher})
    prototypes = EpisodePrototypes(config=config, source=Mock(ExtractedFeatures), captions=captions)
    clustered = prototypes.cluster("teacher", torch.randn(found, 8), None)
    assert len(clustered.centroids) == expected


def test_targets_know_how_much_their_teacher_knows(generator):
    """By the agreement of its groups with the student's, which may not be clustered."""
    rows = torch.randn(30, 4, generator=generator)
    names = ("image", "text", "teacher")
    clusters = {
        name: kmeans(rows[:, :2] + rows[:, 2:] * n, 4, iterations=3, seed=0)
        for n, name in enumerate(names)
    }
    targets = targets_of(clusters, rows, rows, dict.fromkeys(names, 0.1))
    for (student, teacher), target in targets.items():
        groups = clusters[teacher].assignments, clusters[student].assignments
        assert target.confidence == agreement(*groups)
    assert len({target.confidence for target in targets.values()}) > 1
    alone = targets_of({"teacher": clusters["teacher"]}, rows, rows, {"teacher": 0.1})
    assert {target.confidence for target in alone.values()} == {1.0}
