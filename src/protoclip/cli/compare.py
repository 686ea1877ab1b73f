"""`protoclip compare`: its options.

The differences are computed in `results/compare.py`, and `results/table.py` shows them.
"""

from dataclasses import dataclass

from protoclip.cli.spec import JsonOption
from protoclip.files import to_json
from protoclip.rules import require_path


@dataclass(frozen=True)
class Compare(JsonOption):
    """Compare finished runs, with 95% intervals.

    Runs of one name share a column. Differences to the first are paired, by
    seed or else by test sample.
    """

    runs: list[str]  # Run folders; the others are compared with the first one's name.

    def __call__(self) -> None:
        for run in self.runs:
            require_path("", run, "no such run folder")
        from protoclip.evaluation.paired import read_results
        from protoclip.results.compare import compare_runs
        from protoclip.results.table import print_table, table_of_runs

        entries = compare_runs([read_results(path) for path in self.runs])
        if self.json:
            print(to_json(entries, indent=2))
        else:
            print_table(table_of_runs(entries))
