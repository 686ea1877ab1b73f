"""`protoclip analyze`: its options, and the pairs that `--data` names.

The measures are computed in `results/checkpoints.py`.
"""

from dataclasses import KW_ONLY, dataclass

from protoclip.cli.device import open_device
from protoclip.cli.imports import quick_imports
from protoclip.config import Count, DataConfig
from protoclip.files import to_json
from protoclip.rules import (
    require_data_paths,
    require_path,
    require_place,
    require_source,
    with_options,
)

# Settings of `--data`, which may also stand behind it.
OF_DATA = ("image_column", "caption_column", "id_column", "root")


@dataclass(frozen=True)
class Analyze:
    """Measure how runs group images and texts, by checkpoint.

    Writes analysis.json for each run, whose curves report draws. On the pairs
    that the runs held out, report --checkpoints does both.
    """

    runs: list[str]  # Run folders.
    _: KW_ONLY
    out: str | None = None  # Folder for the files; else each run's own.
    data: str | None = None  # Held-out pairs, as data.train; else the run's own.
    image_column: str | None = None  # Column of paths, URLs or bytes; else detected.
    caption_column: list[str] | str | None = None  # Column(s) of captions; else detected.
    id_column: str | None = None  # Column of sample ids; else detected.
    root: str | None = None  # Folder that holds all images of a table.
    samples: Count = 5000  # Most pairs to use, drawn evenly.
    groups: Count | None = None  # Groups of each modality; else as many as prototypes.
    allow_links: bool = False  # Follow symbolic links that leave the root.
    json: bool = False  # Print the analyses as JSON.
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
        given, reference = {name: getattr(self, name) for name in OF_DATA}, self.data
        if reference is not None:
            reference, behind = with_options(reference, "--data")
            given |= behind
        named = [name for name, value in given.items() if value is not None]
        if reference in (None, "emoji") and named:
            raise ValueError(f"--{named[0]}: is for a table that --data names; leave it out")
        if "class_column" in given:
            raise ValueError(
                f"--data: '{self.data}': classes of a table are not compared with groups; leave "
                "out class_column"
            )
        if reference is None:
            return None
        require_source("--data", reference)
        data = DataConfig(train=reference, **given, allow_links=self.allow_links)
        require_data_paths(data)
        return data
