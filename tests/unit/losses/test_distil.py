"""Distillation from the frozen start and from teachers, against the formulas in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip.losses import tiles
from protoclip.losses.distil import StartFeatures, distil, geometry_loss, keep_pairs, keep_relations

B, D, SCALE = 7, 5, 9.0


def unit(seed: int) -> Tensor:
    rows = torch.randn(B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


def batch() -> tuple[Tensor, Tensor, StartFeatures]:
    start = StartFeatures(image=unit(2), text=unit(3), logit_scale=torch.tensor(SCALE).double())
    return unit(0).requires_grad_(), unit(1).requires_grad_(), start


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def slow_relations(images: Tensor, texts: Tensor, start: StartFeatures) -> float:
    total = 0.0
    for rows, columns, own_rows, own_columns in (
        (start.image, start.text, images, texts),
        (start.text, start.image, texts, images),
    ):
        for i in range(B):
            kept = softmax([SCALE * float(rows[i] @ columns[j]) for j in range(B)])
            own = softmax([SCALE * float(own_rows[i] @ own_columns[j]) for j in range(B)])
            total += sum(p * math.log(p / q) for p, q in zip(kept, own, strict=True))
    return total / (2 * B)


def test_the_loss_is_its_formula():
    """Value and gradients; nothing at the start itself."""
    images, texts, start = batch()
    expected = slow_relations(images.detach(), texts.detach(), start)
    assert keep_relations(images, texts, start).item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda x, y: keep_relations(x, y, start), (images, texts))
    images, texts = (rows.clone().requires_grad_() for rows in (start.image, start.text))
    loss = keep_relations(images, texts, start)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    for gradient in torch.autograd.grad(loss, (images, texts)):
        assert gradient.abs().max() < 1e-12


def slow_distil_relations(outputs: Tensor, teacher: Tensor, rows: list[int]) -> float:
    total = 0.0
    for i in rows:
        others = [j for j in rows if j != i]
        p, q = (
            softmax([float(x[i] @ x[j] / x[i].norm() / x[j].norm()) / 0.1 for j in others])
            for x in (teacher, outputs)
        )
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(rows)


def test_a_teacher_is_learned_by_the_rows_that_it_knows():
    """Value and gradients; rows of NaN have none, and with no others the loss is 0."""
    outputs = (3 * unit(0)).requires_grad_()
    teacher = torch.randn(B, D + 2, generator=torch.Generator().manual_seed(4)).double()
    teacher[[1, 4]] = torch.nan
    rows = [0, 2, 3, 5, 6]
    loss = distil(outputs, teacher)
    assert loss.item() == pytest.approx(slow_distil_relations(outputs.detach(), teacher, rows))
    assert torch.autograd.gradcheck(lambda x: distil(x, teacher), outputs)
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == rows
    loss = distil(outputs, torch.full_like(teacher, torch.nan))
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert loss.item() == 0
    assert not gradient.any()


def pairs() -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """A batch of outputs, and two teachers in one space, of which each misses a row."""
    teachers = 2 * unit(2), unit(3)
    teachers[0][1] = teachers[1][4] = torch.nan
    return (3 * unit(0)).requires_grad_(), unit(1).requires_grad_(), teachers


def test_pairs_are_learned_where_both_teachers_know_them():
    """Value and gradients, against a loop; other rows are no columns either."""
    images, texts, teachers = pairs()
    rows, total = [0, 2, 3, 5, 6], 0.0
    x, y, a, b = (
        part.detach() / part.detach().norm(dim=1)[:, None] for part in (images, texts, *teachers)
    )
    for own, others, of_teacher, of_other in ((x, y, a, b), (y, x, b, a)):
        for i in rows:
            p = softmax([20.0 * float(of_teacher[i] @ of_other[j]) for j in rows])
            q = softmax([20.0 * float(own[i] @ others[j]) for j in rows])
            total += sum(s * math.log(s / t) for s, t in zip(p, q, strict=True))
    loss = keep_pairs(images, texts, teachers)
    assert loss.item() == pytest.approx(total / (2 * len(rows)))
    assert torch.autograd.gradcheck(lambda x, y: keep_pairs(x, y, teachers), (images, texts))
    for gradient in torch.autograd.grad(loss, (images, texts)):
        assert gradient.abs().sum(1).nonzero().flatten().tolist() == rows
    nothing = torch.full_like(teachers[0], torch.nan)
    loss = keep_pairs(images, texts, (teachers[0], nothing))
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, (images, texts)))


def test_large_batches_are_computed_in_parts(monkeypatch):
    """Rows a few at a time give the loss and gradients of all at once."""
    outputs, teacher = unit(0).requires_grad_(), unit(2)
    teacher[2] = torch.nan
    whole = distil(outputs, teacher)
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "ROWS", 3)
        found = distil(outputs, teacher)
    torch.testing.assert_close(found, whole)
    rows = [torch.autograd.grad(loss, outputs)[0] for loss in (found, whole)]
    torch.testing.assert_close(*rows)
    images, texts, start = batch()
    for loss, frozen in ((keep_relations, start), (keep_pairs, pairs()[2])):
        expected = loss(images, texts, frozen)
        gradients = torch.autograd.grad(expected, (images, texts))
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "ROWS", 3)
            found = loss(images, texts, frozen)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(torch.autograd.grad(found, (images, texts)), gradients)


def test_autocast_does_not_round_similarities():
    images, texts, start = batch()
    plain = keep_relations(images.float(), texts.float(), start)
    teachers = pairs()[2]
    plain_pairs = keep_pairs(images.float(), texts.float(), teachers)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(keep_relations(images.float(), texts.float(), start), plain)
        assert torch.equal(keep_pairs(images.float(), texts.float(), teachers), plain_pairs)


def test_the_geometry_loss_is_the_divergence_of_each_row():
    """Against a loop over rows, with the gradient. Rows 1 and 2 are one sample."""
    torch.manual_seed(0)
    features = F.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1).requires_grad_()
    frozen = torch.randn(7, 9, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    unit = frozen / frozen.norm(dim=1, keepdim=True)
    for row in range(7):
        others = [n for n in range(7) if n != row and {n, row} != {1, 2}]
        p = torch.softmax(unit[others].float().double() @ unit[row] / 0.1, 0)
        q = torch.softmax(features[others] @ features[row] / 0.1, 0)
        total = total + (p * (p / q).log()).sum()
    (expected,) = torch.autograd.grad(total / 7, features)
    loss = geometry_loss(features, frozen, samples=torch.tensor([0, 1, 1, 3, 4, 5, 6]))
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.item() == pytest.approx(total.item() / 7, rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_the_geometry_of_the_frozen_space_itself_costs_nothing():
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(6, 4), dim=1)
    assert geometry_loss(rows, 3 * rows).item() < 1e-6
    assert geometry_loss(rows, torch.randn(6, 4)).item() > 0.01


def test_large_batches_are_compared_part_by_part():
    torch.manual_seed(0)
    features, frozen = F.normalize(torch.randn(7, 5), dim=1), torch.randn(7, 9)
    parts = [(slice(0, 4), 4), (slice(4, 7), 3)]
    expected = sum(number * geometry_loss(features[p], frozen[p]) for p, number in parts) / 7
    torch.testing.assert_close(geometry_loss(features, frozen, among=4), expected)
