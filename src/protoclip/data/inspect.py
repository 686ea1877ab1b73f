"""What a source of pairs holds: sizes, formats, caption lengths, duplicates, unreadable samples.

Memory grows with the data by eight bytes an image and eight a caption.
"""

import contextlib
import hashlib
import os
import re
import textwrap
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset

from protoclip.data.access import visible
from protoclip.data.decode import decode, dimensions, open_image
from protoclip.data.loader import Item, items_of, read_image
from protoclip.data.mixture import MixedStreams, under
from protoclip.data.pairs import MAX_IMAGE_PIXELS, BadSample, Pairs, SampleStream
from protoclip.data.stream import ShardStream, read_shard
from protoclip.progress import Progress

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
MEASURED = ("kilobytes", "width", "height", "shorter_side", "captions_per_image", "tokens")
# The first so many different images and captions can become examples of repeated ones.
REMEMBERED = 100_000
EXAMPLES, NAME_LENGTH = 5, 90
CHUNK = 64  # rows that a worker looks at together
DECODED_SIDE = 224  # JPEGs are decoded as far as inputs of this size need
# Of the montage, in pixels.
SIDE, GAP, FONT_SIZE, LINES = 192, 20, 14, 3
COLUMNS, ROWS = 6, 4
CELL = SIDE + 8 + LINES * 19
# The default font is Latin; PIL finds these on the systems that have them.
FONTS = ("NotoSansCJK-Regular.ttc", "msyh.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf")
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
        workers: Processes; one for each core if unset. With 1 all is done in this process.

    Raises:
        ValueError: The stream is not of shards, or a worker was killed.
    """
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
    }


def drawn(total: int, number: int, seed: int) -> list[int]:
    """`number` different row numbers below `total`, one from each of equal parts."""
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
            sample, values = read_image(self.source, item, self.measure)
        except BadSample as error:
            return error
        values["captions_per_image"] = len(sample.captions)
        tokens = self.count_tokens(list(sample.captions))
        return _Facts(sample.sample_id, _hash(sample.image), values, sample.captions, tokens)

    def measure(self, encoded: bytes) -> dict[str, int | float | str]:
        width, height = dimensions(encoded, max_pixels=self.max_pixels)
        decode(encoded, max_pixels=self.max_pixels, at_least=DECODED_SIDE)
        return {
            "width": width,
            "height": height,
            "shorter_side": min(width, height),
            "kilobytes": round(len(encoded) / 1000, 1),
            "formats": str(open_image(encoded, max_pixels=self.max_pixels).format),
        }


def _hash(content: bytes) -> int:
    """Eight bytes; two of a billion contents share them with a probability of 3%."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class _Tally:
    """What was found so far. Its size is bounded but for the hashes of contents."""

    def __init__(self) -> None:
        self.read = self.unreadable = 0
        self.counts: dict[str, Counter[Any]] = defaultdict(Counter)
        self.hashes = {"image": array("Q"), "caption": array("Q")}
        self.names: dict[int, str] = {}
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
            self._remember("image", each.content, each.sample_id)
            for name, value in each.values.items():
                self.counts[name][value] += 1
            for text in each.captions:
                self._remember("caption", _hash(text.encode("utf-8", "surrogatepass")), text)
            self.counts["tokens"].update(each.tokens)

    def _remember(self, kind: str, content: int, name: str) -> None:
        self.hashes[kind].append(content)
        if content not in self.names and len(self.names) < REMEMBERED:
            self.names[content] = textwrap.shorten(name, NAME_LENGTH, placeholder="...")

    def report(self, context_length: int) -> dict[str, Any]:
        counts, tokens = self.counts, self.counts["tokens"]
        found = {
            "read": self.read,
            "unreadable": self.unreadable,
            "reasons": dict(counts["reasons"].most_common()),
            "unreadable_examples": self.examples,
            "formats": dict(counts["formats"].most_common()),
            "captions": tokens.total(),
            **{name: percentiles(counts[name]) for name in MEASURED},
            "context_length": context_length,
            "captions_cut": sum(n for length, n in tokens.items() if length > context_length),
        }
        for kind, hashes in self.hashes.items():
            values, number = np.unique(np.array(hashes, dtype=np.uint64), return_counts=True)
            order = np.argsort(-number, kind="stable")[: (number > 1).sum()]
            ranked = zip(values[order].tolist(), number[order].tolist(), strict=True)
            known = (f"{n} x {self.names[value]}" for value, n in ranked if value in self.names)
            found[f"repeated_{kind}_copies"] = len(hashes) - len(values)
            found[f"repeated_{kind}_examples"] = list(islice(known, EXAMPLES))
        return found


def percentiles(counts: Counter[Any]) -> dict[str, int | float]:
    """For each percentage, the least value that so many percent of all values do not exceed."""
    values = sorted(counts)
    below = np.cumsum([counts[value] for value in values])
    places = {p: int(np.searchsorted(100 * below, p * below[-1])) for p in PERCENTILES if values}
    return {str(p): values[place] for p, place in places.items()}


def show(found: dict[str, Any]) -> None:
    """Print what `inspect` found, a line each."""
    for name, value in found.items():
        if value in (None, [], {}):
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

    Leaves out unreadable samples and images of more than `max_pixels`. Raises `ValueError` if no
    sample can be read.
    """
    if isinstance(source, Pairs):
        number = min(TRIES * COLUMNS * ROWS, len(source))
        order = np.random.default_rng(seed).choice(len(source), number, replace=False)
        items: Iterable[Item] = order.tolist()
    else:
        items = islice(source.samples(), TRIES * COLUMNS * ROWS)

    def look(encoded: bytes) -> Image.Image:
        pixels = decode(encoded, max_pixels=max_pixels, at_least=SIDE)
        return ImageOps.pad(Image.fromarray(pixels), (SIDE, SIDE), color="#f1f1f3")

    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, ROWS * (CELL + GAP) + GAP), "white")
    pen, font, shown = ImageDraw.Draw(sheet), _font(), 0
    for item in items:
        try:
            sample, image = read_image(source, item, look)
        except BadSample:
            continue
        row, column = divmod(shown, COLUMNS)
        left, top = GAP + column * (SIDE + GAP), GAP + row * (CELL + GAP)
        sheet.paste(image, (left, top))
        caption = sample.captions[0].encode("utf-8", "replace").decode()[:400]
        characters = max(1, int(SIDE * len(caption) / max(1, font.getlength(caption))))
        lines = textwrap.wrap(caption, characters, max_lines=LINES, placeholder="...")
        pen.text((left, top + SIDE + 8), "\n".join(lines), fill="#1c1c1f", font=font)
        shown += 1
        if shown == COLUMNS * ROWS:
            break
    if not shown:
        raise ValueError(f"{source.name}: none of its samples that were tried can be read")
    return sheet.crop((0, 0, sheet.width, -(-shown // COLUMNS) * (CELL + GAP) + GAP))


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, FONT_SIZE)
    return ImageFont.load_default(FONT_SIZE)
