"""Batches in chunks have the gradients of the whole batch, whatever the loss."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoclip import Embeddings, Target, objective
from protoclip.losses.grad_cache import (
    forward_in_chunks,
    number_of_chunks,
    random_state,
    repeated,
    set_random_state,
)
from protoclip.losses.objective import LossWeights

B, K = 10, 6


class Model(nn.Module):
    """Two towers, and two heads with BatchNorm, of a few weights, in float64."""

    def __init__(self, *, middle: nn.Module, project: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(7, 8), middle, nn.Tanh(), nn.Linear(8, 5))
        self.text = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))
        self.image_head = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))
        self.text_head = copy.deepcopy(self.image_head)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.prototype_scale = nn.Parameter(torch.tensor(1.5))
        self.bias = nn.Parameter(torch.tensor(-3.0))
        self.project = project
        self.double()

    def towers(self) -> tuple[nn.Module, nn.Module]:
        return self.image, self.text

    def encode(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(images), self.text(texts)

    def embeddings(self, image: Tensor, text: Tensor) -> Embeddings:
        heads = (self.image_head(image), self.text_head(text))
        projections = [F.normalize(h, dim=1) if self.project else None for h in heads]
        return Embeddings(
            image_features=F.normalize(image, dim=1),
            text_features=F.normalize(text, dim=1),
            image_projections=projections[0],
            text_projections=projections[1],
            logit_scale=self.scale.exp(),
            prototype_logit_scale=self.prototype_scale.exp(),
            logit_bias=self.bias.clone(),
        )


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(B, 7, generator=generator, dtype=torch.float64),
        torch.randn(B, 4, generator=generator, dtype=torch.float64),
    )


def total(embeddings: Embeddings) -> Tensor:
    """InfoNCE, the sigmoid loss, and the prototypical losses if there are projections."""
    targets = None
    if embeddings.image_projections is not None:
        generator = torch.Generator().manual_seed(2)
        classes, lookup = torch.randn(2, K, 3, generator=generator, dtype=torch.float64)
        target = Target(classes=classes, class_index=torch.arange(K), lookup=lookup)
        targets = {("image", "text"): target, ("text", "image"): target}
    assignments = {space: torch.arange(B) % K for space in ("image", "text")}
    losses, _ = objective(embeddings, targets, assignments, weights=LossWeights(sigmoid=2.0))
    return torch.stack(list(losses.values())).sum()


def chunks(model: Model, size: int) -> list[Callable[[], tuple[Tensor, Tensor]]]:
    images, texts = data()
    parts = zip(images.split(size), texts.split(size), strict=True)
    return [partial(model.encode, *part) for part in parts]


def assert_equal_gradients(once: Model, cached: Model) -> None:
    for (name, right), mine in zip(once.named_parameters(), cached.parameters(), strict=True):
        assert (right.grad is None) == (mine.grad is None), name
        if right.grad is not None:
            torch.testing.assert_close(mine.grad, right.grad, atol=1e-9, rtol=1e-9)


def chunked(model: Model, size: int) -> Tensor:
    trains = [any(p.requires_grad for p in tower.parameters()) for tower in model.towers()]
    buffers = [buffer for tower in model.towers() for buffer in tower.buffers()]
    outputs, backward = forward_in_chunks(chunks(model, size), trains=trains, buffers=buffers)
    assert [output.requires_grad for output in outputs] == trains
    loss = total(model.embeddings(*outputs))
    loss.backward()
    backward()
    return loss.detach()


def in_parts(model: Model, size: int) -> None:
    """Backward through the chunks' outputs with their graphs, as one batch."""
    outputs = zip(*(chunk() for chunk in chunks(model, size)), strict=True)
    total(model.embeddings(*map(torch.cat, outputs))).backward()


@pytest.mark.parametrize("size", [1, 3, 10])
@pytest.mark.parametrize("kind", ["projected", "features", "locked", "both locked"])
def test_the_gradients_are_those_of_the_whole_batch(size, kind):
    """Of all losses and temperatures, with uneven chunks; a locked tower stays without gradient.

    The heads normalise over the whole batch, once.
    """
    once, cached = (Model(middle=nn.Identity(), project=kind != "features") for _ in range(2))
    for model in (once, cached):
        model.image.requires_grad_("locked" not in kind)
        model.image_head.requires_grad_(kind != "locked")
        model.text.requires_grad_(kind != "both locked")
    loss = total(once.embeddings(*once.encode(*data())))
    loss.backward()
    torch.testing.assert_close(chunked(cached, size), loss.detach(), atol=1e-9, rtol=1e-9)
    assert_equal_gradients(once, cached)
    for right, mine in zip(once.buffers(), cached.buffers(), strict=True):
        torch.testing.assert_close(mine, right, atol=1e-9, rtol=1e-9)


def test_apples_gpu_draws_again_what_it_drew(monkeypatch):
    """As the other devices do; here a generator of the CPU takes its place."""
    gpu = torch.Generator().manual_seed(3)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", gpu.get_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", gpu.set_state)

    def draw() -> list[float]:
        return torch.rand(2, generator=gpu).tolist()

    state, first, present = random_state(), draw(), gpu.get_state()
    with repeated(state):
        assert draw() == first
    assert torch.equal(gpu.get_state(), present)
    set_random_state(state)
    assert draw() == first
    set_random_state(state[:2])  # of a checkpoint of an earlier version
    assert draw() != first


@pytest.mark.parametrize("middle", [nn.Dropout(0.5), nn.BatchNorm1d(8)], ids=["dropout", "norm"])
def test_random_numbers_and_statistics_advance_once(middle):
    """Gradients are those of the embeddings that the loss saw, with the statistics of chunks."""
    plain, cached = (Model(middle=copy.deepcopy(middle)) for _ in range(2))
    draws = []
    for model, passes in ((plain, in_parts), (cached, chunked)):
        torch.manual_seed(5)
        passes(model, 4)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)
    for right, mine in zip(plain.buffers(), cached.buffers(), strict=True):
        torch.testing.assert_close(mine, right)
    assert_equal_gradients(plain, cached)


def test_no_chunk_has_one_row():
    """BatchNorm cannot train on it; a batch is divided nearly as fine then."""
    for rows in range(2, 40):
        for size in range(2, 40):
            chunks = torch.arange(rows).tensor_split(number_of_chunks(rows, size))
            assert min(map(len, chunks)) > 1
            assert max(map(len, chunks)) <= max(size, 3)
    assert number_of_chunks(15, 1) == 15  # as asked


def test_the_graph_of_one_chunk_is_held_at_a_time():
    model, earlier = Model(middle=nn.Identity()), []

    def noted(chunk: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        for output in earlier:
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                output.sum().backward()
        outputs = chunk()
        if torch.is_grad_enabled():
            earlier.append(outputs[0])
        return outputs

    parts = [partial(noted, chunk) for chunk in chunks(model, 2)]
    outputs, backward = forward_in_chunks(parts, trains=(True, True), buffers=())
    total(model.embeddings(*outputs)).backward()
    assert not earlier
    backward()
    assert len(earlier) == 5
