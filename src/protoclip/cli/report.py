"""`protoclip report`: its options, and the libraries that it needs.

The page is written in `results/page.py`.
"""

from dataclasses import KW_ONLY, dataclass
from importlib.util import find_spec
from typing import Annotated

from protoclip.cli.spec import open_device, quick_imports
from protoclip.config import Positive, Seed
from protoclip.rules import require_path, require_place
from protoclip.terminal import say

NEEDED = ("jinja2", "matplotlib")


@dataclass(frozen=True)
class Report:
    """Write a report of runs: one HTML file to read and to send.

    Runs may be unfinished. The first one's name is what others are compared to.
    """

    runs: list[str]  # Run folders.
    _: KW_ONLY
    out: str = "report.html"  # The file to write.
    samples: Annotated[int, 1, 10_000] = 1000  # Most example pairs, on which models are shown.
    minutes: Positive = 10.0  # After this long no further model is run on examples.
    seed: Seed = 0  # Draws the examples.
    checkpoints: bool = False  # First measure grouping at all checkpoints, as analyze does.
    overwrite: bool = False  # Replace a file that is no report.
    allow_links: bool = False  # Follow symbolic links that leave the root.

    def __call__(self) -> None:
        require()
        for run in self.runs:
            require_path("", run, "no such run folder")
        require_place("--out", self.out, is_folder=False, suffix=".html")
        with quick_imports():
            from protoclip.results.page import write_report

        device = open_device()
        if self.checkpoints:
            from protoclip.results.examples import analyze_runs

            analyze_runs(self.runs, allow_links=self.allow_links, device=device)
        path = write_report(
            self.runs,
            self.out,
            samples=self.samples,
            minutes=self.minutes,
            seed=self.seed,
            device=device,
            overwrite=self.overwrite,
            allow_links=self.allow_links,
        )
        say(f"written to {path} ({path.stat().st_size / 1e6:.1f} MB)")


def require() -> None:
    """Raise a `ValueError` that says what to install, if the report's libraries are missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"report: needs {' and '.join(missing)}; pip install 'protoclip[report]'")
