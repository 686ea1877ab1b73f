"""Keeping the neighbourhoods of frozen features."""

import numpy as np
import torch
import torch.nn.functional as F

from protoclip.losses.distil import geometry_loss


def test_equals_the_divergence_of_each_row():
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
    np.testing.assert_allclose(loss.item(), total.item() / 7, rtol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_the_frozen_space_itself_costs_nothing():
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
