"""What `data.train` and `data.sources` name: a table, a folder, tar shards, a dataset of the hub,
or the bundled emoji; one of them, or a mixture."""

from pathlib import Path

from protoclip.config import Config, DataConfig, SourceConfig
from protoclip.data.access import Access, is_url, require_allowed
from protoclip.data.emoji import emoji_table
from protoclip.data.folders import open_folder
from protoclip.data.index import cache_folder
from protoclip.data.mixture import MixedPairs, MixedStreams, ShuffledCaptions
from protoclip.data.pairs import ImageTextPairs, Pairs, SampleStream
from protoclip.data.shards import open_shards
from protoclip.data.stream import ShardStream
from protoclip.data.tables import TableOptions, open_hub, open_table
from protoclip.distributed.collectives import rank, world_size


def pairs(config: Config) -> Pairs | SampleStream:
    """The training pairs. In a mixture, sample ids begin with the name of their source.

    Raises `ValueError` if a file is missing or damaged, or sources do not go together.
    """
    data, seed = config.data, config.run.seed
    found = [open_source(data, entry, seed=seed) for entry in entries(data)]
    indexed: list[Pairs] = [source for source in found if isinstance(source, Pairs)]
    streams = [source for source in found if isinstance(source, SampleStream)]
    if data.shuffle_captions:
        if streams:
            raise ValueError("data.shuffle_captions: a stream cannot be read in any order")
        indexed = [ShuffledCaptions(source, seed=seed) for source in indexed]
    if len(found) == 1:
        return streams[0] if streams else indexed[0]
    if not streams:
        return MixedPairs(indexed)
    if indexed:
        raise ValueError(
            "data.sources: a stream mixes only with streams; set data.read = streaming, and name "
            "tar shards only"
        )
    weights = [entry.weight for entry in entries(data) if entry.weight is not None]
    if len(weights) < len(streams):
        raise ValueError("data.sources: streams have no known length; give each a weight")
    return MixedStreams(streams, weights=weights, seed=seed)


def entries(data: DataConfig) -> list[SourceConfig]:
    """The sources of a mixture, or the single one."""
    return data.sources or [SourceConfig(path=data.train)]


def notes(samples: Pairs | SampleStream) -> list[str]:
    """What was noticed when the samples were opened, such as lines that were left out."""
    if isinstance(samples, MixedPairs):
        return [note for source in samples.sources for note in notes(source)]
    if isinstance(samples, ShuffledCaptions):
        return notes(samples.pairs)
    return list(samples.notes) if isinstance(samples, ImageTextPairs) else []


def _is_shards(path: str) -> bool:
    """Whether a path names tar files: by suffix, as a command, or as a folder that holds some."""
    if path.startswith("pipe:") or ".tar" in path or ".tgz" in path:
        return True
    return not is_url(path) and Path(path).is_dir() and any(Path(path).glob("*.tar"))


def access_of(data: DataConfig) -> Access:
    """What the settings `data.allow_*` allow."""
    return Access(
        commands=data.allow_commands,
        private_hosts=data.allow_private_hosts,
        links=data.allow_links,
    )


def open_source(
    data: DataConfig, entry: SourceConfig, *, seed: int = 0, class_column: str | None = None
) -> ImageTextPairs | SampleStream:
    """One source; what its entry leaves unset is taken from `data`.

    With a `class_column`, the source is a table that has this column, and need not have captions.
    """
    path = entry.path
    # In a mixture tar shards are named after their folder, as other sources are.
    here = len(data.sources) > 1 and Path(path).exists()
    captions = entry.caption_column or data.caption_column or []
    options = TableOptions(
        image_column=entry.image_column or data.image_column,
        caption_column=[captions] if isinstance(captions, str) else captions,
        id_column=entry.id_column or data.id_column,
        root=entry.root or data.root,
        name=entry.name or (Path(path).resolve().name if here else None),
        cache=Path(data.cache_folder or cache_folder()) / "index",
        access=access_of(data),
        class_column=class_column,
    )
    if path == "emoji":
        return ImageTextPairs(emoji_table("train"), name=options.name or "emoji")
    for setting, location in (("data.root: ", options.root), ("", path)):
        try:
            require_allowed(location or "", options.access)
        except ValueError as error:
            raise ValueError(f"{setting}{location}: {error}") from None
    local = not (is_url(path) or path.startswith("pipe:"))
    if not _is_shards(path):
        if data.read == "streaming":
            raise ValueError(f'{path}: only tar shards can be streamed; set data.read = "auto"')
        if path.startswith("hf:") and local:
            return open_hub(path, options)
        return (open_folder if local and Path(path).is_dir() else open_table)(path, options)
    if given := options.unused():
        raise ValueError(f"{path}: tar shards have no columns; leave out {given}")
    if data.read == "indexed" and not local:
        raise ValueError(
            f'{path}: only local shards can be indexed; set data.read = "streaming", or copy them'
        )
    keys = options.caption_column or None
    if local and data.read != "streaming":
        return open_shards(path, caption_keys=keys, name=options.name, cache=options.cache)
    return ShardStream(
        path,
        caption_keys=keys,
        seed=seed,
        rank=rank(),
        world_size=world_size(),
        shuffle=data.shuffle_buffer,
        name=options.name,
        access=options.access,
    )
