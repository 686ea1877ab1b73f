"""Write image-text pairs as tar shards in WebDataset's layout.

`pack.json` in the folder lists the complete shards, so an interrupted run resumes after the last.
"""

import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from protoclip.config import shown
from protoclip.data.access import digest
from protoclip.data.decode import decode, dimensions
from protoclip.data.decode import resize as resize_pixels
from protoclip.data.pairs import MAX_IMAGE_PIXELS, BadSample, Pairs
from protoclip.data.shards import read_samples
from protoclip.files import (
    left_by_killed,
    locked,
    read_json,
    replacing,
    require_regular,
    write_atomically,
)
from protoclip.progress import Progress
from protoclip.terminal import say, visible

LIMIT = "data.max_image_pixels"
MANIFEST, SKIPPED = "pack.json", "skipped.jsonl"
JPEG_QUALITY = 95
JPEG_PIXELS = 65_500  # on a side, that libjpeg writes at most
SHARD_BYTES = 1 << 30  # a shard ends once it has as much content
CHUNK = 256  # samples that threads prepare at a time
# Images that start like this are stored as they are; others become JPEG.
KEPT = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"GIF8", "gif"))


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The manifest that `pack` wrote: names of shards, and numbers of samples."""

    shards: list[str]
    samples: int
    skipped: int


def pack(
    source: Pairs,
    out: Path,
    *,
    samples_per_shard: int = 10_000,
    resize: int | None = None,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Packed:
    """Write a source's samples to `00000.tar`, `00001.tar`, ... in a folder.

    The files of a sample are its number with `.jpg`, `.png`, `.webp` or `.gif`, a `.json` with its
    `sample_id` and its captions as `caption`, and a `.txt` if there is one caption. Classes are not
    written. Bad samples are listed in `skipped.jsonl`. Equal input gives equal bytes.

    Images whose shorter side has more pixels than `resize` are shrunk to it, as JPEG. Others, and
    all if it is unset, keep their bytes. An image of more than `max_pixels` that has to be decoded
    is a bad one. An interrupted run with the same settings is resumed.

    Raises `ValueError` if the folder holds something else, no sample can be stored, or a shard does
    not hold what was written to it.
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
    if max_pixels != MAX_IMAGE_PIXELS:
        settings[LIMIT] = max_pixels
    facts = [part.fingerprint(images=False) for part in source.sources]
    key, skipped = digest({"sources": facts}), out / SKIPPED
    with locked(out):
        out.mkdir(parents=True, exist_ok=True)
        if skipped.exists():
            try:
                require_regular(skipped)
            except ValueError as error:
                raise ValueError(f"{skipped}: {error}; remove it") from error
        manifest = _read_manifest(out, settings, key)
        if not manifest["complete"]:
            _write_shards(source, out, manifest)
        else:  # ids and captions are these
            say(
                f"note: {out}: was packed before, and images are not looked at again; delete it to "
                "pack them anew"
            )
    shards = manifest["shards"]
    if not shards:
        raise ValueError(f"{source.name}: no sample could be packed; {skipped} says why")
    for shard in shards:
        path, written = out / shard["name"], shard["samples"]
        with path.open("rb") as file:
            stored = list(read_samples(file, path.stem, None, stream=False))
        whole = sum(bool(s.image and s.captions and not s.fault) for s in stored)
        if not whole == len(stored) == written:
            raise ValueError(
                f"{path}: {whole} of {written} samples are whole; delete it, and retry"
            )
    names, samples = [s["name"] for s in shards], sum(s["samples"] for s in shards)
    return Packed(shards=names, samples=samples, skipped=skipped.read_bytes().count(b"\n"))


def _read_manifest(out: Path, settings: dict[str, Any], key: str) -> dict[str, Any]:
    """The manifest of an earlier run, up to its first missing shard."""
    manifest: dict[str, Any] = {"settings": settings, "key": key, "complete": False, "shards": []}
    if (out / MANIFEST).exists():
        written = read_json(out / MANIFEST)
        if not _is_manifest(written):
            raise ValueError(f"{out / MANIFEST}: not what pack writes; choose another folder")
        manifest = written
    elif other := first_name(out):
        what = "tar files" if other.endswith(".tar") else "files"
        raise ValueError(
            f"{out}: holds {what} of another origin, such as {visible(other)}; choose a new folder"
        )
    unsaid = {LIMIT: MAX_IMAGE_PIXELS}
    earlier, current = {**unsaid, **manifest["settings"]}, {**unsaid, **settings}
    for name, value in current.items():
        if (before := earlier.get(name)) != value:
            reason = f"was packed with {name} = {shown(before)}, not {shown(value)}"
            raise ValueError(f"{out}: {reason}; keep that, or choose another folder")
    if manifest["key"] != key:
        raise ValueError(f"{out}: was packed from other pairs than these; choose another folder")
    for number, shard in enumerate(manifest["shards"]):
        path = out / shard["name"]
        if not path.exists() or path.stat().st_size != shard["bytes"]:
            return {**manifest, "complete": False, "shards": manifest["shards"][:number]}
    return manifest


def first_name(folder: Path) -> str | None:
    """The first name in a folder, of a tar file if there is one; hidden files do not count."""
    names = [path.name for path in folder.iterdir() if path.name[0] != "."]
    return min(names, key=lambda name: (not name.endswith(".tar"), name), default=None)


def _is_manifest(content: Any) -> bool:
    """Whether JSON has the form of a manifest; no name of it leads out of the folder."""
    numbers = ("samples", "bytes", "read", "skipped_bytes")
    try:
        shards, is_complete = content["shards"], content["complete"]
        counts = [shard[key] for shard in shards for key in numbers]
        in_order = [s["name"] for s in shards] == [f"{n:05d}.tar" for n in range(len(shards))]
        is_whole = isinstance(content["settings"], dict) and isinstance(content["key"], str)
    except (KeyError, TypeError):
        return False
    is_whole &= in_order and isinstance(is_complete, bool)
    return is_whole and all(type(count) is int and count >= 0 for count in counts)


def _write_shards(source: Pairs, out: Path, manifest: dict[str, Any]) -> None:
    """Write the shards that the manifest does not list yet, and list them."""
    from webdataset import TarWriter  # slow to import

    settings, shards = manifest["settings"], manifest["shards"]
    last = shards[-1] if shards else {"read": 0, "skipped_bytes": 0}
    row, number = last["read"], sum(shard["samples"] for shard in shards)
    max_pixels = settings.get(LIMIT, MAX_IMAGE_PIXELS)
    items = _prepare(source, row, settings["resize"], max_pixels)
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


def _prepare(
    source: Pairs, start: int, side: int | None, max_pixels: int
) -> Iterator[dict[str, bytes] | BadSample]:
    """The files of each sample from row `start` on, by extension."""
    with ThreadPoolExecutor() as pool:
        for first in range(start, len(source), CHUNK):
            rows = range(first, min(first + CHUNK, len(source)))
            yield from pool.map(partial(_files, source, side, max_pixels), rows)


def _files(
    source: Pairs, side: int | None, max_pixels: int, row: int
) -> dict[str, bytes] | BadSample:
    try:
        sample = source.sample(row)
    except BadSample as bad:
        return bad
    # With `data.caption_column` the captions of a `.json` are read.
    facts = {"sample_id": sample.sample_id, "caption": sample.captions}
    try:
        kind, image = convert_image(sample.image, side, max_pixels)
        files = {kind: image, "json": json.dumps(facts, ensure_ascii=False).encode()}
        several = len(sample.captions) > 1
        return files if several else {**files, "txt": sample.captions[0].encode()}
    except ValueError as error:  # from the decoder, or a caption that UTF-8 cannot hold
        return BadSample(sample.sample_id, sample.where, str(error))


def convert_image(
    encoded: bytes, side: int | None, max_pixels: int = MAX_IMAGE_PIXELS
) -> tuple[str, bytes]:
    """The extension and content of an image, its shorter side at most `side`."""
    kind = next((kind for start, kind in KEPT if encoded.startswith(start)), None)
    shape = () if kind and side is None else dimensions(encoded, max_pixels=max_pixels)
    if kind and (side is None or min(shape) <= side):
        return kind, encoded
    target = min(side or min(shape), *shape)
    width, height = (max(1, round(length * target / min(shape))) for length in shape)
    if max(width, height) > JPEG_PIXELS:
        way_out = "" if side else "; --resize shrinks it"
        raise ValueError(f"{width} x {height} pixels are more than a JPEG holds{way_out}")
    pixels = decode(encoded, max_pixels=max_pixels, at_least=2 * target)
    buffer = io.BytesIO()
    small = Image.fromarray(resize_pixels(pixels, height, width))
    small.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "jpg", buffer.getvalue()
