"""Batches in chunks have the gradients of the whole batch, whatever the loss."""

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoclip import Embeddings, Target, objective
from protoclip.losses.grad_cache import forward_in_chunks
from protoclip.losses.objective import LossWeights

B, K = 10, 6


class Model(nn.Module):
    """Two towers and two heads of a few weights, in float64."""

    def __init__(self, *, middle: nn.Module, project: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(7, 8), middle, nn.Tanh(), nn.Linear(8, 5))
        self.text = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))
        self.image_head, self.text_head = nn.Linear(5, 3), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.prototype_scale = nn.Parameter(torch.tensor(1.5))
        self.project = project
        self.double()

    def forward(self, images: Tensor, texts: Tensor) -> Embeddings:
        image, text = self.image(images), self.text(texts)
        heads = (self.image_head(image), self.text_head(text))
        projections = [F.normalize(h, dim=1) if self.project else None for h in heads]
        return Embeddings(
            image_features=F.normalize(image, dim=1),
            text_features=F.normalize(text, dim=1),
            image_projections=projections[0],
            text_projections=projections[1],
            logit_scale=self.scale.exp(),
            prototype_logit_scale=self.prototype_scale.exp(),
        )


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(B, 7, generator=generator, dtype=torch.float64),
        torch.randn(B, 4, generator=generator, dtype=torch.float64),
    )


def total(embeddings: Embeddings) -> Tensor:
    """InfoNCE, and the prototypical losses if there are projections."""
    targets = None
    if embeddings.image_projections is not None:
        generator = torch.Generator().manual_seed(2)
        classes, lookup = torch.randn(2, K, 3, generator=generator, dtype=torch.float64)
        target = Target(classes=classes, class_index=torch.arange(K), lookup=lookup)
        targets = {("image", "text"): target, ("text", "image"): target}
    assignments = {space: torch.arange(B) % K for space in ("image", "text")}
    losses, _ = objective(embeddings, targets, assignments, weights=LossWeights())
    return torch.stack(list(losses.values())).sum()


def chunks(model: Model, size: int) -> list[Callable[[], Embeddings]]:
    images, texts = data()
    parts = zip(images.split(size), texts.split(size), strict=True)
    return [lambda part=part: model(*part) for part in parts]


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def chunked(model: Model, size: int) -> Tensor:
    embeddings, backward = forward_in_chunks(chunks(model, size), buffers=model.buffers())
    loss = total(embeddings)
    loss.backward()
    backward()
    return loss.detach()


def joined(parts: list[Embeddings]) -> Embeddings:
    """The chunks' embeddings with their graphs, as one batch."""
    whole = {}
    for field in fields(Embeddings):
        values = [getattr(part, field.name) for part in parts]
        whole[field.name] = torch.cat(values) if values[0].ndim else values[0]
    return Embeddings(**whole)


@pytest.mark.parametrize("size", [1, 3, 5, 10])
@pytest.mark.parametrize("project", [True, False])
def test_the_gradients_are_those_of_the_whole_batch(size: int, project: bool) -> None:
    """Of all losses and both temperatures, also with uneven chunks."""
    once, cached = (Model(middle=nn.Identity(), project=project) for _ in range(2))
    loss = total(once(*data()))
    loss.backward()
    torch.testing.assert_close(chunked(cached, size), loss.detach(), atol=1e-9, rtol=1e-9)
    for name, right in gradients(once).items():
        mine = gradients(cached)[name]
        if right is None:
            assert mine is None, name
        else:
            assert mine is not None
            torch.testing.assert_close(mine, right, atol=1e-9, rtol=1e-9)


def test_small_batches_on_their_own_are_another_loss() -> None:
    """Chunking must not sum the gradients of each chunk's own InfoNCE."""
    once = Model(middle=nn.Identity(), project=False)
    total(once(*data())).backward()
    alone = Model(middle=nn.Identity(), project=False)
    for chunk in chunks(alone, 5):
        (total(chunk()) / 2).backward()
    right, wrong = gradients(once)["scale"], gradients(alone)["scale"]
    assert right is not None and wrong is not None  # noqa: PT018
    assert (right - wrong).abs() > 1e-2


def test_dropout_draws_the_same_twice_and_the_generator_moves_once() -> None:
    """Gradients are those of the embeddings that the loss saw; later draws do not change."""
    plain, cached = Model(middle=nn.Dropout(0.5)), Model(middle=nn.Dropout(0.5))
    torch.manual_seed(5)
    total(joined([chunk() for chunk in chunks(plain, 4)])).backward()
    after = torch.rand(3)
    torch.manual_seed(5)
    chunked(cached, 4)
    assert torch.equal(torch.rand(3), after)
    for name, right in gradients(plain).items():
        torch.testing.assert_close(gradients(cached)[name], right, atol=1e-9, rtol=1e-9)


def test_batch_norm_counts_each_chunk_once() -> None:
    """Gradients are those of chunk statistics; running statistics advance as in one pass."""
    plain, cached = Model(middle=nn.BatchNorm1d(8)), Model(middle=nn.BatchNorm1d(8))
    total(joined([chunk() for chunk in chunks(plain, 5)])).backward()
    chunked(cached, 5)
    for right, mine in zip(plain.buffers(), cached.buffers(), strict=True):
        torch.testing.assert_close(mine, right)
    for name, right in gradients(plain).items():
        torch.testing.assert_close(gradients(cached)[name], right, atol=1e-9, rtol=1e-9)


def test_a_locked_tower_stays_without_gradient() -> None:
    once, cached = Model(middle=nn.Identity()), Model(middle=nn.Identity())
    for model in (once, cached):
        model.image.requires_grad_(False)
        model.image_head.requires_grad_(False)
    total(once(*data())).backward()
    chunked(cached, 3)
    for name, right in gradients(once).items():
        assert (right is None) == name.startswith("image"), name
        if right is not None:
            torch.testing.assert_close(gradients(cached)[name], right, atol=1e-9, rtol=1e-9)


def peak_of_graph(model: Model, run: Callable[[], object]) -> int:
    """Most elements, parameters aside, that graphs saved for backward at one time."""
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    held = peak = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal held, peak
            self.tensor = tensor
            self.size = 0 if tensor.data_ptr() in parameters else tensor.numel()
            held += self.size
            peak = max(peak, held)

        def __del__(self) -> None:
            nonlocal held
            held -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        run()
    return peak


def test_the_graph_of_one_chunk_is_held_at_a_time() -> None:
    """Chunks of a fifth of the batch hold a fifth of its graph, besides that of the loss."""
    model = Model(middle=nn.Identity(), project=False)
    whole = peak_of_graph(model, lambda: total(model(*data())).backward())
    leaves, _ = forward_in_chunks(chunks(model, B), buffers=())
    loss = peak_of_graph(model, lambda: total(leaves).backward())
    fifth = peak_of_graph(model, lambda: chunked(model, B // 5))
    assert fifth == max(loss, (whole - loss) // 5)
