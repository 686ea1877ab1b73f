"""Back-translation and targets against the paper's definition."""

import pytest
import torch

from protoclip import Prototypes, back_translate
from protoclip.prototypes.targets import build_targets


def test_back_translation_is_the_mean_over_each_assignment(generator: torch.Generator) -> None:
    """Row k is the mean of the student features assigned to k; an empty cluster is a zero row."""
    features = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    assignments = torch.randint(0, 8, (50,), generator=generator)
    assignments[assignments == 5] = 2
    translated = back_translate(assignments, features, 9)
    for k in range(9):
        members = [features[i].tolist() for i in range(50) if int(assignments[i]) == k]
        expected = (
            [sum(column) / len(members) for column in zip(*members, strict=True)]
            if members
            else [0.0] * 6
        )
        assert translated[k].tolist() == pytest.approx(expected, abs=1e-9)
    assert not members
    assert translated[5].abs().sum() == 0


def test_back_translation_has_the_gradient_of_a_mean(generator: torch.Generator) -> None:
    """d mean_k / d feature_i is 1 / |k| for members and 0 for others, to 1e-9."""
    features = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assignments = torch.tensor([0, 0, 1, 0, 2, 2])
    weights = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(
        (back_translate(assignments, features, 3) * weights).sum(), features
    )
    counts = {0: 3, 1: 1, 2: 2}
    for i, k in enumerate(assignments.tolist()):
        torch.testing.assert_close(gradient[i], weights[k] / counts[k], atol=1e-9, rtol=0)


def test_back_translation_rejects_unequal_lengths() -> None:
    """Assignments of another episode are refused, not silently cut."""
    with pytest.raises(ValueError, match="4 assignments for 5 student features"):
        back_translate(torch.zeros(4, dtype=torch.long), torch.zeros(5, 2), 2)


@pytest.mark.parametrize("back_translation", [True, False])
def test_targets_pair_each_student_with_every_other_space(
    back_translation: bool, generator: torch.Generator
) -> None:
    """Students never learn from themselves; without PBT the raw centroids of the other modality
    serve, except for a teacher, whose space is another."""
    image, text = torch.randn(12, 4, generator=generator), torch.randn(12, 4, generator=generator)
    spaces = {"image": 4, "text": 4, "bert": 7}
    prototypes = {
        space: Prototypes(
            centroids=torch.randn(3, width, generator=generator),
            assignments=torch.randint(0, 3, (12,), generator=generator),
        )
        for space, width in spaces.items()
    }
    targets = build_targets(
        prototypes,
        image_projections=image,
        text_projections=text,
        back_translation=back_translation,
    )
    assert set(targets) == {
        "image_from_text",
        "text_from_image",
        "image_from_bert",
        "text_from_bert",
    }
    for name, target in targets.items():
        student, teacher = name.split("_from_")
        source = prototypes[teacher]
        assert target.assignments is source.assignments
        assert target.teacher_centroids is source.centroids
        translated = back_translate(source.assignments, {"image": image, "text": text}[student], 3)
        expected = (
            translated if back_translation or teacher == "bert" else prototypes[teacher].centroids
        )
        torch.testing.assert_close(target.student_centroids, expected)


def test_prototypes_of_unit_norm() -> None:
    """Directions are kept, lengths are one, and an empty prototype stays the zero row."""
    image = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 2.0]])
    found = Prototypes(centroids=torch.eye(3, 2), assignments=torch.tensor([0, 0, 2]))
    targets = build_targets(
        {"bert": found}, image_projections=image, text_projections=image, unit_norm=True
    )
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(targets["image_from_bert"].student_centroids, expected)
