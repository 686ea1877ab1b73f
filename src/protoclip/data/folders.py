"""Folders of pairs: images with captions beside them, and folders that hold a table."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from protoclip.data.access import NOTHING_MORE, Access, digest, read_file
from protoclip.data.index import build_index
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.tables import (
    BATCH_ROWS,
    CAPTION_COLUMNS,
    LeftOut,
    TableOptions,
    fault_of,
    line,
    open_files,
    open_saved,
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SCHEMA = pa.schema(
    [("sample_id", pa.string()), ("path", pa.string()), ("caption", pa.list_(pa.binary()))]
)


def open_folder(path: str, options: TableOptions) -> ImageTextPairs:
    """Open a local folder of pairs. It is the first of these that fits:

    * what `datasets` saved (`save_to_disk`), or one split of it;
    * images with a `metadata.jsonl`, `.csv` or `.parquet`, whose `file_name` names them;
    * `*.parquet` files of one split;
    * images at any depth, each with captions in a `.txt` or `.json` of the same name.

    Raises `ValueError` if it is none of these, holds several splits, or a damaged table.
    """
    folder = Path(path)
    name = options.name or folder.resolve().name
    folder, files = tables(folder)
    if files and (folder / "state.json").is_file():
        return open_saved(folder, files, options, name=name)
    if files and files[0].name in METADATA:
        options = replace(options, image_column=options.image_column or "file_name")
    if files:
        return open_files([str(file) for file in files], options, root=str(folder), name=name)
    return open_images(folder, options, name=name)


def tables(folder: Path) -> tuple[Path, list[Path]]:
    """The files of the table that a folder holds, if any, and their folder."""
    several = "{}: has several splits ({}); name one, as in {}"
    if (folder / "dataset_dict.json").is_file():
        splits = _read_json(folder / "dataset_dict.json").get("splits") or ["train"]
        if len(splits) > 1:
            names = ", ".join(map(str, splits))
            raise ValueError(several.format(folder, names, folder / str(splits[0])))
        folder = _inside(folder, splits[0])
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        files = _read_json(folder / "state.json").get("_data_files") or []
        return folder, [_inside(folder, dict(file).get("filename")) for file in files]
    for metadata in METADATA:
        if (folder / metadata).is_file():
            return folder, [folder / metadata]
    found = sorted(folder.glob("*.parquet"))
    # `train-00000-of-00005.parquet`, and the like with a digest at the end.
    parts = (re.match(r"(.+)-\d+-of-\d+", file.name) for file in found)
    if len(splits := sorted({part[1] for part in parts if part})) > 1:
        example = folder / f"{splits[0]}-*.parquet"
        raise ValueError(several.format(folder, ", ".join(splits), example))
    return folder, found


def _inside(folder: Path, name: Any) -> Path:
    """A file or folder of a saved dataset, which may name nothing outside its own folder."""
    if not isinstance(name, str) or Path(name).name != name or name == "..":
        shown = line(str(name), 80)
        raise ValueError(f"{folder}: not a saved dataset; it names '{shown}' as its file")
    return folder / name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(read_file(str(path), NOTHING_MORE)))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({line(str(error))})") from None


def open_images(folder: Path, options: TableOptions, *, name: str) -> ImageTextPairs:
    """Open a folder of images with captions beside them."""
    left_out, keys = LeftOut(str(folder)), options.caption_column
    found = list(_walk(folder, left_out))
    stems = Counter(_split(image)[0] for image, _ in found)
    names = {image for image, _ in found}

    def rows() -> Iterator[dict[str, Any]]:
        for image, caption in found:
            if texts := _captions(folder, image, caption, keys, left_out):
                # Two images that differ only in their suffix keep it.
                stem = _split(image)[0]
                sample_id = image if stems[stem] > 1 or stem in names else stem
                yield {"sample_id": sample_id, "path": image, "caption": texts}

    def build(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        made = rows()
        while held := list(islice(made, BATCH_ROWS)):
            yield pa.RecordBatch.from_pylist(held, schema=SCHEMA)
        facts["notes"] = left_out.notes

    # The index changes with a caption, but not with the content of an image.
    known = [(image, caption, _status(folder, caption)) for image, caption in found]
    key = digest({"folder": str(folder.resolve()), "known": known, "keys": keys})
    index = build_index(key, SCHEMA, build, folder=options.cache)
    if not index.table.num_rows:
        reasons = "; ".join(index.facts["notes"])
        raise ValueError(
            f"{reasons or f'{folder}: holds no images'}; no pair is left: put a caption beside "
            f"each image (a.jpg: a.txt or a.json), or all in {METADATA[0]} or .csv"
        )
    given = options.unused()
    return ImageTextPairs(
        index,
        name=name,
        root=str(folder),
        access=Access(links=True),  # the user named the folder; no table names what is in it
        notes=[f"{folder}: a folder of images does not use {given}"] if given else [],
    )


def _status(folder: Path, caption: str | None) -> tuple[int, int] | None:
    try:
        status = (folder / caption).stat() if caption else None
    except OSError:
        return None
    return (status.st_size, status.st_mtime_ns) if status else None


def _walk(top: Path, left_out: LeftOut) -> Iterator[tuple[str, str | None]]:
    """The images below a folder, each with the file of its captions; in order of the names.

    Links are followed, but no folder is read twice. Hidden files and folders are passed over.
    """
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        left_out.add("folders that cannot be read", f"{error.filename} ({error.strerror})")

    for place, folders, names in os.walk(top, followlinks=True, onerror=unreadable):
        status, here = Path(place).stat(), Path(place).relative_to(top)
        if (status.st_dev, status.st_ino) in seen:
            left_out.add("links to folders already read", str(here))
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for entries in (folders, names):
            shown = sorted(name for name in entries if not name.startswith("."))
            entries[:] = [name for name in shown if not fault_of(name)]
            for name in set(shown).difference(entries):
                left_out.add("names that are not UTF-8", str(here / name))
        split = [((here / name).as_posix(), *_split((here / name).as_posix())) for name in names]
        beside = {stem: file for file, stem, suffix in split if suffix == ".json"}
        beside |= {stem: file for file, stem, suffix in split if suffix == ".txt"}
        yield from ((f, beside.get(stem)) for f, stem, suffix in split if suffix in IMAGE_SUFFIXES)


def _split(path: str) -> tuple[str, str]:
    stem, dot, suffix = path.rpartition(".")
    return (stem, f".{suffix.lower()}") if dot and "/" not in suffix else (path, "")


def _captions(
    folder: Path, image: str, file: str | None, keys: Sequence[str], left_out: LeftOut
) -> list[bytes]:
    """The captions of an image; none, and counted, if there is nothing to read."""
    if file is None:
        left_out.add("images without a caption", image)
        return []
    try:
        raw = read_file(str(folder / file), NOTHING_MORE).removeprefix(b"\xef\xbb\xbf")
        if file.lower().endswith(".txt"):
            return [raw]
        record = json.loads(raw.decode("utf-8", "surrogateescape"))
    except (OSError, ValueError, RecursionError):
        left_out.add("images whose caption file cannot be read", image)
        return []
    record = record if isinstance(record, dict) else {}
    present = {key.lower(): key for key in reversed(record)}
    usual = [present[key] for key in CAPTION_COLUMNS if key in present][:1]
    values = [record.get(key) for key in keys or usual]
    found = chain.from_iterable(value if isinstance(value, list) else [value] for value in values)
    texts = [text for text in found if isinstance(text, str) and text.strip()]
    if not texts:
        left_out.add("images whose .json has no caption", image)
    return [text.encode("utf-8", "surrogatepass") for text in texts]
