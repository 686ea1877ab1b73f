"""`protoclip embed`."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

from protoclip.config import PERMISSIONS, Count, DataConfig
from protoclip.paths import require_data_paths, require_model, require_place

# Settings of `data` that go by the same names here.
OF_DATA = (
    *("class_column", "image_column", "caption_column", "id_column"),
    *("root", "only", "without", "read", "workers", *PERMISSIONS),
)


@dataclass(frozen=True)
class Embed:
    """Write a model's vectors of a data set as Parquet.

    One vector for each image and each caption, for search engines;
    docs/embed.md has the columns. After an interruption the same command
    continues.
    """

    model: str  # A run, or whatever else protoclip.load opens.
    _: KW_ONLY
    data: str  # Pairs, as data.train.
    out: str  # Parquet file to write.
    class_column: str | None = None  # Column of a table that holds the class.
    image_column: str | None = None  # Column of paths, URLs or bytes; else detected.
    caption_column: list[str] | str | None = None  # Column(s) of captions; else detected.
    id_column: str | None = None  # Column of sample ids; else detected.
    root: str | None = None  # Folder that holds all images of a table.
    only: str | None = None  # As data.only.
    without: str | None = None  # As data.without.
    read: Literal["auto", "streaming"] = "auto"  # auto: local shards are indexed.
    num_samples: Count | None = None  # Samples of a stream to read.
    allow_commands: bool = False  # Run the commands of pipe: sources.
    allow_links: bool = False  # Follow symbolic links that leave the root.
    batch_size: Count = 256  # Images or captions at once.
    workers: Annotated[int, 0, 4096] | Literal["auto"] = "auto"  # Threads that read images.
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps.
    overwrite: bool = False  # Replace a file of other settings.

    def __call__(self) -> None:
        data = DataConfig(train=self.data, **{name: getattr(self, name) for name in OF_DATA})
        require_model("", self.model)
        require_data_paths(data)
        require_place("--out", self.out, is_folder=False, suffix=".parquet")
        import torch

        from protoclip.distributed import collectives
        from protoclip.features.embed import embed

        torch.set_flush_denormal(True)
        device = collectives.device(self.device, setting="--device")
        with collectives.process_group(device):
            embed(
                self.model,
                data,
                self.out,
                batch_size=self.batch_size,
                device=device,
                num_samples=self.num_samples,
                overwrite=self.overwrite,
            )
