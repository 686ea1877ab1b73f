"""Batches larger than memory: the loss of the whole batch, with the model run on chunks of it.

GradCache (Gao et al. 2021, arXiv 2101.06983): embed all chunks without a graph, differentiate the
loss of the whole batch down to the embeddings, then embed each chunk again with a graph and pass on
its part of that gradient. This costs one more forward pass and holds the graph of one chunk.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from protoclip.models.protoclip import Embeddings


def forward_in_chunks(
    chunks: Sequence[Callable[[], Embeddings]],
    *,
    buffers: Iterable[Tensor],
    no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[Embeddings, Callable[[], None]]:
    """Embed a batch chunk by chunk; also return the second half of its backward pass.

        embeddings, backward = forward_in_chunks(chunks, buffers=model.buffers())
        loss(embeddings).backward()  # down to the embeddings
        backward()  # from there to the parameters, once

    Gradients equal those of one pass over the whole batch, for any loss and with dropout: both
    passes of a chunk use the same random state. Only BatchNorm in training mode normalises by the
    statistics of a chunk, as it does by those of a rank in distributed training.

    Args:
        chunks: Each embeds its part of the batch, under autocast if it is to be used.
        buffers: Buffers that a forward pass changes, such as BatchNorm's running statistics. They
            are restored after the second pass, so that each chunk counts once.
        no_sync: Makes the context of all chunks but the last, which averages gradients over ranks.
    """
    states, parts = [], []
    for chunk in chunks:
        states.append(random_state())
        with torch.no_grad():
            parts.append(chunk())
    kept = [(buffer, buffer.clone()) for buffer in buffers]
    whole: dict[str, Any] = {
        name: join([getattr(part, name) for part in parts]) for name in vars(parts[0])
    }

    def backward() -> None:
        sizes = [len(part.image_features) for part in parts]
        gradients = {
            name: split(leaf.grad, sizes)
            for name, leaf in whole.items()
            if leaf is not None and leaf.grad is not None
        }
        for number, chunk in enumerate(chunks):
            with no_sync() if number < len(chunks) - 1 else nullcontext():
                with repeated(*states[number]):
                    part = chunk()
                trained = [name for name in gradients if getattr(part, name).requires_grad]
                given = [gradients[name][number] for name in trained]
                torch.autograd.backward([getattr(part, name) for name in trained], given)
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)

    return Embeddings(**whole), backward


def join(values: list[Tensor | None]) -> Tensor | None:
    """One field of all chunks, as a leaf that collects a gradient; a scale is equal in all."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    whole = torch.cat(present) if present[0].ndim else present[0].clone()
    return whole.requires_grad_()


def split(gradient: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """The part of a gradient that belongs to each chunk. A scale's goes to the first chunk.

    The other chunks get zero, so that every backward pass reaches the same parameters.
    """
    if gradient.ndim:
        return torch.split(gradient, sizes)
    return [gradient, *[torch.zeros_like(gradient)] * (len(sizes) - 1)]


def random_state() -> tuple[Tensor, Tensor | None]:
    """State of the generators of dropout: the CPU's and, if in use, the current GPU's."""
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), torch.cuda.get_rng_state() if in_use else None


@contextmanager
def repeated(cpu: Tensor, gpu: Tensor | None) -> Iterator[None]:
    """Draw from this random state again, and then go on from the present one."""
    with torch.random.fork_rng(devices=[] if gpu is None else [torch.cuda.current_device()]):
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)
        yield
