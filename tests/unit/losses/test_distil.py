"""Distillation from the frozen start, against the formulas in float64."""

import math

import pytest
import torch
from torch import Tensor

from protoclip.losses import tiles
from protoclip.losses.distil import StartFeatures, keep_features, keep_relations

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


def slow_features(images: Tensor, texts: Tensor, start: StartFeatures) -> float:
    pairs = [*zip(images, start.image, strict=True), *zip(texts, start.text, strict=True)]
    return sum(1 - float(own @ kept) for own, kept in pairs) / len(pairs)


@pytest.mark.parametrize(
    ("loss_of", "slow"), [(keep_relations, slow_relations), (keep_features, slow_features)]
)
def test_the_loss_is_its_formula(loss_of, slow):
    """Value and gradients; nothing at the start itself, where the gradient of relations is 0."""
    images, texts, start = batch()
    expected = slow(images.detach(), texts.detach(), start)
    assert loss_of(images, texts, start).item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda x, y: loss_of(x, y, start), (images, texts))
    images, texts = (rows.clone().requires_grad_() for rows in (start.image, start.text))
    loss = loss_of(images, texts, start)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    if loss_of is keep_relations:
        for gradient in torch.autograd.grad(loss, (images, texts)):
            assert gradient.abs().max() < 1e-12


def test_large_batches_are_computed_in_parts(monkeypatch):
    """Rows a few at a time give the loss and gradients of all at once."""
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
