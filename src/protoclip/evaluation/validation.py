"""The validation set of a run: the emoji's own splits, pairs held out of its data, or others.

Which pairs are held out is decided in `data/split.py`. Here is also what tells whether data that
evaluate a model are those that it was trained on: they are named alike, as seen from the current
folder, or hold the same images or rows.
"""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from protoclip.config import Config, DataConfig
from protoclip.data import sources
from protoclip.data.access import index_folder, is_url
from protoclip.data.pairs import (
    Facts,
    ImageTextPairs,
    Pairs,
    Rows,
    SampleStream,
    describe_change,
    evenly_spaced,
    fingerprint_sources,
    split_by_source,
)
from protoclip.data.sources import NONE, PairsView, drop_rows, join_sources, to_array
from protoclip.data.split import ENOUGH, FEW, MOST, SHARE, Before, count_shared, hold_out_rows
from protoclip.distributed.collectives import rank
from protoclip.encode.features import Images
from protoclip.evaluation import datasets
from protoclip.evaluation.datasets import (
    EvaluationData,
    Split,
    add_split,
    collect_captions,
    find_positions,
    find_with_class,
    name_classes,
    read_classes,
    simplify_name,
    sort_names,
    split_columns,
)
from protoclip.models.checkpoint import checkpoints, facts_of, read_config, run_of
from protoclip.rules import DATA_OPTIONS, with_options
from protoclip.terminal import say, without_secrets

NAME = "validation"  # of the data set, in `eval/validation/retrieval/...`
ROWS = ("rows", "captions", "images")  # facts by which rows are the same, wherever they lie
ELSEWHERE = ("hf:", "emoji")  # names of pairs that are not in files of the user
LEAST = 10  # pairs; fewer are not held out unless the user asks for it
MOST_LEARNED = 5000  # training pairs from which kNN and the linear probe learn


class Division(NamedTuple):
    """The pairs to train on, the data sets to evaluate the run on, and notes for the user."""

    training: Pairs | SampleStream
    data: list[EvaluationData]
    notes: list[str]


def split_validation(
    config: Config, samples: Pairs | SampleStream, *, usual: float = SHARE
) -> Division:
    """Divide the samples of a run into those to train on and those to evaluate it on.

    Where the settings ask for nothing, the `usual` share is held out; its default is that of runs
    whose `config.toml` names none, as of version 1.0. A mixture is evaluated on each of its
    sources, and on all together. Raises `ValueError` if no pairs are left to evaluate on, though
    the settings ask for some.
    """
    validation = config.data.validation
    if validation == "emoji" or (validation is None and config.data.is_emoji):
        return Division(samples, [datasets.emoji()], [])
    if isinstance(validation, str):
        return open_other_source(config, samples, validation)
    share = usual if validation is None else validation
    return Division(samples, [], []) if share == 0 else hold_out_share(config, samples, share)


def open_other_source(config: Config, samples: Pairs | SampleStream, name: str) -> Division:
    """All samples to train on, and the pairs that `data.validation` names to evaluate on."""
    # The lists of ids are of the training data.
    data = replace(config.data, train=name, sources=[], read="auto", only=None, without=None)
    opened = sources.open_samples(replace(config, data=data))
    if not isinstance(opened, Pairs):
        raise ValueError(f"data.validation: {name}: a stream has no end; copy it")
    held_out, notes = list_sources(opened), list[str](getattr(opened, "notes", ()))
    if config.run.evaluate or config.run.evaluate_every > 0:
        for source in held_out:
            named, rows = f"data.validation: {source.name}", range(len(source))
            sources.require_readable(named, rows, source.read_encoded)
    training = list_sources(samples)
    before = find_earlier_pairs(config, notes)
    trained = [*((source, NONE) for source in training), *chain(*before.values())]
    if not isinstance(samples, Pairs):
        notes.append(
            f"data.validation: {without_secrets(name)}: is not compared with the pairs of a "
            "stream; on pairs that both have, numbers are too good"
        )
    counts = dict[str, int]()
    if trained:
        looked, images, captions = count_shared(held_out, trained, folder=index_folder())
        counts = {"pairs": looked, "images": images}
        if images == looked:
            raise ValueError(
                f"data.validation: {name}: every image of it is trained on; name other pairs, a "
                "share of those of data.train, or 0 for none"
            )
        if images or captions:
            image_words, caption_words = (f"{n:,}" if n else "none" for n in (images, captions))
            notes.append(
                f"data.validation: {name}: of {looked:,} pairs, the image of {image_words} is "
                f"trained on, and a caption of {caption_words}"
            )
    parts = [(source, np.arange(len(source))) for source in held_out]
    return Division(samples, make_data_sets(parts, probe_rows(training, NONE), counts), notes)


def hold_out_share(config: Config, samples: Pairs | SampleStream, share: float) -> Division:
    """The samples without those that are held out to evaluate on, and these."""

    def hold_out_none(reason: str) -> Division:
        reason = f"data.validation: {reason}, or 0 for none"
        if is_asked(config):
            raise ValueError(reason)
        return Division(samples, [], [reason])

    if not isinstance(samples, Pairs):
        return hold_out_none("a stream is not held out; name a source to evaluate the run on")
    notes, total, least = list[str](), len(samples), 2 if is_asked(config) else LEAST
    before = find_earlier_pairs(config, notes)
    training, rows, wanted = list[ImageTextPairs](), NONE, min(MOST, round(share * total))
    if before or wanted >= least:  # or too few would be left, whichever are alike
        training, earlier = list_sources(samples), [*chain(*before.values())]
        rows = hold_out_rows(training, share=share, folder=index_folder(), before=earlier)
    why, way_out = "many share a caption or an image", "give a larger share, a source"
    if isinstance(config.data.caption_column, list):
        way_out = f"join caption columns whose values repeat, {way_out}"
    if before:
        start = " and ".join(before)
        why = f"{start} learned from the others"
        way_out = f"make {start} anew with data.validation = 0.2, give a source"
    if len(rows) < least:
        number = len(rows) if training else wanted
        return hold_out_none(
            f"no pairs are held out, since only {number} of {total:,} could be: they are few, "
            f"or {why}; {way_out}"
        )
    if len(rows) < (wanted if before else ENOUGH * wanted):
        notes.append(
            f"data.validation: {len(rows):,} pairs are held out, not {wanted:,}, since {why}"
        )
    if len(rows) == total:
        raise ValueError(
            f"data.validation: {share} leaves none of {total:,} pairs to train on; lower it"
        )
    points = f"{100 / len(rows):.3g} point{'s' * (len(rows) != 100)}"
    steps = f", so values move in steps of {points}" * (len(rows) <= FEW)
    notes.append(
        f"{len(rows):,} of {total:,} pairs are held out to evaluate the run on{steps}; "
        "data.validation sets a share, another source, or 0 for none"
    )
    data = make_data_sets(
        split_by_source(training, rows),
        probe_rows(training, rows),
        {"pairs": len(rows), "images": 0},
    )
    return Division(drop_rows(samples, rows), data, notes)


def is_asked(config: Config) -> bool:
    """Whether the settings ask for a validation set, as to validate on while the run trains."""
    validates = config.run.evaluate_every > 0 and not config.run.guard
    return config.data.validation is not None or validates


def open_guards(config: Config, held_out: Sequence[EvaluationData]) -> list[EvaluationData]:
    """The data sets of `run.guard`.

    On the way their validation split is measured, if they have one, and at the end the test split.
    Raises `ValueError` if there is no such data set, or its name is taken.
    """
    # The columns of the training data say nothing about other tables.
    columns = {name: getattr(DataConfig(), name) for name in DATA_OPTIONS}
    settings, guards = replace(config.data, **columns), list[EvaluationData]()
    for reference in config.run.guard:
        try:
            data = open_data(reference, config=settings)
        except ValueError as error:
            raise ValueError(f"run.guard: {error}") from error
        if data.name in [other.name for other in (*held_out, *guards)]:
            raise ValueError(
                f"run.guard: {reference}: two data sets of this run are called '{data.name}'; "
                "rename one, or leave it out"
            )
        guards.append(data)
    return guards


# Data sets of pairs


def list_sources(samples: Pairs | SampleStream) -> list[ImageTextPairs]:
    """A copy of each source of pairs; none of a stream."""
    pairs = [source for source in samples.sources if isinstance(source, ImageTextPairs)]
    return [copy.copy(source) for source in pairs]


def probe_rows(
    training: Sequence[ImageTextPairs], held_out: Rows
) -> list[tuple[ImageTextPairs, Rows]]:
    """Rows with classes, drawn evenly from what is not held out, for kNN and the linear probe."""
    with_class = []  # a row without one may train, and teaches no probe
    for source, left_out in split_by_source(training, held_out):
        if source.class_column is not None:
            has_class = find_with_class(source)
            has_class[left_out] = False
            with_class.append((source, np.flatnonzero(has_class)))
    total, parts = sum(len(rows) for _, rows in with_class), []
    for source, rows in with_class:
        number = min(len(rows), -(-MOST_LEARNED * len(rows) // max(1, total)))
        parts.append((source, rows[evenly_spaced(len(rows), number, seed=0)] if number else rows))
    return parts


def make_data_sets(
    held_out: Sequence[tuple[ImageTextPairs, Rows]],
    training: Sequence[tuple[ImageTextPairs, Rows]],
    trained_on: Mapping[str, int],
) -> list[EvaluationData]:
    """All held-out pairs as one data set, and those of each source, if there are several.

    Raises:
        ValueError: None of them has a caption.
    """
    parts = [(source, rows) for source, rows in held_out if len(rows)]
    learning = [part for part in training if part[0].class_column is not None]
    known = [(one, rows[find_with_class(one)[rows]]) for one, rows in parts if one.class_column]
    names = sort_names(
        chain.from_iterable(
            read_classes(source, rows.tolist()) for source, rows in [*known, *learning]
        )
    )
    class_names, templates = name_classes(names)

    def make_data_set(name: str, some: Sequence[tuple[ImageTextPairs, Rows]]) -> EvaluationData:
        splits = {NAME: join_rows(some, names)}
        has_classes = splits[NAME].labels is not None
        if has_classes and learning:
            own = [
                part for part in learning if [part[0].name] == [source.name for source, _ in some]
            ]
            splits["train"] = join_rows(own or learning, names)
        return EvaluationData(
            name=name,
            splits=splits,
            class_names=class_names if has_classes else (),
            templates=templates if has_classes else ("{c}",),
            trained_on=trained_on,
        )

    sets = [make_data_set(NAME, parts)]
    with_column = sum(len(rows) for source, rows in parts if source.class_column)
    if 0 < sum(len(rows) for _, rows in known) < with_column:
        by_class = make_data_set(f"{NAME}-with_class", known)
        images = replace(by_class.splits[NAME], captions=None, columns=None)
        sets.append(replace(by_class, splits={**by_class.splits, NAME: images}))
    if len(held_out) > 1:
        # Numbers of few pairs say nothing.
        large = [part for part in parts if len(part[1]) >= LEAST]
        sets += [make_data_set(f"{NAME}-{part[0].name}", [part]) for part in large]
    sets = [part for data in sets for part in split_columns(data, NAME)]
    if not (with_captions := [data for data in sets if len(data.splits[NAME].images)]):
        raise ValueError(
            f"data.validation: {', '.join(source.name for source, _ in parts)}: none of the pairs "
            "of the validation set has a caption; give them some, name other pairs, or 0 for "
            "none"
        )
    return with_captions


def join_rows(parts: Sequence[tuple[ImageTextPairs, Rows]], names: Sequence[str]) -> Split:
    """Rows of several sources as one split; it has classes if all of them have."""
    images: list[tuple[ImageTextPairs, list[int]]] = []
    captions, columns = list[tuple[str, ...]](), list[tuple[str, ...]]()
    labels = []
    for source, some in parts:
        rows, texts, names_of_texts = collect_captions(source, some.tolist())
        images.append((source, rows))
        captions += texts
        columns += names_of_texts
        if len(names) > 1 and source.class_column and find_with_class(source)[rows].all():
            labels.append(find_positions(read_classes(source, rows), names))
    return Split(
        images=PairsView(images),
        captions=captions,
        columns=columns,
        labels=torch.cat(labels) if len(labels) == len(parts) else None,
    )


# The pairs of other runs


def open_data(
    reference: str, *, split: str = "test", config: DataConfig | None = None
) -> EvaluationData:
    """What a reference names, as `datasets.open_data` does; for a run, the pairs that it held out.

    Those are read as the run read them, and have the name of any split asked for but `train`.
    """
    run = find_run(reference)
    if run is None:
        return datasets.open_data(reference, split=split, config=config)
    return open_held_out(run, split=split, allowed=config or DataConfig())


def find_run(reference: str) -> Path | None:
    """The run that a reference to data names, or one of its checkpoints; None for other data."""
    run = run_of(with_options(reference)[0])
    # A folder of data may hold a `config.toml` too, and no checkpoints.
    return run if run is not None and (run / "checkpoints").is_dir() else None


def open_held_out(run: Path, *, split: str, allowed: DataConfig) -> EvaluationData:
    """The validation set of a run, all its sources together, to evaluate other models on.

    It has the name of the split that is asked for. The run's data are read with
    `allowed.allow_links`. Raises `ValueError` if they are gone, changed, or none was held out.
    """
    config = sources.allow_bad(read_config(run, allow_links=allowed.allow_links))
    try:
        divided = split_validation(config, sources.open_samples(config))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{run}: cannot load its held-out pairs ({error}); bring its data back (relative paths "
            "of its config.toml start at the current folder), or name other data"
        ) from error
    if not divided.data:
        raise ValueError(f"{run}: this run held out no pairs; name other data, as a table of pairs")
    first, source = divided.data[0], config.data.validation
    if first.name != NAME:  # the emoji, which have splits of their own
        return first
    if split == "train":
        raise ValueError(f"{run}: stands for the pairs that it held out; ask for no split of it")
    held_out = first.splits[NAME].images
    if differs := find_change(run, divided.training, held_out):
        raise ValueError(
            f"{run}: its data have changed since it was trained ({differs}), so the pairs that it "
            "held out are not known; bring them back, or name other data"
        )
    whose = "that it held out"
    if isinstance(source, str):
        whose = f"of its validation set, {without_secrets(source)},"
    notes = [f"{run}: the {len(held_out):,} images {whose} are the test set"]
    return replace(
        first,
        name=f"{simplify_name(run.resolve().name) or 'run'}-{NAME}",
        splits={split if name == NAME else name: part for name, part in first.splits.items()},
        notes=[*notes, *(divided.notes if isinstance(source, str) else ())],
    )


def find_earlier_pairs(
    config: Config, notes: list[str], visited: frozenset[Path] = frozenset()
) -> dict[str, list[Before]]:
    """The pairs that the starts of a run were trained on, and their starts before; adds notes.

    They are listed by the setting of each start that is known to have some, each with the rows that
    were held out of it, and so may evaluate this run too. Runs say what they were trained on; what
    other models saw is not known. Those `visited` are passed over: a folder may name itself.
    """
    model = config.model
    starts = {"model.image.name": model.image.name, "model.text.name": model.text.name}
    if model.start is not None:
        starts = {"model.start": model.start}
    by_setting = dict[str, list[Before]]()
    for setting, name in starts.items():
        run = None if name is None else run_of(name)
        if run is None or run.resolve() in visited:
            continue
        visited |= {run.resolve()}
        if pairs := list_trained_pairs(run, config, setting, notes, visited):
            by_setting[setting] = pairs
    return by_setting


def list_trained_pairs(
    run: Path, config: Config, setting: str, notes: list[str], visited: frozenset[Path]
) -> list[Before]:
    """The pairs of `find_earlier_pairs`, for the run that a setting names."""
    try:
        settings = sources.allow_bad(read_config(run, allow_links=config.data.allow_links))
        samples = sources.open_samples(settings)
        if not isinstance(samples, Pairs):
            raise ValueError("it was a stream")
        earlier = find_earlier_pairs(settings, [], visited)
        trained, before = list_sources(samples), [*chain(*earlier.values())]
        held, share = NONE, SHARE if settings.data.validation is None else settings.data.validation
        if share and not isinstance(share, str) and not settings.data.is_emoji:
            held = hold_out_rows(trained, share=share, folder=index_folder(), before=before)
        if len(held) < (2 if is_asked(settings) else LEAST):
            held = NONE
        if rank() == 0 and (differs := find_change(run, drop_rows(samples, held))):
            notes.append(
                f"{setting}: the data of {run} have changed since it was trained ({differs}), so "
                "pairs that it was trained on may be in this validation set"
            )
    except (OSError, ValueError) as error:
        notes.append(f"{setting}: what {run} was trained on is not known ({error})")
        return []
    return split_by_source(trained, held) + before


def find_change(
    run: Path, training: Pairs | SampleStream, held_out: Images | None = None
) -> str | None:
    """What differs between the data of a run and those that it began with, as it wrote down.

    `held_out` are its validation pairs of another source, which it wrote down too.
    """
    state = read_content(run)
    differs = (
        describe_change(state["sources"], fingerprint_sources(training))
        if "sources" in state
        else None
    )
    if differs is None and "validation" in state and isinstance(held_out, PairsView):
        differs = describe_change(state["validation"], fingerprint_sources(held_out))
    return differs


# Was a model trained on what evaluates it?


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
    with suppress(OSError, ValueError, LookupError, TypeError):  # the run is damaged
        config = sources.allow_bad(read_config(run, allow_links=allowed.allow_links))
        names = [source.path for source in sources.list_entries(config.data)]
        view = images if isinstance(images, PairsView) else join_sources([images])
        are_pairs = all(isinstance(source, ImageTextPairs) for source in view.sources)
        if are_pairs and not any(is_url(name) or name.startswith(ELSEWHERE) for name in names):
            measured = [source.subset(np.unique(to_array(rows))) for source, rows in view.parts]
            if trained := list_trained_pairs(run, Config(data=allowed), "", [], frozenset()):
                looked, same, _ = count_shared(measured, trained, folder=index_folder())
                return {"pairs": looked, "images": same}
        trained_on = list[Facts]()
        with suppress(OSError, ValueError):  # else the names are known
            trained_on = read_content(run).get("sources", [])
        if is_trained_on(reference, split, data, names, trained_on):
            return {"pairs": len(images), "images": len(images)}
    return {}


def warn_trained(
    model: str, reference: str, data: EvaluationData, split: str, allowed: DataConfig
) -> dict[str, int]:
    """`count_trained`, with a warning if the model was trained on some of the images."""
    count = count_trained(model, reference, data, split, allowed)
    if images := count.get("images", 0):
        say(
            f"warning: {reference}: {model} was trained on {images:,} of these "
            f"{count['pairs']:,} pairs and does better on them than on new ones"
        )
    return count


def note_trained_guards(
    config: Config, guards: Sequence[EvaluationData], training: Pairs | SampleStream
) -> list[str]:
    """A note on each guard of a run whose pairs the run trains on."""
    names = [source.path for source in sources.list_entries(config.data)]
    facts = fingerprint_sources(training) if guards else []
    return [
        f"run.guard: {without_secrets(reference)}: is what the run trains on, so its numbers are "
        "too good, also to choose by; name other data"
        for reference, guard in zip(config.run.guard, guards, strict=True)
        if any(
            is_trained_on(reference, split, guard, names, facts)
            for split in {"test", NAME} & {*guard.splits}
        )
    ]


def is_trained_on(
    reference: str, split: str, data: EvaluationData, names: Iterable[str], trained: Sequence[Facts]
) -> bool:
    """Whether a split of data is what a model was trained on, by the names or the facts of that.

    A split counts where data of the hub name none. Pairs that a run held out are none of them if it
    had the same sources and held out the same.
    """

    def spell(data: str, split: str) -> str:
        """A whole path; on the hub the split, and options in one order."""
        if data.startswith("hf:") and not is_url(data):
            name, *options = add_split(data, split).split(",")
            return ",".join([name, *sorted(options)])
        return os.path.realpath(without_secrets(data))

    name = with_options(reference)[0].removeprefix("wds:")
    # The emoji have splits of their own.
    if name != "emoji" and spell(name, split) in [spell(other, "train") for other in names]:
        return True
    run = find_run(reference)
    if run is not None and describe_change(read_content(run).get("sources", []), trained) is None:
        return False
    for source in getattr(data.splits[split].images, "sources", ()):
        if isinstance(source, ImageTextPairs):
            as_many = [facts for facts in trained if facts.get("rows") == len(source)]
            own = source.fingerprint(images=False) if as_many else {}  # hashing takes a while
            if any(all(facts.get(n) == own[n] for n in ROWS) for facts in as_many):
                return True
    return False


def read_content(run: Path) -> dict[str, Any]:
    """What the newest checkpoint of a run tells of its data: facts of its sources, and more."""
    saved = checkpoints(run)
    return facts_of(saved[-1], "content") if saved else {}
