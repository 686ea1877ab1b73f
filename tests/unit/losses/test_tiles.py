"""Tiled losses: exact, small in memory, and independent of private entry points."""

import math
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from protoclip import KMeans, info_nce, prototypical_loss, sigmoid_loss
from protoclip.losses import info_nce as instance
from protoclip.losses import tiles
from protoclip.losses.prototypical import make_targets


def unit(*shape: int, seed: int) -> Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows / rows.norm(dim=-1, keepdim=True)


@pytest.fixture(params=["oneDNN", "plain"])
def products(request, monkeypatch):
    """Matrix products by oneDNN's private entry point, then without it."""
    if request.param == "plain":
        monkeypatch.setattr(tiles, "onednn_linear", lambda: None)
    elif tiles.onednn_linear() is None:
        pytest.skip("this torch has no oneDNN entry point")


@pytest.fixture(params=[512, 32], ids=["one tile", "many tiles"])
def tile_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "ROWS", request.param)
    monkeypatch.setattr(tiles, "CPU_SCORES", request.param**2 * 2)


def assert_precise(ours: Callable, plain: Callable, *inputs: Tensor) -> None:
    """Value and gradients in float32 against float64."""
    results = []
    for loss, dtype in ((ours, torch.float32), (plain, torch.float64)):
        leaves = [value.to(dtype, copy=True).requires_grad_() for value in inputs]
        value = loss(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    torch.testing.assert_close(results[0][0].double(), results[1][0], rtol=1e-5, atol=0)
    for mine, right in zip(*results, strict=True):
        # By norm, since components may cancel; the scale's is a sum that may cancel as a whole.
        assert (mine.double() - right).norm() <= 1e-5 * right.norm() + 1e-7


@pytest.mark.usefixtures("products", "tile_size")
@pytest.mark.parametrize("scale", [14.0, 100.0])
@pytest.mark.parametrize("temperature", [None, 0.1, 0.01])
def test_the_prototypical_loss_keeps_its_precision_in_float32(scale, temperature):
    """Value and gradients, with soft and hard targets, for flat and peaked softmaxes."""
    student, teacher = unit(333, 24, seed=1), unit(333, 40, seed=2)
    student[:7] = 0
    assignments = torch.randint(7, 333, (77,), generator=torch.Generator().manual_seed(3))
    noisy = student[assignments] + 2 * unit(77, 24, seed=4)
    projections = noisy / noisy.norm(dim=1, keepdim=True)

    def plain(h: Tensor, s: Tensor) -> Tensor:
        alive = (student != 0).any(1)
        log_shares = (s * h @ student[alive].T).log_softmax(1)
        if temperature is None:
            choice = torch.nn.functional.one_hot(assignments, 333)[:, alive].double()
        else:
            choice = (teacher[assignments] @ teacher[alive].T / temperature).softmax(1)
        return -(choice * log_shares).sum(1).mean()

    def ours(h: Tensor, s: Tensor) -> Tensor:
        return prototypical_loss(h, student.float(), teacher.float(), assignments, s, temperature)

    assert_precise(ours, plain, projections, torch.tensor(scale))


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_no_matrix_of_rows_times_classes_exists(monkeypatch):
    """Forward, backward and in `make_targets`, no tensor is larger than the inputs or a tile."""
    monkeypatch.setattr(tiles, "ROWS", 8)
    monkeypatch.setattr(tiles, "CPU_SCORES", 16 * 25)
    monkeypatch.setattr(instance, "TILED_ABOVE", 0)
    b, k, p = 120, 400, 4
    centroids = unit(k, p, seed=1).float()
    centroids[0] = 0
    h, text = (unit(b, p, seed=seed).float().requires_grad_() for seed in (2, 3))
    s = torch.tensor(10.0, requires_grad=True)
    with Largest() as grouped:
        assignments = torch.arange(b) + 1
        prototypical_loss(h, centroids, centroids, assignments, s, 0.1).backward()
        found = KMeans(centroids=centroids, assignments=assignments, inertia=0.0, history=())
        rows = {"image_projections": h.detach(), "text_projections": h.detach()}
        make_targets({"text": found}, **rows, target_temperatures={"text": 0.1})
    assert grouped.elements == k * p
    with Largest() as paired:
        info_nce(h, text, s).backward()
    assert paired.elements == b * p
    with Largest() as classified:
        sigmoid_loss(h, text, s, -10.0).backward()
    assert classified.elements == 2 * b * p  # texts and their gradient, in one tensor
    groups = torch.arange(2 * b).view(b, 2) // 6
    for way in ("masked", "shared"):
        with Largest() as matched:
            info_nce(h, text, s, groups, positives=way).backward()
            sigmoid_loss(h, text, s, -10.0, groups, positives=way).backward()
        assert matched.elements == 2 * b * p


def plain_info_nce(image, text, scale):
    logits = scale * image @ text.T
    return -(logits.log_softmax(0) + logits.log_softmax(1)).diagonal().mean() / 2


def plain_sigmoid(image, text, scale):
    truth = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -(truth * (scale * image @ text.T - 13)).sigmoid().log().sum() / len(image)


# The captions and images of 131 pairs.
GROUPS = torch.stack([torch.arange(131) // 5, torch.arange(131) % 64], dim=1)
SAME = (GROUPS[:, None] == GROUPS).any(2)


def plain_shared(image, text, scale):
    logits, share = scale * image @ text.T, SAME / SAME.sum(1, keepdim=True)
    return -(share * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(1).mean() / 2


def plain_masked(image, text, scale):
    logits = (scale * image @ text.T).masked_fill(SAME ^ torch.eye(131).bool(), -math.inf)
    return -(logits.log_softmax(0) + logits.log_softmax(1)).diagonal().mean() / 2


def weighted(log_sum_exp):
    """A loss of the log-sum-exps, in which each query has a weight of its own."""
    return lambda q, k, s: (torch.linspace(-1, 2, len(q)).to(q) * log_sum_exp(s * q, k)).sum()


@pytest.mark.usefixtures("products", "tile_size")
@pytest.mark.parametrize("scale", [5.0, 100.0])
@pytest.mark.parametrize(
    ("tiled", "plain"),
    [
        (info_nce, plain_info_nce),
        (lambda *pairs: info_nce(*pairs, GROUPS), plain_shared),
        (lambda *pairs: info_nce(*pairs, GROUPS, positives="masked"), plain_masked),
        (lambda image, text, scale: sigmoid_loss(image, text, scale, -13.0), plain_sigmoid),
        (weighted(tiles.log_sum_exp), weighted(lambda q, k: (q @ k.T).logsumexp(1))),
    ],
    ids=["InfoNCE", "shared", "masked", "sigmoid", "log-sum-exp"],
)
def test_tiled_losses_keep_their_precision_in_float32(tiled, plain, scale, monkeypatch):
    """Value and gradients for rows, columns and scale against float64, flat and peaked."""
    monkeypatch.setattr(instance, "TILED_ABOVE", 0)
    text = unit(131, 20, seed=1)
    image = text + 2 * unit(131, 20, seed=2)
    image = image / image.norm(dim=1, keepdim=True)
    assert_precise(tiled, plain, image, text, torch.tensor(scale))


def test_exponentials_are_no_denormals_and_lose_nothing():
    """However small a share, its exponential is a normal number, and sums stay what they are."""
    torch.set_flush_denormal(False)
    exponents = torch.linspace(-300, 0, 10_000)
    shares = tiles.exponential(exponents.clone())
    assert exponents.exp()[exponents.exp() > 0].min() < torch.finfo(torch.float32).tiny
    assert shares.min() > 1e6 * torch.finfo(torch.float32).tiny
    assert shares.double().sum().item() == pytest.approx(exponents.double().exp().sum().item())


@pytest.mark.parametrize("rows", [12, 1100], ids=["plain", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_inside_autocast_are_those_outside(rows, dtype):
    """Forward and backward, in float32 for features of float32 and of bfloat16."""
    assert 12**2 < instance.TILED_ABOVE < 1100**2
    centroids, text = unit(30, 8, seed=1).float(), unit(rows, 8, seed=2).to(dtype)
    results, sharded = [], partial(info_nce, across_ranks=True)
    for enabled in (False, True):
        h = unit(rows, 8, seed=3).to(dtype).float().requires_grad_()
        given, other = (h.to(dtype), text) if enabled else (h, text.float())
        s = torch.tensor(50.0, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            index = torch.arange(rows) % 30
            losses = [
                prototypical_loss(given, centroids, centroids, index, s, 0.1),
                info_nce(given, other, s),
                info_nce(given, other, s, across_ranks=True),
                sigmoid_loss(given, other, s, -10.0),
                *(
                    loss(given, other, s, *bias, index, positives=way)
                    for loss, *bias in ((info_nce,), (sharded,), (sigmoid_loss, -10.0))
                    for way in ("masked", "shared")
                ),
            ]
            sum(losses).backward()
        assert all(loss.dtype == torch.float32 for loss in losses)
        results.append((*losses, s.grad, h.grad))
    for outside, inside in zip(*results, strict=True):
        # Features of bfloat16 have gradients of bfloat16, each of a loss rounded on its own.
        own = outside is results[0][-1] and dtype == torch.bfloat16
        assert (inside - outside).norm() < (2**-7 if own else 1e-5) * outside.norm()


@pytest.mark.parametrize("entries", [{}, {"_linear_pointwise": lambda x, w, *rest: x @ w.T + 1}])
def test_an_entry_point_that_changed_is_not_used(entries, monkeypatch):
    """If oneDNN's private entry point is gone or changed, torch's own product runs."""
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**entries))
    monkeypatch.setattr(tiles, "onednn_linear", cache(tiles.onednn_linear.__wrapped__))
    assert tiles.onednn_linear() is None
    x = torch.arange(12.0).view(3, 4)
    assert torch.equal(tiles.scores(x, x), x @ x.T)
