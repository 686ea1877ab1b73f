"""`protoclip compare`, `analyze` and `report`: their options."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from protoclip import rules
from protoclip.cli.spec import Answers, open_device, quick_imports, require_libraries
from protoclip.config import Count
from protoclip.files import require_ours
from protoclip.results import MARK
from protoclip.terminal import say


@dataclass(frozen=True)
class Compare(Answers):
    """Compare finished runs, with 95% intervals.

    Runs with the same name share a column. Differences from the first are
    paired by seed, or else by test sample.
    """

    runs: list[str]  # Run folders; all are compared with the first.

    def __call__(self) -> None:
        require_runs(self.runs)
        from protoclip.evaluation.paired import read_results
        from protoclip.results.compare import compare_runs
        from protoclip.results.table import print_table, table_of_runs

        entries = compare_runs([read_results(path) for path in self.runs])
        self.answer(entries, lambda: print_table(table_of_runs(entries)))


@dataclass(frozen=True)
class Analyze(Answers):
    """Measure how runs group images and texts, by checkpoint.

    Writes analysis.json beside each run's settings, of the pairs it held out.
    """

    runs: list[str]  # Run folders.
    _: KW_ONLY
    samples: Count = 5000  # Pairs to use at most, drawn evenly.
    allow_links: bool = False  # Follow symbolic links that leave the root.

    def __call__(self) -> None:
        require_runs(self.runs)
        with quick_imports():
            from protoclip.results.examples import analyze_runs, table_of_groupings
            from protoclip.results.table import print_table

        pairs = {"samples": self.samples, "allow_links": self.allow_links}
        analyses = analyze_runs(self.runs, **pairs, device=open_device())
        self.answer(analyses, lambda: print_table(table_of_groupings(analyses)))


@dataclass(frozen=True)
class Report(Answers):
    """Write a report of runs: one HTML file to read and to send.

    Runs may be unfinished. All are compared with the first.
    """

    runs: list[str]  # Run folders.
    _: KW_ONLY
    out: str = "report.html"  # The file to write.
    checkpoints: bool = False  # First measure grouping at all checkpoints, as analyze does.
    samples: Count = 5000  # Pairs to use for these at most.
    overwrite: bool = False  # Replace a file that is not a report.
    allow_links: bool = False  # Follow symbolic links that leave the root.

    def __call__(self) -> None:
        require_libraries("report")
        require_runs(self.runs)
        rules.require_place("--out", self.out, is_folder=False, suffix=".html")
        with quick_imports():
            from protoclip.results.examples import analyze_runs
            from protoclip.results.page import write_report

        if not self.overwrite:
            require_ours(Path(self.out), MARK)
        if self.checkpoints:
            pairs = {"samples": self.samples, "allow_links": self.allow_links}
            analyze_runs(self.runs, **pairs, device=open_device())
        path = write_report(
            self.runs, self.out, overwrite=self.overwrite, allow_links=self.allow_links
        )
        size = path.stat().st_size
        say(f"written to {path} ({size / 1e6:.1f} MB)")
        self.answer({"file": str(path), "bytes": size}, lambda: None)


def require_runs(folders: list[str]) -> None:
    for folder in folders:
        rules.require_path("", folder, "no such run folder")
