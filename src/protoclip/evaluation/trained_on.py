"""Whether data that judge a model are those that it was trained on.

They are if they are named alike, as seen from the current folder, or if they hold the same rows: a
run may have been started in another folder, or its data have moved.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from protoclip.config import Config, DataConfig
from protoclip.data import split as data_split
from protoclip.data.access import is_url
from protoclip.data.content import Facts, content, difference, facts_of_rows
from protoclip.data.index import index_folder
from protoclip.data.mixture import sources_of
from protoclip.data.pairs import ImageTextPairs, Pairs, SampleStream
from protoclip.data.sources import entries
from protoclip.data.view import PairsView, as_array, whole
from protoclip.evaluation.datasets import EvaluationData, Split, with_split
from protoclip.evaluation.validation import NAME, pairs_of_run, run_as_data
from protoclip.files import read_json, read_toml
from protoclip.models.saved import SETTINGS, checkpoints, facts_of, run_of
from protoclip.paths import with_options
from protoclip.terminal import without_secrets

ROWS = ("rows", "captions", "images")  # facts by which rows are the same, wherever they lie
ELSEWHERE = ("hf:", "emoji")  # names of pairs that are not in files of the user


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
        sources = settings.get("sources") or [{"path": settings["train"]}]
        names = [str(source["path"]) for source in sources]
        view = images if isinstance(images, PairsView) else whole([images])
        are_pairs = all(isinstance(source, ImageTextPairs) for source in view.sources)
        if are_pairs and not any(is_url(name) or name.startswith(ELSEWHERE) for name in names):
            judging = [source.subset(np.unique(as_array(rows))) for source, rows in view.parts]
            if trained := pairs_of_run(run, Config(data=allowed), "", [], frozenset()):
                looked, same, _ = data_split.count_trained(judging, trained, folder=index_folder())
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
    names = [source.path for source in entries(config.data)]
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
    for source in sources_of(split.images):
        if isinstance(source, ImageTextPairs):
            as_many = [facts for facts in trained if facts.get("rows") == len(source)]
            known = facts_of_rows(source) if as_many else {}  # hashing takes a while
            if any(all(facts.get(n) == known[n] for n in ROWS) for facts in as_many):
                return True
    return False


def one_spelling(data: str, split: str) -> str:
    """Data as a whole path; of the hub with its split, and with options in one order."""
    if data.startswith("hf:") and not is_url(data):
        name, *options = with_split(data, split).split(",")
        return ",".join([name, *sorted(options)])
    return os.path.realpath(without_secrets(data))
