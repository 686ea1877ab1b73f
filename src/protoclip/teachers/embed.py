"""Teacher features of a whole source: one pass of a frozen model, resumable, then PCA.

The pass writes a part after every few thousand samples; a part appears whole or not at all, and a
pass that was stopped goes on after the last one. When all parts are there they are reduced and
written as a teacher folder (see `teachers.py`), and removed.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protoclip.data.index import fingerprint
from protoclip.data.pairs import Pairs, SampleStream
from protoclip.distributed.collectives import (
    raise_on_all_ranks,
    rank,
    rank0_first,
    world_size,
)
from protoclip.teachers.embed_parts import Part, encode_parts, part_files
from protoclip.teachers.encode import (
    Encoder,
    LoadRun,
    Modality,
    Pooling,
    TextEncoder,
    open_encoder,
    weights_digest,
)
from protoclip.teachers.feature_files import (
    SUFFIXES,
    Block,
    ids_file,
    open_feature_file,
)
from protoclip.teachers.pca import Reduction, fit_reduction
from protoclip.teachers.store import (
    WRITING,
    build_index,
    hash_ids,
    open_folder,
    read_facts,
    whole,
    write_folder,
)

PARTS, SETTINGS, SKIPPED, REDUCTION = "parts", "settings.json", "skipped.jsonl", "reduction.npz"
# Samples a part: what is lost at most when the pass is killed. Captions of a part are sorted by
# length; a stream's pictures of a part are in memory.
PART_ROWS = {"text": 8192, "image": 2048}


def embed_teacher(
    teacher: str,
    samples: Pairs | SampleStream,
    out: Path,
    *,
    load_run: LoadRun,
    modality: Modality = "auto",
    pooling: Pooling = "mean",
    width: int | None = None,
    batch_size: int = 256,
    device: torch.device,
    num_samples: int | None = None,
) -> dict[str, Any]:
    """Make a teacher folder for a source; the same call again goes on where it was stopped.

    Under torchrun the processes share the work, with the result of one, which the first returns.

    Args:
        teacher: A frozen model, named as `encoders.py` says; or a file of features that a user
            has (see `open_feature_file`), which is converted.
        samples: What to encode. A sample with several captions gets their mean feature.
        out: The folder; new, or that of an earlier call with the same arguments.
        load_run: Opens a run folder as a teacher; `protoclip.load`.
        modality: `text`, `image`, or what the model reads; `auto` takes the image tower of two.
        pooling: Of a Hugging Face model: `mean`, `cls` or `pooler`.
        width: Reduce to so many dimensions by PCA over all features; all are kept if unset.
        batch_size: Captions or pictures encoded at once.
        device: Where the model runs.
        num_samples: Samples to read of a stream, which has no end; the first of equal ids counts.

    Returns:
        What `facts.json` in the folder holds: where the features are from, `rows`, `width`,
        `bad` (samples left out, listed in `skipped.jsonl`) and, after PCA, `variance_kept`.

    Raises:
        ValueError: The teacher cannot be opened or gives features that cannot be used, ids are
            not unique, or the folder belongs to something else.
    """
    if Path(teacher).suffix in SUFFIXES:
        return rank0_first(lambda: convert(Path(teacher), samples, out, width=width))
    encoder = open_encoder(
        teacher, modality=modality, pooling=pooling, device=device, load_run=load_run
    )
    origin = {"teacher": teacher}
    if teacher == "minilm" or teacher.startswith("hf:"):
        origin["pooling"] = pooling
    return embed(
        encoder,
        samples,
        out,
        origin=origin,
        width=width,
        batch_size=batch_size,
        num_samples=num_samples,
    )


def embed(
    encoder: Encoder,
    samples: Pairs | SampleStream,
    out: Path,
    *,
    origin: Mapping[str, str],
    width: int | None,
    batch_size: int,
    num_samples: int | None = None,
    part_rows: int | None = None,
) -> dict[str, Any]:
    """`embed_teacher` with a model that is open.

    Args:
        origin: What names the model in the facts, `teacher` among it.
        part_rows: Samples a part.
    """
    check_width(width, encoder.width, origin["teacher"])
    modality = "text" if isinstance(encoder, TextEncoder) else "image"
    settings = {
        **origin,
        "modality": modality,
        "weights": weights_digest(encoder.module),
        **source_facts(samples, num_samples),
        "reduced_to": width,
        "part_rows": part_rows or PART_ROWS[modality],
    }

    def begin() -> dict[str, Any] | None:
        finished = finished_before(out, settings)
        if finished is None:
            (out / PARTS).mkdir(parents=True, exist_ok=True)
            with whole(out / PARTS / SETTINGS) as file:
                file.write(json.dumps(settings).encode())
        return finished

    finished = rank0_first(begin)
    if finished is None:
        raise_on_all_ranks(
            lambda: encode_parts(
                encoder,
                samples,
                out / PARTS,
                name=origin["teacher"],
                total=settings["samples"],
                size=settings["part_rows"],
                batch_size=batch_size,
            )
        )
        finished = join_parts(out, settings=settings, from_width=encoder.width)
    if rank() == 0:
        shutil.rmtree(out / PARTS, ignore_errors=True)
    return finished


def convert(
    path: Path, samples: Pairs | SampleStream, out: Path, *, width: int | None
) -> dict[str, Any]:
    """A user's features as a teacher folder."""
    pairs = samples if isinstance(samples, Pairs) else None
    source = open_feature_file(path, sample_ids=pairs.sample_ids if pairs else None)
    check_width(width, source.width, str(path))
    text = ids_file(path)
    if text.is_file():
        ids = fingerprint(str(text))
    else:  # an array's are then those of the data
        from_data = pairs is not None and path.suffix == ".npy"
        ids = source_facts(samples, None)["ids"] if from_data else samples.name
    settings = {
        "teacher": str(path),
        "file": fingerprint(str(path)),
        "ids": ids,
        "reduced_to": width,
    }
    finished = finished_before(out, settings)
    if finished is None:
        out.mkdir(parents=True, exist_ok=True)
        try:
            reduce = None
            if width is not None:
                reduce = fit_reduction((features for _, features in source.blocks()), width)
            finished = write_reduced(
                out,
                source.blocks(),
                num_rows=source.num_rows,
                from_width=source.width,
                reduce=reduce,
                facts=settings,
            )
        except ValueError as error:
            (out / REDUCTION).unlink(missing_ok=True)
            raise ValueError(f"{path}: {str(error).removeprefix(f'{out}: ')}") from None
    without = open_folder(out).missing(pairs.sample_ids()) if pairs else 0
    return {**finished, "samples_without_features": without}


def check_width(width: int | None, available: int, teacher: str) -> None:
    if width is not None and not 0 < width <= available:
        raise ValueError(
            f"--width: {width} is not between 1 and {available}, {teacher}'s own width"
        )


def source_facts(samples: Pairs | SampleStream, num_samples: int | None) -> dict[str, Any]:
    """What names the samples that are encoded: a pass only goes on with the same ones."""
    if isinstance(samples, SampleStream):
        if num_samples is None:
            raise ValueError("--num_samples: a stream has no end; say how many samples to read")
        return {"source": samples.name, "samples": num_samples}
    if num_samples is not None:
        raise ValueError(f"--num_samples: {samples.name} is no stream; all of it is encoded")
    hashes = hash_ids(samples.sample_ids())

    def ids_of(rows: list[int]) -> list[str]:
        wanted = set(rows)
        found = {row: i for row, i in enumerate(samples.sample_ids()) if row in wanted}
        return [found[row] for row in rows]

    build_index(hashes, name=samples.name, ids_of=ids_of)
    ids = blake2b(hashes.tobytes(), digest_size=16).hexdigest()
    return {"source": samples.name, "samples": len(samples), "ids": ids}


def finished_before(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The facts of a folder that is complete; nothing for one that is new or was begun.

    Raises:
        ValueError: The folder was made, or begun, with something else, or holds something else.
    """
    facts, begun = read_facts(out), out / PARTS / SETTINGS
    earlier = facts
    if earlier is None and begun.is_file():
        earlier = json.loads(begun.read_text(encoding="utf-8"))
    for key, value in settings.items() if earlier is not None else ():
        assert earlier is not None
        if earlier.get(key) != value:
            raise ValueError(
                f"{out}: was made with {key} {earlier.get(key)}, not {value}; "
                "choose another --out, or delete it"
            )
    strangers = [path.name for path in out.glob("*") if path.name not in (WRITING, REDUCTION)]
    if earlier is None and strangers:
        raise ValueError(f"{out}: holds {strangers[0]}; choose a new or empty folder with --out")
    return facts


def join_parts(out: Path, *, settings: Mapping[str, Any], from_width: int) -> dict[str, Any]:
    """All parts as a teacher folder, with a list of the samples that were bad.

    Processes share the PCA's sums; the first one writes, and it alone returns the facts.
    """
    files = part_files(out / PARTS)
    width: int | None = settings["reduced_to"]

    def list_bad() -> tuple[int, int]:
        num_rows, num_bad = 0, 0
        with whole(out / SKIPPED) as skipped:
            for part in map(Part.read, files):
                num_rows, num_bad = num_rows + len(part.ids), num_bad + len(part.bad)
                for entry in part.bad:
                    skipped.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
        if not num_rows:
            raise ValueError(f"{settings['source']}: no sample could be read; see {out / SKIPPED}")
        if not num_bad:
            (out / SKIPPED).unlink()
        return num_rows, num_bad

    num_rows, num_bad = rank0_first(list_bad)
    reduce = None
    if width is not None:
        share = files[rank() :: world_size()]
        # A part whose samples were all bad has no rows.
        blocks = (part.features for part in map(Part.read, share) if len(part.ids))
        reduce = fit_reduction(blocks, width, sharded=True)
    if rank() > 0:
        return {}  # nobody waits for the writing, which may take longer than an exchange may
    return write_reduced(
        out,
        ((part.ids, part.features) for part in map(Part.read, files)),
        num_rows=num_rows,
        from_width=from_width,
        reduce=reduce,
        facts={**settings, "bad": num_bad},
    )


def write_reduced(
    out: Path,
    blocks: Iterator[Block],
    *,
    num_rows: int,
    from_width: int,
    reduce: Reduction | None,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """A teacher folder of these features, after PCA where there is one."""
    if reduce is None:
        return write_folder(out, blocks, num_rows=num_rows, width=from_width, facts=facts)
    with whole(out / REDUCTION) as file:
        np.savez(file, mean=reduce.mean, axes=reduce.axes)
    return write_folder(
        out,
        ((ids, reduce(features)) for ids, features in blocks),
        num_rows=num_rows,
        width=len(reduce.axes),
        facts={**facts, "variance_kept": reduce.variance_kept},
    )
