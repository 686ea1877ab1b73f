"""Before training: look at a source, pack it into shards, index it, make a teacher's features."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from protoclip.checks import check
from protoclip.config import Config, DataConfig, ModelConfig
from protoclip.data import inspect as inspection
from protoclip.data import pack as packing
from protoclip.data import sources
from protoclip.data.pairs import Pairs, SampleStream
from protoclip.distributed import collectives
from protoclip.distributed.collectives import process_group, raise_on_all_ranks, rank
from protoclip.files import to_json
from protoclip.models import loading
from protoclip.progress import duration
from protoclip.teachers.embed import embed_teacher


def opened(
    source: str | None, data: DataConfig, *, seed: int = 0
) -> tuple[Pairs | SampleStream, list[str]]:
    """The source of that path, read as `data` says, and what was noticed about it."""
    config = Config(data=data if source is None else replace(data, train=source))
    config = replace(config, run=replace(config.run, seed=seed))
    check(config)
    found = sources.pairs(config)
    return found, sources.notes(found)


def inspect(
    source: str,
    *,
    data: DataConfig,
    model: ModelConfig,
    samples: int | None,
    seed: int,
    montage: Path | None,
    json: bool,
) -> None:
    """Print what a source holds, and draw some of it."""
    pairs, notes = opened(source, data, seed=seed)
    found = inspection.inspect(
        pairs,
        count_tokens=loading.token_counter(model),
        context_length=loading.context_length(model),
        samples=samples,
        seed=seed,
        workers=data.workers or None,
        max_pixels=data.max_image_pixels,
        notes=notes,
    )
    if json:
        print(to_json(found, indent=2))
    else:
        inspection.show(found)
    if montage is not None:
        montage.parent.mkdir(parents=True, exist_ok=True)
        inspection.montage(pairs, seed=seed, max_pixels=data.max_image_pixels).save(montage)
        print(f"written to {montage}", file=sys.stderr)


def pack(
    source: str, out: Path, *, data: DataConfig, samples_per_shard: int, resize: int | None
) -> None:
    """Write a source as tar shards."""
    pairs, notes = opened(source, data)
    if isinstance(pairs, SampleStream):
        raise ValueError(f"{source}: a stream has no end to pack; leave data.read at auto")
    say(notes)
    packed = packing.pack(pairs, out, samples_per_shard=samples_per_shard, resize=resize)
    shards = f"{len(packed.shards)} shard{'s' if len(packed.shards) != 1 else ''}"
    print(f"{packed.samples} pairs in {shards}, {packed.skipped} skipped: {out}")


def index(source: str, *, data: DataConfig) -> None:
    """Build the index of a source."""
    started = time.monotonic()
    pairs, notes = opened(source, data)
    if isinstance(pairs, SampleStream):
        raise ValueError(f"{source}: a stream has no index; leave data.read at auto")
    say(notes)
    print(f"{len(pairs)} pairs indexed, in {duration(time.monotonic() - started)}")


def embed(
    teacher: str,
    out: Path,
    *,
    data: DataConfig,
    modality: Literal["auto", "text", "image"],
    pooling: Literal["mean", "cls", "pooler"],
    width: int | None,
    batch_size: int,
    device: str,
    num_samples: int | None,
) -> dict[str, Any]:
    """Write a teacher's features of a data set."""
    place = collectives.device(device)
    with process_group(place):
        pairs, notes = raise_on_all_ranks(lambda: opened(None, data))
        if rank() == 0:
            say(notes)
        return embed_teacher(
            teacher,
            pairs,
            out,
            load_run=loading.load,
            modality=modality,
            pooling=pooling,
            width=width,
            batch_size=batch_size,
            device=place,
            num_samples=num_samples,
        )


def say(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
