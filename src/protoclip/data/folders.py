"""Folders of pairs: images with captions beside them, and folders that hold a table."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
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

    Raises:
        ValueError: There is no such folder; it holds none of these, or several splits; or a table
            in it is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path}: no such folder")
    name = options.name or folder.resolve().name
    folder, files = tables(folder)
    if files and (folder / "state.json").is_file():
        return open_saved(folder, files, options.with_defaults(root=str(folder), name=name))
    if files:
        if files[0].name in METADATA:
            options = replace(options, image_column=options.image_column or "file_name")
        return open_files([str(file) for file in files], options, root=str(folder), name=name)
    return open_images(folder, options, name=name)


def tables(folder: Path) -> tuple[Path, list[Path]]:
    """The files of the table that a folder holds, if any, and their folder.

    Raises:
        ValueError: It holds several splits.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _read_json(folder / "dataset_dict.json").get("splits", [])
        if len(splits) != 1:
            raise _several(folder, splits, str(folder / str(next(iter(splits), "train"))))
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
        raise _several(folder, splits, str(folder / f"{splits[0]}-*.parquet"))
    return folder, found


def _inside(folder: Path, name: Any) -> Path:
    """A file or folder of a saved dataset, which may name nothing outside its own folder."""
    if not isinstance(name, str) or Path(name).name != name:
        shown = line(str(name), 80)
        raise ValueError(f"{folder}: not a saved dataset; it names '{shown}' as its file")
    return folder / name


def _several(folder: Path, splits: Sequence[str], example: str) -> ValueError:
    names = ", ".join(map(str, splits))
    return ValueError(f"{folder}: has several splits ({names}); name one, as in {example}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_file(str(path), NOTHING_MORE))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({line(str(error))})") from None
    return found if isinstance(found, dict) else {}


def open_images(folder: Path, options: TableOptions, *, name: str) -> ImageTextPairs:
    """Open a folder of images with captions beside them."""
    known = hashlib.blake2b(digest_size=16)
    for image, caption in _walk(folder, LeftOut(str(folder))):
        # The index changes with a caption, but not with the content of an image.
        status = (folder / caption).stat() if caption else None
        facts = (status.st_size, status.st_mtime_ns) if status else None
        known.update(f"{image}\0{caption}\0{facts}\0".encode())
    key = digest(
        {"folder": str(folder.resolve()), "known": known.hexdigest(), "keys": options.captions}
    )
    index = build_index(
        key, SCHEMA, partial(_image_batches, folder, options.captions), folder=options.folder
    )
    unused = {"image_column": options.image_column, "id_column": options.id_column}
    given = [setting for setting, value in {**unused, "root": options.root}.items() if value]
    note = f"{folder}: a folder of images does not use {', '.join(given)}"
    return ImageTextPairs(
        index,
        name=name,
        root=str(folder),
        access=Access(links=True),  # the user named the folder; no table names what is in it
        notes=[note] if given else [],
    )


def _image_batches(
    folder: Path, keys: Sequence[str], facts: dict[str, Any]
) -> Iterator[pa.RecordBatch]:
    left_out = LeftOut(str(folder))
    rows: list[dict[str, Any]] = []
    total = 0
    found = list(_walk(folder, left_out))
    stems = Counter(_split(image)[0] for image, _ in found)
    names = {image for image, _ in found}
    for image, caption in found:
        if not (texts := _captions(folder, image, caption, keys, left_out)):
            continue
        # Two images that differ only in their suffix keep it.
        stem = _split(image)[0]
        sample_id = image if stems[stem] > 1 or stem in names else stem
        rows.append({"sample_id": sample_id, "path": image, "caption": texts})
        total += 1
        if len(rows) == BATCH_ROWS:
            yield pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
            rows = []
    if rows:
        yield pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
    facts["notes"] = left_out.notes
    if total:
        return
    if splits := sorted(entry.name for entry in folder.iterdir() if _holds_table(entry)):
        raise _several(folder, splits, str(folder / splits[0]))
    if left_out.notes:
        raise ValueError(
            f"{'; '.join(left_out.notes)}; no pair is left: put a caption beside each image "
            "(a.jpg: a.txt or a.json), or all in metadata.csv or metadata.jsonl"
        )
    raise ValueError(
        f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)}), no {METADATA[0]} or .csv, no "
        "*.parquet and no saved Hugging Face dataset"
    )


def _holds_table(folder: Path) -> bool:
    try:
        return folder.is_dir() and bool(tables(folder)[1])
    except ValueError:
        return True


def _walk(top: Path, left_out: LeftOut) -> Iterator[tuple[str, str | None]]:
    """The images below a folder, each with the file of its captions; in order of the names.

    Links are followed, but no folder is read twice. Hidden files and folders are passed over.
    """
    seen: set[tuple[int, int]] = set()

    def walk(relative: str) -> Iterator[tuple[str, str | None]]:
        try:
            status = (top / relative).stat()
            if (place := (status.st_dev, status.st_ino)) in seen:
                left_out.add("links to folders already read", relative)
                return
            seen.add(place)
            with os.scandir(top / relative) as entries:
                found = sorted((e for e in entries if e.name[0] != "."), key=lambda e: e.name)
        except OSError as error:
            left_out.add("folders that cannot be read", f"{relative} ({error.strerror})")
            return
        files: list[str] = []
        folders: list[str] = []
        for entry in found:
            path = f"{relative}/{entry.name}" if relative else entry.name
            real = Path(entry.path)
            if fault_of(entry.name):
                left_out.add("names that are not UTF-8", path)
            elif real.is_dir():
                folders.append(path)
            elif real.is_file():
                files.append(path)
            elif entry.is_symlink():
                left_out.add("dangling links", path)
        beside: dict[str, str] = {}
        for kind in (".json", ".txt"):  # the `.txt` counts if both are there
            beside |= {stem: f for f in files for stem, suffix in [_split(f)] if suffix == kind}
        for file in files:
            stem, suffix = _split(file)
            if suffix in IMAGE_SUFFIXES:
                yield file, beside.get(stem)
        for path in folders:
            yield from walk(path)

    yield from walk("")


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
    values: list[Any] = []
    if isinstance(record, dict):
        present = {key.lower(): key for key in reversed(record)}
        usual = [present[key] for key in CAPTION_COLUMNS if key in present][:1]
        for key in keys or usual:
            value = record.get(key)
            values += value if isinstance(value, list) else [value]
    texts = [v.encode("utf-8", "surrogatepass") for v in values if isinstance(v, str) and v.strip()]
    if not texts:
        left_out.add("images whose .json has no caption", image)
    return texts
