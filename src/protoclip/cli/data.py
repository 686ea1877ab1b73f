"""`protoclip data inspect`, `score`, `pack` and `index`: their options, and what they print."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from protoclip import rules
from protoclip.cli.spec import Recipes, merge_trees, open_device, quick_imports
from protoclip.config import Config, Count, DataConfig, ModelConfig, RunConfig
from protoclip.files import replacing
from protoclip.terminal import counted, line, say, visible

if TYPE_CHECKING:
    from protoclip.data.pairs import Pairs, SampleStream

ENCODERS = {"image": "timm:tf_efficientnet_lite0", "text": "minilm"}  # of `data score`


@dataclass(frozen=True)
class Inspect(Recipes):
    """Show a source's sizes, caption lengths, duplicates, bad files."""

    source: str  # Table, hf:OWNER/NAME, shards or folder.
    _: KW_ONLY
    samples: Count = 5000  # Pairs to read, drawn evenly.
    every: bool = False  # Read all pairs.
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def __call__(self) -> None:
        data = data_of(self.source, self.data)
        rules.require_model("model.start", self.model.start)
        with quick_imports():
            from protoclip.data.tables import describe_bad_lines
            from protoclip.data.tools import inspect, show

        count_tokens, context_length = tokens_of(self.model)
        pairs, notes = open_source(data)
        if fault := describe_bad_lines(pairs, data.max_bad_share):
            say(f"warning: {fault}")
        report = inspect(
            pairs,
            count_tokens=count_tokens,
            context_length=context_length,
            samples=None if self.every else self.samples,
            workers=data.threads,
            notes=notes,
        )
        bad, most = report["unreadable"], data.max_bad_share
        if report["read"] and bad > most * (report["read"] + bad):
            fault = fault or f"mend or remove what cannot be read; more than {most:.0%} ends a run"
        report["next"] = fault or report["next"]
        self.answer(report, lambda: show(report, has_model=context_length is not None))


@dataclass(frozen=True)
class Score(Recipes):
    """Score how well captions fit, by heads that have not seen them.

    Writes a table of all pairs, those that agree least first. Two pretrained
    encoders encode each image and caption once, and align with the same encoders
    reuses the features. docs/tasks/clean.md has the columns.
    """

    defaults: ClassVar[Mapping[str, Any]] = {f"model.{m}.name": n for m, n in ENCODERS.items()}

    source: str  # Table, hf:OWNER/NAME, shards or folder.
    _: KW_ONLY
    out: str  # File to write, .csv or .parquet.
    keep: Annotated[float, 0, 1] | None = None  # Share of samples to write, for --only.
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def __call__(self) -> None:
        data = data_of(self.source, self.data)
        require_table(self.out, only_csv=self.keep is not None)
        usual = {"model": {modality: {"name": name} for modality, name in ENCODERS.items()}}
        given = merge_trees(usual, self.settings())
        given["data"] = {**given.get("data", {}), "train": self.source, "sources": []}
        with quick_imports():
            from protoclip.explore.score import keep_samples, score

        device = open_device()
        table, facts = score(open_indexed(data, "scores"), given, device)
        least = table.slice(0, 3).to_pylist()
        if self.keep is not None:
            table = keep_samples(table, self.keep)
            facts["kept"] = len(set(table["sample_id"].to_pylist()))
        write_table(table, self.out)
        self.answer(facts, lambda: show_scores(facts, least))
        say(f"written to {self.out}")


def show_scores(facts: Mapping[str, Any], least: Sequence[Any]) -> None:
    """Print what `score` found, and the pairs that agree least."""
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{part}: {bits}" for part, bits in value.items()) + " bits"
        print(f"{name.replace('_', ' '):<19} {value if isinstance(value, str) else f'{value:,}'}")
    for pair in least:
        caption, best = line(pair["caption"], 60), line(pair["best_caption"], 60)
        print(f"{'agrees least':<19} {visible(pair['sample_id'])}: {caption}; fits better: {best}")


def require_table(path: str, *, only_csv: bool = False) -> None:
    """Refuse a file that exists, or whose name does not end as that of a table."""
    suffix = ".csv" if only_csv or path.lower().endswith(".csv") else ".parquet"
    rules.require_place("--out", path, is_folder=False, suffix=suffix)
    rules.require_new("--out", path)


def write_table(table: Any, path: str) -> None:
    """Write an Arrow table as the file's name ends."""
    from pyarrow import csv, parquet

    write: Any = csv.write_csv if path.lower().endswith(".csv") else parquet.write_table
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(path)) as scratch:
        write(table, scratch)


@dataclass(frozen=True)
class Pack(Recipes):
    """Write a source as tar shards.

    After an interruption the same command continues.
    """

    source: str  # Table, hf:OWNER/NAME, shards or folder.
    out: str  # Folder of the shards.
    _: KW_ONLY
    samples_per_shard: Count = 10_000  # Pairs in a shard.
    resize: Count | None = None  # Shrink images to this shorter side.
    data: DataConfig = field(default_factory=DataConfig)

    def __call__(self) -> None:
        data = data_of(self.source, self.data)
        rules.require_place("out", self.out, is_folder=True)
        from protoclip.data.tools import pack

        pairs = open_indexed(data, "end to pack")
        if data.class_column:
            say("note: --class_column: shards hold no classes; keep the table for them")
        names, samples, skipped = pack(
            pairs, Path(self.out), samples_per_shard=self.samples_per_shard, resize=self.resize
        )
        shards = counted(len(names), "shard")
        counts = f"{counted(samples, 'pair')} in {shards}, {skipped:,} skipped"
        facts = {"folder": self.out, "shards": names, "pairs": samples, "skipped": skipped}
        self.answer(facts, lambda: print(f"{counts}; written to {visible(self.out)}"))


@dataclass(frozen=True)
class Index(Recipes):
    """Build the index of a source ahead of training."""

    source: str  # Table, hf:OWNER/NAME, shards or folder.
    _: KW_ONLY
    data: DataConfig = field(default_factory=DataConfig)

    def __call__(self) -> None:
        data, started = data_of(self.source, self.data), time.monotonic()
        from protoclip.progress import duration

        pairs = open_indexed(data, "index")
        seconds = time.monotonic() - started
        text = f"{counted(len(pairs), 'pair')} indexed, in {duration(seconds)}"
        self.answer({"pairs": len(pairs), "seconds": seconds}, lambda: print(text))


def data_of(source: str, data: DataConfig) -> DataConfig:
    """The settings for a source, which takes the place of those of a recipe; paths must exist."""
    rules.require_source("", source)
    rules.require_data_paths(replace(data, train="emoji", sources=[]))
    return replace(data, train=source, sources=[])


def tokens_of(model: ModelConfig) -> tuple[Callable[[list[str]], Any], int | None]:
    """What counts the tokens of captions for a model, and how many it reads; None: as they need."""
    from protoclip.data.summary import count_tokens

    if model == ModelConfig():
        return partial(count_tokens, load_clip_tokenizer()), None
    from protoclip.models.start import resolve_start

    start = resolve_start(model)
    names = (model.name, model.start, model.text.name, model.text.context_length)
    is_chosen = any(name is not None for name in names)
    length = start.context_length if is_chosen else None
    return partial(count_tokens, start.tokenizer()), length


def load_clip_tokenizer() -> Any:
    """CLIP's tokenizer, from open_clip's file: the package would import all models (1.6 s)."""
    package = find_spec("open_clip")
    assert package is not None
    file = Path(str(package.origin)).with_name("tokenizer.py")
    return run_path(str(file))["SimpleTokenizer"]()


def open_source(
    data: DataConfig, *, seed: int = 0, max_bad_share: float = 1.0
) -> "tuple[Pairs | SampleStream, list[str]]":
    """The samples that `data` describes, and what was noticed about them. Bad lines end no look."""
    from protoclip.data import sources

    config = Config(data=replace(data, max_bad_share=max_bad_share), run=RunConfig(seed=seed))
    rules.check(config)
    samples = sources.open_samples(config)
    return samples, sources.list_notes(samples)


def open_indexed(data: DataConfig, purpose: str) -> "Pairs":
    """The samples of a source that is no stream. Prints what was noticed about them."""
    from protoclip.data.pairs import SampleStream

    samples, notes = open_source(data)
    if isinstance(samples, SampleStream):
        way_out = "copy the shards here" if data.read == "auto" else "leave data.read at auto"
        raise ValueError(f"{data.train}: a stream has no {purpose}; {way_out}")
    print_notes(notes)
    return samples


def print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        say(f"note: {note}")
