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

    Raises `ValueError` if it is none of these, holds several splits, or a damaged table.
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
    """The files of the table that a folder holds, if any, and their folder."""
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
    if not isinstance(name, str) or Path(name).name != name or name == "..":
        shown = line(str(name), 80)
        raise ValueError(f"{folder}: not a saved dataset; it names '{shown}' as its file")
    return folder / name


def _several(folder: Path, splits: Sequence[str], example: str) -> ValueError:
    names = ", ".join(map(str, splits))
    return ValueError(f"{folder}: has several splits ({names}); name one, as in {example}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(read_file(str(path), NOTHING_MORE)))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({line(str(error))})") from None


def open_images(folder: Path, options: TableOptions, *, name: str) -> ImageTextPairs:
    """Open a folder of images with captions beside them."""
    left_out = LeftOut(str(folder))
    found = list(_walk(folder, left_out))
    known = hashlib.blake2b(digest_size=16)
    for image, caption in found:
        # The index changes with a caption, but not with the content of an image.
        status = (folder / caption).stat() if caption else None
        facts = (status.st_size, status.st_mtime_ns) if status else None
        known.update(f"{image}\0{caption}\0{facts}\0".encode())
    key = digest(
        {"folder": str(folder.resolve()), "known": known.hexdigest(), "keys": options.captions}
    )
    build = partial(_image_batches, folder, found, options.captions, left_out)
    index = build_index(key, SCHEMA, build, folder=options.folder)
    given = ", ".join(options.unused("image_column", "id_column", "root"))
    return ImageTextPairs(
        index,
        name=name,
        root=str(folder),
        access=Access(links=True),  # the user named the folder; no table names what is in it
        notes=[f"{folder}: a folder of images does not use {given}"] if given else [],
    )


def _image_batches(
    folder: Path,
    found: Sequence[tuple[str, str | None]],
    keys: Sequence[str],
    left_out: LeftOut,
    facts: dict[str, Any],
) -> Iterator[pa.RecordBatch]:
    rows: list[dict[str, Any]] = []
    total = 0
    stems = Counter(_split(image)[0] for image, _ in found)
    names = {image for image, _ in found}
    for image, caption in found:
        if texts := _captions(folder, image, caption, keys, left_out):
            # Two images that differ only in their suffix keep it.
            stem = _split(image)[0]
            sample_id = image if stems[stem] > 1 or stem in names else stem
            rows.append({"sample_id": sample_id, "path": image, "caption": texts})
            total += 1
        if len(rows) == BATCH_ROWS:
            yield pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
            rows = []
    yield pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
    facts["notes"] = left_out.notes
    if total:
        return
    if left_out.notes:
        raise ValueError(
            f"{'; '.join(left_out.notes)}; no pair is left: put a caption beside each image "
            "(a.jpg: a.txt or a.json), or all in metadata.csv or metadata.jsonl"
        )
    raise ValueError(
        f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)}), no {METADATA[0]} or .csv, no "
        "*.parquet and no saved Hugging Face dataset"
    )


def _walk(top: Path, left_out: LeftOut) -> Iterator[tuple[str, str | None]]:
    """The images below a folder, each with the file of its captions; in order of the names.

    Links are followed, but no folder is read twice. Hidden files and folders are passed over.
    """
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        where = Path(error.filename).relative_to(top).as_posix()
        left_out.add("folders that cannot be read", f"{where} ({error.strerror})")

    for place, folders, names in os.walk(top, followlinks=True, onerror=unreadable):
        status, here = Path(place).stat(), Path(place).relative_to(top).as_posix()
        if (identity := (status.st_dev, status.st_ino)) in seen:
            left_out.add("links to folders already read", here)
            folders.clear()
            continue
        seen.add(identity)
        prefix = "" if here == "." else f"{here}/"
        shown = {name for name in (*folders, *names) if not name.startswith(".")}
        for name in sorted(shown):
            if fault_of(name):
                left_out.add("names that are not UTF-8", prefix + name)
                shown.discard(name)
        folders[:] = sorted(shown.intersection(folders))
        files: list[str] = []
        for name in sorted(shown.intersection(names)):
            path = Path(place, name)
            if path.is_file():
                files.append(prefix + name)
            elif path.is_symlink():
                left_out.add("dangling links", prefix + name)
        split = [(file, *_split(file)) for file in files]
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
    if not isinstance(record, dict):
        record = {}
    present = {key.lower(): key for key in reversed(record)}
    usual = [present[key] for key in CAPTION_COLUMNS if key in present][:1]
    found = [record.get(key) for key in keys or usual]
    values = [v for value in found for v in (value if isinstance(value, list) else [value])]
    texts = [v.encode("utf-8", "surrogatepass") for v in values if isinstance(v, str) and v.strip()]
    if not texts:
        left_out.add("images whose .json has no caption", image)
    return texts
