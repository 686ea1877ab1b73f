"""How an evaluation is shared out over processes; on one process nothing is.

All functions here are collective: every process calls them in the same order.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.distributed import RaisedElsewhere, gathered, objects_of_all, rank, world_size

Result = TypeVar("Result")


def results_of_all(work: Callable[[], Result]) -> list[Result]:
    """Do this process's share of some work; the small results of all, in the order of ranks.

    An error in one process is raised in all of them, which would otherwise wait for that one.

    Raises:
        Exception: What `work` raised in the lowest rank where it did, in that rank.
        RaisedElsewhere, MemoryError, RuntimeError: In the others, with its message: the first for
            a ValueError or OSError, which are a user's to mend, and else what is most like it.
    """
    failure: Exception | None = None
    result: Result | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    answers = objects_of_all((None if failure is None else sendable(failure), result))
    for teller, (sent, _) in enumerate(answers):
        if sent is not None:
            if failure is not None and teller == rank():
                raise failure
            kind, message = sent
            raise kind(message)
    return [found for _, found in answers]


def sendable(error: Exception) -> tuple[type[Exception], str]:
    """What to raise elsewhere; the error's own class may not be one that a message makes."""
    if isinstance(error, ValueError | OSError):
        return RaisedElsewhere, str(error)
    if isinstance(error, MemoryError):
        return MemoryError, str(error)
    named = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
    return RuntimeError, named


def in_order(
    batches: Sequence[Float[Tensor, "_ d"]],
    total: int,
    width: int,
    device: torch.device | str,
) -> Float[Tensor, "n d"]:
    """The rows of all batches, of which this process made number `rank`, `rank + world_size`, ...

    Args:
        batches: This process's, in order, on the CPU.
        total: Batches of all processes together.
        width: Columns, `d`.
        device: Where the processes can exchange tensors. It holds one batch a process at a time.

    Returns:
        The rows in the order of batches, in float32 on the CPU, the same bits in every process.
    """
    nothing = torch.zeros(0, width)
    if world_size() == 1:
        return torch.cat([nothing, *batches])
    rounds = -(-total // world_size())
    # Round i gathers the batches i * world_size, i * world_size + 1, ..., which is their order.
    rows = [
        gathered((batches[i] if i < len(batches) else nothing).to(device)).cpu()
        for i in range(rounds)
    ]
    return torch.cat([nothing, *rows])
