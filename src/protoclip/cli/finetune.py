"""`protoclip finetune`."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from protoclip.cli.parsing import Recipes, merged
from protoclip.config import Config, NotNegative, Rank
from protoclip.files import read_json, to_json
from protoclip.terminal import say, visible


@dataclass(frozen=True)
class Finetune(Config, Recipes):
    """Adapt a model to your own pairs without losing what it knew.

    The defaults differ from those of train; notes say how. At the end models
    between start and end are judged (WiSE-FT), and the best is the run's model.
    """

    start: str | None = None  # Model to start from: a run, open_clip:NAME/TAG, hf:NAME, a folder.
    _: KW_ONLY
    guard: list[str] = field(default_factory=list)  # General data to watch. May be repeated.
    lora: Rank | None = None  # Rank of LoRA adapters; unset, all weights train.
    keep: NotNegative | None = None  # Weight of distillation from the start, as loss.keep.
    alpha: Annotated[float, 0, 1] | None = None  # From 0, the start, to 1, the end; else the best.
    resume: Literal["never", "auto"] = "never"  # auto continues the run in the folder.
    json: bool = False  # Print the results as JSON.

    def __call__(self) -> None:
        import torch

        from protoclip.distributed import collectives
        from protoclip.training.finetune import finetune
        from protoclip.training.wise_ft import FILE

        torch.set_flush_denormal(True)  # CPUs are very slow with the denormals of soft targets
        results = finetune(self.settings(), alpha=self.alpha, resume=self.resume)
        if collectives.launched()[0] > 0:
            return
        folder, stopped = Path(results["folder"]), "stopped" in results
        record = {} if stopped else read_json(folder / FILE)
        if self.json:
            print(to_json({**results, "wise_ft": record}, indent=2))
        elif not stopped:
            try:
                show_sweep(record)
                show_metrics(results)
            except (LookupError, TypeError) as error:
                reason = f"results.json or {FILE} is not what finetune writes ({error!r})"
                raise ValueError(f"{folder}: {reason}; train in another folder") from error
            print(f"written to {visible(str(folder))}")
        if stopped:
            say(
                f"{results['stopped']}: stopped after step {results['steps']}; the same command "
                "with --resume auto goes on"
            )

    def settings(self) -> dict[str, Any]:
        """What recipes and the command line set, with short options as the settings they mean."""
        tree = {
            name: self.given[name] for name in Config.__dataclass_fields__ if name in self.given
        }
        short: dict[str, dict[str, Any]] = {
            "model": {"start": self.start, "lora": self.lora},
            "run": {"guard": self.guard or None},
            "loss": {"keep": self.keep},
        }
        for section, values in short.items():
            tree = merged(tree, {section: {k: v for k, v in values.items() if v is not None}})
        return tree


def show_sweep(record: Mapping[str, Any]) -> None:
    """Print a table of the sweep: one row an alpha, one column a data set."""
    from rich.markup import escape
    from rich.table import Table

    from protoclip.evaluation.compare import print_table, printable
    from protoclip.training.wise_ft import data_sets

    points = record["points"]
    if not points:
        return
    names = data_sets(points)
    table = Table("alpha", title="From start (0) to end (1), percent")
    for name in (*names, "mean"):
        table.add_column(escape(printable(name)), justify="right")
    for point in points:
        mark = "*" if point["alpha"] == record["alpha"] else ""
        values = [*(point["scores"][name] for name in names), point["mean"]]
        table.add_row(f"{point['alpha']:g}{mark}", *(f"{100 * value:.1f}" for value in values))
    print_table(table, columns=len(names))
    print(f"* chosen; {record['rule']}")


def show_metrics(results: Mapping[str, Any]) -> None:
    """Print the metrics of the start and of the chosen weights."""
    before = results["start_metrics"]
    if results["metrics"]:
        print(f"{'metric':<45} {'start':>10} {'alpha ' + format(results['alpha'], 'g'):>10}")
    for name, value in results["metrics"].items():
        values = ["-" if v is None else f"{v:.4f}" for v in (before[name], value)]
        print(f"{visible(name):<45} {values[0]:>10} {values[1]:>10}")
