"""Sizes that follow from the training pairs: of episodes, of small towers, and of prototypes.

Beside them it counts the captions that a model's own size cuts, and the pairs that share an image.
These are rules alone; `plan.py` asks for those that a configuration leaves unset.
"""

import math
from contextlib import suppress
from itertools import islice

from protoclip.data.captions import BETWEEN_SENTENCES
from protoclip.data.decode import dimensions
from protoclip.data.defaults import (
    LOOKED_AT,
    choose_context_length,
    choose_image_size,
    some_samples,
)
from protoclip.data.pairs import BadSample, ImageTextPairs, Pairs, SampleStream
from protoclip.data.sampler import evenly_spaced
from protoclip.data.split import count_repeated_images
from protoclip.distributed import collectives
from protoclip.models import loading
from protoclip.models.start import Start
from protoclip.models.tokenizers import TokenCounter, open_clip_tokenizer

LARGEST_EPISODE = 2**17  # the paper has 200,000 pairs
EPISODES, PASSES, FEWEST_STEPS = 35, 20, 280  # the fewest of `train`; docs/results.md has these
MOST_STEPS = 100_000  # of any command that trains
COUNTED, CAPTIONS_A_PAIR = 400, 4  # pairs whose captions are counted, and of each at most so many
BLOCKS, BLOCK_ROWS = 10, 200  # of a source, whose images are compared
SHARED = 0.01  # share of the pairs that have the image of another, from which on it is said
PAIRS_A_PROTOTYPE, FEWEST_PROTOTYPES = 10, 8  # the paper has 10


def episode_size(rows: int | None, batch: int) -> int:
    """Pairs in an episode, by default: as whole batches, the largest power of two up to `rows`, or
    for a stream, which has no end (None), the largest episode."""
    pairs = LARGEST_EPISODE if rows is None else max(1, rows)
    power_of_two: int = 2 ** int(math.log2(pairs))
    batches = min(LARGEST_EPISODE, power_of_two) // batch
    return max(1, batches) * batch


def number_of_episodes(rows: int | None, size: int, batch: int) -> int:
    """Episodes of `train`, by default: 35, or more for 20 passes over the pairs or for 280 steps.

    A stream has no known number of `rows`.
    """
    pairs = max(EPISODES * size, PASSES * (rows or 0), FEWEST_STEPS * batch)
    return episodes_with(pairs, size, batch)


def episodes_with(pairs: int, size: int, batch: int) -> int:
    """How many episodes have this number of pairs together, or as many as `MOST_STEPS` allow."""
    return max(1, min(round(pairs / size), MOST_STEPS * batch // size))


def batch_near(usual: int, *, dividing: int | None) -> int:
    """A batch of about the usual size, which ranks share evenly, with at least two pairs each.

    It divides the number `dividing`, if one can that is at least half as large: in small batches
    there is little to tell apart.
    """
    ranks = collectives.world_size()
    usual = max(2 * ranks, usual // ranks * ranks)
    if dividing is None:
        return usual
    even = range(usual, max(ranks, usual // 2 - 1), -ranks)
    return next((size for size in even if dividing % size == 0), usual)


def number_of_prototypes(size: int, samples: Pairs | SampleStream | None = None) -> int:
    """How many prototypes an episode of this size has: one for ten pairs, as in the paper.

    No more than there are different captions, if there are `samples` to look at: captions may name
    few classes.
    """
    number = min(size, max(FEWEST_PROTOTYPES, size // PAIRS_A_PROTOTYPE))
    if isinstance(samples, Pairs):
        number = different_captions(samples, size, most=number)
    return max(2, number)


def different_captions(samples: Pairs, size: int, *, most: int) -> int:
    """How many first captions differ among `size` evenly drawn pairs; reads on up to `most`."""
    captions = set[str]()
    for row in evenly_spaced(len(samples), min(len(samples), size), seed=0):
        with suppress(BadSample):
            captions.add(samples.sample_captions(row)[0])
        if len(captions) == most:
            break
    return len(captions)


def size_and_length(
    samples: Pairs | SampleStream, *, max_image_pixels: int
) -> tuple[int, int, str]:
    """The image size and caption length of small towers that suit some hundred of the samples.

    In pixels and tokens; and by what they were chosen, in words.
    """
    sides, lengths = list[int](), list[int]()
    count_tokens = TokenCounter(open_clip_tokenizer({}))
    for sample in some_samples(samples, LOOKED_AT):
        with suppress(ValueError):  # a bad image
            sides.append(min(dimensions(sample.image, max_pixels=max_image_pixels)))
            lengths += count_tokens(list(sample.captions))
    reason = f"by {len(sides)} of the samples" if sides else "since no sample could be looked at"
    return choose_image_size(sides), choose_context_length(lengths), reason


def captions_cut(
    samples: Pairs | SampleStream, start: Start, *, sentences: bool | None
) -> list[str]:
    """A note on how many of some captions the model's context length cuts, if it cuts any.

    It reads no image, and nothing of a stream.

    Args:
        sentences: Whether training draws sentences of captions, which are counted then; None if it
            never could.
    """
    if not isinstance(samples, Pairs):
        return []
    texts = list[str]()
    for row in evenly_spaced(len(samples), min(len(samples), COUNTED), seed=0):
        with suppress(BadSample):
            texts += islice(samples.sample_captions(row), CAPTIONS_A_PAIR)
    if sentences:
        texts = [part for text in texts for part in BETWEEN_SENTENCES.split(text)]
    length, count_tokens = loading.context_length(start), TokenCounter(loading.tokenizer(start))
    cut = sum(tokens > length for tokens in count_tokens(texts))
    if not cut:
        return []
    what = "sentences" if sentences else "captions"
    way_out = "raise it, or draw sentences by data.captions" if sentences is False else "raise it"
    return [
        f"model.text.context_length = {length} cuts {cut:,} of {len(texts):,} {what} that were "
        f"looked at; {way_out}"
    ]


def shared_images(samples: Pairs | SampleStream) -> list[str]:
    """A note on pairs that have the image of another pair, if they are more than a few.

    Some are looked at (`repeated`). protoclip data inspect compares the bytes of files, too.
    """
    counts = repeated(samples) if isinstance(samples, Pairs) else []
    looked_at, again = sum(number for number, _ in counts), sum(number for _, number in counts)
    if again <= SHARED * looked_at:
        return []
    return [
        f"{again:,} of {looked_at:,} pairs that were looked at have the image of another one, and "
        "in a batch the two are negatives of each other; set loss.positives = shared, or give each "
        "image one row with all its captions"
    ]


def number_of_images(samples: Pairs) -> int:
    """About how many images these pairs show: fewer than pairs in a table with a row a caption."""
    rows, images = 0, 0.0
    for source, (looked_at, again) in zip(samples.sources, repeated(samples), strict=True):
        rows += len(source)
        images += len(source) * (1 - again / looked_at if looked_at else 1)
    return round(len(samples) * images / max(1, rows))


def repeated(samples: Pairs) -> list[tuple[int, int]]:
    """Of each source, how many pairs are looked at, and how many have the image of another one.

    They are in blocks of neighbours, since rows of one image follow each other in tables with a row
    a caption. Equal files of different names count as different (`split.count_repeated_images`).
    """
    counts = []
    for source in samples.sources:
        rows = set[int]()
        if isinstance(source, ImageTextPairs):
            for first in evenly_spaced(len(source), min(len(source), BLOCKS), seed=0):
                rows.update(range(first, min(len(source), first + BLOCK_ROWS)))
        counts.append((len(rows), count_repeated_images(source, sorted(rows)) if rows else 0))
    return counts
