"""WiSE-FT: models between a start and what fine-tuning made of it (arXiv 2109.01903).

Fine-tuning gains on its own data and loses on others. The weights on the line between both ends
often keep most of the gain at little of the loss; `choose_weights` looks for the best.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protoclip.distributed import parallel
from protoclip.distributed.collectives import raise_on_all_ranks, rank, rank0_first
from protoclip.evaluation.datasets import EvaluationData, Split
from protoclip.evaluation.features import Encoder, remove_features
from protoclip.evaluation.metrics import RECALLS, mark_clear
from protoclip.evaluation.paired import RunResults, compare_metric, find_samples, make_reader
from protoclip.files import (
    checksum,
    read_json,
    read_sealed,
    replacing,
    sealed,
    to_json,
    write_atomically,
)
from protoclip.models import checkpoint as saved
from protoclip.models import layers
from protoclip.models.checkpoint import write_model
from protoclip.progress import Progress
from protoclip.terminal import say, visible, without_secrets
from protoclip.training.checkpoint import CheckpointWriter
from protoclip.training.judge import Judge

FILE, FIGURE = "wise_ft.json", "wise_ft.png"
START = "start"  # folder in the run's with `results` by sample of the start
# Those of Okabe and Ito, which people with any kind of colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
ALPHAS = tuple(tenth / 10 for tenth in range(11))
RULE = (
    "the best alpha has the largest mean over data sets of zero-shot accuracy, or of mean recall "
    "where a data set has no classes; of equal ones it is the smallest"
)
# LoRA adds the product of two matrices. Only the second one, which starts at 0, moves along the
# line, so that the product does.
FIXED = ".lora_A."

Point = dict[str, Any]  # `alpha`, `scores` by data set, their `mean`, and all `metrics`


def interpolated(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Weights `(1 - alpha) start + alpha end`, statistics of BatchNorm included.

    Exactly `start` at 0 and `end` at 1. Between them whole numbers, such as counts of batches, are
    those of `end`.

    Args:
        start, end: State dicts of one model, on the CPU.
        alpha: In [0, 1].
    """
    assert start.keys() == end.keys()
    if alpha == 0:
        return dict(start)
    return {
        name: torch.lerp(start[name], value, alpha)
        if value.is_floating_point() and FIXED not in name
        else value
        for name, value in end.items()
    }


def scores(metrics: Mapping[str, float]) -> dict[str, float]:
    """What the rule looks at, by data set: a fraction from 0 to 1.

    The zero-shot accuracy (of images with several classes the mean average precision) or, of a data
    set without classes, the mean of recall@1, 5 and 10 both ways.

    Args:
        metrics: By `eval/<data set>/<task>/<metric>`.
    """
    by_data: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        _, data, metric = name.split("/", 2)
        by_data.setdefault(data, {})[metric] = value
    return {data: score(values) for data, values in by_data.items()}


def score(metrics: Mapping[str, float]) -> float:
    """That of one data set, by the names of its metrics such as `zero_shot/acc1`."""
    for name in ("zero_shot/acc1", "zero_shot/mean_average_precision"):
        if name in metrics:
            return metrics[name]
    return float(np.mean([metrics[name] for name in RECALLS]))


def best(points: Sequence[Point]) -> float | None:
    """The alpha of `RULE` among those of the sweep; None if nothing was measured."""
    usual = [point for point in points if point["alpha"] in ALPHAS]
    if not usual:
        return None
    return float(min(usual, key=lambda point: (-point["mean"], point["alpha"]))["alpha"])


def is_done(
    folder: Path, results: Mapping[str, Any], *, alpha: float | None, guards: Sequence[str]
) -> bool:
    """Whether the model of a finished run is that of this alpha; unset, of the best one by all
    these guards."""
    asked = {without_secrets(guard) for guard in guards}
    if not asked <= {*saved.read_config(folder).run.guard}:
        return False
    wanted = results.get("best_alpha") if alpha is None else alpha
    if wanted is None or results.get("alpha") != wanted:
        return False
    model = folder / saved.MODEL
    return model.is_file() and read_json(model).get("alpha") == wanted


def choose_weights(
    judge: Judge,
    writer: CheckpointWriter,
    start: Mapping[str, Tensor],
    *,
    step: int,
    asked_to_stop: Callable[[], bool],
) -> dict[str, Any] | None:
    """The phase of fine-tuning after training: a sweep over alpha, and the best weights as model.

    `wise_ft.json` holds the points of the sweep, and is written when it is complete. Then the
    chosen weights are written to the run folder itself. Collective.

    Args:
        judge: That of the run, whose model has the weights of its end.
        writer: Of its checkpoints; says where the run is, and what describes its model.
        start: The weights before the first step, on rank 0.
        step: The last one.
        asked_to_stop: Whether a signal asks any rank to stop. Collective.

    Returns:
        What `results.json`, which is written last, says of the choice: `alpha`, that of the plan's
        choices or the best by `RULE`, `best_alpha`, and `start_metrics`. None if a signal stopped
        the sweep.
    """
    model, plan = judge.model, judge.plan
    end = parallel.weights(model)
    assert plan.choices is not None
    asked = plan.choices.alpha

    def load(alpha: float) -> None:
        weights = interpolated(start, end, alpha) if rank() == 0 else {}
        parallel.load_weights(model, weights)

    known = rank0_first(lambda: known_points(judge, writer.run, step))  # hosts may have own folders
    points = sweep(judge, load, asked, known, asked_to_stop)
    if points is None:
        return None
    by_rule = best(points)
    chosen = by_rule if asked is None else asked
    assert chosen is not None
    start_metrics = {}
    if plan.config.run.evaluate:
        load(0.0)
        to, encoder = writer.run / START / "results", judge.keeping_encoder()
        start_metrics = judge("test", encoder=encoder, samples_to=to)
    load(chosen)
    record = {
        "rule": RULE,
        "steps": step,
        "alpha": chosen,
        "best_alpha": by_rule,
        "points": points,
        "data": digest_data(judge),
    }
    weights, _ = layers.merge_adapters(model, parallel.weights(model))
    raise_on_all_ranks(lambda: write(writer, weights, record))
    return {"alpha": chosen, "best_alpha": by_rule, "start_metrics": start_metrics}


def differences(
    folder: Path, start: Mapping[str, float], results: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """How much higher each metric of the chosen weights is than that of the start.

    Both were measured on the same samples, whose results are in the run folder. So a difference has
    an interval over them, as `protoclip compare` gives it.

    Returns:
        By metric the `mean`; its 95% `interval`, or None; and whether it is clear, `beyond`.
    """
    read, chosen = make_reader(refuse=False), results["metrics"]
    of_start, of_chosen = (
        {  # as of one seed
            0: RunResults(
                name="",
                seed=0,
                folder=str(part),
                metrics=metrics,
                samples=find_samples(part),
                trained_on=results.get("trained_on", {}),
            )
        }
        for metrics, part in ((start, folder / START), (chosen, folder))
    )
    made = {
        name: compare_metric(name, of_start, of_chosen, read)
        for name in chosen
        if name in start and math.isfinite(start[name]) and math.isfinite(chosen[name])
    }
    mark_clear(made.values())
    return {
        name: {key: of[key] for key in ("mean", "interval", "beyond")} for name, of in made.items()
    }


def sweep(
    judge: Judge,
    load: Callable[[float], None],
    alpha: float | None,
    known: Sequence[Point],
    asked_to_stop: Callable[[], bool],
) -> list[Point] | None:
    """Judge the model at each alpha but those of the `known` points.

    The features of the start are kept, since other runs may judge it by the same data, and those of
    the weights that are chosen, which are judged again when the run ends. `load` gives the model
    the weights at an alpha. Returns the points by rising alpha; None if a signal stopped it.
    """
    points = {point["alpha"]: point for point in known}
    if not judge.plan.held_out and not judge.plan.guards:
        return []
    wanted = {*ALPHAS, *points}
    if alpha is not None:
        wanted.add(alpha)
    missing = sorted(wanted - points.keys())
    if rank() == 0 and missing:
        say(announce(judge, len(missing)))
    progress = Progress(f"wise-ft {judge.plan.config.run.name}", len(missing))
    leader: Encoder | None = None  # has the features of the weights to choose, so far
    of_start = set[Path]()  # folders of features
    for done, each in enumerate(missing):
        if asked_to_stop():
            return None
        if rank() == 0:
            progress.update(done, f"alpha {each:g}")
        load(each)
        encoder = judge.keeping_encoder()
        points[each] = point_at(each, judge, encoder)
        if each == 0.0:
            of_start = {*encoder.folders.values()}
            continue
        to_choose = best([*points.values()]) if alpha is None else alpha
        outdone: Encoder | None = encoder
        if each == to_choose:
            leader, outdone = encoder, leader
        if outdone is not None:
            leading = set() if leader is None else {*leader.folders.values()}
            remove_features(outdone, keep=of_start | leading)
    if rank() == 0 and missing:
        progress.update(len(missing))
    return [points[each] for each in sorted(points)]


def announce(judge: Judge, number: int) -> str:
    """What a sweep over this number of weights is going to judge, in a line."""
    judging = [
        f"{data.name} ({len(split.images):,} images)" for data, split in judging_splits(judge)
    ]
    weights = f"{number} weights" if number > 1 else "one model"
    each = ", each" * (number > 1)
    return f"note: judging {weights} between start and end{each} on {', '.join(judging)}"


def judging_splits(judge: Judge) -> list[tuple[EvaluationData, Split]]:
    """The data sets that judge the weights, each with the split that does."""
    all_data = (*judge.plan.held_out[:1], *judge.plan.guards)
    return [
        (data, data.splits["validation" if "validation" in data.splits else "test"])
        for data in all_data
    ]


def point_at(alpha: float, judge: Judge, encoder: Encoder) -> Point:
    """The point of the sweep for the weights that the model has now. Collective."""
    metrics = judge("validation", quick=True, encoder=encoder, show=False)
    by_data = scores(metrics)
    mean = float(np.mean([*by_data.values()]))
    return {"alpha": alpha, "scores": by_data, "mean": mean, "metrics": metrics}


def known_points(judge: Judge, folder: Path, step: int) -> list[Point]:
    """The points of a complete sweep of this run, up to this step, by the data sets that it has."""
    record = read_record(folder) if (folder / FILE).is_file() else {}
    now = digest_data(judge)
    if record.get("steps") != step or record.get("data", now) != now:
        return []
    # Other guards would leave means of other data sets beside each other.
    return [point for point in record["points"] if point["scores"].keys() == now.keys()]


def digest_data(judge: Judge) -> dict[str, str]:
    """What judges the weights, by name: a digest of its images, captions, classes and prompts.

    That of squashed images is another one than of crops.
    """
    digests = {}
    squashed = ["squashed"] * judge.model.squashes
    for data, split in judging_splits(judge):
        texts = (split.captions, list(data.class_names), list(data.templates))
        facts = (split.images.key, *texts, *squashed)
        digests[data.name] = checksum(repr(facts).encode())
    return digests


def write(
    writer: CheckpointWriter, weights: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Write the chosen model, the sweep and its figure, on rank 0."""
    if rank() != 0:
        return
    folder = writer.run
    description = {**writer.description, "alpha": record["alpha"]}
    write_model(folder, weights, description, writer.text_files)
    # Those of another alpha; on a full disk they stay, with their model.
    (folder / "results.json").unlink(missing_ok=True)
    write_atomically(folder / FILE, to_json(sealed(record), indent=2) + "\n")
    draw(record, folder / FIGURE)


def read_record(folder: Path) -> dict[str, Any]:
    """What `wise_ft.json` in a run folder holds.

    Raises:
        ValueError: It is damaged or missing; names it.
    """
    try:
        return read_sealed(folder / FILE)
    except ValueError as error:
        raise ValueError(
            f"{error}; remove it and results.json beside it, and --resume auto makes both again"
        ) from error


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw the sweep, if there is one and matplotlib is there: the score of each data set over
    alpha, their mean, and the alpha that was chosen."""
    points, alpha = record["points"], record["alpha"]
    if not points:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        install = "pip install 'protoclip[figures]'"
        say(f"note: no {path.name}: it needs matplotlib; {install}")
        return
    alphas = [point["alpha"] for point in points]
    figure = Figure(figsize=(6.0, 4.0), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for data, colour in zip(points[0]["scores"], cycle(COLOURS), strict=False):
        values = [100 * point["scores"][data] for point in points]
        name = visible(data).replace("$", r"\$")  # matplotlib reads formulas between dollars
        axes.plot(alphas, values, color=colour, marker="o", markersize=3, label=name)
    means = [100 * point["mean"] for point in points]
    axes.plot(alphas, means, color="black", linestyle="--", label="mean")
    axes.axvline(alpha, color="#888888", linewidth=1, label=f"chosen: {alpha:g}")
    axes.set_xlabel("alpha: 0 is the start, 1 the end of fine-tuning")
    axes.set_ylabel("zero-shot accuracy or mean recall, percent")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def data_sets(points: Iterable[Point]) -> list[str]:
    """The data sets that judged the points."""
    return list(dict.fromkeys(name for point in points for name in point["scores"]))
