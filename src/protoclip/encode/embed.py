"""`protoclip.embed`: the vectors of images and captions in one Parquet file, for search engines.

Features go to a store in a hidden folder beside the file, by the encoder and by the image file or
the caption: an interrupted call goes on, and nothing is found that is of something else. At the end
the first rank writes the file from it. Of a run of `align`, the features of both sides are read
from the store that `align` filled, where it has them, and the projections alone compute.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from protoclip import __version__
from protoclip.config import Config, DataConfig, EngineName, build
from protoclip.data import sources
from protoclip.data.access import digest
from protoclip.data.pairs import BadSample, Sample, SampleStream, fingerprint_sources
from protoclip.distributed import collectives
from protoclip.distributed.collectives import raise_on_all_ranks, rank, rank0_first
from protoclip.encode.encoder import freeze
from protoclip.encode.features import Encoder
from protoclip.encode.linear_maps import Features
from protoclip.encode.run import (
    encode_missing,
    hash_captions,
    hash_images,
    images_at_once,
    read_captions,
    read_image,
)
from protoclip.encode.store import Hashes, Store, hash_ids
from protoclip.encode.stream import encode_stream, read_skipped
from protoclip.encode.teachers import find_difference, identify, write_skipped
from protoclip.files import lock_path, naming, require_ours, require_regular, to_json
from protoclip.models import loading
from protoclip.models.checkpoint import read_run_config
from protoclip.models.protoclip import (
    Precision,
    ProtoCLIP,
    autocast,
    resolve_encoding,
)
from protoclip.rules import check
from protoclip.terminal import counted, say, without_secrets

GROUP_ROWS = 2048  # samples of a row group
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
    engine: EngineName = "auto",
    num_samples: int | None = None,
    fuse: float | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model's vectors of a data set to a Parquet file, or finish one. All ranks call it.

    A row is a sample whose image can be read, with captions or without. The others are listed in
    `NAME.skipped.jsonl` beside `NAME.parquet`. After an interruption the same call goes on; until
    the end, what it has done is in the folder `.NAME.parquet.parts`. Of the run of `align`, images
    and captions that it encoded are read from its store: the heads alone compute.

    | column | what it holds |
    |---|---|
    | `sample_id` | string, unique |
    | `image_vector` | list of float16, unit norm, in the joint space |
    | `text_vectors` | list of such lists, one a caption; null where there is none |
    | `vector` | with `fuse`: the weighted mean of both, of unit norm; else the image's |
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
        precision: Of forward passes. `auto` is that of a file that is there, else bf16 or fp16 on a
            card, as in training, and fp32 elsewhere.
        engine: As `encode.engine`.
        num_samples: Samples to read of a stream; unset, all.
        fuse: Weight of the captions, from 0 to 1, in one vector of image and captions.
        overwrite: Replace a file that is of something else.

    Returns:
        The path of the file. The metadata of its schema have the facts as JSON, under `protoclip`:
        `reference`, `weights` (a checksum), `width`, `version`, `source`, `rows`, `bad`,
        `without_captions` and more.

    Raises:
        ValueError: The model or the data cannot be used, no sample can be read, vectors are not
            finite, or the file is of something else.
    """
    if fuse is not None and not 0 <= fuse <= 1:
        raise ValueError(f"fuse: {fuse} is no weight from 0 to 1")
    reference, out = str(reference), Path(out)
    config = build(Config, {"data": {"train": str(data)} if isinstance(data, str | Path) else data})
    check(config)
    samples: Any = raise_on_all_ranks(lambda: sources.open_samples(config, needs_captions=False))
    for note in sources.list_notes(samples) if rank() == 0 else ():
        say(f"note: {note}")
    is_stream = isinstance(samples, SampleStream)
    identity = raise_on_all_ranks(lambda: identify(samples, num_samples))
    with ExitStack() as stack:
        rank0_first(lambda: stack.enter_context(lock_path(out)))
        rank0_first(lambda: None if overwrite else require_free(out))
        newest = loading.pin_newest(reference)
        model, transform, tokenizer = raise_on_all_ranks(lambda: loading.load(newest))
        if not isinstance(device, torch.device):
            device = collectives.choose_device(device, setting="device")
        model, aligned_by = freeze(model, device), None
        if isinstance(model, ProtoCLIP) and model.joins_encoders:
            with suppress(ValueError):  # settings of another version, whose model can be read
                aligned_by = read_run_config(newest)
        usual = resolve_encoding(precision, device)
        if aligned_by is not None and resolve_encoding(aligned_by.run.precision, device) != usual:
            aligned_by = None  # in another precision its features are others
        working = out.with_name(f".{out.name}.parts")
        encoder = Encoder(
            model=model,
            transform=transform,
            tokenizer=tokenizer,
            cache=working,
            autocast=autocast(usual, device),
            engine=engine,
            unit_norm=True,
            aligned_by=aligned_by,
        )
        examples = [*encoder.towers["image"].examples]
        settings = {
            "reference": without_secrets(reference),
            **identity,
            "class_column": config.data.class_column,
            "fuse": fuse,
            "data": digest(samples.state_dict(0)) if is_stream else samples.key,
            **({"content": rank0_first(lambda: fingerprint_sources(samples))} if is_stream else {}),
            "weights": encoder.weights,
            "width": encoder.encode_inputs("image", examples).shape[1],
            "precision": usual,
        }
        facts = rank0_first(lambda: read_finished(out, settings, precision, overwrite))
        verb = f"{out}: is finished" if facts else f"written to {out}"
        if not facts:
            passing: dict[str, Any] = {
                "batch_size": batch_size or images_at_once(model),
                "threads": config.data.threads,
            }
            for tower in encoder.towers.values():
                tower.name, tower.engine = settings["reference"], engine
            folders = rank0_first(lambda: encoder.folders)
            stores = {
                modality: Store(folder, setting="--out", before=encoder.open_aligned(modality))
                for modality, folder in folders.items()
            }
            if is_stream:
                images = encoder.towers["image"]
                samples = encode_stream(
                    samples, working, images, stores["image"], number=num_samples, **passing
                )
            facts = encode_file(out, working, samples, encoder, stores, settings, **passing)
    if rank() == 0:
        announce(out, facts, verb)
    return out


def announce(out: Path, facts: Mapping[str, Any], verb: str) -> None:
    """Say how many samples a file holds, and where those are listed that it lacks."""
    if facts["bad"]:
        number = facts["rows"] + facts["bad"]
        say(
            f"note: {facts['bad']:,} of {number:,} samples could not be read and have no row; "
            f"{name_skipped(out)} lists them"
        )
    if number := facts.get("without_captions"):  # 1.0.0 made bad samples of these
        say(
            f"note: {number:,} of {facts['rows']:,} images have no caption; their captions and "
            "text_vectors are null"
        )
    say(f"{verb}; {counted(facts['rows'], 'row')}, vectors of width {facts['width']}")


def name_skipped(out: Path) -> Path:
    """Where the samples are listed that cannot be read."""
    return out.with_name(f"{out.stem}.skipped.jsonl")


def read_facts(path: Path) -> dict[str, Any]:
    """What an embedded file says of itself; empty for other files."""
    try:
        require_regular(path)
        return dict(json.loads((pq.read_schema(path).metadata or {}).get(FACTS, b"{}")))
    except Exception:  # what is raised for another file has no common class
        return {}


def require_free(out: Path) -> None:
    """Refuse to replace files that `embed` did not write."""
    if out.exists() and not read_facts(out):
        raise ValueError(f"{out}: exists, and was not made by this command; {WAY_OUT}")
    require_ours(name_skipped(out), '"reason"')


def read_finished(
    out: Path, settings: Mapping[str, Any], precision: Literal["auto"] | Precision, overwrite: bool
) -> dict[str, Any]:
    """The facts of a file that is finished; none if there is none, or one to overwrite."""
    if out.exists():
        require_regular(out)
    if facts := read_facts(out):
        facts.setdefault("fuse", None)  # files of 1.0 do not say so
    what = find_difference(facts, settings, precision)
    if what and not overwrite:
        raise ValueError(f"{out}: was made with {what}; {WAY_OUT}")
    return {} if what else facts


@torch.inference_mode()
def read_vectors(encoder: Encoder, modality: str, store: Store, hashes: Hashes) -> Features:
    """Vectors of unit norm, in half precision, by ids that are in the store."""
    features = store.read(store.find(hashes))
    if encoder.frozen is None:
        return features
    with encoder.towers[modality].autocast():
        projected = encoder.project(modality, torch.from_numpy(features))
    vectors: Features = F.normalize(projected.float(), dim=-1).half().numpy()
    return vectors


def encode_file(
    out: Path,
    working: Path,
    samples: Any,
    encoder: Encoder,
    stores: Mapping[str, Store],
    settings: Mapping[str, Any],
    **passing: Any,
) -> dict[str, Any]:
    """Encode images and captions that are new, and write the file; its facts. Collective."""
    image_hashes = hash_images(samples)
    text_hashes, counts = hash_captions(samples)
    ends = counts.cumsum()

    def read_text(number: int) -> Sample:
        row = int(np.searchsorted(ends, number, side="right"))
        return read_captions(samples, row, number - int(ends[row] - counts[row]))

    images, texts = stores["image"], stores["text"]
    towers, read = encoder.towers, partial(read_image, samples)
    bad = encode_missing(images, towers["image"], image_hashes, read, **passing)
    encode_missing(texts, towers["text"], text_hashes, read_text, **passing)
    read_images = partial(read_vectors, encoder, "image", images)
    read_texts = partial(read_vectors, encoder, "text", texts)

    def write() -> dict[str, Any]:
        skipped, is_good = read_skipped(samples), images.has(image_hashes)
        for row in np.flatnonzero(~is_good | (counts == 0)).tolist():
            error = bad.get(int(image_hashes[row]))
            try:
                samples.sample_captions(row)
            except BadSample as unreadable:
                error, is_good[row] = unreadable, False
            if error is not None:
                skipped.append({**vars(error), "sample_id": samples.sample_id(row)})
        rows = np.flatnonzero(is_good)
        write_skipped(name_skipped(out), skipped, samples.name, good=len(rows))
        without = int((counts[rows] == 0).sum())
        facts = {**settings, "rows": len(rows), "bad": len(skipped), "without_captions": without}
        facts["version"] = __version__
        has_classes = any(getattr(source, "class_column", None) for source in samples.sources)
        types = {
            "sample_id": pa.string(),
            "image_vector": HALF,
            "text_vectors": pa.list_(HALF),
            **({} if settings["fuse"] is None else {"vector": HALF}),
            "captions": pa.list_(pa.string()),
            "image": pa.string(),
            **({"class": pa.string()} if has_classes else {}),
        }
        schema = pa.schema(types, metadata={FACTS: to_json(facts)})
        temporary = working / out.name  # which goes with the folder if the process is killed
        with naming(out):
            working.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                # A dictionary of vectors, which all differ, would be made for nothing.
                with pq.ParquetWriter(file, schema, use_dictionary=["class"]) as writer:
                    for start in range(0, len(samples), GROUP_ROWS):
                        first, end = np.searchsorted(rows, [start, start + GROUP_ROWS])
                        if first < end:
                            some = rows[first:end]
                            vectors = read_images(image_hashes[some])
                            given = samples, some.tolist(), vectors, read_texts
                            columns = make_columns(*given, settings["fuse"] or 0.0)
                            columns = {name: columns[name] for name in types}
                            writer.write_table(pa.table(columns, schema=schema))
                file.flush()
                os.fsync(file.fileno())  # before the store goes
            temporary.replace(out)
        shutil.rmtree(working, ignore_errors=True)
        return facts

    return rank0_first(write)


def make_columns(
    samples: Any,
    rows: Sequence[int],
    image_vectors: Features,
    read_texts: Callable[[Hashes], Features],
    fuse: float,
) -> dict[str, Any]:
    """The columns of some rows, also those that the file may not have."""
    captions = [samples.sample_captions(row) for row in rows]
    names = [samples.image_name(row) for row in rows]
    has_none = pa.array([not several for several in captions])
    ends = list(accumulate(map(len, captions), initial=0))
    texts, fused = read_texts(hash_ids(chain(*captions))), image_vectors
    if fuse and len(texts):
        fused = fuse_vectors(image_vectors, texts, [*map(len, captions)], fuse)
    return {
        "sample_id": [samples.sample_id(row) for row in rows],
        "image_vector": list_rows(image_vectors),
        "text_vectors": pa.ListArray.from_arrays(ends, list_rows(texts), mask=has_none),
        "vector": list_rows(fused),
        "captions": [several or None for several in captions],
        # The data may name images by URLs with passwords.
        "image": [None if name is None else without_secrets(name) for name in names],
        "class": [samples.read_class(row) or None for row in rows],
    }


def fuse_vectors(
    image_vectors: Features, text_vectors: Features, counts: Sequence[int], weight: float
) -> Features:
    """Means of unit norm, by `weight`, of each image and its `counts` captions, if it has any."""
    images, texts = (torch.from_numpy(part).float() for part in (image_vectors, text_vectors))
    rows = torch.arange(len(images)).repeat_interleave(torch.tensor(counts))
    means = F.normalize(torch.zeros_like(images).index_add(0, rows, texts), dim=1)
    weights = weight * (means.norm(dim=1, keepdim=True) > 0)
    return F.normalize(torch.lerp(images, means, weights), dim=1).half().numpy()


def list_rows(vectors: Features) -> pa.Array:
    """Each row of an array as a list."""
    number, width = vectors.shape
    starts = np.arange(number + 1, dtype=np.int32) * width
    return pa.ListArray.from_arrays(starts, pa.array(vectors.reshape(-1)))
