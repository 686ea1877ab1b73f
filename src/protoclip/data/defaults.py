"""What a run decides by a look at its data: sizes, augmentation and worker processes.

Sizes that follow from rules, such as those of episodes, are in `training/sizes.py`, and plain
defaults in `config.py`.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Literal

import numpy as np

from protoclip.config import SMALL_CONTEXT_LENGTHS, SMALL_IMAGE_SIZES, DataConfig
from protoclip.data import decode
from protoclip.data.pairs import BadSample, Pairs, Sample, SampleStream, evenly_spaced
from protoclip.data.stream import ShardStream
from protoclip.distributed.cores import cores

LOOKED_AT, DECODED = 256, 32  # samples of a source that are looked at, and that are decoded
READERS = 16  # threads; the images may be behind URLs
# A crop has about this share of an image's shorter side, and need not be enlarged.
CROPPED = 0.8
WHOLE = 0.95  # share of captions that are not to be cut


def some_samples(samples: Pairs | SampleStream, number: int) -> Iterator[Sample]:
    """Up to `number` samples that can be read: evenly spaced pairs, or the first of streams."""
    if isinstance(samples, Pairs):

        def read(row: int) -> Sample | None:
            with suppress(BadSample):
                return samples.sample(row)
            return None

        rows = evenly_spaced(len(samples), min(number, len(samples)), seed=0)
        with ThreadPoolExecutor(READERS) as pool:
            yield from filter(None, pool.map(read, rows))
        return
    streams = samples.sources
    for stream in streams:
        if isinstance(stream, ShardStream):
            items = islice(stream.read(stream.shards[0]), -(-number // len(streams)))
            yield from (item for item in items if isinstance(item, Sample))


def choose_image_size(shorter_sides: Iterable[int]) -> int:
    """The largest size of small towers that crops of half of the images have, in pixels."""
    sides = list(shorter_sides)
    cropped = CROPPED * float(np.median(sides)) if sides else 0.0
    return max(
        (size for size in SMALL_IMAGE_SIZES if size <= cropped), default=SMALL_IMAGE_SIZES[0]
    )


def choose_context_length(lengths: Iterable[int]) -> int:
    """The smallest caption length of small towers that cuts at most one caption of 20, in tokens.

    `lengths` count the tokens of captions, start and end included.
    """
    counts = np.fromiter(lengths, np.int64)
    for length in SMALL_CONTEXT_LENGTHS:
        if not len(counts) or (counts <= length).mean() >= WHOLE:
            return length
    return SMALL_CONTEXT_LENGTHS[-1]


def choose_augmentation(image_size: int, *, is_untrained: bool) -> Literal["light", "clip"]:
    """The augmentation of towers that start untrained at this size, in pixels, or of others.

    Crops alone keep colours, which captions name: above 40 pixels they find the pairs of
    photographs and of a shop better, and drawings of 40 pixels need more (docs/results.md). Named
    models, and towers with weights, get the paper's.
    """
    return "clip" if is_untrained and image_size > SMALL_IMAGE_SIZES[0] else "light"


def number_of_workers(
    data: DataConfig, samples: Pairs | SampleStream, *, image_size: int
) -> tuple[int, str | None]:
    """The worker processes of this rank, and a note if `data.workers` leaves them open.

    One for each core of the rank's share. None where this process can keep all decoded images:
    worker processes share no memory, so they would decode each image again in every pass.
    """
    if data.workers != "auto":
        return data.workers, None
    number = cores()
    why = "the cores of this host over its ranks"
    if number == 1:
        number, why = 0, "since this rank has one core"
    elif isinstance(samples, Pairs) and fits_in_memory(data, samples, image_size=image_size):
        number, why = 0, "since all decoded images fit in data.cache_gb"
    lost = number > 0 and data.cache_gb not in (0, DataConfig().cache_gb)
    note = ", which keep no images in memory, so data.cache_gb has no effect" if lost else ""
    return number, f"data.workers = {number}, {why}{note}"


def fits_in_memory(data: DataConfig, samples: Pairs, *, image_size: int) -> bool:
    """Whether the cache in this process's memory would hold all images, by some of them."""
    sizes = []
    for sample in some_samples(samples, DECODED):
        with suppress(ValueError):
            pixels = decode.decode_all(sample.image, image_size, max_pixels=data.max_image_pixels)
            if pixels is None:  # a JPEG that is decoded at a fraction of its size, every time
                return False
            sizes.append(pixels.pixels.nbytes)
    return not sizes or float(np.mean(sizes)) * len(samples) <= data.cache_gb * 1e9
