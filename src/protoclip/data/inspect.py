"""What a source of pairs holds: sizes, formats, caption lengths, duplicates, unreadable samples.

Worker processes look at samples; the results are counted here, so that memory grows with the data
by eight bytes an image and eight a caption.
"""

import contextlib
import hashlib
import io
import os
import re
import textwrap
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset

from protoclip.data.access import visible
from protoclip.data.decode import READERS, decode, dimensions
from protoclip.data.loader import Item, items_of, read_sample
from protoclip.data.mixture import MixedStreams, under
from protoclip.data.pairs import MAX_IMAGE_PIXELS, BadSample, Pairs, Sample, SampleStream
from protoclip.data.stream import ShardStream, read_shard
from protoclip.progress import Progress, duration

SMALL_SIDES = (64, 224)
PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 100)
# The first so many different images and captions can become examples of repeated ones.
REMEMBERED = 50_000
EXAMPLES, EXAMPLE_NAMES = 5, 3
REASONS = 100  # kinds of reasons that are counted separately
# Samples of a chunk, which goes to a worker, and bytes from which on it has fewer.
CHUNK, CHUNK_BYTES = 64, 1 << 23
# JPEGs are decoded as far as training with inputs of this size would.
DECODED_SIDE = 224
CAPTION_LENGTH = 200  # characters of a caption that are kept as an example

# Items, each with how far the work is before it.
Numbered = Iterable[tuple[int, Item]]


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
    progress: bool = True,
) -> dict[str, Any]:
    """Read samples of a source, all or some, and count what they are, as JSON values.

    Args:
        source: Where the samples are. Of tar shards that are streamed, one pass over them.
        count_tokens: Lengths of captions in tokens, not truncated, start and end included.
        context_length: Tokens that the model reads.
        samples: How many to read, drawn evenly from the whole (of a stream: from the starts of
            shards that are drawn evenly); all if unset.
        seed: Determines which are drawn.
        workers: Processes; one for each core if unset. With 1 all is done in this process.
        max_pixels: Larger images count as unreadable.
        notes: What was noticed when the source was opened, to stand beside the findings.
        progress: Show it, on standard error.

    Raises:
        ValueError: `samples` is not positive, a stream is not of shards, or a worker was killed.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples: {samples} is too small; at least 1")
    started = time.monotonic()
    items: Numbered
    if isinstance(source, Pairs):
        some = samples is not None and samples < len(source)
        rows = drawn(len(source), samples or 0, seed) if some else range(len(source))
        items, total = enumerate(rows), len(rows)
    else:
        items, total = _of_shards(source, samples, seed)
    workers = workers or cores()
    loader = DataLoader(
        _Examiner(source=source, count_tokens=count_tokens, max_pixels=max_pixels),
        sampler=_chunks(items, total),
        batch_size=None,
        num_workers=workers if workers > 1 else 0,
    )
    shown = Progress(f"inspect {source.name}", total) if progress else None
    tally = _Tally()
    for chunk in items_of(loader):
        tally.add(chunk.items)
        if shown is not None:
            shown.update(chunk.done, f"{tally.unreadable} unreadable" if tally.unreadable else "")
    return {
        "source": source.name,
        "pairs": len(source) if isinstance(source, Pairs) else None,
        **tally.report(context_length),
        "notes": list(notes),
        "seconds": round(time.monotonic() - started, 2),
    }


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def drawn(total: int, number: int, seed: int) -> list[int]:
    """So many different numbers below `total`, in order: one from each of equal parts."""
    bounds = np.arange(number + 1, dtype=np.int64) * total // number
    chosen: list[int] = np.random.default_rng(seed).integers(bounds[:-1], bounds[1:]).tolist()
    return chosen


def _of_shards(source: SampleStream, samples: int | None, seed: int) -> tuple[Numbered, int]:
    """Samples to look at, and how many they are; the number of shards if that is not known."""
    streams = source.streams if isinstance(source, MixedStreams) else [source]
    shards = [(s, shard) for s in streams if isinstance(s, ShardStream) for shard in s.shards]
    if not shards:
        raise ValueError(f"{source.name}: has no end; only streams of tar shards can be inspected")

    def read(stream: ShardStream, shard: str) -> Iterator[Item]:
        for item in read_shard(shard, stream.caption_keys, stream.access):
            yield item if stream is source else under(stream.name, item)

    if samples is None:
        numbered = ((done, item) for done, each in enumerate(shards) for item in read(*each))
        return numbered, len(shards)
    most = max(CHUNK, -(-samples // len(shards)))
    chosen = drawn(len(shards), min(len(shards), -(-samples // most)), seed)
    found = (item for number in chosen for item in islice(read(*shards[number]), most))
    return zip(range(samples), found, strict=False), samples


@dataclass(frozen=True)
class _Chunk:
    """Work for a worker, or what it found; and how far the work is after it."""

    done: int
    items: list[Any]


def _chunks(numbered: Numbered, total: int) -> Iterator[_Chunk]:
    chunk: list[Item] = []
    size = 0
    for done, item in numbered:
        chunk.append(item)
        size += len(item.image) if isinstance(item, Sample) else 0
        if len(chunk) == CHUNK or size >= CHUNK_BYTES:
            yield _Chunk(done, chunk)
            chunk, size = [], 0
    yield _Chunk(total, chunk)


class _Facts(NamedTuple):
    """One sample: values to count, and its captions with their hashes and lengths in tokens."""

    sample_id: str
    content: int
    values: dict[str, int | float | str]
    captions: list[tuple[str, int, int]]


@dataclass(frozen=True, kw_only=True)
class _Examiner(Dataset[_Chunk]):
    """Looks at samples, in worker processes. Its index is a chunk of them."""

    source: Pairs | SampleStream
    count_tokens: Callable[[list[str]], list[int]]
    max_pixels: int

    def __getitem__(self, chunk: _Chunk) -> _Chunk:
        return _Chunk(chunk.done, [self.examine(item) for item in chunk.items])

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
        reader = next(found for start, found in READERS if sample.image.startswith(start))
        header = reader(io.BytesIO(sample.image))
        texts = list(sample.captions)
        hashes = [_hash(text.encode("utf-8", "surrogatepass")) for text in texts]
        lengths = self.count_tokens(texts)
        return _Facts(
            sample_id=sample.sample_id,
            content=_hash(sample.image),
            values={
                "width": width,
                "height": height,
                "shorter_side": min(width, height),
                "kilobytes": round(len(sample.image) / 1000, 1),
                "formats": str(header.format),
                "modes": header.mode,
                "captions_per_image": len(texts),
            },
            captions=list(zip((t[:CAPTION_LENGTH] for t in texts), hashes, lengths, strict=True)),
        )


def _hash(content: bytes) -> int:
    """Eight bytes; two of a billion contents share them with a probability of 3%."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class _Contents:
    """Hashes of contents, and the names of the first ones."""

    def __init__(self) -> None:
        self.hashes = array("Q")
        self.names: dict[int, dict[str, None]] = {}

    def add(self, content: int, name: str) -> None:
        self.hashes.append(content)
        if content in self.names or len(self.names) < REMEMBERED:
            names = self.names.setdefault(content, {})
            if len(names) < EXAMPLE_NAMES:
                names[name] = None

    def repeats(self) -> dict[str, Any]:
        values, counts = np.unique(np.array(self.hashes, dtype=np.uint64), return_counts=True)
        values, counts = values[counts > 1], counts[counts > 1]
        order = np.argsort(-counts, kind="stable")
        ranked = zip(values[order].tolist(), counts[order].tolist(), strict=True)
        known = ({"count": n, "of": list(self.names[v])} for v, n in ranked if v in self.names)
        extra = int(counts.sum()) - len(values)
        return {"values": len(values), "extra": extra, "examples": list(islice(known, EXAMPLES))}


class _Tally:
    """What was found so far. Its size is bounded but for the hashes of contents."""

    def __init__(self) -> None:
        self.read = self.unreadable = 0
        self.counts: dict[str, Counter[Any]] = defaultdict(Counter)
        self.images, self.captions = _Contents(), _Contents()
        self.examples: list[dict[str, str]] = []

    def add(self, found: list[_Facts | BadSample]) -> None:
        self.read += len(found)
        for each in found:
            if isinstance(each, BadSample):
                self.add_bad(each)
                continue
            self.images.add(each.content, each.sample_id)
            for name, value in each.values.items():
                self.counts[name][value] += 1
            for text, content, length in each.captions:
                self.captions.add(content, text)
                self.counts["tokens"][length] += 1

    def add_bad(self, bad: BadSample) -> None:
        self.unreadable += 1
        reasons = self.counts["reasons"]
        kind = re.sub(r"\d+", "N", re.sub(r" ?\(.*\)", "", bad.reason))
        reasons[kind if kind in reasons or len(reasons) < REASONS else "other"] += 1
        if len(self.examples) < EXAMPLES:
            facts = {"sample_id": bad.sample_id, "where": bad.where, "reason": bad.reason}
            self.examples.append(facts)

    def report(self, context_length: int) -> dict[str, Any]:
        counts, tokens, sides = self.counts, self.counts["tokens"], self.counts["shorter_side"]
        small = {side: sum(n for value, n in sides.items() if value < side) for side in SMALL_SIDES}
        kilobytes = sum(size * n for size, n in counts["kilobytes"].items())
        measured = ("kilobytes", "width", "height", "shorter_side")
        return {
            "read": self.read,
            "unreadable": self.unreadable,
            "reasons": dict(counts["reasons"].most_common()),
            "unreadable_examples": self.examples,
            "megabytes": round(kilobytes / 1000, 4),
            **{name: spread(counts[name]) for name in measured},
            "shorter_side_below": {str(k): n / max(1, sides.total()) for k, n in small.items()},
            "formats": dict(counts["formats"].most_common()),
            "modes": dict(counts["modes"].most_common()),
            "captions": tokens.total(),
            "captions_per_image": spread(counts["captions_per_image"]),
            "tokens": {str(p): int(percentile(tokens, p)) for p in PERCENTILES if tokens},
            "context_length": context_length,
            "captions_cut": sum(n for length, n in tokens.items() if length > context_length),
            "repeated_images": self.images.repeats(),
            "repeated_captions": self.captions.repeats(),
        }


def percentile(counts: Counter[Any], percent: int) -> float:
    """The least value that so many percent of all values do not exceed; of a non-empty count."""
    values = sorted(counts)
    below = np.cumsum([counts[value] for value in values])
    return float(values[int(np.searchsorted(100 * below, percent * below[-1]))])


def spread(counts: Counter[Any]) -> dict[str, float] | None:
    points = {"least": 0, "median": 50, "most": 100}
    return {name: percentile(counts, p) for name, p in points.items()} if counts else None


def show(found: dict[str, Any]) -> None:
    """Print what `inspect` found, a line each."""
    print(f"{visible(found['source'])}, in {duration(found['seconds'])}")
    for name, value in found.items():
        if name not in ("source", "seconds") and value not in (None, [], {}):
            label = name.replace("_", " ")
            for line in _lines(value):
                print(f"{label:22} {visible(line)}")
                label = ""


def _lines(value: Any) -> Iterator[str]:
    """The lines that show one finding."""
    if isinstance(value, list):
        for each in value:
            yield each if isinstance(each, str) else f"{each['sample_id']}: {each['reason']}"
    elif isinstance(value, dict) and "examples" in value:
        yield f"{value['extra']:,} copies of {value['values']:,}" if value["values"] else "none"
        for each in value["examples"]:
            names = textwrap.shorten(", ".join(each["of"]), 90, placeholder="...")
            yield f"{each['count']} x  {names}"
    elif isinstance(value, dict):
        yield ", ".join(f"{key}: {_number(each)}" for key, each in value.items())
    else:
        yield _number(value)


def _number(value: int | float) -> str:
    return f"{round(value, 3):,}".removesuffix(".0")


# Of the montage, in pixels.
SIDE, GAP, FONT_SIZE, LINE, LINES = 192, 20, 14, 19, 3
CELL = SIDE + 8 + LINES * LINE
FRAME, INK = "#f1f1f3", "#1c1c1f"
ENLARGED = 3  # a small image is not enlarged further
TRIES = 10  # samples that are tried for each that is shown
# PIL's own font has Latin letters only. These are found by name where a system has them.
FONTS = """NotoSans-Regular.ttf NotoSans[wght].ttf DejaVuSans.ttf Arial.ttf arial.ttf
    NotoSansCJK-Regular.ttc NotoSansCJK-VF.ttf.ttc NotoSansCJKsc-Regular.otf wqy-microhei.ttc
    DroidSansFallbackFull.ttf PingFang.ttc msyh.ttc malgun.ttf AppleSDGothicNeo.ttc YuGothM.ttc
    NotoSansArabic-Regular.ttf NotoSansHebrew-Regular.ttf NotoSansThai-Regular.ttf Nirmala.ttf
    NotoSansDevanagari-Regular.ttf NotoSansBengali-Regular.ttf NotoSansTamil-Regular.ttf
    leelawui.ttf Symbola.ttf FreeSans.ttf unifont.otf unifont.ttf"""
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def montage(
    source: Pairs | SampleStream,
    *,
    columns: int = 6,
    rows: int = 4,
    seed: int = 0,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Image.Image:
    """Draw random pairs of a source in a grid: images with their captions below.

    Args:
        source: Where the samples are. Of a stream the first ones are shown.
        columns, rows: Of the grid; fewer are used if there are fewer pairs.
        seed: Determines which pairs.
        max_pixels: Larger images count as unreadable; unreadable samples are left out.

    Raises:
        ValueError: No sample can be read.
    """
    wanted = columns * rows
    if isinstance(source, Pairs):
        number = min(TRIES * wanted, len(source))
        order = np.random.default_rng(seed).choice(len(source), number, replace=False)
        items: Iterable[Item] = order.tolist()
    else:
        items = islice(source.samples(), TRIES * wanted)
    cells = list(islice(_cells(source, items, max_pixels), wanted))
    if not cells:
        raise ValueError(f"{source.name}: none of its samples that were tried can be read")
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, rows * (CELL + GAP) + GAP), "white")
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        sheet.paste(cell, (GAP + column * (SIDE + GAP), GAP + row * (CELL + GAP)))
    return sheet


def _cells(
    source: Pairs | SampleStream, items: Iterable[Item], max_pixels: int
) -> Iterator[Image.Image]:
    """An image with its caption below, for each sample that can be read."""
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
        draw = ImageDraw.Draw(cell)
        draw.rectangle((0, 0, SIDE - 1, SIDE - 1), fill=FRAME)
        cell.paste(image, ((SIDE - width) // 2, (SIDE - height) // 2))
        caption = sample.captions[0].encode("utf-8", "replace").decode()
        font = font_of(caption)
        for number, line in enumerate(wrapped(caption, font)):
            draw.text((0, SIDE + 8 + number * LINE), line, fill=INK, font=font)
        yield cell


def wrapped(text: str, font: Font) -> list[str]:
    """A caption in lines of about the width of a cell; dots replace what is too long."""
    text = " ".join(text.split())[:400]
    characters = max(1, int(SIDE * len(text) / max(1, font.getlength(text))))
    return textwrap.wrap(text, characters, max_lines=LINES, placeholder="...")


def font_of(text: str) -> Font:
    """The first font that has most of a text's characters."""
    characters = set("".join(text.split()))
    return max(_fonts(), key=lambda font: sum(has(font, each) for each in characters))


@cache
def _fonts() -> list[Font]:
    """The fonts of this system, and PIL's own."""
    found: list[Font] = []
    for name in FONTS.split():
        with contextlib.suppress(OSError):  # not on this system
            found.append(ImageFont.truetype(name, FONT_SIZE))
    return [*found, ImageFont.load_default(FONT_SIZE)]


@cache
def has(font: Font, character: str) -> bool:
    # No font has the other character: it shows what a font draws for one that it lacks.
    shape, missing = font.getmask(character), font.getmask("\U0010fffe")
    return shape.size != missing.size or bytes(shape) != bytes(missing)
