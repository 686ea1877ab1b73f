"""`protoclip train`, `align` and `finetune`: their options, and how results are printed."""

import os
import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from protoclip.cli.spec import Recipes, merge_trees, quick_imports, read_recipe
from protoclip.config import ALIGN, ALIGN_HELP, FINETUNE, FINETUNE_HELP, Config
from protoclip.files import read_sealed, to_json
from protoclip.rules import require_paths, require_place
from protoclip.terminal import counted, say, visible


@dataclass(frozen=True, kw_only=True)
class Train(Config, Recipes):
    """Train a model and evaluate it."""

    command: ClassVar[str] = "train"

    resume: Literal["never", "auto"] = "never"  # auto continues the run in the folder.

    def __call__(self) -> None:
        results = perform(self.command, self.settings(), resume=self.resume)
        show_results(results, self.json, in_brief=self.command == "align")


@dataclass(frozen=True, kw_only=True)
class Align(Train):
    """Train heads between two frozen pretrained encoders.

    Each image and each caption is encoded once. Name the encoders with
    --model.image.name and --model.text.name. Other defaults depend on the
    data; notes list them.
    """

    command = "align"
    # With words where they follow from the data.
    defaults: ClassVar[Mapping[str, Any]] = {**ALIGN, "model.image.name": None, **ALIGN_HELP}


@dataclass(frozen=True)
class Finetune(Config, Recipes):
    """Adapt a model to your own pairs without losing what it knew.

    Defaults depend on the start and the data; notes list them. At the end it
    evaluates models between start and end (WiSE-FT), and keeps the best.
    """

    # The pairs have to be named. With words where they follow from the data.
    defaults: ClassVar[Mapping[str, Any]] = {"data.train": None, **FINETUNE, **FINETUNE_HELP}

    start: str | None = None  # Model to start from: a run, open_clip:NAME/TAG, hf:NAME, a folder.
    _: KW_ONLY
    alpha: Annotated[float, 0, 1] | None = None  # Weights from 0 (start) to 1 (end); else the best.
    resume: Literal["never", "auto"] = "never"  # auto continues; START may be the run itself.

    def __call__(self) -> None:
        results = perform("finetune", self.settings(), alpha=self.alpha, resume=self.resume)
        from protoclip.distributed import collectives
        from protoclip.training.evaluate import FILE

        if {"stopped", "overfit"} & results.keys() or collectives.read_launcher()[0] > 0:
            show_results(results, self.json)
            return
        record = read_sealed(Path(results["folder"]) / FILE)
        self.answer({**results, "wise_ft": record}, lambda: self.show(results, record))

    def show(self, results: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        show_sweep(record)
        show_metrics(results)
        print(f"written to {visible(results['folder'])}")

    def settings(self) -> dict[str, Any]:
        """What recipes and the command line set, and START.

        Settings of a fine-tuned run to go on with come first, if no other data are named.
        """
        given = super().settings()
        if self.start is None:
            return given
        recipe = Path(self.start) / "config.toml"
        if self.resume == "auto" and not {"train", "sources"} & given.get("data", {}).keys():
            began = read_recipe(recipe) if recipe.is_file() else {}
            if {"start", "pretrained"} & began.get("model", {}).keys():
                say(f"note: going on with {self.start} by its own settings")
                return merge_trees(merge_trees(began, given), {"run": {"out": self.start}})
        return merge_trees(given, {"model": {"start": self.start}})


def perform(command: str, settings: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """The results of `train`, `align` or `finetune`. Typos are refused before slow imports."""
    config = Config.from_dict(settings)
    # A finished run needs its data no more. If there are several ranks, rank 0 reports a mistake.
    if options["resume"] == "never" and "RANK" not in os.environ:
        require_paths(config)
    if config.run.out is not None:
        require_place("run.out", config.run.out, is_folder=True)
    if os.environ.get("RANK", "0") == "0":
        say(f"note: opening PyTorch, data and models to {command}")
    with quick_imports():
        import torch

        from protoclip.training import run

    torch.set_flush_denormal(True)  # CPUs are very slow with the denormals of soft targets
    results: dict[str, Any] = getattr(run, command)(settings, **options)
    return results


def show_results(results: Mapping[str, Any], as_json: bool, *, in_brief: bool = False) -> None:
    """Print the results of a run, in brief without geometry, or where a signal stopped it."""
    from protoclip.distributed import collectives

    if collectives.read_launcher()[0] == 0:
        if as_json:
            print(to_json(results, indent=2))
        else:
            if in_brief and (sentence := describe_search(results)):
                print(sentence)
            for name, value in results["metrics"].items():
                if in_brief and "/modality_gap/" in name:
                    continue
                shown = "-" if value is None else format(value, ".4f")
                print(f"{visible(name):<45} {shown}{describe_candidates(results, name)}")
        if "stopped" in results:
            say(
                f"{results['stopped']}: stopped after step {results['steps']}; the same command "
                "with --resume auto goes on"
            )
        elif not as_json:
            folder, quoted = results["folder"], shlex.quote(results["folder"])
            look = visible(f"look at its pairs with protoclip explore {quoted}")
            print(f"written to {visible(folder)}; {look}")
    exit_if_stopped(results)


def describe_search(results: Mapping[str, Any]) -> str:
    """How many captions find their image, of the first data set where that was measured."""
    for name, recall in results["metrics"].items():
        data, _, metric = name.rpartition("/")
        images = results.get("candidates", {}).get(f"{data}/text_to_image")
        if metric == "text_to_image@10" and images and recall is not None:
            captions = results["candidates"][f"{data}/image_to_text"]
            chance = f"by chance {round(captions * min(1.0, 10 / images)):,} would"
            found = f"{round(captions * recall):,} of {counted(captions, 'caption')} find their"
            return f"{found} image among the first ten of {images:,} different ones; {chance}"
    return ""


def describe_candidates(results: Mapping[str, Any], name: str) -> str:
    """Among how many images or captions a recall was measured, where that is known."""
    number = results.get("candidates", {}).get(name.partition("@")[0])
    return "" if number is None else f"  among {number:,}"


def exit_if_stopped(results: Mapping[str, Any]) -> None:
    """After a stop by a signal, exit as shells report one: with 128 plus its number."""
    if (name := results.get("stopped")) is not None:
        sys.exit(128 + signal.Signals[name])


def show_sweep(record: Mapping[str, Any]) -> None:
    """Print a table of the sweep: one row an alpha, one column a data set."""
    from protoclip.results.table import Cell, Row, Table, print_table

    points = record["points"]
    if not points:
        return
    names, rows = [*points[0]["scores"]], []
    for point in points:
        mark = "*" if point["alpha"] == record["alpha"] else ""
        values = [*(point["scores"][name] for name in names), point["mean"]]
        cells = [Cell(value=f"{100 * value:.1f}") for value in values]
        rows.append(Row(heading=[f"{point['alpha']:g}{mark}"], cells=cells))
    title, columns = "From start (0) to end (1), percent", [[name] for name in (*names, "mean")]
    print_table(Table(title=title, heading=["alpha"], columns=columns, rows=rows))
    best, by = record["best_alpha"], ""
    if best != record["alpha"]:
        by = f" by --alpha; the rule's best is {best:g}"
    print(f"* chosen{by}; {record['rule']}")
    if best == record["alpha"] == 0:
        print("no weights but the start's were best: the model is the start")


def show_metrics(results: Mapping[str, Any]) -> None:
    """Print the metrics of the start and of the chosen weights, and what they differ by."""
    from protoclip.results.table import decimals, describe_clear, format_interval

    before = results["start_metrics"]
    gains = results.get("differences", {})  # versions up to 1.0.0 wrote none
    if results["metrics"]:
        chosen = f"alpha {results['alpha']:g}"
        print(f"{'metric':<45} {'start':>10} {chosen:>10}" + "  difference" * bool(gains))
    for name, value in results["metrics"].items():
        values = ["-" if v is None else decimals(v, 4) for v in (before[name], value)]
        line = f"{visible(name):<45} {values[0]:>10} {values[1]:>10}"
        if name in gains:
            mean, ends = gains[name]["mean"], gains[name]["interval"]
            line += f"  {decimals(mean, 4, '+')}"
            if ends is not None:
                line += f" {format_interval(ends, 1.0, 4, '+')}" + "*" * gains[name]["beyond"]
        print(line + describe_candidates(results, name))
    if any(gain["interval"] is not None for gain in gains.values()):
        clear = describe_clear(gains.values())
        print(f"in brackets: the 95% interval over test samples; * if {clear}")
    is_clear = any(gain["beyond"] and gain["mean"] > 0 for gain in gains.values())
    if gains and results["alpha"] and not is_clear:
        print("no gain over the start is clear, so it may be chance")
