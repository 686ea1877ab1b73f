"""Writes tar shards, and compares what is read from them."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from protoclip.config import DataConfig
from protoclip.data.pairs import BadSample, ImageTextPairs, Sample
from protoclip.data.shards import expand_shards, open_shards


def write_tar(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, **{"mode": "w", **options}) as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def numbered(*numbers: int) -> dict[str, bytes]:
    """The files of samples whose image, caption and key tell their number."""
    files: dict[str, bytes] = {}
    for number in numbers:
        files[f"{number:03d}.jpg"] = b"image %031d" % number
        files[f"{number:03d}.txt"] = b"caption %d" % number
    return files


def index(pattern: Path | str, keys: list[str] | None = None) -> ImageTextPairs:
    """The pairs in shards."""
    shards, data = expand_shards(str(pattern)), DataConfig(caption_column=keys)
    return open_shards(shards, data, name=str(pattern))


def facts(items: Iterable[Sample | BadSample]) -> list[tuple]:
    return [
        (s.sample_id, s.image, s.captions) if isinstance(s, Sample) else (s.sample_id, s.reason)
        for s in items
    ]
