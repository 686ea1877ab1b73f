"""What `data.train` and `data.sources` name: one source of pairs, or a mixture of several.

A table, a folder, tar shards and the bundled emoji are each read in a file of their own. Data sets
that models are judged on are opened in `evaluation/datasets.py`.
"""

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath

from protoclip.config import Config, DataConfig, ImagesConfig, SourceConfig
from protoclip.data.access import (
    GO_ON,
    PATIENCE_SECONDS,
    files_like,
    is_url,
    require_allowed,
    too_slow,
)
from protoclip.data.decode import dimensions
from protoclip.data.emoji import emoji_table
from protoclip.data.folders import open_folder
from protoclip.data.pairs import BadSample, ImageTextPairs, Pairs, SampleStream, evenly_spaced
from protoclip.data.shards import open_shards
from protoclip.data.split import Chosen, read_chosen
from protoclip.data.stream import ShardStream
from protoclip.data.tables import (
    caption_columns,
    describe_bad_lines,
    list_changed,
    note_unused,
    open_hub,
    open_table,
)
from protoclip.data.view import MixedStreams, PairsView, mix_pairs
from protoclip.distributed.collectives import world_size
from protoclip.terminal import without_secrets

# Settings that have no effect on the emoji, whose columns are known and whose images are small.
EMOJI_LACK = (
    *("image_column", "caption_column", "id_column", "class_column"),
    *("root", "read", "allow_links"),
)
TRIED = 64  # rows of which one has to be good
# The end of a tar file's name, or of one of several in a pattern.
TAR = re.compile(r"\.(tar(\.(gz|bz2|xz))?|tgz|tbz|txz)(?=[{},*&]|$)", re.IGNORECASE)


def pairs(config: Config, *, needs_captions: bool = True) -> Pairs | SampleStream:
    """The training pairs. In a mixture, sample ids begin with the name of their source.

    Unless `needs_captions`, an image without a caption is a sample too, with no captions.

    Raises `ValueError` if a file is missing or damaged, or sources do not go together.
    """
    data = config.data if needs_captions else ImagesConfig(**vars(config.data))
    chosen = read_chosen(data)
    opened = [open_source(data, entry, seed=config.run.seed) for entry in entries(data)]
    tables = [source for source in opened if isinstance(source, ImageTextPairs)]
    streams = [source for source in opened if isinstance(source, ShardStream)]
    if tables and streams:
        raise ValueError(
            "data.sources: a stream mixes only with streams; set data.read = streaming, and name "
            "tar shards only"
        )
    return _join_streams(config, streams, chosen) if streams else _join(config, tables, chosen)


def _join(
    config: Config, tables: list[ImageTextPairs], chosen: Chosen | None
) -> ImageTextPairs | PairsView:
    """Pairs that can be read in any order: those that are chosen, of all tables."""
    data = config.data
    for table in tables:
        if fault := describe_bad_lines(table, data.max_bad_share):
            raise ValueError(fault)
        if table.needs_captions and not table.caption_columns:
            raise ValueError(f"{table.name}: no column with captions; set caption_column to one")
    if chosen is not None:
        tables = chosen.apply(tables)
        for table, entry in zip(tables, entries(data), strict=True):
            if entry.weight is not None and not len(table):
                raise ValueError(
                    f"{chosen.settings}: no sample is left of '{table.name}', which has a "
                    "weight; take it out of data.sources"
                )
    if data.shuffle_buffer != DataConfig().shuffle_buffer:
        why = "since nothing is streamed"
        tables[0].notes = [*tables[0].notes, f"data.shuffle_buffer: no effect, {why}"]
    return tables[0] if len(tables) == 1 else mix_pairs(tables)


def _join_streams(
    config: Config, streams: list[ShardStream], chosen: Chosen | None
) -> ShardStream | MixedStreams:
    """Streams, of which what is chosen passes."""
    for stream in streams if chosen is not None else ():
        stream.chosen, stream.prefix = chosen, f"{stream.name}/" if len(streams) > 1 else ""
        stream.notes.append(
            f"{stream.name}: is filtered as it is read, so ids of no sample are not counted"
        )
    if not config.episodes.replacement:
        streams[0].notes.append("episodes.replacement: no effect, since a stream is read in order")
    if len(streams) == 1:
        return streams[0]
    weights = [entry.weight for entry in entries(config.data) if entry.weight is not None]
    if len(weights) < len(streams):
        raise ValueError("data.sources: streams have no known length; give each a weight")
    return MixedStreams(streams, weights=weights, seed=config.run.seed)


def require_readable(named: str, rows: int, read: Callable[[int], object]) -> None:
    """Refuse a source none of whose rows can be used; some are read until one is good.

    A run would notice late, and leave a folder in the way of the next one.

    Args:
        named: The setting and the source, for the message.
        read: Reads a row; of a bad one it raises `ValueError`, such as `BadSample`.

    Raises:
        ValueError: None of some evenly spaced rows can be used, or they take too long.
    """
    bad, began = list[ValueError](), time.monotonic()
    for row in evenly_spaced(rows, min(rows, TRIED), seed=0):
        try:
            read(row)
            return
        except ValueError as error:
            bad.append(error)
        if time.monotonic() - began > PATIENCE_SECONDS:
            raise ValueError(f"{named}: {too_slow(f'{len(bad)} pairs', bad[-1])}")
    if bad:
        is_remote = isinstance(bad[0], BadSample) and is_url(bad[0].where)
        way_out = "mend them, or set data.root to the folder where the paths start"
        raise ValueError(
            f"{named}: of {len(bad)} pairs that were looked at none can be used, such as {bad[0]}; "
            f"{GO_ON if is_remote else way_out}"
        )


def require_usable(data: DataConfig, samples: Pairs) -> None:
    """Refuse pairs to train on if too many are in sources of which no sample can be used.

    Raises:
        ValueError: They are more than `data.max_bad_share` allows.
    """

    def read(source: Pairs, rows: Sequence[int], number: int) -> object:
        image = source.sample(int(rows[number])).image
        return dimensions(image, max_pixels=data.max_image_pixels)

    reasons, bad = list[ValueError](), 0
    for source, rows in samples.parts:
        try:
            require_readable(f"data.train: {source.name}", len(rows), partial(read, source, rows))
        except ValueError as error:
            reasons.append(error)
            bad += len(rows)
    if bad > data.max_bad_share * len(samples):
        raise reasons[0]


def allow_bad(config: Config) -> Config:
    """Settings that open the pairs of a finished run, with any share of bad samples."""
    return replace(config, data=replace(config.data, max_bad_share=1.0))


def entries(data: DataConfig) -> list[SourceConfig]:
    """The sources of a mixture, or the single one."""
    return data.sources or [SourceConfig(path=data.train)]


def list_notes(samples: Pairs | SampleStream) -> list[str]:
    """Notes from opening the samples, such as lines that were left out."""
    tables = [source for source in samples.sources if isinstance(source, ImageTextPairs)]
    noticed = [
        f"{table.name}: has no column of sample ids, so they are row numbers: keep the order of "
        "its rows, or name such a column by data.id_column"
        for table in tables
        if table.id_column is None
    ]
    by_number = [pairs.name for pairs in tables if len(pairs) and pairs.class_of(0).isdecimal()]
    if len(by_number) > 1:
        noticed.append(
            f"{' and '.join(by_number)}: have numbers as classes, and equal numbers count as one "
            "class; write names in their class columns if they mean different things"
        )
    return [*noticed, *samples.notes]


def _is_shards(path: str) -> bool:
    """Whether a path names tar files: by suffix, or as a folder that holds some.

    A URL that ends in `/` is taken for such a folder, since nothing else is read of a remote one.
    """
    parts = re.split("[?#]", path) if is_url(path) else [path]
    parts[0] = parts[0].rpartition("/")[2]
    if any(map(TAR.search, parts)):
        return True
    if is_url(path):
        return path.endswith("/") and not parts[0]
    return Path(path).is_dir() and bool(files_like(Path(path), "*.tar"))


def open_source(
    data: DataConfig, entry: SourceConfig, *, seed: int = 0
) -> ImageTextPairs | ShardStream:
    """One source; what its entry leaves unset is taken from `data`."""
    path, mixed = entry.path, len(data.sources) > 1
    settings = ("image_column", "caption_column", "id_column", "class_column", "root")
    values = {key: value for key in settings if (value := getattr(entry, key)) is not None}
    data = replace(data, train=path, sources=[], **values)
    label = without_secrets(path)
    # In a mixture tar shards are named after their folder, as other sources are.
    exists = os.path.exists(path)  # noqa: PTH110 (unlike a `Path`, it may be of any length)
    name = entry.name or (Path(path).resolve().name if mixed and exists else None)
    if path == "emoji":
        asked = replace(DataConfig(), train=path, **values) if mixed else data
        lacking = list_changed(asked, EMOJI_LACK)
        notes = [f"emoji: are bundled, and do not use {lacking}"] if lacking else []
        return ImageTextPairs(emoji_table("train"), name=name or "emoji", notes=notes)
    for setting, location in (("data.root: ", data.root or ""), ("", path)):
        try:
            require_allowed(location)
        except ValueError as error:
            raise ValueError(f"{setting}{without_secrets(location)}: {error}") from None
    local, streaming = not is_url(path), data.read == "streaming"
    if not _is_shards(path):
        if streaming:
            raise ValueError(
                f"{label}: only tar shards can be streamed; name them as in .../*.tar, or set "
                'data.read = "auto"'
            )
        if not local and not PurePath(re.split("[?#]", path)[0]).suffix:
            raise ValueError(
                f"{label}: neither a table nor tar shards; name a table's file, or shards as in "
                ".../*.tar"
            )
        opener = open_folder if local and Path(path).is_dir() else open_table
        return (open_hub if path.startswith("hf:") and local else opener)(data, name=name)
    shards = (
        open_shards(data, name=name)
        if local and not streaming
        else ShardStream(
            path,
            caption_keys=caption_columns(data) or None,
            seed=seed,
            lanes=world_size(),
            shuffle=data.shuffle_buffer,
            name=name,
            needs_captions=data.needs_captions,
        )
    )
    shards.notes += note_unused(data)
    return shards
