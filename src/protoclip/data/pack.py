"""Write image-text pairs as tar shards, in WebDataset's layout, from any source.

A shard gets its name once it is whole on the disk, and `pack.json` in the folder says what is done,
so a run that was killed goes on after the last whole shard.
"""

import io
import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from protoclip.data.decode import decode, dimensions
from protoclip.data.decode import resize as resize_pixels
from protoclip.data.pairs import (
    MAX_IMAGE_PIXELS,
    BadSample,
    Pairs,
    Sample,
)
from protoclip.data.tars import read_groups, read_members
from protoclip.progress import Progress

# A sample's members: contents by extension.
Members = dict[str, bytes]

MANIFEST, SKIPPED = "pack.json", "skipped.jsonl"
PACK_FORM = 1
JPEG_QUALITY = 95
# Pictures of these first bytes are stored as they are; others become JPEG.
KEPT = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"GIF8", "gif"))


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What `pack` left in its folder: names of shards, and numbers of samples."""

    shards: list[str]
    samples: int
    skipped: int


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """A finished shard.

    `read` counts the source's samples up to its end, `skipped_bytes` the length of the list of bad
    samples there.
    """

    name: str
    samples: int
    bytes: int
    read: int
    skipped_bytes: int


def pack(
    source: Pairs | Iterable[Sample | BadSample],
    out: Path,
    *,
    name: str | None = None,
    samples_per_shard: int = 10_000,
    shard_bytes: int = 1 << 30,
    resize: int | None = None,
    threads: int | None = None,
) -> Packed:
    """Write a source's samples to `00000.tar`, `00001.tar`, ... in a folder.

    A sample's members are its number with `.jpg`, `.png`, `.webp` or `.gif`, its caption in `.txt`,
    and a `.json` that holds its `sample_id`, and its captions where it has several. Bad samples are
    listed in `skipped.jsonl`. At the end the shards are read and their samples counted.

    Args:
        source: Pairs, or samples that come in the same order each time.
        out: The folder, made if need be; one that holds an unfinished run of the same source and
            settings is continued.
        name: Of a source that has none of its own, to recognise it by.
        samples_per_shard, shard_bytes: A shard ends when it has so many samples, or bytes of
            members.
        resize: Shrink pictures whose shorter side has more pixels to that, as JPEG of quality
            `JPEG_QUALITY`. Others, and all if unset, keep their bytes.
        threads: That read and shrink; one a core if unset.

    Raises:
        ValueError: The folder holds something else, a sample cannot be stored, or a shard does not
            hold what was written to it.
    """
    named = source.name if isinstance(source, Pairs) else (name or "samples")
    total = len(source) if isinstance(source, Pairs) else None
    settings = {
        "form": PACK_FORM,
        "source": named,
        "source_samples": total,
        "samples_per_shard": samples_per_shard,
        "shard_bytes": shard_bytes,
        "resize": resize,
    }
    if min(samples_per_shard, shard_bytes, 1 if resize is None else resize) < 1:
        raise ValueError("pack: samples_per_shard, shard_bytes and resize are at least 1")
    out.mkdir(parents=True, exist_ok=True)
    done, complete = _finished(out, settings)
    if not complete:
        _write_manifest(out, settings, done, False)
        start = done[-1].read if done else 0
        ready = _prepared(
            source, start, partial(_ready, side=resize), threads or os.cpu_count() or 1
        )
        progress = Progress(f"Packing {named}", total) if total else None
        _write_all(ready, out, settings, done, progress)
    if not done:
        raise ValueError(f"{named}: no sample could be packed; {out / SKIPPED} says why")
    for shard in done:
        _verify(out / shard.name, shard.samples)
    skipped = out / SKIPPED
    lines = skipped.read_bytes().count(b"\n") if skipped.exists() else 0
    return Packed(
        shards=[shard.name for shard in done],
        samples=sum(shard.samples for shard in done),
        skipped=lines,
    )


def _finished(out: Path, settings: dict[str, Any]) -> tuple[list[_Shard], bool]:
    """The shards that an earlier run left whole, and whether they are all."""
    manifest = out / MANIFEST
    if not manifest.exists():
        if next(out.glob("*.tar"), None) is not None:
            raise ValueError(f"{out}: holds tar files of another origin; choose another folder")
        (out / SKIPPED).unlink(missing_ok=True)
        return [], False
    facts = json.loads(manifest.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if facts["settings"].get(key) != value:
            raise ValueError(
                f"{out}: was packed with {key} = {facts['settings'].get(key)!r}, not {value!r}; "
                "keep that, or choose another folder"
            )
    listed = [_Shard(**each) for each in facts["shards"]]
    sizes = [(out / s.name).stat().st_size if (out / s.name).exists() else -1 for s in listed]
    whole = [size == shard.bytes for size, shard in zip(sizes, listed, strict=True)]
    if facts["complete"] and all(whole):
        return listed, True
    done = listed[: whole.index(False)] if not all(whole) else listed
    if (out / SKIPPED).exists():
        os.truncate(out / SKIPPED, done[-1].skipped_bytes if done else 0)
    return done, False


def _prepared(
    source: Pairs | Iterable[Sample | BadSample],
    start: int,
    ready: Callable[[Sample | BadSample], Members | BadSample],
    threads: int,
) -> Iterator[Members | BadSample]:
    """The samples from number `start` on, in order, read and shrunk by threads."""
    if isinstance(source, Pairs):
        pairs = source  # narrowed for the function below
        items: Iterable[Any] = range(start, len(pairs))

        def prepare(row: int) -> Members | BadSample:
            try:
                return ready(pairs.sample(row))
            except BadSample as bad:
                return bad

        function: Callable[[Any], Members | BadSample] = prepare
    else:
        items, function = islice(source, start, None), ready
    waiting: deque[Future[Members | BadSample]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 4 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _ready(sample: Sample | BadSample, *, side: int | None) -> Members | BadSample:
    if isinstance(sample, BadSample):
        return sample
    kind = next((kind for start, kind in KEPT if sample.image.startswith(start)), None)
    image, facts = sample.image, {"sample_id": sample.sample_id}
    try:
        if kind is None or side is not None:
            width, height = dimensions(image, max_pixels=MAX_IMAGE_PIXELS)
            if kind is None or (side is not None and min(width, height) > side):
                kind, image = "jpg", _shrunk(image, width, height, side)
        if len(sample.captions) == 1:
            text = {"txt": sample.captions[0].encode(), "json": _json(facts)}
        else:
            text = {"json": _json({**facts, "caption": sample.captions})}
    except ValueError as error:  # a caption with half a surrogate pair, too
        return BadSample(sample.sample_id, sample.where, str(error))
    return {kind: image, **text}


def _json(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, ensure_ascii=False).encode()


def _shrunk(encoded: bytes, width: int, height: int, side: int | None) -> bytes:
    """The picture as JPEG, its shorter side at most `side`."""
    shorter = min(width, height)
    target = min(side or shorter, shorter)
    pixels = decode(encoded, max_pixels=MAX_IMAGE_PIXELS, at_least=2 * target)
    small = resize_pixels(
        pixels, max(1, round(height * target / shorter)), max(1, round(width * target / shorter))
    )
    buffer = io.BytesIO()
    Image.fromarray(small).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _write_all(
    samples: Iterator[Members | BadSample],
    out: Path,
    settings: dict[str, Any],
    done: list[_Shard],
    progress: Progress | None,
) -> None:
    """Write shards until there is no sample left; `done` grows by each."""
    read = done[-1].read if done else 0
    written = sum(shard.samples for shard in done)
    complete = False
    with (out / SKIPPED).open("ab") as skipped:
        while not complete:
            path = out / f"{len(done):05d}.tar"
            scratch = path.with_suffix(".tar.tmp")
            count = size = 0
            with scratch.open("wb") as file:
                with tarfile.open(fileobj=file, mode="w") as tar:
                    while count < settings["samples_per_shard"] and size < settings["shard_bytes"]:
                        item = next(samples, None)
                        if item is None:
                            complete = True
                            break
                        read += 1
                        if isinstance(item, BadSample):
                            skipped.write(_line(item))
                        else:
                            size += _add(tar, f"{written + count:09d}", item)
                            count += 1
                        if progress is not None:
                            progress.update(read)
                _flush(file)
            _flush(skipped)
            if count:
                scratch.replace(path)
                written += count
                done.append(
                    _Shard(
                        name=path.name,
                        samples=count,
                        bytes=path.stat().st_size,
                        read=read,
                        skipped_bytes=skipped.tell(),
                    )
                )
            else:
                scratch.unlink()
            _write_manifest(out, settings, done, complete)


def _line(bad: BadSample) -> bytes:
    facts = {"sample_id": bad.sample_id, "where": bad.where, "reason": bad.reason}
    return (json.dumps(facts) + "\n").encode()


def _add(tar: tarfile.TarFile, key: str, members: Members) -> int:
    """Add a sample; returns its bytes."""
    for kind, data in members.items():
        info = tarfile.TarInfo(f"{key}.{kind}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return sum(map(len, members.values()))


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_manifest(
    out: Path, settings: dict[str, Any], done: list[_Shard], complete: bool
) -> None:
    facts = {"settings": settings, "complete": complete, "shards": [asdict(s) for s in done]}
    scratch = out / f"{MANIFEST}.tmp"
    with scratch.open("wb") as file:
        file.write(json.dumps(facts, indent=1).encode())
        _flush(file)
    scratch.replace(out / MANIFEST)


def _verify(path: Path, samples: int) -> None:
    """Count the whole samples in a shard."""
    with path.open("rb") as file:
        groups = list(read_groups(read_members(file, lambda name: False, size=path.stat().st_size)))
    whole = sum(not g.fault and g.image is not None and "json" in g.members for g in groups)
    if whole != samples or len(groups) != samples:
        raise ValueError(
            f"{path}: holds {whole} samples where {samples} were written; delete it and pack again"
        )
