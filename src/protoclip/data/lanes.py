"""Which samples each rank takes for a batch of a stream, and what replaces bad ones.

A stream is dealt to lanes, as many as the run had ranks when it began. A batch takes equally many
samples of each lane, one lane after the other. Any number of ranks shares the batch evenly, so a
rank's part may be a lane, several lanes, or a part of one; the batch is the same.

So is what replaces bad samples. A lane's part of a batch is cut into stretches with spare samples
of their own, which their bad ones take in turn. Only decoding shows which are bad. So a rank that
begins amid a stretch has the samples before its part too, and decodes them if one of its own is
bad.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import chain, islice, pairwise

import numpy as np
import numpy.typing as npt

from protoclip.data.pairs import BadSample, Sample, SampleStream
from protoclip.distributed.collectives import all_gather_object
from protoclip.files import checksum

Item = Sample | BadSample

# Spare rows for each one of a batch that is bad. They are more than the spare samples of a stream,
# which travel to the workers with the batch: rows cost nothing until read.
SPARE_BATCHES = 4
# Spare samples that replace the bad ones of a stretch, as a share of it, and the least number.
SPARE_SAMPLES, MIN_SPARE = 0.25, 8
# The most samples of a stretch. Of more, a few bad ones in a row are less likely to use up the
# spare ones; of fewer, ranks that share a lane have fewer samples of each other.
MAX_STRETCH = 256


def list_overlaps(part: int, parts: int, others: int) -> range:
    """Which of `others` equal parts of a batch share samples with one of its `parts`.

    >>> list_overlaps(1, 2, 3)
    range(1, 3)
    """
    return range(part * others // parts, -(-(part + 1) * others // parts))


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Samples that follow each other in a batch, and the spare ones that replace the bad of them.

    Attributes:
        before: Those with which the stretch begins and which other ranks have.
        samples: Those of this rank, which follow.
        spare: They come after the batch in the lane. No other stretch of the batch has them.
        lane: Its number, and a checksum of the ids of all samples that it gave for the batch.
    """

    before: list[Item]
    samples: list[Item]
    spare: list[Item]
    lane: tuple[int, str] = (0, "")

    def candidates(self, is_good: Callable[[Item], bool]) -> Iterator[Iterator[Item]]:
        """For each of this rank's samples: itself, and then its replacements.

        To be used one after the other. Who asks for a further candidate says that the last was bad.
        `is_good` is asked about samples of other ranks, once one of this rank's is bad. No more
        candidates are left where too many samples of the stretch are bad.
        """
        before, spare = iter(self.before), iter(self.spare)

        def replacements() -> Iterator[Item]:
            for sample in before:
                any(map(is_good, chain([sample], spare)))  # to the first good one, and no further
            yield from spare

        return (chain([sample], replacements()) for sample in self.samples)


def shares_of_batches(
    stream: SampleStream, batch: int, *, batch_size: int, rank: int, world_size: int
) -> Iterator[list[Stretch]]:
    """This rank's part of each batch of a run, from batch number `batch` on.

    What stands for a sample, and replaces it, is the same with any number of ranks. `batch_size` is
    that of all ranks, a multiple of their number and of the lanes'. Iteration raises what that of
    the stream does.
    """
    share, per_lane = batch_size // world_size, batch_size // stream.lanes
    number = -(-per_lane // MAX_STRETCH)
    bounds = [per_lane * index // number for index in range(number + 1)]
    read = per_lane + number * max(MIN_SPARE, int(SPARE_SAMPLES * per_lane / number))
    lanes = list_overlaps(rank, world_size, stream.lanes)
    readers = {lane: stream.samples(batch * per_lane, lane) for lane in lanes}
    ahead: dict[int, list[Item]] = {lane: [] for lane in lanes}
    while True:
        stretches = []
        for lane in lanes:
            first = max(rank * share - lane * per_lane, 0)
            last = min((rank + 1) * share - lane * per_lane, per_lane)
            waiting = ahead[lane]
            waiting.extend(islice(readers[lane], read - len(waiting)))
            names = "\n".join(item.sample_id for item in waiting).encode()
            for index, (begin, end) in enumerate(pairwise(bounds)):
                if first < end and begin < last:
                    since = max(begin, first)
                    stretches.append(
                        Stretch(
                            before=waiting[begin:since],
                            samples=waiting[since : min(end, last)],
                            # Dealt in turn, as what is bad often comes in a row.
                            spare=waiting[per_lane + index :: number],
                            lane=(lane, checksum(names)),
                        )
                    )
            del waiting[:per_lane]  # the spare ones stay, since the next batch begins with them
        yield stretches


def require_equal_lanes(lanes: Set[tuple[int, str]]) -> None:
    """Refuse a batch, given its `Stretch.lane`s, if ranks read other samples of one. Collective."""
    lanes = frozenset[tuple[int, str]]().union(*all_gather_object(lanes))
    if len(lanes) > len({number for number, _ in lanes}):
        raise ValueError(
            "ranks that share a lane of the stream read other samples of it, since one of them "
            "lost a shard; go on with --resume auto"
        )


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
    """For each of `size` positions: its row, its spare rows, then those of others, each once.

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
                failed.add(rows[index])  # since another one is asked for

    return map(of, range(size))
