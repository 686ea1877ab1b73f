"""What a source of pairs holds: sizes, formats, caption lengths, duplicates, unreadable samples.

Memory grows with the data by eight bytes an image and eight a caption.
"""

import hashlib
import re
import textwrap
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader

from protoclip.data.access import MISSING
from protoclip.data.decode import decode, dimensions, open_image
from protoclip.data.loader import items_of, read_image
from protoclip.data.pairs import MAX_IMAGE_PIXELS, BadSample, Pairs, SampleStream, evenly_spaced
from protoclip.data.stream import ShardStream
from protoclip.data.summary import choose_context_length
from protoclip.distributed.cores import cores
from protoclip.progress import Progress
from protoclip.terminal import visible

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
MEASURED = ("kilobytes", "width", "height", "shorter_side", "captions_per_image", "tokens")
REMEMBERED = 100_000  # Keep examples of at most this many contents.
REASONS = 100  # that are counted by themselves
EXAMPLES, NAME_LENGTH = 5, 90
# Up to how many pairs a way is advised, and its row in docs/which_way.md.
WAYS = {
    500: "take a published model as it is, or protoclip align, with --data.validation 0.2",
    100_000: "protoclip align, two pretrained halves",
    1_000_000: "protoclip align, then protoclip finetune of the run, with --guard",
    10_000_000: "protoclip finetune of a published model, with --guard",
}
MORE = "protoclip train, by a recipe"  # than any of these
NONE_READ = "mend what the reasons name, and look again: no pair could be read"
NONE_THERE = (
    "no image is where the pairs name it: name the folder in which their paths start with "
    "--data.root, and look again"
)
UNCOUNTED = "count the pairs of this stream with --every (docs/which_way.md)"
CHUNK = 64  # samples that a worker looks at together
DECODED_SIDE = 224  # JPEGs are decoded as far as inputs of this size need


def inspect(
    source: Pairs | SampleStream,
    *,
    count_tokens: Callable[[list[str]], list[int]],
    context_length: int | None,
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
        context_length: Tokens that the model reads; unset, as many as small towers would here.
        samples: How many to read, drawn evenly from the whole (of a stream: at least as many, from
            the starts of shards that are drawn evenly); all if unset.
        workers: Processes; one for each core if unset. With 1 or 0 all is done in this process.

    Raises:
        ValueError: The stream is not of shards, or a worker was killed.
    """
    parts, is_all = _divide(source, samples, seed)
    if workers is None:
        workers = cores()
    loader: DataLoader[list[_Facts | BadSample]] = DataLoader(
        parts,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers if workers > 1 else 0,
        collate_fn=partial(_examine, count_tokens, max_pixels),
    )
    progress = Progress(f"inspect {source.name}", len(parts))
    read_of_parts: list[int] = []

    def samples_of_parts() -> Iterator[_Facts | BadSample]:
        for done, samples_of_part in enumerate(items_of(loader), 1):
            yield from samples_of_part
            read_of_parts.append(len(samples_of_part))
            progress.update(done)

    facts = _tally(samples_of_parts(), context_length)
    number = len(source) if isinstance(source, Pairs) else None
    pairs = sum(read_of_parts) if number is None else number
    ended = (
        part.most is None or n < part.most for part, n in zip(parts, read_of_parts, strict=True)
    )
    is_counted = number is not None or (is_all and all(ended))
    return {
        "source": source.name,
        "pairs": number,
        **facts,
        "notes": list(notes),
        "next": (size_hint(pairs) if is_counted else UNCOUNTED)
        if facts["read"]
        else fix_hint(facts),
    }


def fix_hint(facts: Mapping[str, Any]) -> str:
    """Advice if no pair could be read, in a line."""
    return NONE_THERE if {*facts["reasons"]} == {MISSING} else NONE_READ


def size_hint(pairs: int) -> str:
    """Advice for this number of pairs, in a line."""
    advice = next((advice for most, advice in WAYS.items() if pairs <= most), MORE)
    return f"{advice} (docs/which_way.md)"


class _Part(NamedTuple):
    """Rows of pairs, or a shard of a stream, with at most `most` samples (None: all)."""

    source: Any
    items: Any
    most: int | None = None


def _divide(
    source: Pairs | SampleStream, samples: int | None, seed: int
) -> tuple[list[_Part], bool]:
    """The parts to look at, and whether they cover the source."""
    if isinstance(source, Pairs):
        some = samples is not None and samples < len(source)
        rows = evenly_spaced(len(source), samples or 0, seed) if some else range(len(source))
        firsts = range(0, len(rows), CHUNK)
        return [_Part(source, rows[first : first + CHUNK]) for first in firsts], not some
    streams = [stream for stream in source.sources if isinstance(stream, ShardStream)]
    shards = [_Part(stream, shard) for stream in streams for shard in stream.shards]
    if not shards:
        raise ValueError(f"{source.name}: has no end; only streams of tar shards can be inspected")
    if samples is None:
        return shards, True
    number = min(len(shards), -(-samples // CHUNK))
    most = -(-samples // number)
    drawn = [shards[n]._replace(most=most) for n in evenly_spaced(len(shards), number, seed)]
    return drawn, number == len(shards)


# Values of one sample by name; an image or caption is its hash and how to show it.
_Facts = dict[str, list[Any]]


def _examine(
    count_tokens: Callable[[list[str]], list[int]], max_pixels: int, part: _Part
) -> list[_Facts | BadSample]:
    """Look at the samples of a part; in worker processes."""
    source, items = part.source, part.items
    if isinstance(items, str):
        items = islice(source.read(items), part.most)
    samples: list[_Facts | BadSample] = []
    for item in items:
        try:
            sample, facts = read_image(source, item, partial(_measure, max_pixels))
        except BadSample as error:
            samples.append(error)
            continue
        texts = [text.encode("utf-8", "surrogatepass") for text in sample.captions]
        facts["image"] = [(_hash(sample.image), sample.sample_id)]
        facts["caption"] = list(zip(map(_hash, texts), sample.captions, strict=True))
        facts["captions_per_image"] = [len(texts)]
        facts["tokens"] = count_tokens(list(sample.captions))
        samples.append(facts)
    return samples


def _measure(max_pixels: int, encoded: bytes) -> _Facts:
    width, height = dimensions(encoded, max_pixels=max_pixels)
    decode(encoded, max_pixels=max_pixels, at_least=DECODED_SIDE)
    return {
        "width": [width],
        "height": [height],
        "shorter_side": [min(width, height)],
        "kilobytes": [round(len(encoded) / 1000, 1)],
        "formats": [open_image(encoded, max_pixels=max_pixels).format],
    }


def _hash(content: bytes) -> int:
    """Eight bytes; two of a billion contents share them with a probability of 3%."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _tally(samples: Iterable[_Facts | BadSample], context_length: int | None) -> dict[str, Any]:
    """What samples are, counted: those that were `read`, and the `unreadable` ones.

    Memory is bounded, except for the hashes of contents.
    """
    read, unreadable = 0, list[str]()
    counts: dict[str, Counter[Any]] = defaultdict(Counter)
    hashes = {"image": array("Q"), "caption": array("Q")}
    names: dict[int, str] = {}
    reasons, tokens = counts["reasons"], counts["tokens"]
    for facts in samples:
        if isinstance(facts, BadSample):
            unreadable = [*unreadable, str(facts)][:EXAMPLES]
            # Without the details and numbers of this sample; that of UTF-8 is part of a word.
            reason = re.sub(r" ?\(.*\)", "", facts.reason)
            reason = re.sub(r"(?<![\w-])\d+\b", "N", reason)[:NAME_LENGTH]
            reasons[reason if reason in reasons or len(reasons) < REASONS else "other"] += 1
            continue
        read += 1
        for kind in hashes:
            for content, name in facts.pop(kind):
                hashes[kind].append(content)
                if content not in names and len(names) < REMEMBERED:
                    names[content] = textwrap.shorten(name, NAME_LENGTH, placeholder="...")
                if content in names:
                    counts[kind][content] += 1
        for name, values in facts.items():
            counts[name].update(values)
    if context_length is None:
        context_length = choose_context_length(tokens.elements())
    report = {
        "read": read,
        "unreadable": reasons.total(),
        "reasons": dict(reasons.most_common()),
        "unreadable_examples": unreadable,
        "formats": dict(counts["formats"].most_common()),
        "captions": tokens.total(),
        **{name: percentiles(counts[name]) for name in MEASURED},
        "context_length": context_length,
        "captions_cut": sum(n for length, n in tokens.items() if length > context_length),
    }
    for kind, numbers in hashes.items():
        different = len(np.unique(np.array(numbers, dtype=np.uint64)))
        common = counts[kind].most_common(EXAMPLES)
        report[f"repeated_{kind}_copies"] = len(numbers) - different
        report[f"repeated_{kind}_examples"] = [f"{n} x {names[c]}" for c, n in common if n > 1]
    return report


def percentiles(counts: Counter[Any]) -> dict[str, int | float]:
    """For each percentage, the least value that this share of all values does not exceed."""
    values = sorted(counts)
    below = np.cumsum([counts[value] for value in values])
    numbers = {p: int(np.searchsorted(100 * below, p * below[-1])) for p in PERCENTILES if values}
    return {str(p): values[number] for p, number in numbers.items()}


def show(report: dict[str, Any], *, by_captions: bool = False) -> None:
    """Print what `inspect` found, a line each; of what is measured, `50%` is the median.

    Args:
        by_captions: No model says how many tokens are read; the length follows from the captions.
    """
    for name, value in report.items():
        if value in (None, [], {}):
            continue
        if isinstance(value, dict):
            mark = "%" if name in MEASURED else ""
            value = ", ".join(f"{key}{mark}: {count:,}" for key, count in value.items())
        if name == "context_length" and by_captions:
            value = f"{value} tokens, by these captions; --model.text.name takes a model's"
        label = name.replace("_", " ")
        for line in value if isinstance(value, list) else [value]:
            text = f"{line:,}" if isinstance(line, int) else visible(line)
            print(f"{label:24} {text}")
            label = ""
