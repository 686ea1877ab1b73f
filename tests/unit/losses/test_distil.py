"""Distillation from the frozen start and from teachers, against the formulas in float64."""

import math

import pytest
import torch
from torch import Tensor

from protoclip.losses import tiles
from protoclip.losses.distil import StartFeatures, distil, keep_relations

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


def slow_distil_relations(outputs: Tensor, teacher: Tensor, known: list[int]) -> float:
    total = 0.0
    for i in known:
        others = [j for j in known if j != i]
        p, q = (
            softmax([float(x[i] @ x[j] / x[i].norm() / x[j].norm()) / 0.1 for j in others])
            for x in (teacher, outputs)
        )
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(known)


def test_a_teacher_is_learned_by_the_rows_that_it_knows():
    """Value and gradients; rows of NaN have none, and with no others the loss is 0."""
    outputs = (3 * unit(0)).requires_grad_()
    teacher = torch.randn(B, D + 2, generator=torch.Generator().manual_seed(4)).double()
    teacher[[1, 4]] = torch.nan
    known = [0, 2, 3, 5, 6]
    loss = distil(outputs, teacher)
    assert loss.item() == pytest.approx(slow_distil_relations(outputs.detach(), teacher, known))
    assert torch.autograd.gradcheck(lambda x: distil(x, teacher), outputs)
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == known
    loss = distil(outputs, torch.full_like(teacher, torch.nan))
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert loss.item() == 0
    assert not gradient.any()


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
    expected = keep_relations(images, texts, start)
    gradients = torch.autograd.grad(expected, (images, texts))
    monkeypatch.setattr(tiles, "ROWS", 3)
    found = keep_relations(images, texts, start)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (images, texts)), gradients)


def test_autocast_does_not_round_similarities():
    images, texts, start = batch()
    plain = keep_relations(images.float(), texts.float(), start)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(keep_relations(images.float(), texts.float(), start), plain)
