"""`protoclip analyze`: its options, and the pairs that `--data` names.

The measures are computed in `results/checkpoints.py`.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any

from protoclip.cli.imports import open_device, quick_imports
from protoclip.cli.spec import JsonOption
from protoclip.config import Count, DataConfig
from protoclip.files import to_json
from protoclip.rules import (
    require_data_paths,
    require_path,
    require_place,
    require_source,
    with_options,
)


@dataclass(frozen=True)
class Analyze(JsonOption):
    """Measure how runs group images and texts, by checkpoint.

    Writes analysis.json for each run, whose curves report draws. On the pairs
    that the runs held out, report --checkpoints does both.
    """

    runs: list[str]  # Run folders.
    _: KW_ONLY
    out: str | None = None  # Folder for the files; else each run's own.
    data: str | None = None  # Other pairs: a source, or SOURCE,caption_column=NAME.
    samples: Count = 5000  # Most pairs to use, drawn evenly.
    groups: Count | None = None  # Groups of each modality; else as many as prototypes.
    allow_links: bool = False  # Follow symbolic links that leave the root.
    overwrite: bool = False  # Replace files that analyze did not write.

    def __call__(self) -> None:
        for run in self.runs:
            require_path("", run, "no such run folder")
        data = self.data_config()
        if self.out is not None:
            require_place("--out", self.out, is_folder=True)
        with quick_imports():
            from protoclip.results.checkpoints import analyze_runs, table_of_groupings
            from protoclip.results.table import print_table

        analyses = analyze_runs(
            self.runs,
            out=self.out,
            overwrite=self.overwrite,
            data=data,
            samples=self.samples,
            num_groups=self.groups,
            allow_links=self.allow_links,
            device=open_device(),
        )
        if self.json:
            print(to_json(analyses, indent=2))
        else:
            print_table(table_of_groupings(analyses))

    def data_config(self) -> DataConfig | None:
        """The settings of the pairs of `--data`; None for those that each run held out.

        Raises:
            ValueError: There is no such file or folder, or a setting has no effect on these pairs.
        """
        if self.data is None:
            return None
        reference, given = with_options(self.data, "--data")
        options: dict[str, Any] = {**given}
        if unused := [*options] if reference == "emoji" else {"class_column"} & options.keys():
            raise ValueError(f"--data: '{self.data}': has no use for {min(unused)}; leave it out")
        require_source("--data", reference)
        data = DataConfig(train=reference, allow_links=self.allow_links, **options)
        require_data_paths(data)
        return data
