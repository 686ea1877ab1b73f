"""What a source of pairs holds: sizes, formats, caption lengths, duplicates, what cannot be read.

Worker processes look at samples; what they hand back is counted here, so that memory grows with the
data by eight bytes a picture and eight a caption.
"""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from protoclip.data.examination import (
    CountTokens,
    Examiner,
    Facts,
    cores,
    examined,
    row_chunks,
    stream_chunks,
)
from protoclip.data.pairs import MAX_IMAGE_PIXELS, Pairs, SampleStream
from protoclip.progress import Progress, duration

SMALL_SIDES = (64, 224)
PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 100)
# Different pictures or captions, from the first on, that can become examples of repeated ones.
REMEMBERED = 50_000
EXAMPLES, EXAMPLE_NAMES = 5, 3
# Kinds of reasons that are told apart.
REASONS = 100


@dataclass(frozen=True, kw_only=True)
class Spread:
    least: float
    median: float
    most: float


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Equal contents: `values` that come more than once, and how many are `extra` to the first.

    Each example has its `count` and, in `of`, up to three sample ids, or the caption.
    """

    values: int
    extra: int
    examples: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect` found. Spreads are unset where no sample could be read.

    Attributes:
        source: Name of the source.
        pairs: Samples in it; unset for a stream.
        read: Samples that were looked at, `unreadable` ones included.
        seconds: Wall clock.
        megabytes: Of all pictures that were read, encoded; `kilobytes` is the spread over them.
        width, height, shorter_side: Pixels, upright.
        shorter_side_below: Share of pictures whose shorter side has fewer pixels than the key.
        formats, modes: How many pictures are of each (PIL's names).
        captions: How many there are; `captions_per_image` is the spread over samples.
        tokens: Percentiles of the captions' length in tokens, start and end included.
        captions_cut: Captions of more than `context_length` tokens.
        repeated_images, repeated_captions: By content, to the byte.
        reasons: How many samples are unreadable for each; numbers and details left out.
        unreadable_examples: The first ones: `sample_id`, `where`, `reason`.
        notes: What was noticed when the source was opened.
    """

    source: str
    pairs: int | None
    read: int
    seconds: float
    megabytes: float
    kilobytes: Spread | None
    width: Spread | None
    height: Spread | None
    shorter_side: Spread | None
    shorter_side_below: dict[str, float]
    formats: dict[str, int]
    modes: dict[str, int]
    captions: int
    captions_per_image: Spread | None
    context_length: int
    tokens: dict[str, int]
    captions_cut: int
    repeated_images: Repeats
    repeated_captions: Repeats
    unreadable: int
    reasons: dict[str, int]
    unreadable_examples: list[dict[str, str]]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        return asdict(self)


def inspect(
    source: Pairs | SampleStream,
    *,
    count_tokens: CountTokens,
    context_length: int,
    samples: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    max_pixels: int = MAX_IMAGE_PIXELS,
    notes: Sequence[str] = (),
    progress: bool = True,
) -> Inspection:
    """Read samples of a source, all or some, and count what they are.

    Args:
        source: Where the samples are. Of tar shards that are streamed, one pass over them.
        count_tokens: Lengths of captions in tokens, uncut, start and end included.
        context_length: Tokens that the model reads.
        samples: How many to read, drawn evenly from the whole (of a stream: from the start of
            shards that are drawn evenly); all if unset.
        seed: Determines which are drawn.
        workers: Processes; one for each core if unset. With 1 all is done in this process.
        max_pixels: Larger pictures count as unreadable.
        notes: What was noticed when the source was opened, to stand beside the findings.
        progress: Show it, on standard error.

    Raises:
        ValueError: `samples` is not positive, or unset for a stream that is not of shards, or a
            worker process was killed.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples: {samples} is too small; at least 1")
    started = time.monotonic()
    if isinstance(source, Pairs):
        chunks, total = row_chunks(len(source), samples, seed)
    else:
        chunks, total = stream_chunks(source, samples, seed)
    examiner = Examiner(
        source=source if isinstance(source, Pairs) else None,
        count_tokens=count_tokens,
        max_pixels=max_pixels,
    )
    shown = Progress(f"inspect {source.name}", total) if progress else None
    counted = _Counted()
    done = 0
    for facts, done in examined(examiner, chunks, workers or cores()):
        counted.add(facts)
        if shown is not None:
            shown.update(done, f"{counted.unreadable} unreadable" if counted.unreadable else "")
    if shown is not None and done < total:  # a stream's end shows only now
        shown.update(total)
    return counted.inspection(source, context_length, time.monotonic() - started, notes)


@dataclass(kw_only=True)
class _Contents:
    """Hashes of contents, and names of the first ones."""

    parts: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    names: dict[int, dict[str, None]] = field(default_factory=dict)

    def add(self, found: npt.NDArray[np.uint64], names: list[str]) -> None:
        self.parts.append(found)
        for content, name in zip(found.tolist(), names, strict=True):
            if len(self.names) < REMEMBERED:
                self.names.setdefault(content, {})
            known = self.names.get(content)
            if known is not None and len(known) < EXAMPLE_NAMES:
                known[name] = None

    def repeats(self) -> Repeats:
        every = np.concatenate([*self.parts, np.empty(0, np.uint64)])
        values, counts = np.unique(every, return_counts=True)
        values, counts = values[counts > 1], counts[counts > 1]
        order = np.argsort(-counts, kind="stable").tolist()
        known = (n for n in order if int(values[n]) in self.names)
        examples = [
            {"count": int(counts[n]), "of": list(self.names[int(values[n])])}
            for n in islice(known, EXAMPLES)
        ]
        return Repeats(values=len(values), extra=int(counts.sum()) - len(values), examples=examples)


@dataclass(kw_only=True)
class _Counted:
    """The sum of what was found so far."""

    read: int = 0
    unreadable: int = 0
    counts: dict[str, Counter[Any]] = field(default_factory=lambda: defaultdict(Counter))
    images: _Contents = field(default_factory=_Contents)
    captions: _Contents = field(default_factory=_Contents)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, facts: Facts) -> None:
        self.read += len(facts.sample_ids) + len(facts.bad)
        self.unreadable += len(facts.bad)
        for name, values in facts.counts.items():
            self.counts[name].update(values)
        self.images.add(facts.images, facts.sample_ids)
        self.captions.add(facts.texts, facts.captions)
        for bad in facts.bad:
            kind = re.sub(r"\d+", "N", re.sub(r" ?\(.*\)", "", bad.reason))
            known = kind in self.reasons or len(self.reasons) < REASONS
            self.reasons[kind if known else "other"] += 1
            if len(self.examples) < EXAMPLES:
                self.examples.append(
                    {"sample_id": bad.sample_id, "where": bad.where, "reason": bad.reason}
                )

    def inspection(
        self,
        source: Pairs | SampleStream,
        context_length: int,
        seconds: float,
        notes: Sequence[str],
    ) -> Inspection:
        counts, tokens = self.counts, self.counts["tokens"]
        sides = counts["shorter side"]
        small = {side: sum(n for value, n in sides.items() if value < side) for side in SMALL_SIDES}
        return Inspection(
            source=source.name,
            pairs=len(source) if isinstance(source, Pairs) else None,
            read=self.read,
            seconds=round(seconds, 2),
            megabytes=round(sum(size * n for size, n in counts["kilobytes"].items()) / 1000, 4),
            kilobytes=spread(counts["kilobytes"]),
            width=spread(counts["width"]),
            height=spread(counts["height"]),
            shorter_side=spread(sides),
            shorter_side_below={str(k): n / max(1, sides.total()) for k, n in small.items()},
            formats=dict(counts["format"].most_common()),
            modes=dict(counts["mode"].most_common()),
            captions=tokens.total(),
            captions_per_image=spread(counts["captions"]),
            context_length=context_length,
            tokens={str(p): int(percentile(tokens, p)) for p in PERCENTILES if tokens},
            captions_cut=sum(n for length, n in tokens.items() if length > context_length),
            repeated_images=self.images.repeats(),
            repeated_captions=self.captions.repeats(),
            unreadable=self.unreadable,
            reasons=dict(self.reasons.most_common()),
            unreadable_examples=self.examples,
            notes=list(notes),
        )


def percentile(counts: Counter[Any], percent: int) -> float:
    """The least value that so many percent of all values do not exceed.

    Args:
        counts: How often each value is there; not empty.
        percent: In [0, 100].
    """
    values = sorted(counts)
    below = np.cumsum([counts[value] for value in values])
    return float(values[int(np.searchsorted(100 * below, percent * below[-1]))])


def spread(counts: Counter[Any]) -> Spread | None:
    if not counts:
        return None
    least, most = float(min(counts)), float(max(counts))
    return Spread(least=least, median=percentile(counts, 50), most=most)


def table(found: Inspection) -> Table:
    """The inspection as lines of a name and what was found."""
    drawn = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    drawn.add_column(style="bold", no_wrap=True)
    drawn.add_column()
    pairs = f"{found.pairs:,}" if found.pairs is not None else "a stream"
    every = found.read == found.pairs
    drawn.add_row("pairs", pairs if every else f"{pairs}; {found.read:,} of them read")
    share = f" ({found.unreadable / found.read:.2%})" if found.unreadable else ""
    drawn.add_row("unreadable", f"{found.unreadable:,}{share}")
    size = amount(found.megabytes)
    if not every and found.pairs:
        size += f", about {amount(found.megabytes * found.pairs / found.read)} in all"
    drawn.add_row("bytes", f"{size}; {line(found.kilobytes, 'kB')}")
    drawn.add_row("width", line(found.width, "px"))
    drawn.add_row("height", line(found.height, "px"))
    small = [f"{part:.1%} below {side}" for side, part in found.shorter_side_below.items()]
    drawn.add_row("shorter side", "; ".join([line(found.shorter_side, "px"), *small]))
    drawn.add_row("formats", listed(found.formats))
    drawn.add_row("modes", listed(found.modes))
    drawn.add_row("captions", f"{found.captions:,}; {line(found.captions_per_image)} a picture")
    lengths = ", ".join(f"{percent}%: {length}" for percent, length in found.tokens.items())
    drawn.add_row("tokens, percentiles", lengths or "-")
    cut = found.captions_cut / max(1, found.captions)
    drawn.add_row(
        f"longer than {found.context_length} tokens", f"{found.captions_cut:,} captions ({cut:.1%})"
    )
    for name, repeats in (
        ("repeated pictures", found.repeated_images),
        ("repeated captions", found.repeated_captions),
    ):
        what = f"{repeats.extra:,} copies of {repeats.values:,}" if repeats.values else "none"
        drawn.add_row(name, what if every else f"{what} among those read")
        for example in repeats.examples:
            drawn.add_row("", Text(f"{example['count']} x  {cut_off(', '.join(example['of']))}"))
    if found.unreadable:
        drawn.add_row("reasons", Text(listed(found.reasons)))
    for example in found.unreadable_examples:
        drawn.add_row("", Text(f"{example['sample_id']}: {example['reason']}"))
    for note in found.notes:
        drawn.add_row("note", Text(note))
    return drawn


def line(spread: Spread | None, unit: str = "") -> str:
    if spread is None:
        return "-"
    least, median, most = (f"{n:,.1f}".removesuffix(".0") for n in astuple(spread))
    numbers = least if least == most else f"{least} to {most}, median {median}"
    return f"{numbers} {unit}".rstrip()


def amount(megabytes: float) -> str:
    return f"{megabytes:,.1f} MB" if megabytes < 1000 else f"{megabytes / 1000:,.1f} GB"


def listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items()) or "-"


def cut_off(text: str, length: int = 90) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def show(found: Inspection) -> None:
    """Print the inspection."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(f"{found.source}, in {duration(found.seconds)}", highlight=False, markup=False)
    console.print(table(found), highlight=False)
