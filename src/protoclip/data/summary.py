"""What a look at some pairs of a run tells: sizes, captions, repeated images, what fits in memory.

`training/presets.py` chooses settings by it, and `training/plan.py` has notes on it.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from protoclip.config import SMALL_CONTEXT_LENGTHS, DataConfig
from protoclip.data import decode
from protoclip.data.bands import find_size
from protoclip.data.captions import legible
from protoclip.data.pairs import (
    BadSample,
    ImageTextPairs,
    Pairs,
    Sample,
    SampleStream,
    evenly_spaced,
)
from protoclip.data.sources import list_notes
from protoclip.data.split import count_repeated_images
from protoclip.distributed.collectives import count_cores

LOOKED_AT, DECODED = 256, 32  # samples of a source that are looked at, and that are decoded
READERS = 16  # threads; the images may be behind URLs
COUNTED, CAPTIONS_A_PAIR = 400, 4  # pairs whose captions are counted, and of each at most so many
BLOCKS, BLOCK_ROWS = 10, 200  # of a source, whose images are compared
ENOUGH = 0.95  # share of captions that are not to be cut

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What is known of the pairs to train on; empty or 0 what was not asked for."""

    rows: int | None  # None for a stream, whose length is not known
    captions: list[str]  # some captions of some pairs; none of a stream
    sides: list[int]  # the shorter side of some images in pixels
    captions_of_images: list[str]  # and their captions
    compared: int  # pairs whose images were compared
    repeated: int  # those of them that have the image of another one
    images: int | None  # about how many the pairs show
    notes: list[str]  # what the user should know, such as lines that were left out


def summarize(
    samples: Pairs | SampleStream, *, looks_at_images: bool, compares_images: bool
) -> Summary:
    """Look at some pairs, or at the first ones of a stream, whose images are not compared.

    Images are compared in blocks of neighbours, since rows of one image follow each other in tables
    with a row a caption. Equal files of different names count as different.
    """
    captions, sides, captions_of_images = list[str](), list[int](), list[str]()
    rows = len(samples) if isinstance(samples, Pairs) else None
    if isinstance(samples, Pairs):
        for row in evenly_spaced(len(samples), COUNTED, seed=0):
            with suppress(BadSample):
                captions += islice(samples.sample_captions(row), CAPTIONS_A_PAIR)
    for sample in read_some(samples, LOOKED_AT) if looks_at_images else ():
        with suppress(ValueError):  # a bad image
            sides.append(min(find_size(sample.image)))
            captions_of_images += sample.captions
    compared, repeated, images, total = 0, 0, 0.0, 0
    for source in samples.sources if compares_images and rows is not None else ():
        neighbours = set[int]()
        if isinstance(source, ImageTextPairs):
            for first in evenly_spaced(len(source), BLOCKS, seed=0):
                neighbours.update(range(first, min(len(source), first + BLOCK_ROWS)))
        again = count_repeated_images(source, sorted(neighbours)) if neighbours else 0
        compared, repeated = compared + len(neighbours), repeated + again
        images += len(source) * (1 - again / max(1, len(neighbours)))
        total += len(source)
    return Summary(
        rows=rows,
        captions=captions,
        sides=sides,
        captions_of_images=captions_of_images,
        compared=compared,
        repeated=repeated,
        images=round(rows * images / total) if rows and total else None,
        notes=list_notes(samples),
    )


def count_captions(samples: Pairs, size: int, *, most: int) -> int:
    """How many first captions differ among `size` evenly drawn pairs; reads on up to `most`."""
    captions = set[str]()
    for row in evenly_spaced(len(samples), size, seed=0):
        with suppress(BadSample):
            captions.add(samples.sample_captions(row)[0])
        if len(captions) == most:
            break
    return len(captions)


def read_some(samples: Pairs | SampleStream, number: int) -> Iterator[Sample]:
    """Up to `number` samples that can be read: evenly spaced pairs, or the first of streams."""
    if isinstance(samples, Pairs):

        def read(row: int) -> Sample | None:
            with suppress(BadSample):
                return samples.sample(row)
            return None

        rows = evenly_spaced(len(samples), number, seed=0)
        with ThreadPoolExecutor(READERS) as pool:
            yield from filter(None, pool.map(read, rows))
        return
    share = -(-number // len(samples.sources))
    for stream in samples.sources:
        asked, items = stream.first_items
        if asked < share and len(items) == asked:  # else the shard has no more, or cannot be read
            items = [*islice(stream.read(stream.shards[0]), share)]
            stream.first_items = share, items
        yield from (item for item in items[:share] if isinstance(item, Sample))


def draw_samples(
    pairs: Pairs | SampleStream, number: int, read: Callable[[Any], T], *, seed: int
) -> Iterator[tuple[Any, T | BadSample]]:
    """What `read` makes of up to `number` pairs, evenly spaced, or of the first ones of a stream.

    They are read in threads, since the images may be behind URLs. Bad samples are among them.
    """
    if isinstance(pairs, Pairs):
        items: list[Any] = evenly_spaced(len(pairs), number, seed)
    else:
        items = [*islice(pairs.samples(), number)]

    def read_one(item: Any) -> tuple[Any, T | BadSample]:
        try:
            return item, read(item)
        except BadSample as error:
            return item, error

    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(read_one, items)


def count_tokens(tokenizer: Any, texts: list[str]) -> list[tuple[int, int]]:
    """How many tokens each caption has before it is cut, start and end included; and how many of
    these stand for text that the tokenizer does not know."""
    tokenizer, texts = getattr(tokenizer, "tokenizer", tokenizer), [legible(text) for text in texts]
    if hasattr(tokenizer, "encode"):  # CLIP's own, which knows every byte
        return [(len(tokenizer.encode(text)) + 2, 0) for text in texts]
    known = tokenizer.tokenizer
    # Tokenizers of bytes know every text; some use the end's token where one is asked for.
    unknown = known.unk_token_id if known.unk_token_id != known.eos_token_id else None
    return [(len(ids), ids.count(unknown)) for ids in known(texts)["input_ids"]]


def choose_context_length(lengths: Iterable[int]) -> int:
    """The smallest caption length of small towers that cuts at most one caption of 20, by their
    lengths in tokens, start and end included."""
    counts = np.fromiter(lengths, np.int64)
    for length in SMALL_CONTEXT_LENGTHS:
        if not len(counts) or (counts <= length).mean() >= ENOUGH:
            return length
    return SMALL_CONTEXT_LENGTHS[-1]


def choose_workers(
    data: DataConfig, samples: Pairs | SampleStream, *, image_size: int
) -> tuple[int, str | None]:
    """The worker processes of this rank, and a note if `data.workers` leaves them open: one for
    each core of its share, or none where this process, unlike them, can keep all decoded images."""
    if data.workers != "auto":
        return data.workers, None
    number = count_cores()
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
    for sample in read_some(samples, DECODED):
        with suppress(ValueError):
            pixels = decode.decode_all(sample.image, image_size)
            if pixels is None:  # a JPEG that is decoded at a fraction of its size, every time
                return False
            sizes.append(pixels.pixels.nbytes)
    return bool(sizes) and float(np.mean(sizes)) * len(samples) <= data.cache_gb * 1e9
