"""Open whatever a path names: a table, a folder, tar shards, or the bundled emoji."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from protoclip.data.bundled import emoji_table
from protoclip.data.folders import open_folder
from protoclip.data.locations import NOTHING_MORE, Access, is_url, require_allowed
from protoclip.data.manifests import open_manifest
from protoclip.data.pairs import ImageTextPairs, SampleStream
from protoclip.data.shards import open_shards
from protoclip.data.streams import ShardStream


def open_source(
    path: str,
    *,
    name: str | None = None,
    image_column: str | None = None,
    caption_column: Sequence[str] | None = None,
    id_column: str | None = None,
    root: str | None = None,
    read: Literal["auto", "indexed", "streaming"] = "auto",
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    shuffle: int = 4096,
    cache: Path | None = None,
    access: Access = NOTHING_MORE,
) -> ImageTextPairs | SampleStream:
    """Open a source of image-text pairs; `docs/data.md` has a page on each kind.

    Args:
        path: `emoji`; a CSV, TSV or Parquet file; tar shards as a path, glob, brace pattern, URL
            or `pipe:` command; or a folder of any of these or of pictures with captions.
        name: What messages and derived sample ids call it; derived from the path if unset.
        image_column, caption_column, id_column: Columns of a table; detected if unset. For tar
            shards the captions' keys in the `.json` members.
        root: Folder or URL that a table's relative paths start from, and all its paths lie below;
            the table's own if unset.
        read: How tar shards are read: `indexed` (any order, local files), `streaming` (in one
            order), `auto` (indexed where the files are local).
        seed, rank, world_size, shuffle: Of a stream; see `ShardStream`.
        cache: Folder for indexes; the user's cache folder if unset.
        access: What the user allows.

    Raises:
        ValueError: Nothing there, or not of a known form; in one line that says what to do.
    """
    if path == "emoji":
        return ImageTextPairs(emoji_table("train"), name=name or "emoji")
    for setting, location in (("data.root: ", root), ("", path)):
        try:
            require_allowed(location or "", access)
        except ValueError as error:
            raise ValueError(f"{setting}{location}: {error}") from None
    if is_shards(path):
        columns = {"image_column": image_column, "id_column": id_column, "root": root}
        given = [f"data.{column}" for column, value in columns.items() if value]
        if given:
            raise ValueError(f"{path}: tar shards have no columns; leave out {', '.join(given)}")
        local = not (is_url(path) or path.startswith("pipe:"))
        if read == "indexed" and not local:
            raise ValueError(
                f'{path}: only local shards can be indexed; set data.read = "streaming", '
                "or copy them here"
            )
        if read == "streaming" or not local:
            return ShardStream(
                path,
                caption_key=caption_column,
                seed=seed,
                rank=rank,
                world_size=world_size,
                shuffle=shuffle,
                name=name,
                access=access,
            )
        return open_shards(path, caption_key=caption_column, name=name, cache=cache)
    if read == "streaming":
        raise ValueError(f'{path}: only tar shards can be streamed; leave data.read at "auto"')
    open_table = open_folder if not is_url(path) and Path(path).is_dir() else open_manifest
    return open_table(
        path,
        image_column=image_column,
        caption_column=caption_column,
        id_column=id_column,
        root=root,
        name=name,
        cache=cache,
        access=access,
    )


def is_shards(path: str) -> bool:
    """Whether a path names tar files: by suffix, as a command, or as a folder that holds some."""
    if path.startswith("pipe:") or any(s in path for s in (".tar", ".tgz")):
        return True
    folder = Path(path)
    return not is_url(path) and folder.is_dir() and next(folder.glob("*.tar"), None) is not None
