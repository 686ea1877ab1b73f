"""`protoclip evaluate`: its options, and which models are judged on which data.

Tasks are run in `evaluation/suite.py`; records are printed and written by `results/`.
"""

from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from protoclip.cli.imports import open_device, quick_imports
from protoclip.cli.spec import BatchOption, EncodingOptions, JsonOption, TableOptions
from protoclip.files import locked, to_json
from protoclip.rules import (
    require_data_set,
    require_folder,
    require_model,
    require_place,
)
from protoclip.terminal import say


@dataclass(frozen=True)
class Evaluate(TableOptions, EncodingOptions, BatchOption, JsonOption):
    """Judge models on data, with 95% intervals.

    Tasks: zero_shot, retrieval and geometry; and if asked for linear_probe,
    knn and clustering, which learn, the first two from all of train.
    A run as --data stands for the pairs that it held out; without --data
    those of a single run judge it.
    docs/evaluation.md has the data, the tasks and what is printed.
    """

    models: list[str]  # Runs, checkpoints, open_clip:NAME/TAG, hf:NAME.
    _: KW_ONLY
    data: list[str] = field(default_factory=list)  # What to judge on. May be repeated.
    tasks: tuple[str, ...] | None = None  # Of those above; unset, the first three.
    split: Literal["test", "validation", "train"] = "test"  # Choose models on validation.
    class_column: str | None = None  # Column of a table that holds the class.
    templates: str | None = None  # Prompts: openai, simple, or a file of them.
    compare_to: str | None = None  # Model to which differences are shown.
    out: str | None = None  # Folder for one JSON file a record.
    overwrite: bool = False  # Replace files in it that evaluate did not write.
    cache: bool = True  # Keep features, so that another task is quick.
    workers: Annotated[int, 0, 4096] | None = None  # Threads that read images; unset, one a core.
    fast_resize: bool = False  # Quicker; pixels differ by rounding.

    def __call__(self) -> None:
        self.require_paths()
        with quick_imports():
            from protoclip.data.index import cache_folder
            from protoclip.data.transforms import PillowTransform
            from protoclip.distributed import collectives
            from protoclip.evaluation import suite, validation
            from protoclip.evaluation.encoders import encoder_of
            from protoclip.evaluation.zero_shot import read_templates
            from protoclip.models import loading
            from protoclip.models.precision import autocast_encoding
            from protoclip.results import compare
            from protoclip.results.table import print_table, table_of_records

        device = open_device(self.device)

        def judge(reference: str) -> list[suite.Result]:
            newest = loading.pin_newest(reference)
            model, transform, tokenizer = collectives.raise_on_all_ranks(
                lambda: loading.load(newest)
            )
            if self.fast_resize and isinstance(transform, PillowTransform):
                transform = replace(transform, fast=True)
            encoder = encoder_of(
                loading.to_device(model, device),
                transform,
                tokenizer,
                batch_size=self.batch_size,
                workers=self.workers,
                cache=cache_folder() / "features" if self.cache else None,
                show=True,
                autocast=autocast_encoding(self.precision, device),
            )
            name, pretrained = names_of(reference)
            measured = suite.compute_results(
                encoder,
                data,
                self.tasks,
                split=self.split,
                templates=templates,
                model_name=name,
                pretrained=pretrained,
            )
            for record in (result.record for result in measured):
                record |= counts.get((reference, record["dataset"]), {})
            return measured

        with collectives.process_group(device):
            references = dict.fromkeys([self.compare_to or self.models[0], *self.models])
            # A later one would else be refused after the first was judged.
            collectives.raise_on_all_ranks(lambda: [*map(loading.require_model, references)])
            templates = self.templates and collectives.raise_on_all_ranks(
                lambda: read_templates(str(self.templates))
            )
            config = replace(self.data_config(), root=None)  # which is given by itself
            names = self.data or [collectives.raise_on_all_ranks(lambda: usual_data(references))]
            data = collectives.raise_on_all_ranks(
                lambda: [
                    validation.open_data(
                        reference,
                        root=self.root,
                        class_column=self.class_column,
                        split=self.split,
                        config=config,
                    )
                    for reference in names
                ]
            )
            notes = [f"note: {note}" for of in data for note in of.notes]
            counts = dict[tuple[str, str], dict[str, Any]]()  # of a model and a data set
            for reference in references if collectives.rank() == 0 else ():
                for name, opened in zip(names, data, strict=True):
                    count = validation.count_trained(reference, name, opened, self.split, config)
                    counts[reference, opened.name] = {"trained_on": count} if count else {}
                    notes += warnings_of(reference, name, count)
            for note in notes if collectives.rank() == 0 else ():
                say(note)
            suite.announce(data, self.split, self.tasks)  # before models are loaded
            judged = {reference: compare.add_means(judge(reference)) for reference in references}
        if collectives.launched()[0] > 0:
            return
        if self.compare_to is not None:
            first = judged.pop(self.compare_to)
            compared = compare.add_differences([*judged.values()], first)
            judged = {self.compare_to: first} | dict(zip(judged, compared, strict=True))
        all_records = [result.record for of_model in judged.values() for result in of_model]
        if self.json:
            print(to_json(all_records, indent=2))
        else:
            print_table(table_of_records([*judged.values()]))
        if self.out is not None:
            of_sets = [record for record in all_records if "datasets" not in record]
            with locked(Path(self.out) / "records", wait=2.0):  # others write theirs in less
                compare.write_records(of_sets, Path(self.out), overwrite=self.overwrite)

    def require_paths(self) -> None:
        """Refuse paths that do not exist."""
        for model in (*self.models, *filter(None, [self.compare_to])):
            require_model("", model)
        for reference in self.data:
            require_data_set("--data", reference)
        require_folder("--root", self.root)
        if self.out is not None:
            require_place("--out", self.out, is_folder=True)


def warnings_of(reference: str, name: str, count: Mapping[str, int]) -> list[str]:
    """A warning of data, by their name, of which a model was trained on some pairs."""
    from protoclip.evaluation.validation import has_held_out_metrics
    from protoclip.models.saved import run_of

    if not count.get("images") or (run := run_of(reference)) is None:
        return []
    pairs = f"{count['images']:,} of these {count['pairs']:,} pairs"
    if count["images"] == count["pairs"]:
        pairs = "these pairs"
    known = "; its results.json has its numbers on held-out pairs" * has_held_out_metrics(run)
    return [
        f"warning: {name}: {reference} was trained on {pairs} and does better on them than on new "
        f"ones{known}"
    ]


def usual_data(models: Collection[str]) -> str:
    """What judges models if no data are named: the pairs that a single run held out, or the emoji
    that all of them were trained on.

    Raises:
        ValueError: They are other models, of which nobody can say what they are for.
    """
    from protoclip.models.saved import read_config, run_of

    runs = [run for run in map(run_of, models) if run is not None]
    if len(runs) == len(models):
        data = [read_config(run).data for run in runs]
        if all(each.is_emoji and each.validation in (None, "emoji") for each in data):
            return "emoji"
        if len(runs) == 1:
            return str(runs[0])
    raise ValueError(
        "--data: is missing; name what to judge on, such as a table of pairs, or a run for the "
        "pairs that it held out"
    )


def names_of(reference: str) -> tuple[str, str]:
    """What records call a model: its name, and the tag of its weights if it has one."""
    if reference.startswith("open_clip:"):
        name, _, tag = reference.removeprefix("open_clip:").partition("/")
        return name, tag or "none"
    return reference, "none"
