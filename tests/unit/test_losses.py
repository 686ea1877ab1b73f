"""Losses against independent restatements of the paper's formulas, in float64."""

import math

import pytest
import torch
from torch import Tensor

from protoclip import (
    Embeddings,
    PrototypeTarget,
    info_nce,
    objective,
    prototypical_loss,
)
from protoclip.losses import info_nce as instance
from protoclip.losses import prototypical, tiles
from protoclip.losses.objective import LossWeights
from protoclip.losses.prototypical import prepare_targets

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


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of three rows and two classes, so that a few rows need many, the last ones smaller."""
    monkeypatch.setattr(tiles, "ROWS", 3)
    monkeypatch.setattr(tiles, "CPU_SCORES", 6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("tiled_above", [0, 10**6])
def test_info_nce_is_the_papers_formula_with_its_gradients(
    tiled_above: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain or in tiles, value, feature gradients and temperature gradient are the paper's."""
    monkeypatch.setattr(instance, "TILED_ABOVE", tiled_above)
    image, text, s = unit(B, D, seed=1), unit(B, D, seed=2), scale(14.0)
    ours, slow = info_nce(image, text, s), slow_info_nce(image, text, s)
    assert_equal_with_gradients(ours, slow, [image, text, s])


@pytest.mark.usefixtures("small_tiles")
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


def target(student: Tensor, teacher: Tensor) -> PrototypeTarget:
    """A target whose own assignments, those of its episode, play no part here."""
    return PrototypeTarget(
        student_centroids=student.detach(),
        teacher_centroids=teacher.detach(),
        assignments=torch.zeros(50, dtype=torch.long),
    )


def test_the_objective_is_the_weighted_sum_of_its_terms() -> None:
    """w_i InfoNCE + w_p (image + text) / 2 + w_e (image + text) / 2."""
    e = embeddings(10)
    names = ["image_from_text", "text_from_image", "image_from_bert", "text_from_bert"]
    targets = {
        name: target(unit(K, P, seed=30 + i), unit(K, Q, seed=40 + i))
        for i, name in enumerate(names)
    }
    assignments = {"image": [8, 1, 1, 0, 4, 5, 6], "text": [0, 0, 7, 3, 2, 8, 8]}
    assignments["bert"] = [3, 1, 4, 1, 5, 2, 6]
    losses, report = objective(
        e,
        prepare_targets(targets, target_temperatures={"image": 0.2, "text": 0.3, "bert": 0.0}),
        {space: torch.tensor(rows) for space, rows in assignments.items()},
        weights=LossWeights(info_nce=2.0, prototypical=3.0, teachers={"bert": 0.5}),
        detailed=True,
    )
    expected = 2.0 * slow_info_nce(e.image_features, e.text_features, e.logit_scale)
    settings = {"image": (3.0, 0.2), "text": (3.0, 0.3), "bert": (0.5, None)}
    for name, one in targets.items():
        student, teacher = name.split("_from_")
        weight, temperature = settings[teacher]
        h = e.image_projections if student == "image" else e.text_projections
        assert h is not None
        expected = expected + weight / 2 * slow_prototypical(
            h,
            one.student_centroids,
            one.teacher_centroids,
            assignments[teacher],
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
    losses, report = objective(
        embeddings(1),
        prepare_targets(
            {"image_from_text": target(unit(K, P, seed=3), unit(K, Q, seed=4))},
            target_temperatures={"text": 0.1},
        ),
        {"text": torch.arange(B)},
        weights=LossWeights(prototypical=0.0),
    )
    assert list(losses) == ["info_nce"]
    assert "train/loss/prototypical/image_from_text" not in report
    losses, _ = objective(embeddings(1), None, {}, weights=LossWeights())
    assert list(losses) == ["info_nce"]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mask_empty", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_a_prepared_target_gives_the_loss_of_any_assignments(
    mask_empty: bool, temperature: float
) -> None:
    """Prepared once, for all batches; rows without prototype, or with an empty one, stay out."""
    h, s = unit(B, P, seed=1), scale(9.0)
    student, teacher = unit(K, P, seed=2).detach(), unit(K, Q, seed=3).detach()
    student[3] = 0
    alive = [k for k in range(K) if k != 3 or not mask_empty]
    prepared = prepare_targets(
        {"image_from_text": target(student, teacher)},
        target_temperatures={"text": temperature},
        mask_empty=mask_empty,
    )["image_from_text"]
    for assignments in ([0, 1, 2, 4, 5, 6, 7], [8, 8, 7, 7, 6, 6, 0], [-1, 8, 3, -1, 0, 2, 3]):
        rows = [i for i, a in enumerate(assignments) if a in alive]
        index = torch.tensor(assignments)
        for ours in (
            prepared.loss(h, index, s),
            prototypical_loss(h, student, teacher, index, s, temperature, mask_empty=mask_empty),
        ):
            own = [assignments[i] for i in rows]
            slow = slow_prototypical(h[rows], student, teacher, own, s, temperature or None, alive)
            assert_equal_with_gradients(ours, slow, [h, s])


def test_a_batch_that_a_teacher_knows_nothing_of_has_no_loss() -> None:
    """The loss is 0 and its gradient too, so that the step can be taken all the same."""
    h, s = unit(B, P, seed=1), scale(9.0)
    nothing = torch.full((B,), -1)
    loss = prototypical_loss(h, unit(K, P, seed=2), unit(K, Q, seed=3), nothing, s, 0.1)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, [h, s]):
        assert not gradient.any()


@pytest.mark.parametrize("chunk_elements", [1, 10**6])
def test_accuracy_counts_the_nearest_prototype_where_it_is_asked_for(
    chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rows with a prototype, a projection that equals its own is right, another's wrong."""
    monkeypatch.setattr(prototypical, "CHUNK_ELEMENTS", chunk_elements)
    rows = torch.eye(4, P, dtype=torch.float64)
    e = Embeddings(
        image_features=rows,
        text_features=rows,
        image_projections=rows,
        text_projections=None,
        logit_scale=scale(1.0),
        prototype_logit_scale=scale(1.0),
    )
    name = "train/prototypes/accuracy/image_from_text"
    for detailed in (True, False):
        _, report = objective(
            e,
            prepare_targets(
                {"image_from_text": target(rows, rows)},
                target_temperatures={"text": 0.0},
            ),
            {"text": torch.tensor([0, 2, 2, -1])},
            weights=LossWeights(info_nce=0.0),
            detailed=detailed,
        )
        assert (name in report) == detailed
        if detailed:
            assert report[name].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize(("mask_empty", "right"), [(True, 1.0), (False, 0.0)])
def test_an_empty_prototype_is_nobodys_nearest(mask_empty: bool, right: float) -> None:
    """A row is right if its own prototype wins among those that are not empty."""
    centroids = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [0.0, -1.0]])
    prepared = prepare_targets(
        {"image_from_text": target(centroids, centroids)},
        target_temperatures={"text": 0.0},
        mask_empty=mask_empty,
    )["image_from_text"]
    projections = torch.tensor([[1.0, 0.1], [0.1, 1.0]])
    assert prepared.accuracy(projections, torch.tensor([2, 1])).item() == right
