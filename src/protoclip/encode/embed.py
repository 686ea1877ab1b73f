"""`protoclip.embed`: the vectors of images and captions in one Parquet file, for search engines.

The pass writes parts (see `parts.py`) into a hidden folder beside the file. At the end the first
rank joins them, a row group each, so that no more than one part is in memory.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from protoclip import __version__
from protoclip.config import Config, DataConfig, build
from protoclip.data import sources
from protoclip.data.access import digest
from protoclip.data.content import content
from protoclip.data.loader import Item
from protoclip.data.pairs import BadSample, SampleStream
from protoclip.distributed import collectives
from protoclip.distributed.collectives import raise_on_all_ranks, rank, rank0_first
from protoclip.encode import store
from protoclip.encode.encoder import Encoder, encode_texts, freeze, image_encoder, text_encoder
from protoclip.encode.halves import images_at_once
from protoclip.encode.parts import (
    Part,
    Show,
    begun_precision,
    claim,
    difference_in,
    encode_missing,
    identity,
    parts_of,
    prepare_images,
    read_note,
    read_part,
    require_same,
    write_skipped,
)
from protoclip.encode.projected import KeptHalves, kept_halves
from protoclip.files import locked, replacing, require_ours, require_regular, to_json
from protoclip.models import loading
from protoclip.models.precision import Precision, autocast_encoding, resolve_encoding
from protoclip.rules import check
from protoclip.terminal import say, without_secrets

PART_ROWS = 2048
FACTS = b"protoclip"  # key of the schema's metadata
WAY_OUT = "choose another --out, or give --overwrite"
HALF = pa.list_(pa.float16())


def embed(
    reference: str | Path,
    data: str | Path | DataConfig | Mapping[str, Any],
    out: str | Path,
    *,
    batch_size: int | None = None,
    device: str | torch.device = "auto",
    precision: Literal["auto"] | Precision = "auto",
    num_samples: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model's vectors of a data set to a Parquet file, or finish one. All ranks call it.

    A row is a sample whose image can be read, with captions or without. The others are listed in
    `NAME.skipped.jsonl` beside `NAME.parquet`. After an interruption the same call goes on; until
    the end, what it has done is in the folder `.NAME.parquet.parts`. Of the run of `align`, images
    and captions that it encoded are read from its store: the heads alone compute.

    | column | |
    |---|---|
    | `sample_id` | string, unique |
    | `image_vector` | list of float16, unit norm, in the joint space |
    | `text_vectors` | list of such lists, one a caption; null where there is none |
    | `captions` | list of strings; null where there is none |
    | `image` | string: the image's path or URL as the data name it; null for one in the data |
    | `class` | string, if the data have classes; null where there is none |

    Args:
        reference: A model, as `protoclip.load` takes it.
        data: What `data.train` names: a table, a folder, shards, `hf:OWNER/NAME` or `emoji`; or a
            `[data]` section as a mapping or `DataConfig`, which may also name columns.
        out: The file. One of the same model, data and settings is left as it is.
        batch_size: Images or captions encoded at once; unset, 16 on a CPU and 256 on a card.
        device: As `run.device`.
        precision: Of forward passes. `auto` is that of what is there: of a file that was begun, or
            of images in the store of `align`; else bf16 or fp16 on a card, as in training, and fp32
            elsewhere. Images that are kept in another precision are encoded anew.
        num_samples: Samples to read of a stream.
        overwrite: Replace a file that is of something else.

    Returns:
        The path of the file. The metadata of its schema have the facts as JSON, under `protoclip`:
        `reference`, `weights` (a checksum), `width`, `version`, `source`, `rows`, `bad`,
        `without_captions`, `kept` (`images` and `captions` from the store of `align`) and more.

    Raises:
        ValueError: The model or the data cannot be used, no sample can be read, vectors are not
            finite, or the file or its parts are of something else.
    """
    reference, out = str(reference), Path(out)
    name = without_secrets(reference)
    section = {"train": str(data)} if isinstance(data, str | Path) else data
    config = build(Config, {"data": section})
    check(config)
    samples: Any = raise_on_all_ranks(lambda: sources.pairs(config, needs_captions=False))
    for note in sources.list_notes(samples) if rank() == 0 else ():
        say(f"note: {note}")
    is_stream = isinstance(samples, SampleStream)
    ids = raise_on_all_ranks(
        lambda: identity(samples, () if is_stream else samples.sample_ids(), num_samples)
    )
    with ExitStack() as stack:
        rank0_first(lambda: stack.enter_context(locked(out)))
        rank0_first(lambda: None if overwrite else require_free(out))
        newest = loading.pin_newest(reference)
        model, transform, tokenizer = raise_on_all_ranks(lambda: loading.load(newest))
        if not isinstance(device, torch.device):
            device = collectives.device(device, setting="device")
        model = freeze(model, device)
        max_pixels = config.data.max_image_pixels
        images = image_encoder(model, device, model.encode_image, transform, max_pixels=max_pixels)
        texts = text_encoder(model, device, tokenizer, model.encode_text)
        working = out.with_name(f".{out.name}.parts")
        settings = {
            "reference": name,
            **ids,
            "class_column": config.data.class_column,
            "data": digest(samples.state_dict(0)) if is_stream else samples.key,
            **({"content": rank0_first(lambda: content(samples))} if is_stream else {}),
            "weights": images.checksum(),
            "width": images.width,
            "part_rows": PART_ROWS,
        }
        begun = rank0_first(lambda: begun_precision(begun_facts(out, working), settings, precision))
        asked = precision if begun is None else resolve_encoding(begun, device)
        kept = kept_halves(
            *(newest, model, transform, tokenizer, samples, device, asked),
            max_pixels=max_pixels,
        )
        settings["precision"] = begun or kept.precision
        images.autocast = texts.autocast = autocast_encoding(kept.precision, device)
        has_classes = any(getattr(each, "class_column", None) for each in samples.sources)
        workers = config.data.workers
        encode = partial(
            encode_pairs,
            images,
            texts,
            kept,
            samples,
            batch_size=batch_size or images_at_once(model),
            threads=None if workers == "auto" else workers,
            has_classes=has_classes,
            name=name,
        )

        def claimed() -> tuple[dict[str, Any], list[Path]]:
            facts, parts = claim_file(out, working, settings, overwrite)
            if kept.note and "rows" not in facts:  # nothing is encoded for a file that is finished
                say(f"note: {kept.note}")
            return facts, parts

        finished = encode_missing(encode, samples, claimed, working, settings, label=name)
        facts = finished or rank0_first(lambda: join_parts(out, working, settings, has_classes))
    if rank() == 0:
        announce(out, facts, f"{out}: is finished" if finished else f"written to {out}")
    return out


def announce(out: Path, facts: Mapping[str, Any], what: str) -> None:
    """Say how many samples a file holds, and where those are listed that it lacks."""
    if facts["bad"]:
        number = facts["rows"] + facts["bad"]
        say(
            f"note: {facts['bad']:,} of {number:,} samples could not be read and have no row; "
            f"{skipped_of(out)} lists them"
        )
    if number := facts.get("without_captions"):  # 1.0.0 made bad samples of these
        say(
            f"note: {number:,} of {facts['rows']:,} images have no caption; their captions and "
            "text_vectors are null"
        )
    if any((kept := facts.get("kept", {})).values()):
        say(
            f"note: {kept['images']:,} images and {kept['captions']:,} captions were encoded by "
            "align before, and not again"
        )
    say(f"{what}; {facts['rows']:,} rows, vectors of width {facts['width']}")


def skipped_of(out: Path) -> Path:
    """Where the samples are listed that cannot be read."""
    return out.with_name(f"{out.stem}.skipped.jsonl")


def read_facts(path: Path) -> dict[str, Any]:
    """What an embedded file says of itself; empty for other files."""
    try:
        require_regular(path)
        return dict(json.loads((pq.read_schema(path).metadata or {}).get(FACTS, b"{}")))
    except (*store.DAMAGED, TypeError, RecursionError):
        return {}


def begun_facts(out: Path, working: Path) -> dict[str, Any]:
    """What the parts are of, or the file where there are none; empty if they do not say it."""
    with suppress(ValueError):  # damaged parts are told by `claim`, or replaced
        if facts := store.read_facts(working):
            return facts
    return read_facts(out)


def require_free(out: Path) -> None:
    """Refuse to replace files that `embed` did not write."""
    if out.exists() and not read_facts(out):
        raise ValueError(f"{out}: exists, and was not made by this command; {WAY_OUT}")
    require_ours(skipped_of(out), '"reason"')


def claim_file(
    out: Path, working: Path, settings: Mapping[str, Any], overwrite: bool
) -> tuple[dict[str, Any], list[Path]]:
    """The facts of a file that is finished; else those of its parts, and the parts that are there.

    Raises:
        ValueError: The file, or what is there of it, is of other settings, unless `overwrite`.
    """
    for path in (out, skipped_of(out)):
        drop_unfinished(path)
    facts = read_facts(out)
    if difference_in(facts, settings) is None:
        shutil.rmtree(working, ignore_errors=True)  # it stays if the process was killed at the end
        return facts, []
    if overwrite:
        if is_of_others(working, settings):
            shutil.rmtree(working)
    elif out.exists():
        require_same(facts, settings, name=out, way_out=WAY_OUT)
    return claim(working, settings, name=out, way_out=WAY_OUT)


def drop_unfinished(path: Path) -> None:
    """Remove what `replacing` left of this file alone when its process was killed."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.\d+\.tmp", re.ASCII)
    for left in path.parent.iterdir():
        if ours.fullmatch(left.name):
            left.unlink(missing_ok=True)


def is_of_others(working: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the parts in a folder are of other settings, or nobody can tell."""
    try:
        facts = store.read_facts(working)
    except ValueError:
        return True
    return bool(facts) and difference_in(facts, settings) is not None


def encode_pairs(
    images: Encoder,
    texts: Encoder,
    kept: KeptHalves,
    samples: Any,
    items: Sequence[Item],
    show: Show,
    *,
    batch_size: int,
    threads: int | None,
    has_classes: bool,
    name: str,
) -> Part:
    """The vectors of samples and of all their captions, which stand one after another.

    A sample may have none.
    """
    known, vectors = kept.images_of(samples, items, images.width)
    named, bad, done = {**known}, [], len(known)
    missing = [position for position in range(len(items)) if position not in known]
    to_read, left = [items[position] for position in missing], iter(missing)
    show(done)
    for batch in prepare_images(samples, to_read, images.prepare, batch_size, threads):
        made = zip(islice(left, len(batch)), (one for _, one in batch), strict=True)
        bad += [vars(one) for _, one in batch if isinstance(one, BadSample)]
        good = {at: one for at, one in made if not isinstance(one, BadSample)}
        named |= {at: (sample.sample_id, sample.captions) for at, (sample, _) in good.items()}
        if good:
            vectors[[*good]] = images.encode([pixels for _, pixels in good.values()])
        done += len(batch)
        show(done)
    positions = sorted(named)
    ids, captions = [named[at][0] for at in positions], [named[at][1] for at in positions]
    files = [image_name(samples, items[at]) for at in positions]
    classes = [samples.class_of(items[at]) or None for at in positions] if has_classes else []
    every = list(chain(*captions))
    unknown, text_vectors = kept.texts_of(every, texts.width)
    for numbers, features in encode_texts(texts, [every[at] for at in unknown], batch_size):
        text_vectors[unknown[numbers]] = features
        show(done)  # images alone are counted, but it says that the work goes on
    owners = [sample_id for sample_id, several in zip(ids, captions, strict=True) for _ in several]
    return Part(
        ids=ids,
        bad=bad,
        arrays={
            "image": store.to_half(vectors[positions].numpy(), ids, name=name),
            "text": store.to_half(text_vectors.numpy(), owners, name=name),
        },
        values={
            **{"captions": captions, "images": files, "classes": classes},
            "kept": {"images": len(known), "captions": len(every) - len(unknown)},
        },
    )


def image_name(samples: Any, item: Item) -> str | None:
    """The path or URL of an image, as the data name it; None for one in the data or a stream."""
    name = samples.image_name(item) if isinstance(item, int) else None
    return None if name is None else without_secrets(name)


def join_parts(
    out: Path, working: Path, settings: Mapping[str, Any], has_classes: bool
) -> dict[str, Any]:
    """Make the parts a Parquet file, and remove them."""
    files, skipped = parts_of(working), skipped_of(out)
    rows, bad = write_skipped(files, skipped, settings["source"])
    if not bad:
        skipped.unlink(missing_ok=True)  # of a file that is replaced
    kept, without = {"images": 0, "captions": 0}, 0
    for note in map(read_note, files):
        without += sum(not captions for captions in note["captions"])
        for what in kept:  # versions that read nothing from a store may have begun the file
            kept[what] += note.get("kept", {}).get(what, 0)
    facts = {**settings, "rows": rows, "bad": bad, "without_captions": without, "kept": kept}
    facts["version"] = __version__
    types = {
        "sample_id": pa.string(),
        "image_vector": HALF,
        "text_vectors": pa.list_(HALF),
        "captions": pa.list_(pa.string()),
        "image": pa.string(),
    }
    types |= {"class": pa.string()} if has_classes else {}
    schema = pa.schema(types, metadata={FACTS: to_json(facts)})
    with replacing(out) as temporary, temporary.open("wb") as file:
        # A dictionary of vectors, which all differ, would be made for nothing.
        with pq.ParquetWriter(file, schema, use_dictionary=["class"]) as writer:
            for part in files:
                note, arrays = read_part(part)
                if note["ids"]:
                    writer.write_table(pa.table(columns(note, arrays), schema=schema))
        file.flush()
        os.fsync(file.fileno())  # before the parts go
    shutil.rmtree(working, ignore_errors=True)  # or the next call does
    return facts


def columns(
    note: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[np.float16]]
) -> dict[str, pa.Array]:
    """The rows of a part."""
    captions = note["captions"]
    ends = list(accumulate(map(len, captions), initial=0))
    has_none = pa.array([not several for several in captions])
    return {
        "sample_id": pa.array(note["ids"], pa.string()),
        "image_vector": lists(arrays["image"]),
        "text_vectors": pa.ListArray.from_arrays(ends, lists(arrays["text"]), mask=has_none),
        "captions": pa.array([several or None for several in captions], pa.list_(pa.string())),
        # Versions that named no images may have begun the file.
        "image": pa.array(note.get("images", [None] * len(captions)), pa.string()),
        **({"class": pa.array(note["classes"], pa.string())} if note["classes"] else {}),
    }


def lists(vectors: npt.NDArray[np.float16]) -> pa.Array:
    """Each row of an array as a list."""
    number, width = vectors.shape
    starts = np.arange(number + 1, dtype=np.int32) * width
    return pa.ListArray.from_arrays(starts, pa.array(vectors.reshape(-1)))
