"""Which rows replace bad ones, where the rows of a source can be read in any order.

`lanes.py` says what does in a stream.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

# Spare rows for each one of a batch that is bad. They are more than the spare samples of a stream,
# which travel to the workers with the batch: rows cost nothing until read.
SPARE_BATCHES = 4


def spare_positions(
    position: npt.NDArray[np.int64], number: int, *, batch: int, size: int
) -> npt.NDArray[np.int64]:
    """So many spare positions `(number, b)` for each of these positions of an episode.

    They are those of the same place in the batches that follow; once around, those of the next
    place. So a position has the same ones whatever else its rank has, and as many different ones as
    the episode has.
    """
    batches, spare = -(-size // batch), np.arange(number)[:, None]
    around, turn = (spare, 0) if batches == 1 else np.divmod(spare, batches - 1)
    of_batch = (position // batch + 1 + turn) % batches
    in_batch = (position % batch + around + (batches == 1)) % min(batch, size)
    return np.asarray((of_batch * batch + in_batch) % size, dtype=np.int64)


def row_candidates(rows: Sequence[int], size: int) -> Iterator[Iterator[int]]:
    """Of each of `size` positions: its row, its spare ones, then those of others, each once.

    To be used one after the other. Who asks for a further candidate says that the last was bad.

    Args:
        rows: One for each position, then spare ones, of which those of a position are as far apart
            as there are positions.
    """
    taken, failed = set[int](), set[int]()

    def of(number: int) -> Iterator[int]:
        for index in chain(range(number, len(rows), size), range(size, len(rows))):
            if index not in taken and rows[index] not in failed:
                taken.add(index)
                yield rows[index]
                failed.add(rows[index])  # or nobody would have asked for another

    return map(of, range(size))
