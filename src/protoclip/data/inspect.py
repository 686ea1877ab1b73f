"""What a source of pairs holds: sizes, formats, caption lengths, duplicates, unreadable samples.

Worker processes look at samples. The results are counted here, so that memory grows with the data
by eight bytes an image and eight a caption.
"""

import hashlib
import os
import re
import textwrap
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset

from protoclip.data.access import visible
from protoclip.data.decode import decode, dimensions, open_image
from protoclip.data.loader import Item, items_of, read_sample
from protoclip.data.mixture import MixedStreams, under
from protoclip.data.pairs import MAX_IMAGE_PIXELS, BadSample, Pairs, SampleStream
from protoclip.data.stream import ShardStream, read_shard
from protoclip.progress import Progress, duration

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
# The first so many different images and captions can become examples of repeated ones.
REMEMBERED = 50_000
EXAMPLES, NAMES, NAME_LENGTH = 5, 3, 90
CHUNK = 64  # rows that a worker looks at together
# JPEGs are decoded as far as training with inputs of this size would.
DECODED_SIDE = 224
# Of the montage, in pixels.
SIDE, GAP, FONT_SIZE, LINES = 192, 20, 14, 3
COLUMNS, ROWS = 6, 4
CELL = SIDE + 8 + LINES * 19
ENLARGED = 3  # a small image is not enlarged further
TRIES = 10  # samples that are tried for each that is shown


def inspect(
    source: Pairs | SampleStream,
    *,
    count_tokens: Callable[[list[str]], list[int]],
    context_length: int,
    samples: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    max_pixels: int = MAX_IMAGE_PIXELS,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Read samples of a source, all or some, and count what they are, as JSON values.

    Args:
        source: Rows in any order, or a stream of tar shards, which is read once.
        count_tokens: Lengths of captions in tokens, not truncated, start and end included.
        context_length: Tokens that the model reads.
        samples: How many to read, drawn evenly from the whole (of a stream: from the starts of
            shards that are drawn evenly); all if unset.
        seed: Determines which are drawn.
        workers: Processes; one for each core if unset. With 1 all is done in this process.
        max_pixels: Larger images count as unreadable.
        notes: What was noticed when the source was opened, to stand beside the findings.

    Raises:
        ValueError: The stream is not of shards, or a worker was killed.
    """
    started = time.monotonic()
    if isinstance(source, Pairs):
        some = samples is not None and samples < len(source)
        rows = drawn(len(source), samples or 0, seed) if some else range(len(source))
        parts: list[Any] = [rows[first : first + CHUNK] for first in range(0, len(rows), CHUNK)]
    else:
        parts = _shards(source, samples, seed)
    if workers is None:
        can_ask = hasattr(os, "sched_getaffinity")  # which cores this process may use
        workers = len(os.sched_getaffinity(0)) if can_ask else os.cpu_count() or 1
    loader = DataLoader(
        _Examiner(source, parts, count_tokens, max_pixels),
        batch_size=None,
        num_workers=workers if workers > 1 else 0,
    )
    progress = Progress(f"inspect {source.name}", len(parts))
    tally = _Tally()
    for done, found in enumerate(items_of(loader), 1):
        tally.add(found)
        progress.update(done, f"{tally.unreadable} unreadable" if tally.unreadable else "")
    return {
        "source": source.name,
        "pairs": len(source) if isinstance(source, Pairs) else None,
        **tally.report(context_length),
        "notes": list(notes),
        "seconds": round(time.monotonic() - started, 2),
    }


def drawn(total: int, number: int, seed: int) -> list[int]:
    """So many different numbers below `total`, in order: one from each of equal parts."""
    bounds = np.arange(number + 1, dtype=np.int64) * total // number
    chosen: list[int] = np.random.default_rng(seed).integers(bounds[:-1], bounds[1:]).tolist()
    return chosen


def _shards(
    source: SampleStream, samples: int | None, seed: int
) -> list[tuple[ShardStream, str, int | None]]:
    """Shards to look at: stream, shard, and how many of its samples (all if None)."""
    streams = source.streams if isinstance(source, MixedStreams) else [source]
    shards = [(s, shard) for s in streams if isinstance(s, ShardStream) for shard in s.shards]
    if not shards:
        raise ValueError(f"{source.name}: has no end; only streams of tar shards can be inspected")
    if samples is None:
        return [(*each, None) for each in shards]
    most = max(CHUNK, -(-samples // len(shards)))
    firsts = range(0, samples, most)
    chosen = drawn(len(shards), len(firsts), seed)
    pairs = zip(chosen, firsts, strict=True)
    return [(*shards[number], min(most, samples - first)) for number, first in pairs]


class _Facts(NamedTuple):
    """One sample: the hash of its image, values to count, its captions and their tokens."""

    sample_id: str
    content: int
    values: dict[str, int | float | str]
    captions: tuple[str, ...]
    tokens: list[int]


@dataclass(frozen=True)
class _Examiner(Dataset[list[_Facts | BadSample]]):
    """Looks at samples, in worker processes: at the rows or the shard of a part."""

    source: Pairs | SampleStream
    parts: list[Any]
    count_tokens: Callable[[list[str]], list[int]]
    max_pixels: int

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> list[_Facts | BadSample]:
        part: Iterable[Any] = self.parts[number]
        if not isinstance(self.source, Pairs):
            stream, shard, most = self.parts[number]
            part = islice(read_shard(shard, stream.caption_keys, stream.access), most)
            if stream is not self.source:
                part = (under(stream.name, item) for item in part)
        return [self.examine(item) for item in part]

    def examine(self, item: Item) -> _Facts | BadSample:
        try:
            sample = read_sample(self.source, item)
        except BadSample as error:
            return error
        try:
            width, height = dimensions(sample.image, max_pixels=self.max_pixels)
            decode(sample.image, max_pixels=self.max_pixels, at_least=DECODED_SIDE)
        except ValueError as error:
            return BadSample(sample.sample_id, sample.where, str(error))
        values: dict[str, int | float | str] = {
            "width": width,
            "height": height,
            "shorter_side": min(width, height),
            "kilobytes": round(len(sample.image) / 1000, 1),
            "formats": str(open_image(sample.image, max_pixels=self.max_pixels).format),
            "captions_per_image": len(sample.captions),
        }
        tokens = self.count_tokens(list(sample.captions))
        return _Facts(sample.sample_id, _hash(sample.image), values, sample.captions, tokens)


def _hash(content: bytes) -> int:
    """Eight bytes; two of a billion contents share them with a probability of 3%."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class _Contents:
    """Hashes of contents, and the names of the first ones."""

    def __init__(self) -> None:
        self.hashes = array("Q")
        self.names: dict[int, list[str]] = {}

    def add(self, content: int, name: str) -> None:
        self.hashes.append(content)
        if content in self.names or len(self.names) < REMEMBERED:
            names = self.names.setdefault(content, [])
            if name not in names and len(names) < NAMES:
                names.append(name)

    def repeats(self) -> dict[str, Any]:
        """How many copies there are beyond the first, and the most frequent contents."""
        values, counts = np.unique(np.array(self.hashes, dtype=np.uint64), return_counts=True)
        order = np.argsort(-counts, kind="stable")[: (counts > 1).sum()]
        ranked = zip(values[order].tolist(), counts[order].tolist(), strict=True)
        known = (f"{n} x {', '.join(self.names[v])}" for v, n in ranked if v in self.names)
        return {"copies": len(self.hashes) - len(values), "examples": list(islice(known, EXAMPLES))}


class _Tally:
    """What was found so far. Its size is bounded but for the hashes of contents."""

    def __init__(self) -> None:
        self.read = self.unreadable = 0
        self.counts: dict[str, Counter[Any]] = defaultdict(Counter)
        self.images, self.captions = _Contents(), _Contents()
        self.examples: list[str] = []

    def add(self, found: list[_Facts | BadSample]) -> None:
        self.read += len(found)
        for each in found:
            if isinstance(each, BadSample):
                self.unreadable += 1
                # Without the numbers and details of this sample.
                kind = re.sub(r"\d+", "N", re.sub(r" ?\(.*\)", "", each.reason))[:NAME_LENGTH]
                self.counts["reasons"][kind] += 1
                self.examples = [*self.examples, str(each)][:EXAMPLES]
                continue
            self.images.add(each.content, each.sample_id)
            for name, value in each.values.items():
                self.counts[name][value] += 1
            for text in each.captions:
                content = _hash(text.encode("utf-8", "surrogatepass"))
                self.captions.add(content, textwrap.shorten(text, NAME_LENGTH, placeholder="..."))
            self.counts["tokens"].update(each.tokens)

    def report(self, context_length: int) -> dict[str, Any]:
        counts, tokens = self.counts, self.counts["tokens"]
        measured = ("kilobytes", "width", "height", "shorter_side", "captions_per_image", "tokens")
        return {
            "read": self.read,
            "unreadable": self.unreadable,
            "reasons": dict(counts["reasons"].most_common()),
            "unreadable_examples": self.examples,
            "formats": dict(counts["formats"].most_common()),
            "captions": tokens.total(),
            **{name: percentiles(counts[name]) for name in measured},
            "context_length": context_length,
            "captions_cut": sum(n for length, n in tokens.items() if length > context_length),
            **{f"repeated_image_{name}": v for name, v in self.images.repeats().items()},
            **{f"repeated_caption_{name}": v for name, v in self.captions.repeats().items()},
        }


def percentiles(counts: Counter[Any]) -> dict[str, int | float]:
    """For each percentage, the least value that so many percent of all values do not exceed."""
    values = sorted(counts)
    below = np.cumsum([counts[value] for value in values])
    places = {p: int(np.searchsorted(100 * below, p * below[-1])) for p in PERCENTILES if values}
    return {str(p): values[place] for p, place in places.items()}


def show(found: dict[str, Any]) -> None:
    """Print what `inspect` found, a line each."""
    print(f"{visible(found['source'])}, in {duration(found['seconds'])}")
    for name, value in found.items():
        if name in ("source", "seconds") or value in (None, [], {}):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {each:,}" for key, each in value.items())
        label = name.replace("_", " ")
        for line in value if isinstance(value, list) else [value]:
            text = f"{line:,}" if isinstance(line, int) else visible(line)
            print(f"{label:24} {text}")
            label = ""


def montage(
    source: Pairs | SampleStream, *, seed: int = 0, max_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image:
    """Draw 24 random pairs (of a stream, the first) in a grid: images with their captions below.

    Unreadable samples and images of more than `max_pixels` are left out.

    Raises:
        ValueError: No sample can be read.
    """
    wanted = COLUMNS * ROWS
    if isinstance(source, Pairs):
        number = min(TRIES * wanted, len(source))
        order = np.random.default_rng(seed).choice(len(source), number, replace=False)
        items: Iterable[Item] = order.tolist()
    else:
        items = islice(source.samples(), TRIES * wanted)
    cells = list(islice(_cells(source, items, max_pixels), wanted))
    if not cells:
        raise ValueError(f"{source.name}: none of its samples that were tried can be read")
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, rows * (CELL + GAP) + GAP), "white")
    for number, cell in enumerate(cells):
        row, column = divmod(number, COLUMNS)
        sheet.paste(cell, (GAP + column * (SIDE + GAP), GAP + row * (CELL + GAP)))
    return sheet


def _cells(
    source: Pairs | SampleStream, items: Iterable[Item], max_pixels: int
) -> Iterator[Image.Image]:
    """An image with its caption below, for each sample that can be read."""
    font = ImageFont.load_default(FONT_SIZE)
    for item in items:
        try:
            sample = read_sample(source, item)
            pixels = decode(sample.image, max_pixels=max_pixels, at_least=SIDE)
        except ValueError:  # `BadSample` is one
            continue
        image = Image.fromarray(pixels)
        factor = min(SIDE / image.width, SIDE / image.height, ENLARGED)
        width, height = (max(1, round(side * factor)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        cell = Image.new("RGB", (SIDE, CELL), "white")
        cell.paste("#f1f1f3", (0, 0, SIDE, SIDE))
        cell.paste(image, ((SIDE - width) // 2, (SIDE - height) // 2))
        caption = sample.captions[0].encode("utf-8", "replace").decode()[:400]
        characters = max(1, int(SIDE * len(caption) / max(1, font.getlength(caption))))
        lines = textwrap.wrap(caption, characters, max_lines=LINES, placeholder="...")
        ImageDraw.Draw(cell).text((0, SIDE + 8), "\n".join(lines), fill="#1c1c1f", font=font)
        yield cell
