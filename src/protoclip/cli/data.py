"""`protoclip data inspect`, `data pack` and `data index`."""

import importlib.util
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from protoclip.cli.parsing import Recipes
from protoclip.config import (
    SMALL_CONTEXT_LENGTH,
    Config,
    Count,
    DataConfig,
    ModelConfig,
    RunConfig,
    Seed,
    check,
)
from protoclip.files import to_json
from protoclip.progress import duration

if TYPE_CHECKING:
    from protoclip.data.pairs import Pairs, SampleStream


@dataclass(frozen=True)
class Inspect(Recipes):
    """Show what a source holds: sizes, caption lengths, duplicates, bad files."""

    source: str
    """As data.train."""
    _: KW_ONLY
    samples: Count = 5000
    """Pairs to read, drawn at random."""
    every: bool = False
    """Read all pairs."""
    seed: Seed = 0
    """Seed of the draw."""
    montage: str | None = None
    """Draw random pairs with captions into this PNG file."""
    json: bool = False
    """Print the findings as JSON."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def __call__(self) -> None:
        from protoclip.data.inspect import inspect, montage, show

        pairs, notes = open_source(replace(self.data, train=self.source), seed=self.seed)
        count_tokens, context_length = tokens_of(self.model)
        found = inspect(
            pairs,
            count_tokens=count_tokens,
            context_length=context_length,
            samples=None if self.every else self.samples,
            seed=self.seed,
            workers=self.data.workers or None,
            max_pixels=self.data.max_image_pixels,
            notes=notes,
        )
        if self.json:
            print(to_json(found, indent=2))
        else:
            show(found)
        if self.montage is not None:
            path = Path(self.montage)
            path.parent.mkdir(parents=True, exist_ok=True)
            montage(pairs, seed=self.seed, max_pixels=self.data.max_image_pixels).save(path)
            print(f"written to {path}", file=sys.stderr)


@dataclass(frozen=True)
class Pack(Recipes):
    """Write a source as tar shards.

    After an interruption the same command continues.
    """

    source: str
    """As data.train."""
    out: str
    """Folder of the shards."""
    _: KW_ONLY
    samples_per_shard: Count = 10_000
    """Pairs in a shard."""
    resize: Count | None = None
    """Shrink images to this shorter side; else copy them as they are."""
    data: DataConfig = field(default_factory=DataConfig)

    def __call__(self) -> None:
        from protoclip.data.pack import pack
        from protoclip.data.pairs import SampleStream

        pairs, notes = open_source(replace(self.data, train=self.source))
        if isinstance(pairs, SampleStream):
            raise ValueError(f"{self.source}: a stream has no end to pack; leave data.read at auto")
        print_notes(notes)
        packed = pack(
            pairs, Path(self.out), samples_per_shard=self.samples_per_shard, resize=self.resize
        )
        shards = f"{len(packed.shards)} shard{'s' if len(packed.shards) != 1 else ''}"
        print(f"{packed.samples} pairs in {shards}, {packed.skipped} skipped: {self.out}")


@dataclass(frozen=True)
class Index(Recipes):
    """Build the index of a source ahead of training."""

    source: str
    """As data.train."""
    _: KW_ONLY
    data: DataConfig = field(default_factory=DataConfig)

    def __call__(self) -> None:
        from protoclip.data.pairs import SampleStream

        started = time.monotonic()
        pairs, notes = open_source(replace(self.data, train=self.source))
        if isinstance(pairs, SampleStream):
            raise ValueError(f"{self.source}: a stream has no index; leave data.read at auto")
        print_notes(notes)
        print(f"{len(pairs)} pairs indexed, in {duration(time.monotonic() - started)}")


def tokens_of(model: ModelConfig) -> tuple[Callable[[list[str]], list[int]], int]:
    """What counts the tokens of captions, and how many of them the model reads."""
    if model.name is None:
        return ClipTokens(), model.text.context_length or SMALL_CONTEXT_LENGTH
    from protoclip.models import loading
    from protoclip.models.towers import TokenCounter

    return TokenCounter(model.name), loading.context_length(model)


class ClipTokens:
    """Counts the tokens of captions, start and end included, for the small towers.

    open_clip's tokenizer is loaded from its file: importing open_clip imports all its models.
    """

    def __init__(self) -> None:
        package = importlib.util.find_spec("open_clip")
        assert package is not None
        names = runpy.run_path(str(Path(package.origin or "").with_name("tokenizer.py")))
        self.tokenizer = names["SimpleTokenizer"]()

    def __call__(self, texts: list[str]) -> list[int]:
        return [len(self.tokenizer.encode(text)) + 2 for text in texts]

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return ClipTokens, ()  # worker processes load the file again


def open_source(data: DataConfig, *, seed: int = 0) -> tuple["Pairs | SampleStream", list[str]]:
    """The samples that `data` describes, and what was noticed about them."""
    from protoclip.data import sources

    config = Config(data=data, run=RunConfig(seed=seed))
    check(config)
    samples = sources.pairs(config)
    return samples, sources.notes(samples)


def print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
