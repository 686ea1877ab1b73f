"""What `data.train` and `data.sources` name: one source of pairs, or a mixture of several.

A view has rows of several sources: all, all but a few, or some, one source after the other. It
holds no pair itself. In a mixture, of tables or of streams, sample ids begin with the name of their
source. Data sets that models are evaluated on are opened in `evaluation/datasets.py`.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from protoclip.config import Config, DataConfig, ImagesConfig, SourceConfig
from protoclip.data.access import GO_ON, digest, files_like, is_url, require_allowed
from protoclip.data.bands import find_size
from protoclip.data.emoji import emoji_table
from protoclip.data.folders import open_folder
from protoclip.data.pairs import (
    BadSample,
    ImageTextPairs,
    Pairs,
    Rows,
    Sample,
    SampleStream,
    evenly_spaced,
    split_by_source,
)
from protoclip.data.sampler import ORDER_STREAM, generator
from protoclip.data.shards import ShardStream, expand_shards, open_shards
from protoclip.data.split import read_chosen
from protoclip.data.tables import caption_columns, describe_bad_lines, open_hub, open_table
from protoclip.distributed.collectives import world_size
from protoclip.terminal import without_secrets

NONE: Rows = np.array([], np.int64)
PERIOD = 1000  # a mixture of streams keeps its shares exactly over as many samples
TRIED = 64  # rows of which one has to be good
# The end of a tar file's name, or of one of several in a pattern.
TAR = re.compile(r"\.(tar(\.(gz|bz2|xz))?|tgz|tbz|txz)(?=[{},*&]|$)", re.IGNORECASE)


def open_samples(config: Config, *, needs_captions: bool = True) -> Pairs | SampleStream:
    """The training pairs. Unless `needs_captions`, an image without a caption is a sample, too.

    Raises `ValueError` if a file is missing or damaged, or sources do not go together.
    """
    data = config.data if needs_captions else ImagesConfig(**vars(config.data))
    chosen, entries = read_chosen(data), list_entries(data)
    opened = [open_entry(data, entry, seed=config.run.seed) for entry in entries]
    tables = [source for source in opened if isinstance(source, ImageTextPairs)]
    streams = [source for source in opened if isinstance(source, ShardStream)]
    if tables and streams:
        raise ValueError(
            "data.sources: a stream mixes only with streams; set data.read = streaming, and name "
            "tar shards only"
        )
    for stream in streams if chosen is not None else ():
        stream.chosen, stream.prefix = chosen, f"{stream.name}/" if len(streams) > 1 else ""
        stream.notes.append(
            f"{stream.name}: is filtered as it is read, so unknown ids are not counted"
        )
    weights = [entry.weight for entry in entries if entry.weight is not None]
    if len(streams) > 1 and len(weights) < len(streams):
        raise ValueError("data.sources: streams have no known length; give each a weight")
    if streams:
        mixed = len(streams) > 1
        return MixedStreams(streams, weights, seed=config.run.seed) if mixed else streams[0]
    for table in tables:
        if fault := describe_bad_lines(table, data.max_bad_share):
            raise ValueError(fault)
        if table.needs_captions and not table.caption_columns:
            raise ValueError(f"{table.name}: no column with captions; set --caption_column to one")
    tables = chosen.select(tables) if chosen else tables
    for table, entry in zip(tables, entries, strict=True):
        if chosen and entry.weight is not None and not len(table):
            raise ValueError(
                f"{chosen.settings}: no sample is left in '{table.name}', which has a weight; "
                "take it out of data.sources"
            )
    return tables[0] if len(tables) == 1 else mix_pairs(tables)


def require_readable(named: str, rows: "RowNumbers", read: Callable[[int], Sample | bytes]) -> None:
    """Refuse a source none of whose rows can be used; some are read until one is good.

    A run would notice late. `named` has the setting and the source; `read` gives a row's sample or
    image, or raises `ValueError`.
    """
    bad = list[ValueError]()
    for number in evenly_spaced(len(rows), TRIED, seed=0):
        try:
            found = read(int(rows[number]))
            find_size(found.image if isinstance(found, Sample) else found)
            return
        except ValueError as error:
            bad.append(error)
    if bad:
        is_remote = isinstance(bad[0], BadSample) and is_url(bad[0].where)
        way_out = "mend them, or set --root to the folder where the paths start"
        raise ValueError(
            f"{named}: of {len(bad)} pairs that were looked at none can be used, such as {bad[0]}; "
            f"{GO_ON if is_remote else way_out}"
        )


def require_usable(data: DataConfig, samples: Pairs) -> None:
    """Raises `ValueError` if too many pairs are in sources of which no sample can be used."""
    reasons, bad = list[ValueError](), 0
    for source, rows in samples.parts:
        try:
            require_readable(f"data.train: {source.name}", rows, source.sample)
        except ValueError as error:
            reasons.append(error)
            bad += len(rows)
    if bad > data.max_bad_share * len(samples):
        raise reasons[0]


def allow_bad(config: Config) -> Config:
    """Settings that open the pairs of a finished run, with any share of bad samples."""
    return replace(config, data=replace(config.data, max_bad_share=1.0))


def list_entries(data: DataConfig) -> list[SourceConfig]:
    """The sources of a mixture, or the single one."""
    return data.sources or [SourceConfig(path=data.train)]


def list_notes(samples: Pairs | SampleStream) -> list[str]:
    """Notes from opening the samples, such as lines that were left out."""
    noticed = [
        f"{source.name}: has no column of sample ids, so they are row numbers: keep the order of "
        "its rows, or name such a column with --id_column"
        for source in samples.sources
        if isinstance(source, ImageTextPairs) and source.id_column is None
    ]
    return [*noticed, *samples.notes]


def open_entry(
    data: DataConfig, entry: SourceConfig, *, seed: int = 0
) -> ImageTextPairs | ShardStream:
    """One source; what its entry leaves unset is taken from `data`."""
    path, mixed = entry.path, len(data.sources) > 1
    settings = ("image_column", "caption_column", "id_column", "class_column", "root")
    values = {key: value for key in settings if (value := getattr(entry, key)) is not None}
    data = replace(data, train=path, sources=[], **values)
    # In a mixture tar shards are named after their folder, as other sources are.
    exists = os.path.exists(path)  # noqa: PTH110 (unlike a `Path`, it may be of any length)
    name = entry.name or (Path(path).resolve().name if mixed and exists else None)
    if path == "emoji":
        return ImageTextPairs(emoji_table("train"), name=name or "emoji")
    for setting, location in (("data.root: ", data.root or ""), ("", path)):
        try:
            require_allowed(location)
        except ValueError as error:
            raise ValueError(f"{setting}{without_secrets(location)}: {error}") from None
    local, streaming = not is_url(path), data.read == "streaming"
    words = [path] if local else re.split("[?#]", path)
    words[0] = words[0].rpartition("/")[2]
    are_shards = any(map(TAR.search, words))
    if not are_shards and local:
        are_shards = Path(path).is_dir() and bool(files_like(Path(path), "*.tar"))
    elif not are_shards:  # a URL that ends in a slash is taken for a folder of them
        are_shards = path.endswith("/") and not words[0]
    if not are_shards:
        if streaming:
            raise ValueError(
                f"{without_secrets(path)}: only tar shards can be streamed; name them as in "
                '.../*.tar, or set data.read = "auto"'
            )
        if not local and not PurePath(re.split("[?#]", path)[0]).suffix:
            raise ValueError(
                f"{without_secrets(path)}: neither a table nor tar shards; name a table's file, or "
                "shards as in .../*.tar"
            )
        opener = open_folder if local and Path(path).is_dir() else open_table
        return (open_hub if path.startswith("hf:") and local else opener)(data, name=name)
    if local and not streaming:
        return open_shards(expand_shards(path), data, name=name or path)
    return ShardStream(
        path,
        caption_keys=caption_columns(data) or None,
        seed=seed,
        lanes=world_size(),
        shuffle=data.shuffle_buffer,
        name=name,
        needs_captions=data.needs_captions,
    )


class AllBut:
    """The numbers below `size` without some, which ascend; it takes memory for these alone."""

    def __init__(self, size: int, left_out: Rows = NONE) -> None:
        self.size, self.left_out = size, left_out
        # Number `n` of the rest is `n` plus the count of these that are at most `n`.
        self._before = left_out - np.arange(len(left_out))

    def __len__(self) -> int:
        return self.size - len(self.left_out)

    def __getitem__(self, number: int) -> int:
        return number + int(np.searchsorted(self._before, number, side="right"))

    def at(self, numbers: Rows) -> Rows:
        """Several at once."""
        return numbers + np.searchsorted(self._before, numbers, side="right")

    def __iter__(self) -> Iterator[int]:
        return map(self.__getitem__, range(len(self)))


RowNumbers = Sequence[int] | Rows | AllBut


def to_array(rows: RowNumbers) -> Rows:
    """All numbers in one array, which is far faster than one after the other."""
    return rows.at(np.arange(len(rows))) if isinstance(rows, AllBut) else np.asarray(rows, np.int64)


def ask_source(name: str) -> Any:
    """A view's method with a row, which the source that has the row answers."""

    def ask(self: "PairsView", row: int) -> Any:
        source, number = self.locate(row)
        return getattr(source, name)(number)

    return ask


class PairsView(Pairs):
    """Rows of sources, with the ids that they have there; see `pairs.Pairs`.

    `parts` are sources, each with its rows in the view. The view can give what they can give.
    """

    parts: Sequence[tuple[Any, RowNumbers]] = ()
    sources: Sequence[Any] = ()

    def __init__(self, parts: Sequence[tuple[Any, RowNumbers]], name: str | None = None) -> None:
        self.parts, self.sources = list(parts), [source for source, _ in parts]
        self.name = name or " + ".join(source.name for source in self.sources)
        self.notes = [note for source in self.sources for note in getattr(source, "notes", ())]
        self._starts = list(accumulate((len(rows) for _, rows in parts), initial=0))

    @cached_property
    def key(self) -> str:
        """Changes with the pairs; empty if a source does not tell. All of a source have its key."""
        source, rows = self.parts[0]
        if len(self.parts) == 1 and np.array_equal(to_array(rows), np.arange(len(source))):
            return str(source.key)
        keys = [
            digest({"of": source.key, "rows": to_array(rows).tolist()}) if source.key else ""
            for source, rows in self.parts
        ]
        return keys[0] if len(keys) == 1 else digest({"parts": keys})

    @property
    def left_out(self) -> Rows:
        starts = accumulate(map(len, self.sources), initial=0)
        parts = zip(self.parts, starts, strict=False)
        left_out = [rows.left_out + at for (_, rows), at in parts if isinstance(rows, AllBut)]
        return np.concatenate([NONE, *left_out])

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, row: int) -> tuple[Any, int]:
        """The source that has a row, and the number of the row there."""
        number = bisect_right(self._starts, row) - 1
        source, rows = self.parts[number]
        return source, int(rows[row - self._starts[number]])

    sample = ask_source("sample")
    sample_id = ask_source("sample_id")
    sample_captions = ask_source("sample_captions")
    image = ask_source("image")
    image_name = ask_source("image_name")
    image_key = ask_source("image_key")
    read_encoded = ask_source("read_encoded")
    read_class = ask_source("read_class")
    where = ask_source("where")

    def most_captions(self, share: float = 1.0) -> int:
        return max(int(source.most_captions(share)) for source in self.sources)

    def sample_ids(self) -> Iterator[str]:
        for source, rows in self.parts:
            if isinstance(rows, AllBut):  # whole columns are read faster than cells
                left_out = set(rows.left_out.tolist())
                ids = enumerate(source.sample_ids())
                yield from (sample_id for row, sample_id in ids if row not in left_out)
            else:
                yield from map(source.sample_id, rows)


def join_sources(sources: Sequence[Any], name: str | None = None) -> PairsView:
    """All rows of the sources."""
    return PairsView([(source, AllBut(len(source))) for source in sources], name)


def drop_rows(pairs: Pairs, left_out: Rows) -> PairsView:
    """A source or view of all rows but a few, without some more of its rows, which ascend."""
    # Rows of the view are rows of its sources without those that it leaves out already.
    in_sources = AllBut(sum(map(len, pairs.sources)), pairs.left_out).at(left_out)
    parts = split_by_source(pairs.sources, np.union1d(pairs.left_out, in_sources))
    return PairsView([(source, AllBut(len(source), rows)) for source, rows in parts], pairs.name)


def _join_names(sources: Sequence[ImageTextPairs | SampleStream]) -> str:
    """The name of a mixture; raises if ids `<name>/<id in the source>` could be equal."""
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1 or "/" in name:
            wrong = f"two are named '{name}'" if "/" not in name else f"'{name}' holds a '/'"
            raise ValueError(
                f"data.sources: {wrong}, but sample ids start with the name; give each source a "
                "name of its own, without '/', by name = ... in its [[data.sources]]"
            )
    return " + ".join(names)


def mix_pairs(sources: Sequence[ImageTextPairs]) -> PairsView:
    """Sources one after the other; sample ids are `<name of the source>/<id in the source>`, so
    names must differ and have no `/`."""
    return join_sources([source.prefix_ids() for source in sources], _join_names(sources))


class MixedStreams(SampleStream):
    """Streams in a seeded order, each with its exact share of every thousand samples.

    Sample ids are as in `mix_pairs`. Raises `ValueError` as that, or if a weight is too small.
    """

    sources: Sequence[Any] = ()

    def __init__(
        self, streams: Sequence[SampleStream], weights: Sequence[float], *, seed: int
    ) -> None:
        self.name, self.sources, self.seed = _join_names(streams), list(streams), seed
        self.notes = [note for stream in streams for note in stream.notes]
        bounds = np.rint(PERIOD * np.cumsum(weights) / sum(weights)).astype(np.int64)
        self._shares = np.diff(bounds, prepend=0)
        if not self._shares.all():
            raise ValueError("data.sources: a weight is less than a thousandth of their sum")
        names, shares = [stream.name for stream in streams], self._shares.tolist()
        self._identity = digest({"names": names, "shares": shares, "seed": seed})

    @property
    def lanes(self) -> int:
        return int(self.sources[0].lanes)

    def samples(self, first: int = 0, lane: int = 0) -> Iterator[Sample | BadSample]:
        period, skip = divmod(first, PERIOD)
        readers = [stream.samples(count, lane) for stream, count in self._counts(first)]
        while True:
            for source in self._order(period)[skip:]:
                item = next(readers[source])
                sample_id = f"{self.sources[source].name}/{item.sample_id}"
                if isinstance(item, Sample):
                    yield replace(item, sample_id=sample_id)
                else:
                    yield BadSample(sample_id, item.where, item.reason)
            period, skip = period + 1, 0

    def state_dict(self, first: int, lane: int = 0) -> dict[str, Any]:
        states = [stream.state_dict(count, lane) for stream, count in self._counts(first)]
        return {"streams": states, "mixture": self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("mixture") != self._identity:
            raise ValueError(
                f"{self.name}: the names, the weights or the seed are not those of the interrupted "
                "run, so the streams cannot continue; restore them, or start again"
            )
        for stream, of_stream in zip(self.sources, state["streams"], strict=True):
            stream.load_state_dict(of_stream)

    def _order(self, period: int) -> Rows:
        sources = np.repeat(np.arange(len(self.sources)), self._shares)
        return generator(self.seed, ORDER_STREAM, period).permutation(sources)

    def _counts(self, first: int) -> list[tuple[SampleStream, int]]:
        """The streams, each with how many of the first samples came from it."""
        period, within = divmod(first, PERIOD)
        begun = np.bincount(self._order(period)[:within], minlength=len(self.sources))
        return list(zip(self.sources, (period * self._shares + begun).tolist(), strict=True))
