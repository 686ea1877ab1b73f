"""Batches larger than memory: the loss of the whole batch, the model a chunk at a time.

GradCache (Gao et al. 2021, arXiv 2101.06983). InfoNCE compares all rows of a batch, so the sum over
small batches is another loss. Its gradient for the embeddings, however, needs the embeddings
alone: embed the chunks without a graph, differentiate the loss down to the embeddings, then embed
each chunk again with a graph and send its part of that gradient on. This costs one more forward
pass and holds the graph of one chunk.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from protoclip.models.protoclip import Embeddings

RandomState = tuple[Tensor, Tensor | None]


def forward_in_chunks(
    chunks: Sequence[Callable[[], Embeddings]],
    *,
    buffers: Iterable[Tensor],
    no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[Embeddings, Callable[[], None]]:
    """Embeddings of a batch that does not fit, and the second half of its backward pass.

        embeddings, backward = forward_in_chunks(chunks, buffers=model.buffers())
        loss(embeddings).backward()  # down to the embeddings
        backward()  # from there to the parameters

    The gradients equal those of one pass over the whole batch, for any loss of the embeddings, with
    dropout too: each chunk meets the same random state twice. BatchNorm in training mode makes them
    differ: it normalises by the statistics of a chunk instead of the batch, as it does in each
    process of distributed training.

    Args:
        chunks: Each embeds its part of the batch under the autocast it should have.
        buffers: What a forward pass advances, such as BatchNorm's running statistics; put back at
            the end of the second pass, so that each chunk counts once.
        no_sync: Makes the context of all chunks but the last, whose gradients are to be exchanged
            between processes (DDP's `no_sync`).

    Returns:
        The embeddings of all chunks in order, cut off from the model; and the function that adds
        the parameters' gradients, to be called once.
    """
    states, parts = [], []
    for chunk in chunks:
        states.append(random_state())
        with torch.no_grad():
            parts.append(chunk())
    kept = [(buffer, buffer.clone()) for buffer in buffers]
    whole: dict[str, Any] = {
        field.name: join([getattr(p, field.name) for p in parts]) for field in fields(parts[0])
    }

    def backward() -> None:
        sizes = [len(part.image_features) for part in parts]
        gradients = {
            name: part_by_part(leaf.grad, sizes)
            for name, leaf in whole.items()
            if leaf is not None and leaf.grad is not None
        }
        for number, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
            last = number == len(chunks) - 1
            with nullcontext() if last else no_sync():
                with repeated(state):
                    part = chunk()
                trained = [name for name in gradients if getattr(part, name).requires_grad]
                torch.autograd.backward(
                    [getattr(part, name) for name in trained],
                    [gradients[name][number] for name in trained],
                )
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)

    return Embeddings(**whole), backward


def join(values: list[Tensor | None]) -> Tensor | None:
    """One field of all chunks as a leaf that collects a gradient; a scale is the same in each."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    whole = torch.cat(present) if present[0].ndim else present[0].clone()
    return whole.requires_grad_()


def part_by_part(gradient: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """Each chunk's part of a gradient; that of a scale goes through the first chunk.

    The other chunks send zero through the scale, so that every backward pass reaches the same
    parameters, as distributed training expects.
    """
    if gradient.ndim:
        return torch.split(gradient, sizes)
    return [gradient, *[torch.zeros_like(gradient)] * (len(sizes) - 1)]


def random_state() -> RandomState:
    """State of the generators that dropout draws from: the CPU's, and the current GPU's in use."""
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpu = torch.cuda.get_rng_state() if in_use else None
    return torch.get_rng_state(), gpu


@contextmanager
def repeated(state: RandomState) -> Iterator[None]:
    """Draw once more from a given state, and leave the present one as it is."""
    cpu, gpu = state
    with torch.random.fork_rng(devices=[] if gpu is None else [torch.cuda.current_device()]):
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)
        yield
