"""What a run is evaluated on: the emoji's own splits, or pairs that were held out of its data.

Which pairs are held out is decided in `data/split.py`, and `training/judge.py` evaluates. Here is
also what tells whether data that evaluate a model are those that it was trained on: they are named
alike, as seen from the current folder, or hold the same rows.
"""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from protoclip.config import Config, DataConfig
from protoclip.data import sources
from protoclip.data.access import is_url
from protoclip.data.content import Facts, content, difference
from protoclip.data.index import index_folder
from protoclip.data.pairs import ImageTextPairs, Pairs, SampleStream
from protoclip.data.sampler import evenly_spaced
from protoclip.data.split import ENOUGH, MOST, SHARE, Before, count_shared, hold_out_rows
from protoclip.data.view import NONE, PairsView, Rows, drop_rows, split_by_source, to_array, whole
from protoclip.distributed.collectives import rank
from protoclip.evaluation import data_names, datasets
from protoclip.evaluation.datasets import (
    EvaluationData,
    Images,
    Split,
    add_split,
    collect_captions,
    find_positions,
    have_class,
    name_classes,
    read_classes,
    sort_names,
)
from protoclip.evaluation.task_features import quick_tasks
from protoclip.files import read_json, read_toml
from protoclip.models.saved import SETTINGS, STATE, checkpoints, facts_of, read_config, run_of
from protoclip.rules import COLUMN_OPTIONS, with_options
from protoclip.terminal import without_secrets

NAME = "validation"  # of the data set, in `eval/validation/retrieval/...`
ROWS = ("rows", "captions", "images")  # facts by which rows are the same, wherever they lie
ELSEWHERE = ("hf:", "emoji")  # names of pairs that are not in files of the user
LEAST = 10  # pairs; fewer are not held out unless the user asks for it
FEW = 100  # pairs; of so many or fewer, one moves a value by a point or more, which a note says
# Settings of `data` that name columns of a table, or the folder of its images.
COLUMNS = ("image_column", "caption_column", "id_column", "class_column", "root")
MOST_LEARNED = 5000  # training pairs from which kNN and the linear probe learn


class Judged(NamedTuple):
    """The pairs to train on, the data sets to judge the run by, and notes for the user."""

    training: Pairs | SampleStream
    data: list[EvaluationData]
    notes: list[str]


def judged(config: Config, samples: Pairs | SampleStream) -> Judged:
    """Divide the samples of a run into those to train on and those to evaluate it on.

    A mixture is evaluated on each of its sources, and on all together.

    Raises:
        ValueError: No pairs are left to evaluate on, though the settings ask for some.
    """
    validation = config.data.validation
    if validation == "emoji" or (validation is None and config.data.is_emoji):
        return Judged(samples, [datasets.emoji()], [])
    if isinstance(validation, str):
        return judged_by_other(config, samples, validation)
    share = SHARE if validation is None else validation
    return Judged(samples, [], []) if share == 0 else judged_by_share(config, samples, share)


def judged_by_other(config: Config, samples: Pairs | SampleStream, name: str) -> Judged:
    """All samples to train on, and the pairs that `data.validation` names to evaluate on."""
    # The lists of ids are of the training data.
    data = replace(config.data, train=name, sources=[], read="auto", only=None, without=None)
    opened = sources.pairs(replace(config, data=data))
    if not isinstance(opened, Pairs):
        raise ValueError(f"data.validation: {name}: a stream has no end; copy it")
    judging, notes = plain_sources(opened), list[str](getattr(opened, "notes", ()))
    if config.run.evaluate or config.run.evaluate_every > 0:
        for source in judging:
            sources.require_readable(f"data.validation: {source.name}", len(source), source.image)
    training = plain_sources(samples)
    before = trained_before(config, notes)
    trained = [*((source, NONE) for source in training), *chain(*before.values())]
    if not isinstance(samples, Pairs):
        notes.append(
            f"data.validation: {without_secrets(name)}: is not compared with the pairs of a "
            "stream; on pairs that both have, numbers are too good"
        )
    counts = dict[str, int]()
    if trained:
        looked, images, captions = count_shared(judging, trained, folder=index_folder())
        notes += overlap(name, (looked, images, captions))
        counts = {"pairs": looked, "images": images}
    parts = [(source, np.arange(len(source))) for source in judging]
    return Judged(samples, data_sets(parts, probe_rows(training, NONE), counts), notes)


def judged_by_share(config: Config, samples: Pairs | SampleStream, share: float) -> Judged:
    """The samples without those that are held out to evaluate on, and these."""
    # Without pairs to evaluate on, an evaluation on the way would be refused next.
    nothing = "0, with run.evaluate_every = 0" if judges_on_the_way(config) else "0"
    nothing += ", and for finetune --alpha 1" * (config.model.start is not None)

    def without_any(reason: str) -> Judged:
        if is_asked(config):
            raise ValueError(f"data.validation: {reason}, or {nothing}")
        return Judged(samples, [], [f"data.validation: {reason}, or {nothing}"])

    if not isinstance(samples, Pairs):
        return without_any("a stream is not held out; name a source to judge the run by")
    training, notes, total = plain_sources(samples), list[str](), len(samples)
    before = trained_before(config, notes)
    learned = f"{' and '.join(before)} learned from the others"
    rows = hold_out_rows(
        training, share=share, folder=index_folder(), before=[*chain(*before.values())]
    )
    if len(rows) < least_held_out(config):
        larger = "a larger share, " if len(rows) or share * total < 1 else ""
        return without_any(
            f"no pairs are held out, since only {len(rows)} of {total:,} could be: "
            f"{f'{learned}, ' if before else ''}they are few, or many share a caption or an image; "
            f"give {larger}a source"
        )
    wanted = min(MOST, round(share * total))
    if len(rows) < (wanted if before else ENOUGH * wanted):
        why = learned if before else "many share a caption or an image"
        notes.append(
            f"data.validation: {len(rows):,} pairs are held out, not {wanted:,}, since {why}"
        )
    if len(rows) == total:
        raise ValueError(
            f"data.validation: {share} leaves none of {total:,} pairs to train on; lower it"
        )
    points = f"{100 / len(rows):.3g}"
    steps = f", so values move in steps of {points} point{'s' * (points != '1')}"
    notes.append(
        f"{len(rows):,} of {total:,} pairs are held out to judge the run by"
        f"{steps if len(rows) <= FEW else ''}; "
        "data.validation sets a share, another source, or 0 for none"
    )
    parts = split_by_source(training, rows)
    counts = {"pairs": len(rows), "images": 0}
    data = data_sets(parts, probe_rows(training, rows), counts)
    return Judged(drop_rows(samples, rows), data, notes)


def starts_of(config: Config) -> dict[Path, str]:
    """The runs whose weights a run starts from, whole or as halves, and the setting of each."""
    model = config.model
    named = {"model.image.name": model.image.name, "model.text.name": model.text.name}
    if model.start is not None:
        named = {"model.start": model.start}
    runs = dict[Path, str]()
    for setting, name in named.items():
        if name is not None and (run := run_of(name)) is not None:
            runs.setdefault(run, setting)
    return runs


def trained_before(
    config: Config, notes: list[str], visited: frozenset[Path] = frozenset()
) -> dict[str, list[Before]]:
    """The pairs that the starts were trained on, and those that they started from; adds notes.

    By the setting of each start that is known to have some, each with the rows that were held out
    of it, and so may judge this run too. Runs say what they were trained on; what other models saw
    is not known. Those `visited` on the way here are passed over: a folder may name itself.
    """
    starts = {run.resolve(): (run, setting) for run, setting in starts_of(config).items()}
    by_setting = {
        setting: pairs_of_run(run, config, setting, notes, visited | {real})
        for real, (run, setting) in starts.items()
        if real not in visited
    }
    return {setting: pairs for setting, pairs in by_setting.items() if pairs}


def open_data(
    reference: str,
    *,
    root: str | None = None,
    class_column: str | None = None,
    split: str = "test",
    config: DataConfig | None = None,
) -> EvaluationData:
    """What a reference names, as `datasets.open_data` does; of a run, the pairs that it held out.

    Those have the name of any split that is asked for but `train`.
    """
    config = config or DataConfig()
    run = run_as_data(reference)
    if run is None:
        return datasets.open_data(
            reference, root=root, class_column=class_column, split=split, config=config
        )
    columns = {name: getattr(config, name) for name in COLUMN_OPTIONS}
    given = {**columns, "class_column": class_column, "root": root, **with_options(reference)[1]}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{run}: a run's pairs are read as it read them; leave out {name}")
    return held_out_by(run, split=split, allowed=config)


def run_as_data(reference: str) -> Path | None:
    """The run that a reference to data names, or one of its checkpoints; None for other data."""
    run = run_of(with_options(reference)[0])
    # A folder of data may hold a `config.toml` too, and no checkpoints.
    return run if run is not None and (run / "checkpoints").is_dir() else None


def held_out_by(run: Path, *, split: str, allowed: DataConfig) -> EvaluationData:
    """The pairs that judge a run, those of all its sources together, to judge other models too.

    Args:
        split: What the pairs are called, whichever is asked for.
        allowed: Has `allow_links`, since the run's folder has none.

    Raises:
        ValueError: There are none, or the run's data are gone or are others now.
    """
    config = settings_of(run, allowed)
    try:
        divided = judged(config, sources.pairs(config))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{run}: the pairs that it held out are not to be had ({error}); bring its data back "
            "(relative paths of its config.toml start at the current folder), or name other data"
        ) from error
    if not divided.data:
        raise ValueError(f"{run}: this run held out no pairs; name other data, as a table of pairs")
    first = divided.data[0]
    if first.name != NAME:  # the emoji, which have splits of their own
        return first
    if split == "train":
        raise ValueError(f"{run}: stands for the pairs that it held out; ask for no split of it")
    judging = first.splits[NAME].images
    if differs := changed_since(run, divided.training, judging):
        raise ValueError(
            f"{run}: its data have changed since it was trained ({differs}), so the pairs that it "
            "held out are not known; bring them back, or name other data"
        )
    number, source = f"{len(judging):,} images", config.data.validation
    notes = [f"{run}: the {number} that it held out judge the models"]
    if isinstance(source, str):
        told = (
            f"{run}: the {number} of {without_secrets(source)}, which judged it, judge the models"
        )
        notes = [told, *divided.notes]
    splits = {split if name == NAME else name: part for name, part in first.splits.items()}
    return replace(first, name=data_names.name_run_data(run, NAME), splits=splits, notes=notes)


def settings_of(run: Path, allowed: DataConfig) -> Config:
    """The settings of a run, with this `allow_links`, to look at its pairs."""
    settings = read_config(run)
    data = replace(settings.data, allow_links=allowed.allow_links)
    return sources.allow_bad(replace(settings, data=data))


def pairs_of_run(
    run: Path, config: Config, setting: str, notes: list[str], visited: frozenset[Path]
) -> list[Before]:
    """The pairs of `trained_before`, of the run that a setting names."""
    try:
        settings = settings_of(run, config.data)
        samples = sources.pairs(settings)
        if not isinstance(samples, Pairs):
            raise ValueError("it was a stream")
        earlier = trained_before(settings, [], visited)
        trained, before = plain_sources(samples), [*chain(*earlier.values())]
        held, share = NONE, SHARE if settings.data.validation is None else settings.data.validation
        if share and not isinstance(share, str) and not settings.data.is_emoji:
            held = hold_out_rows(trained, share=share, folder=index_folder(), before=before)
        if len(held) < least_held_out(settings):
            held = NONE
        if rank() == 0 and (differs := changed_since(run, drop_rows(samples, held))):
            notes.append(
                f"{setting}: the data of {run} have changed since it was trained ({differs}), so "
                "pairs that it was trained on may judge this run"
            )
    except (OSError, ValueError) as error:
        notes.append(f"{setting}: what {run} was trained on is not known ({error})")
        return []
    return split_by_source(trained, held) + before


def changed_since(
    run: Path, training: Pairs | SampleStream, judging: Images | None = None
) -> str | None:
    """What differs between the data of a run and those that it began with, as it wrote down.

    `judging` are the pairs of a source that judged it, which it wrote down too.
    """
    saved = checkpoints(run)
    state = read_json(saved[-1] / STATE).get("content", {}) if saved else {}
    differs = difference(state["sources"], content(training)) if "sources" in state else None
    if differs is None and "validation" in state and isinstance(judging, PairsView):
        differs = difference(state["validation"], content(judging))
    return differs


def is_asked(config: Config) -> bool:
    """Whether the settings ask for something to judge the run by."""
    return config.data.validation is not None or judges_on_the_way(config)


def least_held_out(config: Config) -> int:
    """Fewer pairs than these are not held out."""
    return 2 if is_asked(config) else LEAST


def judges_on_the_way(config: Config) -> bool:
    """Whether the run validates as it trains, by nothing but pairs that are held out."""
    return config.run.evaluate_every > 0 and not config.run.guard


def overlap(name: str, counts: tuple[int, int, int]) -> list[str]:
    """A note on the pairs of a source to judge by that are trained on.

    Raises:
        ValueError: All of them are.
    """
    looked, images, captions = counts
    if images == looked:
        raise ValueError(
            f"data.validation: {name}: every image of it is trained on; name other pairs, a share "
            "of those of data.train, or 0 for none"
        )
    if not images and not captions:
        return []
    of_images, of_captions = (f"{number:,}" if number else "none" for number in (images, captions))
    told = f"the image of {of_images} is trained on, and a caption of {of_captions}"
    return [f"data.validation: {name}: of {looked:,} pairs, {told}"]


def guards(config: Config, held_out: Sequence[EvaluationData]) -> list[EvaluationData]:
    """The data sets of `run.guard`.

    On the way their validation split is measured, if they have one, and at the end the test split.

    Raises:
        ValueError: There is no such data set, it can serve no quick task, or its name is taken.
    """
    # The columns of the training data say nothing about other tables.
    usual = DataConfig()
    columns = {name: getattr(usual, name) for name in COLUMNS}
    settings, guards = replace(config.data, **columns), list[EvaluationData]()
    for reference in config.run.guard:
        try:
            data = open_data(reference, config=settings)
            for split in {"test", NAME} & data.splits.keys():
                quick_tasks(data, split)
        except ValueError as error:
            raise ValueError(f"run.guard: {error}") from error
        data = replace(data, name=name_in_metrics(data.name, config))
        if data.name in [other.name for other in (*held_out, *guards)]:
            raise ValueError(
                f"run.guard: {reference}: two data sets of this run are called '{data.name}'; "
                "rename one, or leave it out"
            )
        guards.append(data)
    return guards


def name_in_metrics(name: str, config: Config) -> str:
    """The name of a guard; of one that is called by its folder too, as `photos-test`, the name
    without it where a setting has that, as settings of versions up to 1.0.0 do."""
    short = name.rpartition("-")[2]
    if short == NAME:  # which the held-out pairs have
        return name
    metrics = [metric for metric in (config.run.keep_best, config.run.stop_by) if metric]
    named = {metric.split("/")[1] for metric in metrics if metric.count("/") > 1}
    return short if short in data_names.SPLITS and short in named and name not in named else name


def plain_sources(samples: Pairs | SampleStream) -> list[ImageTextPairs]:
    """A copy of each source of pairs; none of a stream."""
    pairs = [source for source in samples.sources if isinstance(source, ImageTextPairs)]
    return [copy.copy(source) for source in pairs]


def probe_rows(of: Sequence[ImageTextPairs], held_out: Rows) -> list[tuple[ImageTextPairs, Rows]]:
    """Rows with classes, drawn evenly from what is not held out, for kNN and the linear probe."""
    with_class = []  # a row without one may train, and teaches no probe
    for source, left_out in split_by_source(of, held_out):
        if source.class_column is not None:
            has_class = have_class(source)
            has_class[left_out] = False
            with_class.append((source, np.flatnonzero(has_class)))
    total, parts = sum(len(rows) for _, rows in with_class), []
    for source, rows in with_class:
        number = min(len(rows), -(-MOST_LEARNED * len(rows) // max(1, total)))
        parts.append((source, rows[evenly_spaced(len(rows), number, seed=0)] if number else rows))
    return parts


def data_sets(
    held_out: Sequence[tuple[ImageTextPairs, Rows]],
    training: Sequence[tuple[ImageTextPairs, Rows]],
    trained_on: Mapping[str, int],
) -> list[EvaluationData]:
    """All held-out pairs as one data set, and those of each source, if there are several.

    Raises:
        ValueError: None of them has a caption.
    """
    parts = [(source, rows) for source, rows in held_out if len(rows)]
    with_classes = [part for part in (*parts, *training) if part[0].class_column is not None]
    present = [read_classes(source, rows.tolist()) for source, rows in with_classes]
    names = sort_names(chain.from_iterable(present))
    shown, templates = name_classes(names)

    def data_set(name: str, of: Sequence[tuple[ImageTextPairs, Rows]]) -> EvaluationData:
        known = [source.name for source, _ in of]
        splits = {NAME: joined(of, names)}
        has_classes = splits[NAME].labels is not None
        fitting = [part for part in training if part[0].class_column is not None]
        if same := [part for part in fitting if [part[0].name] == known]:
            fitting = same
        if has_classes and fitting:
            splits["train"] = joined(fitting, names)
        return EvaluationData(
            name=name,
            splits=splits,
            class_names=shown if has_classes else (),
            templates=templates if has_classes else ("{c}",),
            trained_on=trained_on,
        )

    sets = [data_set(NAME, parts)]
    if len(held_out) > 1:
        # Numbers of few pairs say nothing.
        large = [part for part in parts if len(part[1]) >= LEAST]
        sets += [data_set(f"{NAME}-{part[0].name}", [part]) for part in large]
    if not (with_captions := [each for each in sets if len(each.splits[NAME].images)]):
        sources_named = ", ".join(source.name for source, _ in parts)
        raise ValueError(
            f"data.validation: {sources_named}: none of the pairs that are to judge the run has a "
            "caption; give them some, name other pairs, or 0 for none"
        )
    return with_captions


def joined(parts: Sequence[tuple[ImageTextPairs, Rows]], names: Sequence[str]) -> Split:
    """Rows of several sources as one split; it has classes if all of them have."""
    images: list[tuple[ImageTextPairs, list[int]]] = []
    captions: list[tuple[str, ...]] = []
    labels = []
    for source, given in parts:
        rows, texts = collect_captions(source, given.tolist())
        images.append((source, rows))
        captions += texts
        if source.class_column is not None and len(names) > 1:
            labels.append(find_positions(read_classes(source, rows), names))
    return Split(
        images=PairsView(images),
        captions=captions,
        labels=torch.cat(labels) if len(labels) == len(parts) else None,
    )


def count_trained(
    model: str, reference: str, data: EvaluationData, split: str, allowed: DataConfig
) -> dict[str, int]:
    """How many `pairs` a split of data that this reference opened has, and `images` that the run of
    a model was trained on; nothing where that is not known.

    Images are compared where both are in files. Else names, and what the run wrote down of its
    sources, tell whether they are the same. The run's pairs are read with `allowed.allow_links`.
    """
    if (run := run_of(model)) is None:
        return {}
    images = data.splits[split].images
    with suppress(OSError, ValueError, LookupError, AttributeError, TypeError):  # of a damaged run
        settings = read_toml(run / SETTINGS)["data"]
        named = settings.get("sources") or [{"path": settings["train"]}]
        names = [str(source["path"]) for source in named]
        view = images if isinstance(images, PairsView) else whole([images])
        are_pairs = all(isinstance(source, ImageTextPairs) for source in view.sources)
        if are_pairs and not any(is_url(name) or name.startswith(ELSEWHERE) for name in names):
            judging = [source.subset(np.unique(to_array(rows))) for source, rows in view.parts]
            if trained := pairs_of_run(run, Config(data=allowed), "", [], frozenset()):
                looked, same, _ = count_shared(judging, trained, folder=index_folder())
                return {"pairs": looked, "images": same}
        if is_named(reference, split, names) or holds_rows(
            reference, data.splits[split], sources_in(run)
        ):
            return {"pairs": len(images), "images": len(images)}
    return {}


def trained_guards(
    config: Config, guards: Sequence[EvaluationData], training: Pairs | SampleStream
) -> list[str]:
    """A note on each guard of a run whose pairs the run trains on."""
    if not guards:
        return []
    names = [source.path for source in sources.entries(config.data)]
    facts = content(training)
    return [
        f"run.guard: {without_secrets(reference)}: is what the run trains on, so its numbers are "
        "too good, also to choose by; name other data"
        for reference, guard in zip(config.run.guard, guards, strict=True)
        if is_named(reference, "test", names)
        or any(
            holds_rows(reference, guard.splits[each], facts)
            for each in {"test", NAME} & {*guard.splits}
        )
    ]


def has_held_out_metrics(run: Path) -> bool:
    """Whether the results of a run have metrics of pairs that were held out of it."""
    try:
        metrics = read_json(run / "results.json")["metrics"]
        return any(name.startswith(f"eval/{NAME}/") for name in metrics)
    except (ValueError, LookupError, AttributeError, TypeError):  # damaged, or not there yet
        return False


def is_named(reference: str, split: str, names: Iterable[str]) -> bool:
    """Whether a reference to data of a split is one of these names of training data.

    The split counts for data of the hub that names none.
    """
    data = with_options(reference)[0]
    if data == "emoji":  # they have splits of their own
        return False
    measured = one_spelling(data.removeprefix("wds:"), split)
    return any(one_spelling(name, "train") == measured for name in names)


def sources_in(run: Path) -> list[Facts]:
    """What the newest checkpoint of a run tells of its sources, and of what was held out; nothing,
    if there is none."""
    saved = checkpoints(run)
    return list(facts_of(saved[-1], "content").get("sources", [])) if saved else []


def holds_rows(reference: str, split: Split, trained: Sequence[Facts]) -> bool:
    """Whether a source of the split has the rows that one of these facts of sources tells of.

    Pairs that a run held out are none of them if it had the same sources and held out the same.
    """
    run = run_as_data(reference)
    if run is not None and difference(sources_in(run), trained) is None:
        return False
    for source in getattr(split.images, "sources", ()):
        if isinstance(source, ImageTextPairs):
            as_many = [facts for facts in trained if facts.get("rows") == len(source)]
            known = source.fingerprint(images=False) if as_many else {}  # hashing takes a while
            if any(all(facts.get(n) == known[n] for n in ROWS) for facts in as_many):
                return True
    return False


def one_spelling(data: str, split: str) -> str:
    """Data as a whole path; of the hub with its split, and with options in one order."""
    if data.startswith("hf:") and not is_url(data):
        name, *options = add_split(data, split).split(",")
        return ",".join([name, *sorted(options)])
    return os.path.realpath(without_secrets(data))
