"""From the configuration to samples, episodes, loaders and external teachers."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from protoclip.config import Config, DataConfig, SourceConfig
from protoclip.data.bundled import emoji_teacher_path
from protoclip.data.cache import DiskCache, ImageCache, MemoryCache
from protoclip.data.episodes import Episode, EpisodeSampler
from protoclip.data.index import cache_folder, digest
from protoclip.data.loader import EpisodeLoader
from protoclip.data.locations import Access
from protoclip.data.mixtures import MixedPairs, MixedStreams, ShuffledCaptions
from protoclip.data.pairs import BadSample, ImageTextPairs, Pairs, SampleStream
from protoclip.data.sources import open_source
from protoclip.data.transforms import View
from protoclip.distributed import rank, world_size
from protoclip.teachers import TeacherFeatures, read_teacher

# Shorter side of small copies: this, or more where crops are larger.
COPY_SIDE, COPY_MARGIN = 256, 10 / 7
# Part of the folder's name: what an earlier form of the cache left is not read.
CACHE_FORM = "pictures-2"


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
        shuffle=data.shuffle,
        cache=Path(data.cache_folder) / "index" if data.cache_folder else None,
        access=Access(
            commands=data.allow_commands,
            private_hosts=data.allow_private_hosts,
            links=data.allow_links,
        ),
        **columns,
    )


def episodes(config: Config, samples: Pairs | SampleStream) -> Callable[[int], Episode]:
    """Which samples form the episode of a number.

    Raises:
        ValueError: An episode is larger than the data without replacement.
    """
    size = config.episodes.size
    if isinstance(samples, SampleStream):
        # Rows of a stream's episode are numbers in the stream.
        return lambda index: Episode(
            index=index, rows=torch.arange(index * size, (index + 1) * size)
        )
    weights = [entry.weight for entry in config.data.sources if entry.weight is not None]
    sources = samples.sources if isinstance(samples, MixedPairs) else [samples]
    return EpisodeSampler(
        [len(source) for source in sources],
        size,
        seed=config.run.seed,
        replacement=config.episodes.replacement,
        weights=weights or None,
    ).episode


def loader(
    config: Config,
    samples: Pairs | SampleStream,
    *,
    tokenizer: Callable[[list[str]], Tensor],
    view: View,
    device: torch.device,
    on_read: Callable[[int, list[BadSample]], None],
) -> EpisodeLoader:
    """This process's share of the batches.

    Raises:
        ValueError: The processes cannot share a batch evenly.
    """
    share, rest = divmod(config.episodes.batch_size, world_size())
    if rest or share < 2:
        raise ValueError(
            f"episodes.batch_size: {config.episodes.batch_size} pairs cannot be shared evenly by "
            f"{world_size()} processes, two or more each; try {max(2, share) * world_size()}"
        )
    return EpisodeLoader(
        pairs=samples,
        tokenizer=tokenizer,
        view=view,
        batch_size=share,
        rank=rank(),
        world_size=world_size(),
        seed=config.run.seed,
        device=device,
        workers=config.data.workers,
        cache=image_cache(config.data, samples),
        small_side=max(COPY_SIDE, math.ceil(view.size * COPY_MARGIN))
        if config.data.small_copies
        else None,
        max_image_pixels=config.data.max_image_pixels,
        on_read=on_read,
    )


def image_cache(data: DataConfig, samples: Pairs | SampleStream) -> ImageCache | None:
    """Keeps decoded pictures for repeated passes."""
    most = int(data.cache_gb * 1e9)
    if data.cache == "disk":
        folder = Path(data.cache_folder) if data.cache_folder else cache_folder()
        return DiskCache(folder / CACHE_FORM / identity(samples), max_bytes=most)
    # Memory is a process's own: what one worker keeps, another has to decode.
    keeps = data.cache == "ram" and not data.workers
    return MemoryCache(max_bytes=most) if keeps else None


def identity(samples: Pairs | SampleStream) -> str:
    """A name for a source and its index, each of which has a room of its own in the cache."""
    if isinstance(samples, MixedPairs):
        return digest({"sources": [identity(source) for source in samples.sources]})
    index = samples.index if isinstance(samples, ImageTextPairs) else None
    return digest({"name": samples.name, "index": index.path.stem if index else None})


def teachers(
    config: Config, samples: Pairs | SampleStream, note: Callable[[str], None]
) -> dict[str, TeacherFeatures]:
    """The external teachers by name. Samples they know nothing of are noted, where known ahead.

    Raises:
        ValueError: No such teacher, or it knows none of the samples.
    """
    found = {}
    for name, teacher in config.external_teachers.items():
        assert teacher.features is not None
        if teacher.features == "emoji":
            features = read_teacher(emoji_teacher_path(), prefixes=emoji_prefixes(config, samples))
        else:
            features = read_teacher(teacher.features)
        if isinstance(samples, Pairs) and (missing := features.missing(samples.sample_ids())):
            note(
                f"{name}: no features of {missing} of {len(samples)} training samples, which this "
                "teacher leaves alone"
            )
        found[name] = features
    return found


def emoji_prefixes(config: Config, samples: Pairs | SampleStream) -> list[str]:
    """What the ids of the bundled samples begin with, which their features know without."""
    if not isinstance(samples, MixedPairs):
        return [""]
    sources = zip(samples.sources, entries(config.data), strict=True)
    return [f"{source.name}/" for source, entry in sources if entry.path == "emoji"] or [""]
