"""Open whatever a path names: a table, a folder, tar shards, or the bundled emoji."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from protoclip.config import Config, DataConfig, SourceConfig
from protoclip.data.emoji import emoji_table
from protoclip.data.folders import open_folder
from protoclip.data.locations import (
    NOTHING_MORE,
    Access,
    is_url,
    require_allowed,
)
from protoclip.data.manifests import open_manifest
from protoclip.data.mixture import MixedPairs, MixedStreams, ShuffledCaptions
from protoclip.data.pairs import ImageTextPairs, Pairs, SampleStream
from protoclip.data.shards import open_shards
from protoclip.data.stream import ShardStream
from protoclip.distributed.collectives import rank, world_size


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
                caption_keys=caption_column,
                seed=seed,
                rank=rank,
                world_size=world_size,
                shuffle=shuffle,
                name=name,
                access=access,
            )
        return open_shards(path, caption_keys=caption_column, name=name, cache=cache)
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


def pairs(config: Config) -> Pairs | SampleStream:
    """The training pairs: one source, or a mixture, whose sample ids begin with a source's name.

    Raises:
        ValueError: A file is missing or not of the right form, or sources do not go together.
    """
    data = config.data
    found = [opened(data, entry, seed=config.run.seed) for entry in entries(data)]
    if data.shuffle_captions:
        if not all(isinstance(source, Pairs) for source in found):
            raise ValueError("data.shuffle_captions: needs samples in any order, not a stream")
        found = [ShuffledCaptions(source, seed=config.run.seed) for source in found]  # type: ignore[arg-type]
    if len(found) == 1:
        return found[0]
    streams = [source for source in found if isinstance(source, SampleStream)]
    if not streams:
        return MixedPairs([source for source in found if isinstance(source, Pairs)])
    if len(streams) < len(found):
        raise ValueError(
            "data.sources: streams do not mix with sources read in any order; read all of them "
            "as tar shards with data.read = streaming, or none"
        )
    shares = [entry.weight for entry in entries(data)]
    if any(share is None for share in shares):
        raise ValueError("data.sources: streams have no known length; give each a weight")
    return MixedStreams(streams, weights=[s for s in shares if s], seed=config.run.seed)


def notes(samples: Pairs | SampleStream) -> list[str]:
    """What was noticed when the samples were indexed, such as lines or files left out."""
    if isinstance(samples, MixedPairs):
        return [note for source in samples.sources for note in notes(source)]
    if isinstance(samples, ShuffledCaptions):
        return notes(samples.pairs)
    if isinstance(samples, ImageTextPairs) and samples.index is not None:
        return [str(note) for note in samples.index.facts.get("notes", [])]
    return []


def entries(data: DataConfig) -> list[SourceConfig]:
    return data.sources or [SourceConfig(path=data.train)]


def opened(data: DataConfig, entry: SourceConfig, *, seed: int) -> Pairs | SampleStream:
    """One source; what its entry leaves unset is taken from the section it stands in."""
    # In a mixture tar shards are named after their folder, as other sources are: not by the path.
    here = len(data.sources) > 1 and Path(entry.path).exists()
    name = entry.name or (Path(entry.path).resolve().name if here else None)
    columns = {
        name: getattr(entry, name) or getattr(data, name)
        for name in ("image_column", "caption_column", "id_column", "root")
    }
    if isinstance(columns["caption_column"], str):
        columns["caption_column"] = [columns["caption_column"]]
    return open_source(
        entry.path,
        name=name,
        read=data.read,
        seed=seed,
        rank=rank(),
        world_size=world_size(),
        shuffle=data.shuffle_buffer,
        cache=Path(data.cache_folder) / "index" if data.cache_folder else None,
        access=Access(
            commands=data.allow_commands,
            private_hosts=data.allow_private_hosts,
            links=data.allow_links,
        ),
        **columns,
    )
