"""`protoclip evaluate`, `choose` and `classify`: their options, and which data they take."""

from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from protoclip import rules
from protoclip.cli import spec
from protoclip.cli.data import ENCODERS, open_indexed, print_notes, require_table, write_table
from protoclip.config import DataConfig
from protoclip.files import lock_path
from protoclip.terminal import counted, say, visible

if TYPE_CHECKING:
    import torch

    from protoclip.encode.features import Encoder


@dataclass(frozen=True)
class Evaluate(spec.TableOptions, spec.EncodingOptions, spec.BatchOption, spec.Answers):
    """Evaluate models on data, with 95% intervals.

    Tasks: zero_shot, retrieval and geometry; and if you name them,
    linear_probe and knn, which learn from all of train, and clustering.
    A run as --data stands for the pairs that it held out. Without --data,
    a single run is evaluated on those.
    docs/evaluation.md has the data, the tasks and what is printed.
    """

    models: list[str]  # Runs, checkpoints, open_clip:NAME/TAG, hf:NAME.
    _: KW_ONLY
    data: list[str] = field(default_factory=list)  # What to evaluate on. May be repeated.
    tasks: tuple[str, ...] | None = None  # Tasks to run; unset, the first three.
    split: Literal["test", "validation", "train"] = "test"  # Split; choose models on validation.
    class_column: str | None = None  # Column of a table that holds the class.
    templates: str | None = None  # Prompts: openai, simple, or a file of them.
    compare_to: str | None = None  # Model to compare with.
    out: str | None = None  # Folder for one JSON file per record.
    overwrite: bool = False  # Replace files in it that evaluate did not write.
    cache: bool = True  # Keep features, so that another task is quick.
    workers: Annotated[int, 0, 4096] | None = None  # Threads that read images; unset, one per core.
    fast_resize: bool = False  # Resize quicker; pixels differ by rounding.

    def __call__(self) -> None:
        for model in (*self.models, *filter(None, [self.compare_to])):
            rules.require_model("", model)
        for reference in self.data:
            rules.require_data_set("--data", reference)
        rules.require_path("--root", self.root, is_folder=True)
        if self.out is not None:
            rules.require_place("--out", self.out, is_folder=True)
        with spec.quick_imports():
            from protoclip.distributed import collectives
            from protoclip.evaluation import suite, validation
            from protoclip.evaluation.datasets import split_columns
            from protoclip.evaluation.readers import read_templates
            from protoclip.models.start import find_start
            from protoclip.results import compare
            from protoclip.results.table import print_table, table_of_records

        references = [*dict.fromkeys([self.compare_to or self.models[0], *self.models])]
        config = DataConfig(**self.data_settings())

        def open_all() -> tuple[Any, ...]:
            for reference in references:  # or a later one is refused after the first was evaluated
                find_start(reference)
            names = self.data or [usual_data(references)]
            opened = [
                (name, part)
                for name in names
                for part in split_columns(
                    validation.open_data(name, split=self.split, config=config), self.split
                )
            ]
            names, data = map(list, zip(*opened, strict=True))
            templates = read_templates(self.templates) if self.templates else None
            tasks = suite.choose_tasks(data, self.split, self.tasks)
            return names, data, templates, tasks

        device = spec.open_device(self.device)
        with collectives.process_group(device):
            names, data, templates, tasks = collectives.raise_on_all_ranks(open_all)
            counts = dict[str, Any]()  # by model
            if collectives.rank() == 0:
                print_notes([*dict.fromkeys(note for opened in data for note in opened.notes)])
                for reference in references:
                    counts[reference] = {
                        one.name: validation.warn_trained(reference, name, one, self.split, config)
                        for name, one in zip(names, data, strict=True)
                    }
            by_model = {}
            for reference in references:
                name, tag = reference, "none"
                if reference.startswith("open_clip:"):
                    name, _, tag = reference.removeprefix("open_clip:").partition("/")
                results = suite.compute_results(
                    self.open_encoder(reference, device),
                    data,
                    tasks,
                    split=self.split,
                    templates=templates,
                    model_name=name,
                    pretrained=tag or "none",
                    trained_on=counts.get(reference, {}),
                )
                by_model[reference] = compare.add_means(results)
        if collectives.read_launcher()[0] > 0:
            return
        if self.compare_to is not None:
            first = by_model.pop(self.compare_to)
            compared = compare.add_differences([*by_model.values()], first)
            by_model = {self.compare_to: first} | dict(zip(by_model, compared, strict=True))
        records = [result.record for results in by_model.values() for result in results]
        self.answer(records, lambda: print_table(table_of_records([*by_model.values()])))
        if self.out is not None:
            of_sets = [record for record in records if "datasets" not in record]
            with lock_path(Path(self.out) / "records", wait=2.0):  # others write theirs in less
                compare.write_records(of_sets, Path(self.out), overwrite=self.overwrite)

    def open_encoder(self, reference: str, device: "torch.device") -> "Encoder":
        """A model, to encode as the options ask for."""
        from protoclip.data.transforms import PillowTransform
        from protoclip.encode.features import load_encoder
        from protoclip.models.protoclip import autocast, resolve_encoding

        encoder = load_encoder(
            reference,
            device,
            keep=self.cache,
            batch_size=self.batch_size,
            workers=self.workers,
            engine=self.engine,
            autocast=autocast(resolve_encoding(self.precision, device), device),
        )
        if self.fast_resize and isinstance(encoder.transform, PillowTransform):
            encoder = replace(encoder, transform=replace(encoder.transform, fast=True))
        return encoder


@dataclass(frozen=True, kw_only=True)
class Choose(spec.PairsOptions, spec.DeviceOption, spec.Answers):
    """Find the best model for your pairs.

    Holds out some pairs, and measures on them published models, the best two
    pairs of encoders, aligned, and the better of these, fine-tuned if time allows.
    The last lines recommend one and say how to make it. If interrupted, run the
    same command again.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "models": "CLIP, SigLIP 2, MobileCLIP",
        "out": "runs/choose-DATA",
    }

    models: tuple[str, ...] = ()  # Models to measure, or none.
    images: tuple[str, ...] = (ENCODERS["image"],)  # Image encoders, as for match.
    texts: tuple[str, ...] = (ENCODERS["text"],)  # Text encoders, as for match.
    minutes: Annotated[float, 0, 1e6] = 30.0  # Fine-tune if that fits into this time.
    out: str | None = None  # Folder for what it makes.

    def __call__(self) -> None:
        data = DataConfig(train=self.data, **self.data_settings())
        rules.require_data_paths(data)
        models = [name for name in self.models if name.lower() != "none"]
        for name in models:
            rules.require_model("--models", name)
        for setting, names in (("images", self.images), ("texts", self.texts)):
            for name in names:
                rules.require_model(f"--{setting}", name, "encoder")
        out = Path(self.out or f"runs/choose-{Path(self.data).stem}")
        rules.require_place("--out", str(out), is_folder=True)
        with spec.quick_imports():
            from protoclip.results import choose
            from protoclip.results.table import print_table

        usual = vars(DataConfig())
        given = {name: value for name, value in vars(data).items() if value != usual[name]}
        contest = choose.Contest(
            pairs=open_indexed(data, "held-out pairs"),
            data=given | {"train": self.data},
            out=out,
            minutes=self.minutes,
            device=spec.open_device(self.device),
            engine=self.engine,
        )
        out.mkdir(parents=True, exist_ok=True)
        with lock_path(out):
            published = () if self.models else choose.find_published()
            contest.run([*models, *published], self.images, self.texts)
        records, table, lines = contest.recommend()

        def show() -> None:
            print_table(table)
            print("\n".join(map(visible, lines)))

        self.answer(records, show)


@dataclass(frozen=True)
class Classify(spec.DeviceOption, spec.BatchOption, spec.Answers):
    """Write the class of each image, and its probability.

    Give class names, or labelled images. With images, cross-validation chooses
    among names, class means, kNN and a linear probe, and calibrates.
    Columns may follow a table's name, as in labelled.csv,class_column=kind.
    """

    model: str  # A run, or another model that protoclip.load opens.
    _: KW_ONLY
    data: str  # Images, as for evaluate; with classes, accuracy is printed.
    classes: str  # A .txt, one name per line; or labelled images, as for evaluate.
    out: str  # File to write, .csv or .parquet.

    def __call__(self) -> None:
        rules.require_model("", self.model)
        require_table(self.out)
        rules.require_data_set("--data", self.data)
        rules.require_data_set("--classes", self.classes, "a .txt with one name a line, ")
        with spec.quick_imports():
            from protoclip.encode.features import load_encoder
            from protoclip.evaluation.classify import classify

        device = spec.open_device(self.device)
        encoder = load_encoder(self.model, device, batch_size=self.batch_size, engine=self.engine)
        table, facts = classify(encoder, self.data, self.classes)
        write_table(table, self.out)
        self.answer(facts, lambda: self.show(facts))

    def show(self, facts: Mapping[str, Any]) -> None:
        from protoclip.results.table import format_interval

        for name, record in {**facts["validated"], "these images": facts["accuracy"]}.items():
            if record is not None:
                ends = record["interval"] and format_interval(record["interval"], 100.0, 1)
                share = " ".join(filter(None, [f"{100 * record['accuracy']:.1f}%", ends]))
                print(f"{name.replace('_', ' '):<12} {share} of {record['images']:,} are right")
        if number := facts["labelled_too"]:
            say(f"note: {counted(number, 'image')} with a label; each is classified without itself")
        images = counted(facts["images"], "image")
        print(f"{images} by {facts['method']}; written to {visible(self.out)}")


def usual_data(models: Collection[str]) -> str:
    """What evaluates models if no data are named: the pairs that a single run held out, or the
    emoji that all of them were trained on."""
    from protoclip.models.checkpoint import read_config, run_of

    runs = [run for run in map(run_of, models) if run is not None]
    if len(runs) == len(models):
        data = [read_config(run).data for run in runs]
        if all(entry.is_emoji and entry.validation in (None, "emoji") for entry in data):
            return "emoji"
        if len(runs) == 1:
            return str(runs[0])
    raise ValueError(
        "--data: is missing; name what to evaluate on, such as a table of pairs, or a run for the "
        "pairs that it held out"
    )
