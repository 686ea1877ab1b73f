"""`protoclip analyze`: its options, the table that it prints, and the files that it may replace.

The measures are computed in `evaluation/analysis.py`, and drawn in `evaluation/analysis_figure.py`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protoclip.cli.device import open_device
from protoclip.cli.imports import quick_imports
from protoclip.config import Count, DataConfig
from protoclip.files import SOFTWARE, locked, replacing, require_ours, to_json, write_atomically
from protoclip.paths import (
    require_data_paths,
    require_place,
    require_run,
    require_source,
    with_options,
)
from protoclip.terminal import say, visible

if TYPE_CHECKING:
    import torch

FEW = 100  # pairs; with fewer a note says that numbers say little
TOGETHER = "analysis_of_runs"  # the figure over several runs
# Settings of `--data`, which may also stand behind it.
OF_DATA = ("image_column", "caption_column", "id_column", "root")


@dataclass(frozen=True)
class Analyze:
    """Show how runs group images and texts, over their checkpoints.

    Writes analysis.json and analysis.png for each run, and for several runs
    a figure that lays them over each other.
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
            require_run(run)
        data = self.data_config()
        if self.out is not None:
            require_place("--out", self.out, is_folder=True)
        folders = [Path(run) for run in self.runs]
        stems = self.stems(folders)
        together = (Path(self.out) if self.out else folders[0].parent) / f"{TOGETHER}.png"
        outputs = [*stems, *([together] if len(folders) > 1 else [])]
        with quick_imports():
            from protoclip.evaluation.analysis import open_run

        device = open_device()
        for folder in folders:  # before minutes of work on the first one
            open_run(folder)
        with ExitStack() as stack:
            for output in {each.resolve(): each for each in outputs}.values():
                stack.enter_context(locked(output))
            self.write(folders, stems, together, data, device)

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

    def write(
        self,
        folders: Sequence[Path],
        stems: Sequence[Path],
        together: Path,
        data: DataConfig | None,
        device: "torch.device",
    ) -> None:
        """Analyse, print and write."""
        from protoclip.evaluation.analysis import HINT

        for stem in stems if not self.overwrite else ():
            require_ours(Path(f"{stem}.json"), '"checkpoints"')
            require_ours(Path(f"{stem}.png"), SOFTWARE)
        if len(folders) > 1 and not self.overwrite:
            require_ours(together, SOFTWARE)
        analyses = [self.analyze(folder, data, device) for folder in folders]
        for analysis in analyses:
            if len(analysis["checkpoints"]) == 1:
                note(f"{analysis['folder']}: a single checkpoint, so no curves; {HINT}")
            if analysis["pairs"] < FEW:
                note(
                    f"{analysis['folder']}: only {analysis['pairs']} pairs, whose groups say "
                    "little; --data names others"
                )
            for said in analysis["notes"]:
                note(f"{analysis['folder']}: {said}")
        if len({(analysis["digest"], analysis["groups"]) for analysis in analyses}) > 1:
            note("the runs differ in data or in the number of groups; see --data and --groups")
        for stem, analysis in zip(stems, analyses, strict=True):
            stem.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(f"{stem}.json"), to_json(analysis, indent=2) + "\n")
        labels = names(analyses)
        if self.json:
            print(to_json(analyses, indent=2))
        else:
            show(analyses, labels)
        draw(analyses, labels, stems, together)

    def analyze(
        self, folder: Path, data: DataConfig | None, device: "torch.device"
    ) -> dict[str, Any]:
        """The analysis of one run; of several, an error begins with the folder of its run."""
        from protoclip.evaluation.analysis import analyze

        try:
            return analyze(
                folder,
                data=data,
                samples=self.samples,
                num_groups=self.groups,
                allow_links=self.allow_links,
                device=device,
            )
        except ValueError as error:
            if len(self.runs) == 1 or str(error).startswith((f"{folder}:", f"{folder}/")):
                raise
            raise ValueError(f"{folder}: {error}") from error

    def stems(self, folders: Sequence[Path]) -> list[Path]:
        """Where each run's files go, without their suffixes; in `--out` each has its own."""
        if self.out is None:
            return [folder / "analysis" for folder in folders]
        names = [folder.resolve().name for folder in folders]
        stems: list[str] = []
        for name in names:
            numbered = (f"{name}-{number}" for number in count(2))
            # A number may make a name that another run has.
            free = (each for each in numbered if each not in (*stems, *names))
            stems.append(next(free) if name in (*stems, TOGETHER) else name)
        return [Path(self.out) / stem for stem in stems]


def names(analyses: Sequence[Mapping[str, Any]]) -> list[str]:
    """The runs' names, with their folders where names are alike."""
    counts = Counter(analysis["name"] for analysis in analyses)
    return [
        a["name"] if counts[a["name"]] == 1 else f"{a['name']} ({a['folder']})" for a in analyses
    ]


def draw(
    analyses: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    stems: Sequence[Path],
    together: Path,
) -> None:
    """Write the figures, and name all files that were written."""
    try:
        from protoclip.evaluation.analysis_figure import run_figure, runs_figure
    except ImportError:
        note("no figures: they need matplotlib; pip install 'protoclip[figures]'")
        return
    for stem, analysis in zip(stems, analyses, strict=True):
        save(run_figure(analysis), Path(f"{stem}.png"))
        say(f"written to {stem}.json and {stem}.png")
    if len(analyses) > 1:
        save(runs_figure(analyses, labels), together)
        say(f"written to {together}")


def save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": SOFTWARE})


def show(analyses: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    """Print a table of the last checkpoints: one row a measure, one column a run and space."""
    from rich.markup import escape
    from rich.table import Table

    from protoclip.evaluation.compare import print_table

    table = Table("measure", title="Last checkpoint, held-out pairs")
    columns: list[Mapping[str, float]] = []
    for analysis, label in zip(analyses, labels, strict=True):
        last = analysis["checkpoints"][-1]
        for space in ("features", "projections"):
            if space in last:
                columns.append(last[space])
                heading = f"{escape(visible(label))}\n{space}, step {last['step']}"
                table.add_column(heading, justify="right")
    for measure in sorted({key for values in columns for key in values}):
        digits = ".4g" if measure.startswith(("groups/", "prototypes/")) else ".3f"
        cells = [values.get(measure) for values in columns]
        table.add_row(measure, *("-" if v is None else format(v, digits) for v in cells))
    print_table(table)


def note(text: str) -> None:
    say(f"note: {text}")
