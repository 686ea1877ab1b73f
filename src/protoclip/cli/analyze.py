"""`protoclip analyze`: what `report --checkpoints` measures, as a table, and of other pairs too."""

from dataclasses import KW_ONLY, dataclass

from protoclip.cli.spec import JsonOption, open_device, quick_imports
from protoclip.config import Count, DataConfig, build
from protoclip.files import to_json
from protoclip.rules import require_data_paths, require_path, require_source, with_options


@dataclass(frozen=True)
class Analyze(JsonOption):
    """Measure how runs group images and texts, by checkpoint.

    Writes analysis.json into the folder of each run; report draws its curves.
    On the pairs that the runs held out, report --checkpoints does both.
    """

    runs: list[str]  # Run folders.
    _: KW_ONLY
    data: str | None = None  # Other pairs: a source, or SOURCE,caption_column=NAME.
    samples: Count = 5000  # Most pairs to use, drawn evenly.
    groups: Count | None = None  # Groups of each modality; else as many as prototypes.
    allow_links: bool = False  # Follow symbolic links that leave the root.

    def __call__(self) -> None:
        for run in self.runs:
            require_path("", run, "no such run folder")
        data = None
        if self.data is not None:
            reference, options = with_options(self.data)
            require_source("--data", reference)
            given = {"train": reference, "allow_links": self.allow_links, **options}
            data = build(DataConfig, given)
            require_data_paths(data)
        with quick_imports():
            from protoclip.results.examples import analyze_runs, table_of_groupings
            from protoclip.results.table import print_table

        analyses = analyze_runs(
            self.runs,
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
