"""`protoclip embed`, `embed-teacher` and `match`: their options, and what they print."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from protoclip.cli import spec
from protoclip.cli.data import open_source, print_notes
from protoclip.config import Count, DataConfig, Seed
from protoclip.rules import require_data_paths, require_model, require_place
from protoclip.terminal import say, visible

FEW = 1000  # pairs; with fewer a note says that numbers say little


@dataclass(frozen=True)
class Embed(spec.PairsOptions, spec.EncodingOptions, spec.Answers):
    """Write a model's vectors for a data set as Parquet.

    One vector for each image and each caption, for search engines;
    docs/embed.md has the columns. After an interruption the same command
    continues.
    """

    model: str  # A run, or another model that protoclip.load opens.
    _: KW_ONLY
    out: str  # Parquet file to write.
    class_column: str | None = None  # Column of a table that holds the class.
    max_bad_share: Annotated[float, 0, 1] = 0.05  # Share of a CSV's lines that may be bad.
    num_samples: Count | None = None  # Samples of a stream to read.
    fuse: Annotated[float, 0, 1] | None = None  # Also their mean, with this weight for text.
    batch_size: Count | None = None  # Images or captions at once.
    workers: Annotated[int, 0, 4096] | Literal["auto"] = "auto"  # Threads that read images.
    overwrite: bool = False  # Replace a file made with other settings.

    def __call__(self) -> None:
        data = DataConfig(train=self.data, **self.data_settings())
        require_model("", self.model)
        require_data_paths(data)
        require_place("--out", self.out, is_folder=False, suffix=".parquet")
        with spec.quick_imports():
            from protoclip.distributed import collectives
            from protoclip.encode.embed import embed, read_facts

        device = spec.open_device(self.device)
        with collectives.process_group(device):
            path = embed(
                self.model,
                data,
                self.out,
                batch_size=self.batch_size,
                device=device,
                precision=self.precision,
                engine=self.engine,
                num_samples=self.num_samples,
                fuse=self.fuse,
                overwrite=self.overwrite,
            )
            if collectives.rank() == 0:
                self.answer({"file": self.out, **read_facts(path)}, lambda: None)


@dataclass(frozen=True, kw_only=True)
class EmbedTeacher(spec.Recipes, spec.EncodingOptions, spec.BatchOption):
    """Write a frozen model's features for a data set.

    After an interruption the same command continues.
    """

    teacher: str  # hf:NAME, minilm, open_clip:MODEL/TAG, timm:MODEL, run or file.
    out: str  # Folder of the features, for teacher.features.
    modality: Literal["auto", "text", "image"] = "auto"  # auto prefers images.
    pooling: Literal["mean", "cls", "last", "pooler"] = "mean"  # How tokens become one feature.
    width: Count | None = None  # Reduce the features to this width by PCA.
    num_samples: Count | None = None  # Samples of a stream to read.
    data: DataConfig = field(default_factory=DataConfig)

    def __call__(self) -> None:
        require_data_paths(self.data)
        require_model("--teacher", self.teacher, "teacher")
        require_place("--out", self.out, is_folder=True)
        with spec.quick_imports():
            from protoclip.distributed import collectives
            from protoclip.encode.teachers import embed_teacher

        device = spec.open_device(self.device)
        with collectives.process_group(device):
            samples, notes = collectives.raise_on_all_ranks(lambda: open_source(self.data))
            if collectives.rank() == 0:
                print_notes(notes)
            facts = embed_teacher(
                self.teacher,
                samples,
                Path(self.out),
                modality=self.modality,
                pooling=self.pooling,
                width=self.width,
                batch_size=self.batch_size,
                device=device,
                precision=self.precision,
                engine=self.engine,
                num_samples=self.num_samples,
                threads=self.data.threads,
            )
        if collectives.read_launcher()[0] > 0:
            return
        self.answer(facts, lambda: self.show(facts))

    def show(self, facts: Mapping[str, Any]) -> None:
        for name, value in facts.items():
            shown = f"{value:.4f}" if isinstance(value, float) else visible(str(value))
            print(f"{name:<24} {shown}")
        out = visible(self.out)
        say(f"written to {out}; train with --teacher.features {shlex.quote(out)}")


@dataclass(frozen=True, kw_only=True)
class Match(spec.PairsOptions, spec.DeviceOption, spec.Answers):
    """Rank pretrained encoders before anything is trained.

    Each encoder reads some pairs once. A row shows an image encoder with a text
    encoder. The first row has the highest recall@10 of align's closed form, on
    pairs that it was not fitted to. docs/match.md explains the rest.
    """

    images: tuple[str, ...]  # Image encoders: timm:MODEL[/FILE], runs, open_clip:NAME/TAG.
    texts: tuple[str, ...]  # Text encoders: minilm, hf:NAME, runs, open_clip:NAME/TAG.
    pairs: Count = 4000  # Pairs to draw; from a stream, the first.
    seed: Seed = 0  # Seed of the draw and of the splits.
    pooling: Literal["mean", "cls", "last", "pooler"] | None = None  # Token pooling; else its own.
    batch_size: Count = 64  # Captions or images at once.
    cache: bool = True  # Keep features, so that another encoder is quick.

    def __call__(self) -> None:
        for encoder in self.images:
            require_model("--images", encoder, "encoder")
        for encoder in self.texts:
            require_model("--texts", encoder, "encoder")
        data = DataConfig(train=self.data, **self.data_settings())
        require_data_paths(data)
        with spec.quick_imports():
            from protoclip.data.access import cache_folder
            from protoclip.evaluation.match import match

        device = spec.open_device(self.device)
        source, _ = open_source(data, seed=self.seed, max_bad_share=data.max_bad_share)
        print_notes([*getattr(source, "notes", ())])  # but not those on ids, which nothing keeps
        records = match(
            self.images,
            self.texts,
            source,
            pairs=self.pairs,
            seed=self.seed,
            pooling=self.pooling,
            batch_size=self.batch_size,
            cache=cache_folder() / "features" if self.cache else None,
            device=device,
            engine=self.engine,
        )
        if skipped := records[0]["skipped"]:
            say(f"note: {source.name}: {skipped:,} of the pairs cannot be read; left out")
        if (number := records[0]["apart"]) < FEW:
            say(
                f"note: {source.name}: only {number:,} pairs share no image or caption, too few to "
                "say much"
            )
        self.answer(records, lambda: show_encoders(records))


def show_encoders(records: Sequence[Mapping[str, Any]]) -> None:
    """Print a table with one row a pair of encoders."""
    from protoclip.results.table import Cell, Row, Table, print_table

    first = records[0]
    rows = []
    for record in records:
        rates = (record["images_per_second"], record["captions_per_second"])
        low, high = (100 * end for end in record["recall@10/interval"])
        values = (
            f"{100 * record['recall@10']:.1f}%\n{low:.1f} to {high:.1f}",
            f"{100 * record['mutual_neighbours']:.1f}%",
            f"{record['cka']:.3f}",
            f"{record['agreement']:.3f}",
            f"{record['image_width']}\n{record['text_width']}",
            "\n".join("kept" if rate is None else f"{rate:,.0f}" for rate in rates),
        )
        cells = [Cell(value=value) for value in values]
        sides = [(record[name], record[f"{name}_layers"]) for name in ("image", "text")]
        names = [" ".join(filter(None, side)) for side in sides]
        rows.append(Row(heading=names, cells=cells))
    measures = ["recall@10", "mutual 10-NN", "linear CKA", "groups agree", "widths"]
    note = (
        "Ordered by recall@10: the mean of both ways between an image and its text, by what align "
        "begins with and the layers that it would choose, fitted on "
        f"{first['pairs'] - first['judged']:,} pairs and evaluated on {first['judged']:,} others "
        f"(by chance {100 * first['recall@10/by_chance']:.1f}%). The other measures are of "
        f"{first['apart']:,} pairs, of which no two share an image or a caption, and last layers."
    )
    print_table(
        Table(
            title="Pretrained encoders, the best pair first",
            heading=["image encoder", "text encoder"],
            columns=[name.split() for name in (*measures, "images/s captions/s")],
            rows=rows,
            notes=[note],
        )
    )
