"""Folders of pairs: images with captions beside them, and folders that hold a table."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from protoclip.config import DataConfig
from protoclip.data.access import digest, files_like, index_folder, read_file, resolve_cell
from protoclip.data.pairs import ImageTextPairs, file_status
from protoclip.data.tables import (
    METADATA,
    ROWS,
    TEXT_SUFFIXES,
    LeftOut,
    batch_rows,
    build_index,
    caption_columns,
    describe_fault,
    list_captions,
    make_pairs,
    open_files,
)
from protoclip.files import read_json
from protoclip.progress import Progress
from protoclip.terminal import line

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif"),
    *(".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
)
UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".jp2")
UNREAD = "images of a kind that is not read"
CONVERT = "convert them to JPEG, PNG, WebP, GIF, BMP or TIFF"


def open_folder(data: DataConfig, *, name: str | None = None) -> ImageTextPairs:
    """Open the local folder `data.train`. It is the first of these that fits:

    * what `datasets` saved (`save_to_disk`), or one split of it;
    * images with a `metadata.jsonl`, `.csv` or `.parquet`, whose columns are found as in a table,
      `file_name` first;
    * `*.parquet` files of one split;
    * images at any depth, each with captions in a `.txt` or `.json` of the same name; without
      any too, where the data need no captions.

    Raises `ValueError` if it is none of these, holds several splits, or a damaged table.
    """
    location = Path(data.train)
    if (location / "config.toml").is_file() and (location / "checkpoints").is_dir():
        raise ValueError(
            f"{location}: is a run, not data; name its training data (`data` in its "
            "config.toml). Other models are evaluated on the pairs that it held out with protoclip "
            "evaluate MODEL --data, and with run.guard"
        )
    name = name or location.resolve().name
    folder, files = find_table(location)
    if not files:
        return open_images(folder, data, name=name)
    saved = (folder / "state.json").is_file()
    return open_files([*map(str, files)], data, name=name, root=str(folder), saved=saved)


def find_table(folder: Path) -> tuple[Path, list[Path]]:
    """The files of the table that a folder holds, if any, and their folder."""
    several = "{}: has several splits ({}); name one, as in {}"
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json").get("splits") or ["train"]
        if len(splits) > 1:
            names = ", ".join(map(str, splits))
            raise ValueError(several.format(folder, names, folder / str(splits[0])))
        folder = _inside(folder, splits[0])
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        files = read_json(folder / "state.json").get("_data_files") or []
        return folder, [_inside(folder, dict(file).get("filename")) for file in files]
    for metadata in METADATA:
        if (folder / metadata).exists():  # what is no file there is refused
            return folder, [folder / metadata]
    files = files_like(folder, "*.parquet")
    # `train-00000-of-00005.parquet`, and the like with a digest at the end.
    parts = (re.match(r"(.+)-\d+-of-\d+", file.name) for file in files)
    if len(splits := sorted({part[1] for part in parts if part})) > 1:
        example = folder / f"{splits[0]}-*.parquet"
        raise ValueError(several.format(folder, ", ".join(splits), example))
    return folder, files


def _inside(folder: Path, name: Any) -> Path:
    """A file or folder of a saved dataset, which may name nothing outside its own folder."""
    if not isinstance(name, str) or Path(name).name != name or name == "..":
        shown = line(str(name), 80)
        raise ValueError(f"{folder}: not a saved dataset; it names '{shown}' as its file")
    return folder / name


def open_images(folder: Path, data: DataConfig, *, name: str) -> ImageTextPairs:
    """Open a folder of images with captions beside them, or without where none is needed."""
    left_out = LeftOut(str(folder))
    unread = LeftOut(str(folder), {UNREAD: CONVERT})  # the index does not change with these
    images = list(_walk(folder, left_out, unread))
    if unread.notes and not images:
        raise ValueError(f"{unread.notes[0]}; no pair is left")
    keys, links, needed = caption_columns(data), data.allow_links, data.needs_captions
    stems = Counter(_split(image)[0] for image, _ in images)
    names = {image for image, _ in images}

    def read_rows() -> Iterator[tuple[str, list[bytes], str]]:
        progress = Progress(f"read captions of {folder}", len(images), quiet=True)
        for done, (image, file) in enumerate(images):
            progress.update(done)
            try:
                texts = _read_captions(folder, file, keys, allow_links=links) if file else []
            except ValueError as error:
                left_out.add(str(error), image)
                continue
            if texts or not needed:
                # Two images that differ only in their suffix keep it.
                stem = _split(image)[0]
                yield image, texts, image if stems[stem] > 1 or stem in names else stem
            else:
                lack = "images whose .json has no caption" if file else "images without a caption"
                left_out.add(lack, image)
        progress.update(len(images))

    def build(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        yield from batch_rows(read_rows(), ROWS)
        facts["left_out"] = left_out.notes

    # The index changes with a caption, but not with the content of an image.
    stamps = [(image, file, file and file_status(str(folder / file))) for image, file in images]
    facts = {"commands": False, "links": links}  # as versions had it that ran commands
    key = digest({**facts, "folder": str(folder.resolve()), "known": stamps, "keys": keys})
    tables = [path for path in files_like(folder, "*") if path.suffix.lower() in TEXT_SUFFIXES]
    if images and tables:
        way_out = f"{tables[0]} looks like a table of captions: name it instead of the folder"
    elif needed:
        way_out = (
            f"put a caption beside each image (a.jpg: a.txt or a.json), or all in {METADATA[0]}; "
            f"folders of classes need none for protoclip evaluate MODEL --data {folder}"
        )
    else:
        way_out = f"name a folder with images in it ({', '.join(IMAGE_SUFFIXES)})"
    built = key if needed else f"{key}-images"  # the pairs are known by `key` in both
    index = build_index(built, build, folder=index_folder(), label=str(folder), way_out=way_out)
    settings = replace(data, root=None)  # which is for tables
    pairs = make_pairs(index, settings, key=key, label=str(folder), name=name, root=str(folder))
    pairs.notes += unread.notes
    if tables and not any(file for _, file in images):
        pairs.notes.append(f"{folder}: its images have no captions beside them; {way_out}")
    return pairs


def _walk(top: Path, left_out: LeftOut, unread: LeftOut) -> Iterator[tuple[str, str | None]]:
    """The images below a folder, each with the file of its captions; in order of the names."""
    seen: set[tuple[int, int]] = set()

    def note_unreadable(error: OSError) -> None:
        left_out.add("folders that cannot be read", f"{error.filename} ({error.strerror})")

    for path, folders, names in os.walk(top, followlinks=True, onerror=note_unreadable):
        status, here = Path(path).stat(), Path(path).relative_to(top)
        if (status.st_dev, status.st_ino) in seen:
            left_out.add("links to folders already read", str(here))
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for entries in (folders, names):
            shown = sorted(name for name in entries if not name.startswith("."))
            entries[:] = [name for name in shown if not describe_fault(name)]
            for name in set(shown).difference(entries):
                left_out.add("names that are not UTF-8", str(here / name))
        split = [((here / name).as_posix(), *_split((here / name).as_posix())) for name in names]
        beside = {stem: file for file, stem, suffix in split if suffix == ".json"}
        beside |= {stem: file for file, stem, suffix in split if suffix == ".txt"}
        for file, stem, suffix in split:
            if suffix in UNREAD_SUFFIXES:
                unread.add(UNREAD, file)
            elif suffix in IMAGE_SUFFIXES:
                yield file, beside.get(stem)


def _split(path: str) -> tuple[str, str]:
    stem, dot, suffix = path.rpartition(".")
    return (stem, f".{suffix.lower()}") if dot and "/" not in suffix else (path, "")


def _read_captions(
    folder: Path, file: str, keys: Sequence[str], *, allow_links: bool
) -> list[bytes]:
    """The captions beside an image; the `ValueError` says what images without readable ones are."""
    try:
        path = resolve_cell(str(folder), file, allow_links=allow_links)
    except ValueError:
        raise ValueError("captions that are links out of it; see --allow_links") from None
    try:
        raw = read_file(path).removeprefix(b"\xef\xbb\xbf")
        if file.lower().endswith(".txt"):
            return [raw]
        record = json.loads(raw.decode("utf-8", "surrogateescape"))
    except (OSError, ValueError, RecursionError):
        raise ValueError("images whose caption file cannot be read") from None
    return [text for text in list_captions(record, keys) if text.strip()]
