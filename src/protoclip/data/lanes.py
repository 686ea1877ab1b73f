"""How ranks share a stream: which of its samples each rank takes for a batch.

A stream is dealt to lanes, as many as the run had ranks when it began. A batch takes equally many
samples of each lane, one lane after the other. Any number of ranks shares the batch evenly, so a
rank's part may be a lane, several lanes, or a part of one; the batch is the same.
"""

from collections.abc import Iterator
from itertools import islice

from protoclip.data.pairs import BadSample, Sample, SampleStream

# Spare samples that replace the bad ones of a batch, as a share of it, and the least number.
SPARE_SAMPLES, MIN_SPARE = 0.25, 8


def overlapping(part: int, parts: int, others: int) -> range:
    """Which of `others` equal parts of a batch share samples with one of its `parts`.

    >>> overlapping(1, 2, 3)
    range(1, 3)
    """
    return range(part * others // parts, -(-(part + 1) * others // parts))


def shares_of_batches(
    stream: SampleStream, batch: int, *, batch_size: int, rank: int, world_size: int
) -> Iterator[list[Sample | BadSample]]:
    """This rank's samples of each batch of a run, from batch number `batch` on, then spare ones.

    Spare samples are those that follow the batch in the rank's lanes. Ranks that share a lane have
    different ones. `batch_size` is that of all ranks, a multiple of their number and of the lanes'.
    """
    share, per_lane = batch_size // world_size, batch_size // stream.lanes
    lanes = overlapping(rank, world_size, stream.lanes)
    readers = {lane: stream.samples(batch * per_lane, lane) for lane in lanes}
    ahead: dict[int, list[Sample | BadSample]] = {lane: [] for lane in lanes}
    while True:
        samples, spare = [], []
        for lane in lanes:
            first = max(rank * share - lane * per_lane, 0)
            last = min((rank + 1) * share - lane * per_lane, per_lane)
            number = max(MIN_SPARE, int(SPARE_SAMPLES * (last - first)))
            ranks_of_lane, waiting = overlapping(lane, stream.lanes, world_size), ahead[lane]
            wanted = per_lane + number * len(ranks_of_lane)
            waiting.extend(islice(readers[lane], wanted - len(waiting)))
            samples += waiting[first:last]
            # The ranks of a lane take the samples after the batch in turn, so none has another's.
            spare += waiting[per_lane + ranks_of_lane.index(rank) :: len(ranks_of_lane)]
            del waiting[:per_lane]  # the spare ones stay, since the next batch begins with them
        yield samples + spare
