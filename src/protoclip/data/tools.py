"""What `data inspect` and `data pack` do: count what a source holds, and write it as tar shards.

An inspection's memory grows with the data by eight bytes an image and eight a caption. A list of
the complete shards is kept beside them, so packing goes on after the last.
"""

import io
import json
import os
import re
import textwrap
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from protoclip.config import shown
from protoclip.data.access import MISSING, digest
from protoclip.data.bands import find_size, is_plain, read_values
from protoclip.data.captions import hash_content
from protoclip.data.decode import decode, decode_crop, open_image
from protoclip.data.decode import resize as resize_pixels
from protoclip.data.loader import iterate_items, read_image
from protoclip.data.pairs import BadSample, ImageTextPairs, Pairs, SampleStream, evenly_spaced
from protoclip.data.summary import choose_context_length
from protoclip.data.transforms import clip_transform
from protoclip.distributed.collectives import count_cores
from protoclip.files import left_by_killed, lock_path, read_json, replacing, write_atomically
from protoclip.progress import Progress
from protoclip.terminal import say, visible

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
MEASURED = ("kilobytes", "width", "height", "shorter_side", "captions_per_image", "tokens")
REMEMBERED = 100_000  # Keep the names of at most this many contents.
REASONS = 100  # that are counted by themselves
EXAMPLES, UNREADABLE, NAME_LENGTH = 5, 20, 90  # how many are named, in how many characters
OF_TOWERS = ("context_length", "captions_cut", "enough_for_cards")  # shown if a model is named
# Up to how many pairs a way is advised, and its row in docs/which_way.md.
WAYS = {
    500: "take a published model as it is, or protoclip align, with --data.validation 0.2",
    100_000: "protoclip align, two pretrained encoders",
    1_000_000: "protoclip align, then protoclip finetune of the run, with --guard",
    10_000_000: "protoclip finetune of a published model, with --guard",
}
MORE = "protoclip train, by a recipe"  # than any of these
UNCOUNTED = "count the pairs of this stream with --every (docs/which_way.md)"
NONE_READ = "mend what the reasons name, and look again: no pair could be read"
NONE_THERE = (
    "no image is where the pairs name it: name the folder in which their paths start with "
    "--root, and look again"
)
CHUNK = 64  # samples that a worker looks at together
# What is timed: a crop for towers of 224 pixels, of 95% of an image.
CROP = clip_transform(size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
# Pairs a second that a card trains: at 20% of an H100's bf16 peak, and as open_clip published.
CARDS = {
    "ViT-B/32 on an H100": 4460,
    "ViT-B/16 on an H100": 1605,
    "ViT-B/32 on an A100": 773,
    "ViT-B/16 on an A100": 332,
}

MANIFEST, SKIPPED = "pack.json", "skipped.jsonl"
JPEG_QUALITY = 95
JPEG_PIXELS = 65_500  # on a side, that libjpeg writes at most
SHARD_BYTES = 1 << 30  # a shard ends once it has as much content
PREPARED = 256  # samples that threads prepare at a time
# Images that start like this are stored as they are; others become JPEG.
STORED = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"GIF8", "gif"))

# Values of one sample by name; an image or caption is its hash and how to show it.
Measures = dict[str, list[Any]]
Part = tuple[Any, Any, int | None]  # a source, rows or a shard of it, and how many samples at most


def inspect(
    source: Pairs | SampleStream,
    *,
    count_tokens: Callable[[list[str]], list[tuple[int, int]]],
    context_length: int | None,
    samples: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Read samples of a source, all or some, and count what they are, as JSON values.

    Args:
        source: Rows in any order, or a stream of tar shards, which is read once.
        count_tokens: For each caption its tokens, not truncated, start and end included; and how
            many of them stand for text that the tokenizer does not know.
        context_length: Tokens that the model reads; unset, as many as small towers would here.
        samples: How many to read, drawn evenly from the whole (of a stream: at least as many, from
            the starts of shards that are drawn evenly); all if unset.
        workers: Processes; one for each core if unset. With 1 or 0 all is done in this process.

    Raises `ValueError` if a worker was killed.
    """
    parts = _divide(source, samples, seed)
    workers = count_cores() if workers is None else workers
    loader: DataLoader[tuple[list[Measures | BadSample], float]] = DataLoader(
        parts,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers if workers > 1 else 0,
        collate_fn=partial(_measure_part, count_tokens),
    )
    progress, seconds = Progress(f"inspect {source.name}", len(parts)), 0.0

    def measure_all() -> Iterator[Measures | BadSample]:
        nonlocal seconds
        for done, (samples_of_part, taken) in enumerate(iterate_items(loader), 1):
            seconds += taken
            yield from samples_of_part
            progress.update(done)

    facts = _tally(measure_all(), context_length)
    rate = facts["read"] * max(1, workers) / max(seconds, 1e-9)
    number = len(source) if isinstance(source, Pairs) else None
    if not facts["read"]:
        advice = NONE_THERE if {*facts["reasons"]} == {MISSING} else NONE_READ
    elif number is None and samples is not None:
        advice = UNCOUNTED
    else:
        advice = advise(facts["read"] + facts["unreadable"] if number is None else number)
    speed = {"images_per_second": round(rate), "processes": max(1, workers)}
    speed["enough_for_cards"] = {card: round(rate / pairs, 2) for card, pairs in CARDS.items()}
    return {
        **{"source": source.name, "pairs": number, **facts, **speed},
        **{"notes": list(notes), "next": advice},
    }


def advise(pairs: int) -> str:
    """Advice for this number of pairs, in a line."""
    advice = next((advice for most, advice in WAYS.items() if pairs <= most), MORE)
    return f"{advice} (docs/which_way.md)"


def _divide(source: Pairs | SampleStream, samples: int | None, seed: int) -> list[Part]:
    """The parts to look at."""
    if isinstance(source, Pairs):
        number = len(source)
        rows = range(number) if samples is None else evenly_spaced(number, samples, seed)
        firsts = range(0, len(rows), CHUNK)
        return [(source, rows[first : first + CHUNK], None) for first in firsts]
    shards = [(stream, shard) for stream in source.sources for shard in stream.shards]
    if samples is None:
        return [(stream, shard, None) for stream, shard in shards]
    number = min(len(shards), -(-samples // CHUNK))
    chosen = evenly_spaced(len(shards), number, seed)
    return [(*shards[n], -(-samples // number)) for n in chosen]


def _measure_part(
    count_tokens: Callable[[list[str]], list[tuple[int, int]]], part: Part
) -> tuple[list[Measures | BadSample], float]:
    """Look at the samples of a part, in a worker; and the seconds of reading and cropping."""
    (source, items, most), seconds, started = part, 0.0, time.perf_counter()
    if isinstance(items, str):
        items = islice(source.read(items), most)
    samples: list[Measures | BadSample] = []
    for item in items:
        try:
            sample, facts = read_image(source, item, _measure_image)
        except BadSample as error:
            samples.append(error)
            continue
        seconds += time.perf_counter() - started
        facts["image"] = [(hash_content(sample.image), sample.sample_id)]
        facts["blank"] = [sample.sample_id] * facts["blank"][0]
        facts["caption"] = [(hash_content(text), text) for text in sample.captions]
        facts["captions_per_image"] = [len(sample.captions)]
        counted = count_tokens(list(sample.captions))
        facts["tokens"] = [number for number, _ in counted]
        columns = source.name_captions(item) if isinstance(source, ImageTextPairs) else ()
        facts["known"] = [*zip(columns or repeat("captions"), counted, strict=False)]
        samples.append(facts)
        started = time.perf_counter()
    return samples, seconds


def _measure_image(encoded: bytes) -> Measures:
    width, height = find_size(encoded)
    if plain := is_plain(encoded):
        box = partial(CROP.box, draws=np.full(4, 0.5, np.float32))
        values: Any = decode_crop(encoded, box, CROP.size)
    else:
        values, _ = read_values(encoded)
    return {
        "blank": [bool((values == values[0, 0]).all())],  # except a margin
        "width": [width],
        "height": [height],
        "shorter_side": [min(width, height)],
        "kilobytes": [round(len(encoded) / 1000, 1)],
        "formats": [open_image(encoded).format if plain else "array"],
    }


def _tally(samples: Iterable[Measures | BadSample], context_length: int | None) -> dict[str, Any]:
    """What samples are, counted: those that were `read`, and the `unreadable` ones."""
    read, unreadable = 0, list[str]()
    blank, blank_examples = 0, list[str]()
    counts: dict[str, Counter[Any]] = defaultdict(Counter)
    hashes = {"image": array("q"), "caption": array("q")}
    names: dict[int, str] = {}
    reasons, tokens = counts["reasons"], counts["tokens"]
    text_tokens, unknown_tokens = Counter[str](), Counter[str]()  # by the column of the caption
    for facts in samples:
        if isinstance(facts, BadSample):
            unreadable = [*unreadable, str(facts)][:UNREADABLE]
            # Without the details and numbers of this sample; that of UTF-8 is part of a word.
            reason = re.sub(r" ?\(.*\)", "", facts.reason)
            reason = re.sub(r"(?<![\w-])\d+\b", "N", reason)[:NAME_LENGTH]
            reasons[reason if reason in reasons or len(reasons) < REASONS else "other"] += 1
            continue
        read += 1
        blank += len(blank_names := facts.pop("blank"))
        blank_examples = [*blank_examples, *blank_names][:EXAMPLES]
        for column, (number, unknown) in facts.pop("known"):
            text_tokens[column] += number - 2  # start and end
            unknown_tokens[column] += unknown
        for kind in hashes:
            for content, name in facts.pop(kind):
                hashes[kind].append(content)
                if len(names) < REMEMBERED:
                    names.setdefault(
                        content, textwrap.shorten(name, NAME_LENGTH, placeholder="...")
                    )
        for name, values in facts.items():
            counts[name].update(values)
    if context_length is None:
        context_length = choose_context_length(tokens.elements())
    report = {
        "read": read,
        "unreadable": reasons.total(),
        "reasons": dict(reasons.most_common()),
        "unreadable_examples": unreadable,
        "blank_images": blank,
        "blank_image_examples": blank_examples,
        "formats": dict(counts["formats"].most_common()),
        "captions": tokens.total(),
        **{name: _find_percentiles(counts[name]) for name in MEASURED},
        "context_length": context_length,
        "captions_cut": sum(n for length, n in tokens.items() if length > context_length),
        "unknown_tokens": {
            name: round(unknown_tokens[name] / max(1, n), 3) for name, n in text_tokens.items()
        },
    }
    for kind, numbers in hashes.items():
        contents, copies = np.unique(np.array(numbers, dtype=np.int64), return_counts=True)
        common = [number for number in np.argsort(-copies, kind="stable") if copies[number] > 1]
        named = [number for number in common if int(contents[number]) in names][:EXAMPLES]
        report[f"repeated_{kind}_copies"] = len(numbers) - len(contents)
        report[f"repeated_{kind}_examples"] = [
            f"{copies[number]} x {names[int(contents[number])]}" for number in named
        ]
    return report


def _find_percentiles(counts: Counter[Any]) -> dict[str, int | float]:
    """For each percentage, the least value that this share of all values does not exceed."""
    values = sorted(counts)
    below = np.cumsum([counts[value] for value in values])
    numbers = {p: int(np.searchsorted(100 * below, p * below[-1])) for p in PERCENTILES if values}
    return {str(p): values[number] for p, number in numbers.items()}


def show(report: Mapping[str, Any], *, has_model: bool) -> None:
    """Print what `inspect` found; `has_model` if one says how many tokens are read."""
    for name, value in report.items():
        if value in (None, [], {}) or (name in OF_TOWERS and not has_model):
            continue
        if name in MEASURED:
            value = f"{value['0']:,} to {value['100']:,}, half at most {value['50']:,}"
        elif isinstance(value, dict):
            form = ".1%" if name == "unknown_tokens" else ","
            value = ", ".join(f"{key}: {count:{form}}" for key, count in value.items())
        label = name.replace("_", " ")
        for line in value if isinstance(value, list) else [value]:
            text = f"{line:,}" if isinstance(line, int) else visible(line)
            print(f"{label:26}{text}")
            label = ""


def pack(
    source: Pairs, out: Path, *, samples_per_shard: int = 10_000, resize: int | None = None
) -> tuple[list[str], int, int]:
    """Write a source's samples to `00000.tar`, `00001.tar`, ... in a folder.

    The files of a sample are its number with `.jpg`, `.png`, `.webp` or `.gif`, a `.json` with its
    `sample_id` and its captions as `caption`, and a `.txt` if there is one caption. Classes are not
    written. Bad samples are listed in `skipped.jsonl`. Equal input gives equal bytes.

    Images whose shorter side has more pixels than `resize` are shrunk to it, as JPEG. Others, and
    all if it is unset, keep their bytes. An interrupted run with the same settings is resumed.

    Returns the names of the shards, and the numbers of samples in them and of skipped ones.
    Raises `ValueError` if the folder holds something else, or no sample can be stored.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard: {samples_per_shard} is too small; at least 1")
    settings = {
        "form": 4,
        "source": source.name,
        "source_samples": len(source),
        "samples_per_shard": samples_per_shard,
        "resize": resize,
    }
    facts = [part.fingerprint(images=False) for part in source.sources]
    key, skipped = digest({"sources": facts}), out / SKIPPED
    with lock_path(out):
        out.mkdir(parents=True, exist_ok=True)
        manifest = _read_manifest(out, settings, key)
        if not manifest["complete"]:
            _write_shards(source, out, manifest)
        else:  # ids and captions are these
            say(
                f"note: {out}: is packed already, and images are not checked again; delete it to "
                "pack them anew"
            )
    shards = manifest["shards"]
    if not shards:
        raise ValueError(f"{source.name}: no sample could be packed; {skipped} says why")
    samples = sum(shard["samples"] for shard in shards)
    return [shard["name"] for shard in shards], samples, skipped.read_bytes().count(b"\n")


def _read_manifest(out: Path, settings: dict[str, Any], key: str) -> dict[str, Any]:
    """The manifest of an earlier run, up to its first missing shard."""
    if not (out / MANIFEST).exists():
        if other := min((path.name for path in out.iterdir() if path.name[0] != "."), default=""):
            raise ValueError(
                f"{out}: holds files of another origin, such as {visible(other)}; choose a new "
                "folder"
            )
        return {"settings": settings, "key": key, "complete": False, "shards": []}
    manifest = read_json(out / MANIFEST)
    before = manifest.get("settings", {})
    for name in [name for name in settings if before.get(name) != settings[name]]:
        reason = f"was packed with {name} = {shown(before.get(name))}, not {shown(settings[name])}"
        raise ValueError(f"{out}: {reason}; keep that, or choose another folder")
    if manifest["key"] != key:
        raise ValueError(f"{out}: was packed from other pairs than these; choose another folder")
    for number, shard in enumerate(manifest["shards"]):
        path = out / shard["name"]
        if not path.exists() or path.stat().st_size != shard["bytes"]:
            return {**manifest, "complete": False, "shards": manifest["shards"][:number]}
    return manifest


def _write_shards(source: Pairs, out: Path, manifest: dict[str, Any]) -> None:
    """Write the shards that the manifest does not list yet, and list them."""
    from webdataset import TarWriter  # slow to import

    settings, shards = manifest["settings"], manifest["shards"]
    last = shards[-1] if shards else {"read": 0, "skipped_bytes": 0}
    row, number = last["read"], sum(shard["samples"] for shard in shards)
    items = _prepare_samples(source, row, settings["resize"])
    progress = Progress(f"Packing {source.name}", len(source))
    for left in left_by_killed(out):
        if left.parent == out:  # another command may pack into a folder below
            left.unlink()
    write_atomically(out / MANIFEST, json.dumps(manifest, indent=1), durable=True)
    with (out / SKIPPED).open("ab") as skipped:
        skipped.truncate(last["skipped_bytes"])
        skipped.seek(0, os.SEEK_END)  # truncating does not move there, and `tell` is kept below
        while not manifest["complete"]:
            path = out / f"{len(shards):05d}.tar"
            samples = size = 0
            with replacing(path) as temporary, temporary.open("wb") as file:
                with TarWriter(file, "", "", 0o644, encoder=False, mtime=0) as tar:
                    while samples < settings["samples_per_shard"] and size < SHARD_BYTES:
                        if (item := next(items, None)) is None:
                            manifest["complete"] = True
                            break
                        if isinstance(item, BadSample):
                            skipped.write(json.dumps(vars(item)).encode() + b"\n")
                        else:
                            size += tar.write({"__key__": f"{number:09d}", **item})
                            samples, number = samples + 1, number + 1
                        progress.update(row := row + 1)
                for written in (file, skipped):
                    written.flush()
                    os.fsync(written.fileno())
            facts = {"name": path.name, "samples": samples, "bytes": path.stat().st_size}
            if samples:
                shards.append({**facts, "read": row, "skipped_bytes": skipped.tell()})
            else:
                path.unlink()
            write_atomically(out / MANIFEST, json.dumps(manifest, indent=1), durable=True)


def _prepare_samples(
    source: Pairs, start: int, side: int | None
) -> Iterator[dict[str, bytes] | BadSample]:
    """The files of each sample from row `start` on, by extension."""

    def prepare(row: int) -> dict[str, bytes] | BadSample:
        try:
            sample = source.sample(row)
        except BadSample as bad:
            return bad
        # With `data.caption_column` the captions of a `.json` are read.
        facts = {"sample_id": sample.sample_id, "caption": sample.captions}
        try:
            kind, image = convert_image(sample.image, side)
            files = {kind: image, "json": json.dumps(facts, ensure_ascii=False).encode()}
            several = len(sample.captions) > 1
            return files if several else {**files, "txt": sample.captions[0].encode()}
        except ValueError as error:  # from the decoder, or a caption that UTF-8 cannot hold
            return BadSample(sample.sample_id, sample.where, str(error))

    with ThreadPoolExecutor() as pool:
        for first in range(start, len(source), PREPARED):
            yield from pool.map(prepare, range(first, min(first + PREPARED, len(source))))


def convert_image(encoded: bytes, side: int | None) -> tuple[str, bytes]:
    """The extension and content of an image, its shorter side at most `side`."""
    kind = next((kind for start, kind in STORED if encoded.startswith(start)), None)
    shape = () if kind and side is None else find_size(encoded)
    if kind and (side is None or min(shape) <= side):
        return kind, encoded
    target = min(side or min(shape), *shape)
    width, height = (max(1, round(length * target / min(shape))) for length in shape)
    if max(width, height) > JPEG_PIXELS:
        way_out = "" if side else "; --resize shrinks it"
        raise ValueError(f"{width} x {height} pixels are more than a JPEG holds{way_out}")
    pixels = decode(encoded, at_least=2 * target)
    buffer = io.BytesIO()
    small = Image.fromarray(resize_pixels(pixels, height, width))
    small.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "jpg", buffer.getvalue()
