"""One pass of a frozen model over a source, in parts, so that it can be stopped and go on."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from protoclip.data.decode import decode
from protoclip.data.pairs import (
    MAX_IMAGE_PIXELS,
    BadSample,
    Pairs,
    Sample,
    SampleStream,
)
from protoclip.distributed.collectives import rank, rank0_first, world_size
from protoclip.progress import Progress
from protoclip.teachers.encode import Encoder, ImageEncoder, TextEncoder
from protoclip.teachers.store import whole

# A row of `Pairs`, or what a stream gave.
Item = int | Sample | BadSample
# Ids and features of good samples, and the bad ones.
Encoded = tuple[list[str], npt.NDArray[np.float32], list[BadSample]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Features of some thousand samples that follow each other in the source.

    Attributes:
        ids: Of the good samples.
        features: Rows of theirs, in half precision.
        bad: Samples without features, with the reason.
        landmark: Where a stream stands behind this part.
    """

    ids: list[str]
    features: npt.NDArray[np.float16]
    bad: list[dict[str, str]]
    landmark: dict[str, Any] | None

    def write(self, path: Path) -> None:
        note = json.dumps({"bad": self.bad, "landmark": self.landmark})
        columns = {
            "sample_id": pa.array(self.ids, pa.string()),
            "features": pa.FixedSizeListArray.from_arrays(
                pa.array(self.features.ravel()), self.features.shape[1]
            ),
        }
        table = pa.table(columns).replace_schema_metadata({"note": note})
        with whole(path) as file, pa.ipc.new_file(pa.PythonFile(file), table.schema) as writer:
            writer.write_table(table)

    @classmethod
    def read(cls, path: Path) -> "Part":
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        features = table.column("features").combine_chunks()
        width = table.schema.field("features").type.list_size
        return cls(
            ids=table.column("sample_id").to_pylist(),
            features=features.flatten().to_numpy(zero_copy_only=False).reshape(-1, width),
            **json.loads(table.schema.metadata[b"note"]),
        )


def part_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.arrow"))


def encode_parts(
    encoder: Encoder,
    samples: Pairs | SampleStream,
    folder: Path,
    *,
    name: str,
    total: int,
    size: int,
    batch_size: int,
) -> None:
    """Write the parts that are not there yet, with progress; processes share them out.

    Args:
        encoder: The model.
        samples: What it reads.
        folder: Where parts are written.
        name: What messages call the model.
        total: Samples to read.
        size: Samples a part.
        batch_size: Captions or pictures encoded at once.

    Raises:
        ValueError: Features that are not finite; a stream, and several processes.
    """
    if isinstance(samples, SampleStream) and world_size() > 1:
        raise ValueError(f"{samples.name}: a stream is embedded by one process; start one")
    written = rank0_first(lambda: part_files(folder))
    there = {int(path.stem) for path in written}
    missing = [number for number in range(-(-total // size)) if number not in there]
    start = min(len(written) * size, total)
    progress = Progress(f"embed {name}", total)
    show = progress.update if rank() == 0 else lambda done: None
    show(start)
    known: set[str] = set()
    items: Iterator[Item] = iter(())
    if isinstance(samples, SampleStream):
        for path in written:
            part = Part.read(path)
            known.update(part.ids, (entry["sample_id"] for entry in part.bad))
        if written and part.landmark is not None:
            samples.load_state_dict(part.landmark)
        items = samples.samples(start)
    own = missing[rank() :: world_size()]
    for done, number in enumerate(own):
        first, end = number * size, min((number + 1) * size, total)
        block: Sequence[Item] = range(first, end)
        if isinstance(samples, SampleStream):
            block = unseen(list(islice(items, end - first)), known)

        def tick(share: float, done: int = done) -> None:
            # As far as this process is with its share, so are the others with theirs.
            show(start + int((done + share) / len(own) * (total - start)))

        if isinstance(encoder, TextEncoder):
            ids, features, bad = encode_captions(encoder, samples, block, batch_size, tick)
        else:
            ids, features, bad = encode_pictures(encoder, samples, block, batch_size, tick)
        broken = np.flatnonzero(~np.isfinite(features).all(1))
        if len(broken):
            raise ValueError(
                f"{name}: {len(broken)} of {len(ids)} features are not finite, "
                f"such as those of '{ids[broken[0]]}'"
            )
        Part(
            ids=ids,
            features=features.astype(np.float16),
            bad=[{"sample_id": b.sample_id, "where": b.where, "reason": b.reason} for b in bad],
            landmark=samples.state_dict(end) if isinstance(samples, SampleStream) else None,
        ).write(folder / f"{number:06d}.arrow")


def unseen(block: Sequence[Item], known: set[str]) -> list[Item]:
    """What a stream gives for the first time; it comes back to samples it gave before."""
    new: list[Item] = []
    for item in block:
        assert not isinstance(item, int)
        if item.sample_id not in known:
            known.add(item.sample_id)
            new.append(item)
    return new


def encode_captions(
    encoder: TextEncoder,
    samples: Pairs | SampleStream,
    block: Sequence[Item],
    batch_size: int,
    tick: Callable[[float], None],
) -> Encoded:
    """Captions in batches of similar length, the longest first, so that little is padding."""
    ids, captions, bad = [], [], []
    for item in block:
        try:
            sample_id, found = read_captions(samples, item)
        except BadSample as error:
            bad.append(error)
            continue
        ids.append(sample_id)
        captions.append(found)
    owner = np.repeat(np.arange(len(ids)), [len(found) for found in captions])
    texts = [text for found in captions for text in found]
    order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
    sums = torch.zeros(len(ids), encoder.width)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        features = encoder.encode([texts[place] for place in batch])
        sums.index_add_(0, torch.from_numpy(owner[batch]), features.cpu())
        tick((first + len(batch)) / len(order))
    return ids, F.normalize(sums, dim=-1).numpy(), bad


def read_captions(samples: Pairs | SampleStream, item: Item) -> tuple[str, tuple[str, ...]]:
    """Id and captions of a sample; where the source allows it, without reading the picture."""
    if isinstance(item, int):
        assert isinstance(samples, Pairs)
        return samples.sample_id(item), samples.sample_captions(item)
    sample = read_sample(samples, item)
    return sample.sample_id, sample.captions


def read_sample(samples: Pairs | SampleStream, item: Item) -> Sample:
    if isinstance(item, BadSample):
        raise item
    if isinstance(item, Sample):
        return item
    assert isinstance(samples, Pairs)
    return samples.sample(item)


def encode_pictures(
    encoder: ImageEncoder,
    samples: Pairs | SampleStream,
    block: Sequence[Item],
    batch_size: int,
    tick: Callable[[float], None],
) -> Encoded:
    """Pictures in batches; threads read and decode the next batch while one is encoded."""

    def read(item: Item) -> tuple[str, Tensor] | BadSample:
        try:
            sample = read_sample(samples, item)
            try:
                pixels = decode(sample.image, max_pixels=MAX_IMAGE_PIXELS)
            except ValueError as error:
                raise BadSample(sample.sample_id, sample.where, str(error)) from None
        except BadSample as error:
            return error
        return sample.sample_id, encoder.transform(Image.fromarray(pixels))

    batches = [block[first : first + batch_size] for first in range(0, len(block), batch_size)]
    ids, features, bad = [], [np.zeros((0, encoder.width), dtype=np.float32)], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending = [pool.submit(read, item) for item in batches[0]] if batches else []
        for number in range(len(batches)):
            following = batches[number + 1] if number + 1 < len(batches) else []
            ready = [future.result() for future in pending]
            pending = [pool.submit(read, item) for item in following]
            bad += [found for found in ready if isinstance(found, BadSample)]
            good = [found for found in ready if not isinstance(found, BadSample)]
            if good:
                ids += [sample_id for sample_id, _ in good]
                features.append(encoder.encode([picture for _, picture in good]).cpu().numpy())
            tick((number + 1) / len(batches))
    return ids, np.concatenate(features), bad
