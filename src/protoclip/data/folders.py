"""Folders of pairs: pictures with captions beside them or in a metadata table, Hugging Face
datasets on disk, and Parquet exports."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from protoclip.data.index import BATCH_ROWS, build_index, digest
from protoclip.data.locations import NOTHING_MORE, Access
from protoclip.data.manifests import FORMAT, open_tables
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.pictures import (
    IMAGE_SUFFIXES,
    Oddities,
    below,
    captions,
    sample_ids,
    walk,
)
from protoclip.data.tables import line

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SCHEMA = pa.schema(
    [("sample_id", pa.string()), ("path", pa.string()), ("caption", pa.list_(pa.binary()))]
)


def open_folder(
    path: str,
    *,
    image_column: str | None = None,
    caption_column: str | Sequence[str] | None = None,
    id_column: str | None = None,
    root: str | None = None,
    name: str | None = None,
    cache: Path | None = None,
    access: Access = NOTHING_MORE,
) -> ImageTextPairs:
    """Open a local folder of pairs. It is the first of these that fits:

    * a dataset that Hugging Face `datasets` saved (`save_to_disk`), or the split of one;
    * pictures with a `metadata.jsonl`, `.csv` or `.parquet`, whose column `file_name` names them;
    * `*.parquet` files of one split;
    * pictures at any depth, each with captions in a `.txt` (one caption) or `.json` (the keys of
      `CAPTION_COLUMNS`) of the same name. A picture without is left out and counted. Ids are paths
      without suffix; rows follow the names, a folder's own pictures before those of its folders.

    Args:
        path: The folder.
        image_column, caption_column, id_column, root: As `open_manifest` takes them, for tables.
            Beside pictures `caption_column` names keys of the `.json`; the others have no effect.
        name: What messages and derived ids call the source; the folder's name if unset.
        cache: Folder for the index; the user's cache folder if unset.
        access: What the user allows.

    Raises:
        ValueError: There is no such folder, it holds none of these or several splits, or what it
            holds is no sound table.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path}: no such folder")
    name = name or folder.resolve().name
    found = tables(folder)
    if found:
        if image_column is None and found[0].name in METADATA:
            image_column = "file_name"
        return open_tables(
            [str(file) for file in found],
            image_column=image_column,
            caption_column=caption_column,
            id_column=id_column,
            root=root if root is not None else str(found[0].parent),
            name=name,
            cache=cache,
            access=access,
        )
    given = {"image_column": image_column, "id_column": id_column, "root": root}
    unused = [setting for setting, value in given.items() if value is not None]
    keys = (caption_column,) if isinstance(caption_column, str) else tuple(caption_column or ())
    return open_pictures(folder, keys=keys, unused=unused, name=name, cache=cache)


def tables(folder: Path) -> list[Path]:
    """The files of a folder that is read as a table, in order; none if it is not one.

    Raises:
        ValueError: It holds several splits.
    """
    splits: list[str] = []
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json").get("splits", [])
        if len(splits) == 1:
            return tables(inside(folder, splits[0]))
        if splits:
            raise several(folder, splits, str(folder / splits[0]))
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        files = read_json(folder / "state.json").get("_data_files") or []
        return [inside(folder, file.get("filename")) for file in files if isinstance(file, dict)]
    for metadata in METADATA:
        if (folder / metadata).is_file():
            return [folder / metadata]
    found = sorted(folder.glob("*.parquet"))
    # `train-00000-of-00005.parquet`, and the like with a digest at the end.
    parts = (re.match(r"(.+)-\d+-of-\d+", file.name) for file in found)
    splits = sorted({part[1] for part in parts if part})
    if len(splits) > 1:
        raise several(folder, splits, str(folder / f"{splits[0]}-*.parquet"))
    return found


def inside(folder: Path, name: Any) -> Path:
    """What a saved dataset names in its own folder.

    Raises:
        ValueError: It names something elsewhere.
    """
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(
            f"{folder}: not a saved dataset; it names '{line(str(name), 80)}' as its file"
        )
    return folder / name


def several(folder: Path, splits: Sequence[str], example: str) -> ValueError:
    return ValueError(
        f"{folder}: its data lie in parts ({', '.join(splits)}); name one, as in {example}"
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({line(str(error))})") from None
    return found if isinstance(found, dict) else {}


def open_pictures(
    folder: Path, *, keys: tuple[str, ...], unused: list[str], name: str, cache: Path | None
) -> ImageTextPairs:
    """Open a folder of pictures with captions beside them."""
    known = hashlib.blake2b(digest_size=16)
    for listing in walk(folder, Oddities()):
        for picture, caption in listing.pictures:
            # A picture that changes leaves the index as it is; a caption does not.
            known.update(f"{listing.folder}/{picture}\0".encode())
            if caption is not None:
                status = (folder / listing.folder / caption).stat()
                known.update(f"{caption}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    settings = {"folder": str(folder.resolve()), "keys": keys, "unused": unused}
    key = digest({"format": FORMAT, "pictures": known.hexdigest(), **settings})

    def build(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        odd = Oddities()
        rows: list[dict[str, Any]] = []
        total = 0
        for listing in walk(folder, odd):
            ids = sample_ids([picture for picture, _ in listing.pictures])
            for (picture, caption), sample_id in zip(listing.pictures, ids, strict=True):
                path, sample_id = below(listing.folder, picture), below(listing.folder, sample_id)
                texts = captions(folder / listing.folder, caption, path, keys, odd)
                if not texts:
                    continue
                rows.append({"sample_id": sample_id, "path": path, "caption": texts})
                total += 1
                if len(rows) == BATCH_ROWS // 8:
                    yield pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
                    rows = []
        if rows:
            yield pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
        if not total:
            raise nothing(folder, odd)
        facts["notes"] = odd.notes(folder)
        if unused:
            facts["notes"].append(
                f"{folder}: {', '.join(unused)} have no effect on a folder of pictures"
            )

    # The user named the folder, so its links are followed; no table names what is in it.
    return ImageTextPairs(
        build_index(key, SCHEMA, build, folder=cache),
        name=name,
        root=str(folder),
        access=Access(links=True),
    )


def nothing(folder: Path, odd: Oddities) -> ValueError:
    """Why a folder gave no pair, and what to do."""
    splits = sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and holds_table(entry)
    )
    if splits:
        return several(folder, splits, str(folder / splits[0]))
    if odd.counts:
        return ValueError(
            f"{'; '.join(odd.notes(folder))}; no pair is left: put a caption beside each picture "
            "(a.jpg: a.txt or a.json), or all in metadata.csv or metadata.jsonl"
        )
    return ValueError(
        f"{folder}: holds no pictures ({', '.join(IMAGE_SUFFIXES)}), no {METADATA[0]} or .csv, no "
        "*.parquet and no saved Hugging Face dataset"
    )


def holds_table(folder: Path) -> bool:
    try:
        return bool(tables(folder))
    except ValueError:
        return True
