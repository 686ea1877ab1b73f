"""`protoclip match`: its options, and the table that it prints.

The encoders run, and are ranked, in `evaluation/match.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from protoclip.cli.spec import DeviceOption, JsonOption, PairsOptions, open_device, quick_imports
from protoclip.config import Count, Seed
from protoclip.files import to_json
from protoclip.rules import require_data_paths, require_model, require_source
from protoclip.terminal import say, visible

FEW = 1000  # pairs; with fewer a note says that numbers say little


@dataclass(frozen=True, kw_only=True)
class Match(PairsOptions, DeviceOption, JsonOption):
    """Rank pretrained encoders before anything is trained.

    Each encoder takes some pairs once. A row shows an image encoder with a text
    half. The first row has the highest recall@10 of what align begins with, on
    pairs that this has not seen. docs/match.md explains the rest.
    """

    images: tuple[str, ...]  # Image encoders: timm:MODEL[/FILE], runs, open_clip:NAME/TAG.
    texts: tuple[str, ...]  # Text encoders: minilm, hf:NAME, runs, open_clip:NAME/TAG.
    pairs: Count = 4000  # Pairs to draw; of a stream the first ones.
    seed: Seed = 0  # Seed of the draw and of the splits.
    pooling: Literal["mean", "cls", "pooler"] | None = None  # Of tokens; else by its files.
    batch_size: Count = 64  # Captions or images at once.
    cache: bool = True  # Keep features, so that another encoder is quick.

    def __call__(self) -> None:
        for half in self.images:
            require_model("--images", half, "half")
        for half in self.texts:
            require_model("--texts", half, "half")
        require_source("--data", self.data)
        data = self.data_config(train=self.data)
        require_data_paths(data)
        with quick_imports():
            from protoclip.cli.data import open_source, print_notes
            from protoclip.data.access import cache_folder
            from protoclip.evaluation.match import match

        device = open_device(self.device)
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
        )
        if skipped := records[0]["skipped"]:
            say(f"note: {source.name}: {skipped:,} of the pairs cannot be read; left out")
        if (number := records[0]["apart"]) < FEW:
            say(f"note: {source.name}: only {number:,} pairs that share nothing, which say little")
        if self.json:
            print(to_json(records, indent=2))
        else:
            show(records)


def show(records: Sequence[Mapping[str, Any]]) -> None:
    """Print a table with one row a pair of encoders."""
    from rich.markup import escape
    from rich.table import Table

    from protoclip.results.table import print_rich

    first = records[0]
    table = Table("image encoder", "text encoder", title="Pretrained encoders, the best pair first")
    measures = ("recall@10", "mutual\n10-NN", "linear\nCKA", "groups\nagree", "widths")
    for name in (*measures, "images/s\ncaptions/s"):
        table.add_column(name, justify="right")
    for record in records:
        rates = (record["images_per_second"], record["captions_per_second"])
        table.add_row(
            *(escape(visible(record[half])) for half in ("image", "text")),
            f"{100 * record['recall@10']:.1f}%",
            f"{100 * record['mutual_neighbours']:.1f}%",
            f"{record['cka']:.3f}",
            f"{record['agreement']:.3f}",
            f"{record['image_width']}\n{record['text_width']}",
            "\n".join("kept" if rate is None else f"{rate:,.0f}" for rate in rates),
        )
    table.caption_justify = "left"
    table.caption = (
        f"Ordered by recall@10: the mean of both ways between an image and its text, by what align "
        f"begins with, fitted on {first['pairs'] - first['judged']:,} pairs and evaluated on "
        f"{first['judged']:,} others (by chance {100 * first['recall@10/by_chance']:.1f}%). The "
        f"other measures are of {first['apart']:,} pairs, of which no two share an image or a "
        "caption."
    )
    print_rich(table)
