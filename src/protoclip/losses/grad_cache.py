"""Batches larger than memory: the loss of the whole batch, with the towers run on chunks of it.

GradCache (Gao et al. 2021, arXiv 2101.06983): pass all chunks through the towers without a graph,
differentiate heads and losses of the whole batch down to the towers' outputs, then pass each chunk
again with a graph, and pass on its part of that gradient. This costs one more forward pass of the
towers and holds the graph of one chunk.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]  # of the towers, a row for each image or text
RandomState = Sequence[Tensor | None]  # by device, None of one that is not in use


def number_of_chunks(rows: int, size: int) -> int:
    """Into how many chunks of nearly equal sizes a batch is divided, at most `size` rows each.

    BatchNorm cannot train on one row. Rather than one of these, chunks of two have three.
    """
    number = math.ceil(rows / size)
    return number if size == 1 or rows // number > 1 else max(1, rows // 2)


def forward_in_chunks(
    chunks: Sequence[Callable[[], Outputs]],
    *,
    trains: Sequence[bool],
    buffers: Iterable[Tensor],
    no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[Outputs, Callable[[], None]]:
    """The towers' outputs for a batch, chunk by chunk, and the second half of its backward pass.

        outputs, backward = forward_in_chunks(chunks, trains=trains, buffers=towers.buffers())
        loss(outputs).backward()  # down to the outputs
        backward()  # from there to the parameters of the towers, once

    Gradients equal those of one pass over the whole batch, for any loss and with dropout: both
    passes of a chunk use the same random state. Only a tower's BatchNorm in training mode
    normalises by the statistics of a chunk, as it does by those of a rank in distributed training.

    Args:
        chunks: Each passes its part of the batch through the towers, under any autocast.
        trains: Whether each output gets a gradient.
        buffers: Buffers that a forward pass changes, such as BatchNorm's running statistics. They
            are restored after the second pass, so that each chunk counts once.
        no_sync: Makes the context of all chunks but the last, which averages gradients over ranks.
    """
    states, parts = [], []
    for chunk in chunks:
        states.append(random_state())
        with torch.no_grad():
            parts.append(chunk())
    buffers_before = [(buffer, buffer.clone()) for buffer in buffers]
    whole = tuple(
        torch.cat(outputs).requires_grad_(train)
        for outputs, train in zip(zip(*parts, strict=True), trains, strict=True)
    )

    def backward() -> None:
        feature_gradients = [
            torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in whole
        ]
        sizes = [[len(part) for part in outputs] for outputs in zip(*parts, strict=True)]
        gradients = zip(*map(torch.split, feature_gradients, sizes), strict=True)
        for number, of_chunk in enumerate(gradients):
            with no_sync() if number < len(chunks) - 1 else nullcontext():
                with repeated(states[number]):
                    part = chunks[number]()
                trained = [index for index, output in enumerate(part) if output.requires_grad]
                if trained:
                    torch.autograd.backward(
                        [part[index] for index in trained], [of_chunk[index] for index in trained]
                    )
        with torch.no_grad():
            for buffer, value in buffers_before:
                buffer.copy_(value)

    return whole, backward


def generators() -> tuple[Any, ...]:
    """The modules with the generators of CPU, CUDA and Apple's GPU; None for one not in use."""
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    mps = torch.backends.mps.is_available()
    return torch, torch.cuda if cuda else None, torch.mps if mps else None


def random_state() -> RandomState:
    """State of the generators of dropout, in the order of `generators`."""
    return tuple(None if module is None else module.get_rng_state() for module in generators())


def set_random_state(states: RandomState) -> None:
    """Let the generators of devices in use go on from such states."""
    for module, state in zip(generators(), states, strict=False):
        if module is not None and state is not None:
            module.set_rng_state(state.cpu())


@contextmanager
def repeated(states: RandomState) -> Iterator[None]:
    """Draw from this random state again, and then go on from the present one."""
    present = random_state()
    set_random_state(states)
    try:
        yield
    finally:
        set_random_state(present)
