"""Losses against independent restatements of the paper's formulas, in float64."""

import math

import pytest
import torch
from torch import Tensor

from protoclip import Embeddings, PrototypeTarget, info_nce, objective, prototypical_loss
from protoclip.losses import LossWeights

B, D, P, Q, K = 7, 5, 6, 4, 9


def unit(*shape: int, seed: int) -> Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (rows / rows.norm(dim=-1, keepdim=True)).requires_grad_()


def scale(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def dot(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(a, b, strict=True):
        total = total + x * y
    return total


def slow_info_nce(image: Tensor, text: Tensor, s: Tensor) -> Tensor:
    """Term by term: -log of a pair's share among its row, and among its column."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(image)):
        own = torch.exp(s * dot(image[i], text[i]))
        row = sum(torch.exp(s * dot(image[i], text[j])) for j in range(len(text)))
        column = sum(torch.exp(s * dot(image[j], text[i])) for j in range(len(image)))
        total = total - torch.log(own / row) / 2 - torch.log(own / column) / 2
    return total / len(image)


def slow_prototypical(
    h: Tensor,
    student: Tensor,
    teacher: Tensor,
    assigned: list[int],
    s: Tensor,
    temperature: float | None,
    alive: list[int],
) -> Tensor:
    """Term by term over the classes in `alive`."""
    total = torch.zeros((), dtype=torch.float64)
    for i, a in enumerate(assigned):
        partition = sum(torch.exp(s * dot(h[i], student[k])) for k in alive)
        if temperature is None:
            target = {k: float(k == a) for k in alive}
        else:
            raw = {k: math.exp(float(dot(teacher[a], teacher[k])) / temperature) for k in alive}
            target = {k: value / sum(raw.values()) for k, value in raw.items()}
        for k in alive:
            share = torch.exp(s * dot(h[i], student[k])) / partition
            total = total - target[k] * torch.log(share)
    return total / len(h)


def assert_equal_with_gradients(ours: Tensor, slow: Tensor, inputs: list[Tensor]) -> None:
    assert ours.item() == pytest.approx(slow.item(), abs=1e-9, rel=1e-9)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(slow, inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


def test_info_nce_is_the_papers_formula_with_its_gradients() -> None:
    """InfoNCE, its feature gradients and its temperature gradient equal the paper's formula."""
    image, text, s = unit(B, D, seed=1), unit(B, D, seed=2), scale(14.0)
    ours, slow = info_nce(image, text, s), slow_info_nce(image, text, s)
    assert_equal_with_gradients(ours, slow, [image, text, s])


@pytest.mark.parametrize("temperature", [None, 0.3, 0.05])
@pytest.mark.parametrize("empty", [(), (0, 4)])
def test_prototypical_loss_is_the_papers_formula_with_its_gradients(
    temperature: float | None, empty: tuple[int, ...]
) -> None:
    """Soft and hard targets, with and without empty clusters: value and gradients agree."""
    h, s = unit(B, P, seed=1), scale(9.0)
    student, teacher = unit(K, P, seed=2).detach(), 0.7 * unit(K, Q, seed=3).detach()
    for k in empty:
        student[k] = 0
    alive = [k for k in range(K) if k not in empty]
    assigned = [alive[(3 * i) % len(alive)] for i in range(B)]
    ours = prototypical_loss(h, student, teacher, torch.tensor(assigned), s, temperature)
    slow = slow_prototypical(h, student, teacher, assigned, s, temperature, alive)
    assert_equal_with_gradients(ours, slow, [h, s])


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_the_switch_restores_the_references_empty_clusters(temperature: float | None) -> None:
    """With mask_empty=False an empty cluster is a class with logit 0, as the reference has it."""
    h, s = unit(B, P, seed=1), scale(9.0)
    student, teacher = unit(K, P, seed=2).detach(), unit(K, Q, seed=3).detach()
    student[2] = 0
    assigned = [0, 1, 3, 4, 5, 6, 7]
    index = torch.tensor(assigned)
    ours = prototypical_loss(h, student, teacher, index, s, temperature, mask_empty=False)
    everything = slow_prototypical(h, student, teacher, assigned, s, temperature, list(range(K)))
    assert_equal_with_gradients(ours, everything, [h, s])
    masked = prototypical_loss(h, student, teacher, index, s, temperature)
    assert abs(ours.item() - masked.item()) > 1e-3


@pytest.mark.parametrize("temperature", [0.0, -1.0, None])
def test_a_temperature_of_zero_or_less_means_hard_targets(temperature: float | None) -> None:
    """None, 0 and negative temperatures are one and the same: hard targets."""
    h, student, teacher = unit(B, P, seed=1), unit(K, P, seed=2), unit(K, Q, seed=3)
    index = torch.arange(B)
    hard = slow_prototypical(h, student, teacher, list(range(B)), scale(5.0), None, list(range(K)))
    ours = prototypical_loss(h, student, teacher, index, 5.0, temperature)
    assert ours.item() == pytest.approx(hard.item(), rel=1e-12)


def test_soft_targets_of_a_vanishing_temperature_are_hard() -> None:
    """With unit teacher prototypes each is most similar to itself, so the softmax tends to it."""
    h, student, teacher = unit(B, P, seed=1), unit(K, P, seed=2), unit(K, Q, seed=3).detach()
    index = torch.arange(B)
    soft = prototypical_loss(h, student, teacher, index, 5.0, 1e-4)
    hard = prototypical_loss(h, student, teacher, index, 5.0, None)
    assert soft.item() == pytest.approx(hard.item(), rel=1e-9)


def embeddings(seed: int) -> Embeddings:
    return Embeddings(
        image_features=unit(B, D, seed=seed),
        text_features=unit(B, D, seed=seed + 1),
        image_projections=unit(B, P, seed=seed + 2),
        text_projections=unit(B, P, seed=seed + 3),
        logit_scale=scale(14.0),
        prototype_logit_scale=scale(9.0),
    )


def test_the_objective_is_the_weighted_sum_of_its_terms() -> None:
    """w_i InfoNCE + w_p (image + text) / 2 + w_e (image + text) / 2, by position."""
    e = embeddings(10)
    episode = 20
    names = ["image_from_text", "text_from_image", "image_from_bert", "text_from_bert"]
    targets = {
        name: PrototypeTarget(
            student_centroids=unit(K, P, seed=30 + i).detach(),
            teacher_centroids=unit(K, Q, seed=40 + i).detach(),
            assignments=torch.randint(
                0, K, (episode,), generator=torch.Generator().manual_seed(50 + i)
            ),
        )
        for i, name in enumerate(names)
    }
    position = torch.tensor([19, 3, 7, 0, 11, 4, 4])
    losses, report = objective(
        e,
        targets,
        position,
        weights=LossWeights(info_nce=2.0, prototypical=3.0, teachers={"bert": 0.5}),
        target_temperatures={"image": 0.2, "text": 0.3, "bert": 0.0},
    )
    expected = 2.0 * slow_info_nce(e.image_features, e.text_features, e.logit_scale)
    settings = {"image": (3.0, 0.2), "text": (3.0, 0.3), "bert": (0.5, None)}
    for name, target in targets.items():
        student, teacher = name.split("_from_")
        weight, temperature = settings[teacher]
        h = e.image_projections if student == "image" else e.text_projections
        assert h is not None
        expected = expected + weight / 2 * slow_prototypical(
            h,
            target.student_centroids,
            target.teacher_centroids,
            target.assignments[position].tolist(),
            e.prototype_logit_scale,
            temperature,
            list(range(K)),
        )
    total = torch.stack(list(losses.values())).sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-9)
    for name in names:
        assert 0 <= report[f"train/prototypes/accuracy/{name}"].item() <= 1


def test_a_term_of_weight_zero_is_not_computed() -> None:
    """Weight 0 leaves the term out of losses and report; no targets leave InfoNCE alone."""
    target = PrototypeTarget(
        student_centroids=unit(K, P, seed=3).detach(),
        teacher_centroids=unit(K, Q, seed=4).detach(),
        assignments=torch.zeros(B, dtype=torch.long),
    )
    settings = {"target_temperatures": {"image": 0.1, "text": 0.1}}
    losses, report = objective(
        embeddings(1),
        {"image_from_text": target},
        torch.arange(B),
        weights=LossWeights(prototypical=0.0),
        **settings,
    )
    assert list(losses) == ["info_nce"]
    assert "train/loss/prototypical/image_from_text" not in report
    losses, _ = objective(embeddings(1), None, torch.arange(B), weights=LossWeights(), **settings)
    assert list(losses) == ["info_nce"]


def test_accuracy_counts_the_nearest_prototype() -> None:
    """A projection that equals its prototype is right; one that equals another's is wrong."""
    centroids = torch.eye(3, dtype=torch.float64)
    e = Embeddings(
        image_features=centroids,
        text_features=centroids,
        image_projections=centroids,
        text_projections=centroids,
        logit_scale=scale(1.0),
        prototype_logit_scale=scale(1.0),
    )
    target = PrototypeTarget(
        student_centroids=centroids,
        teacher_centroids=centroids,
        assignments=torch.tensor([0, 2, 2]),
    )
    _, report = objective(
        e,
        {"image_from_text": target},
        torch.arange(3),
        weights=LossWeights(),
        target_temperatures={"text": 0.0},
    )
    assert report["train/prototypes/accuracy/image_from_text"].item() == pytest.approx(2 / 3)
