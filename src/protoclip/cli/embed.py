"""`protoclip embed`: its options.

The vectors are computed and written in `encode/embed.py`.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

from protoclip.cli.spec import EncodingOptions, PairsOptions, open_device, quick_imports
from protoclip.config import Count
from protoclip.rules import require_data_paths, require_model, require_place


@dataclass(frozen=True)
class Embed(PairsOptions, EncodingOptions):
    """Write a model's vectors of a data set as Parquet.

    One vector for each image and each caption, for search engines;
    docs/embed.md has the columns. After an interruption the same command
    continues.
    """

    model: str  # A run, or whatever else protoclip.load opens.
    _: KW_ONLY
    out: str  # Parquet file to write.
    class_column: str | None = None  # Column of a table that holds the class.
    max_bad_share: Annotated[float, 0, 1] = 0.05  # Share of a CSV's lines that may be bad.
    num_samples: Count | None = None  # Samples of a stream to read.
    batch_size: Count | None = None  # Images or captions at once.
    workers: Annotated[int, 0, 4096] | Literal["auto"] = "auto"  # Threads that read images.
    overwrite: bool = False  # Replace a file of other settings.

    def __call__(self) -> None:
        data = self.data_config(
            train=self.data,
            class_column=self.class_column,
            workers=self.workers,
            max_bad_share=self.max_bad_share,
        )
        require_model("", self.model)
        require_data_paths(data)
        require_place("--out", self.out, is_folder=False, suffix=".parquet")
        with quick_imports():
            from protoclip.distributed import collectives
            from protoclip.encode.embed import embed

        device = open_device(self.device)
        with collectives.process_group(device):
            embed(
                self.model,
                data,
                self.out,
                batch_size=self.batch_size,
                device=device,
                precision=self.precision,
                num_samples=self.num_samples,
                overwrite=self.overwrite,
            )
