"""How a run is evaluated: on its way, at its end, and between its start and its end (WiSE-FT)."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from protoclip.config import Config
from protoclip.data.access import cache_folder
from protoclip.distributed import parallel
from protoclip.distributed.collectives import rank, rank0_first
from protoclip.encode.features import Encoder
from protoclip.encode.rows import features_folder
from protoclip.evaluation.datasets import EvaluationData
from protoclip.evaluation.datasets import Split as SplitData
from protoclip.evaluation.metrics import RECALLS, mark_clear
from protoclip.evaluation.paired import RunResults, compare_metric, find_samples, read_samples
from protoclip.evaluation.suite import evaluate_run
from protoclip.files import checksum, read_json, read_sealed, seal, to_json, write_atomically
from protoclip.models import checkpoint, layers
from protoclip.models.opening import Tokenizer
from protoclip.models.protoclip import ProtoCLIP, autocast, evaluation_transform, resolve_encoding
from protoclip.progress import Progress
from protoclip.terminal import say, without_secrets
from protoclip.training.folder import CheckpointWriter
from protoclip.training.plan import Plan
from protoclip.training.presets import Choices

Split = Literal["validation", "test"]
FILE = "wise_ft.json"
PATIENCE = 3  # evaluations without a better value that end a run
START = "start"  # folder in the run's with `results` by sample of the start
ALPHAS = tuple(tenth / 10 for tenth in range(11))
RULE = (
    "the best alpha has the largest mean over data sets of zero-shot accuracy, or of mean recall "
    "where a data set has no classes; of equal ones it is the smallest"
)
# LoRA adds the product of two matrices. Only the second one, which starts at 0, moves along the
# line, so that the product does.
FIXED = ".lora_A."

Point = dict[str, Any]  # `alpha`, `scores` by data set, their `mean`, and all `metrics`


class RunEvaluator:
    """Measures a model on the validation set of a run, and on each guard.

    The encoders of a run that `aligns` encode what is measured but once.

    Attributes:
        encoder: Of the model as it is whenever it is measured.
    """

    def __init__(
        self, plan: Plan, model: ProtoCLIP, *, tokenizer: Tokenizer, workers: int, aligns: bool
    ) -> None:
        self.plan, self.model = plan, model
        most, config = Encoder.batch_size, plan.config
        device = next(model.parameters()).device
        # On a CPU a model is measured in fp32, in whatever precision it trains.
        precision = config.run.precision if device.type == "cuda" else "fp32"
        # Sharded, compiled or with adapters a model rounds other than when its run is opened.
        is_plain = config.model.lora is None and not config.parallel.compile
        self._keeps = not aligns and is_plain and not parallel.is_sharded(model)
        self.encoder = Encoder(
            model=model,
            transform=evaluation_transform(model),
            tokenizer=tokenizer,
            batch_size=min(most, config.episodes.micro_batch_size or most),
            workers=workers,
            autocast=autocast(resolve_encoding(precision, device), device),
            engine=config.encode.engine if aligns else "auto",
            whole=not (aligns or self._keeps),
            cache=features_folder(config) if aligns else None,
        )

    def make_keeping_encoder(self, *, show: bool = True) -> Encoder:
        """The encoder of the model as it is now; what opens these weights finds its features."""
        if not self._keeps:
            return replace(self.encoder, show=show)
        encoder = replace(self.encoder, cache=cache_folder() / "features", show=show)
        _ = encoder.folders  # by the weights that the model has now
        return encoder

    def evaluate(
        self, split: Split, *, quick: bool = False, encoder: Encoder | None = None, **more: Any
    ) -> dict[str, float]:
        """Metrics on the split, of the data that have it; else on the other one.

        A `quick` evaluation compares models: zero-shot and retrieval alone, and all sources of a
        mixture together. Weights that are measured again have a `make_keeping_encoder`.
        """
        encoder, metrics = encoder or self.encoder, dict[str, float]()
        for data in self.plan.held_out[:1] if quick else self.plan.held_out:
            there: Split = split if split in data.splits else "validation"
            metrics |= evaluate_run(encoder, data=data, split=there, quick=quick, **more)
        for data in self.plan.guards:
            there = split if split in data.splits else "test"
            metrics |= evaluate_run(encoder, data=data, split=there, quick=True, **more)
        return metrics

    def list_splits(self) -> list[tuple[EvaluationData, SplitData]]:
        """The data sets that choose weights, each with the split that does."""
        return [
            (data, data.splits["validation" if "validation" in data.splits else "test"])
            for data in (*self.plan.held_out[:1], *self.plan.guards)
        ]

    def digest_data(self) -> dict[str, str]:
        """By data set that chooses weights, a digest of images, captions, classes and prompts."""
        digests, squashed = dict[str, str](), ["squashed"] * self.model.squashes
        for data, split in self.list_splits():
            texts = (split.captions, list(data.class_names), list(data.templates))
            digests[data.name] = checksum(repr((split.images.key, *texts, *squashed)).encode())
        return digests


@dataclass(kw_only=True)
class EarlyStop:
    """Decides after each evaluation whether the run ends there.

    Of the `metric` higher is better. `waited` evaluations came since the best one.
    """

    metric: str
    best: float | None = None
    best_step: int = 0
    step: int = 0
    waited: int = 0

    def observe(self, step: int, value: float) -> None:
        """Count an evaluation after this step."""
        self.step = step
        if math.isfinite(value) and (self.best is None or value > self.best):
            self.best, self.best_step, self.waited = value, step, 0
        elif step > 0:  # the start has no evaluation before it
            self.waited += 1

    @property
    def is_due(self) -> bool:
        return self.waited >= PATIENCE

    @property
    def reason(self) -> str:
        best = "it was never finite"
        if self.best is not None:
            best = f"its best value is {self.best:.4f}, of step {self.best_step}"
        return (
            f"stopped early after step {self.step}: no better {self.metric} in {self.waited} "
            f"evaluations; {best}"
        )


# WiSE-FT (arXiv 2109.01903). Fine-tuning gains on its own data and loses on others. The weights on
# the line between both ends often keep most of the gain at little of the loss.


def choose_weights(
    evaluator: RunEvaluator,
    writer: CheckpointWriter,
    start: Mapping[str, Tensor],
    *,
    step: int,
    asked_to_stop: Callable[[], bool],
) -> dict[str, Any] | None:
    """The phase of fine-tuning after training: a sweep over alpha, and the best weights as model.

    Writes `wise_ft.json` with the points of the complete sweep, then the chosen weights to the run
    folder. Collective. `start` holds the weights before the first step, on rank 0; the model has
    those after `step` steps.

    Returns `alpha` (the plan's, or the best by `RULE`), `best_alpha` and `start_metrics`, for
    `results.json`; None if a signal stopped the sweep.
    """
    model, plan, folder = evaluator.model, evaluator.plan, writer.run
    end = parallel.gather_weights(model)
    assert plan.choices is not None
    asked = plan.choices.alpha

    def load(alpha: float) -> None:
        parallel.load_weights(model, interpolate(start, end, alpha) if rank() == 0 else {})

    # Hosts may have folders of their own.
    points = rank0_first(lambda: read_points(evaluator, folder, step))
    splits = evaluator.list_splits()
    wanted = {*ALPHAS, *points, *([] if asked is None else [asked])} if splits else set[float]()
    missing, encoders = sorted(wanted - points.keys()), dict[float, Encoder]()
    progress = Progress(f"wise-ft {plan.config.run.name}", len(missing))
    if rank() == 0 and missing:
        weights = f"{len(missing)} weights" if len(missing) > 1 else "one model"
        on_each = ", each" * (len(missing) > 1)
        names = ", ".join(f"{data.name} ({len(split.images):,} images)" for data, split in splits)
        say(f"note: evaluating {weights} between start and end{on_each} on {names}")
    for done, alpha in enumerate(missing):
        if asked_to_stop():
            return None
        if rank() == 0:
            progress.update(done, f"alpha {alpha:g}")
        load(alpha)
        encoder = encoders[alpha] = evaluator.make_keeping_encoder(show=False)
        metrics = evaluator.evaluate("validation", quick=True, encoder=encoder)
        scores = score_data(metrics)
        mean = float(np.mean([*scores.values()]))
        points[alpha] = {"alpha": alpha, "scores": scores, "mean": mean, "metrics": metrics}
    if rank() == 0 and missing:
        progress.update(len(missing))
    best = find_best([*points.values()])
    chosen = best if asked is None else asked
    assert chosen is not None
    # Other runs may measure the start by the same data, and the chosen weights are measured again.
    # Models may share a tower.
    folders = {alpha: {*encoder.folders.values()} for alpha, encoder in encoders.items()}
    stays = set[Path]().union(*(folders[alpha] for alpha in {0.0, chosen} & {*folders}))
    gone = set[Path]().union(*folders.values()) - stays
    for store in gone if rank() == 0 else ():
        shutil.rmtree(store, ignore_errors=True)
    start_metrics = {}
    if plan.config.run.evaluate:
        load(0.0)
        start_metrics = evaluator.evaluate(
            "test", encoder=evaluator.make_keeping_encoder(), samples_to=folder / START / "results"
        )
    load(chosen)
    merged, _ = layers.merge_adapters(model, parallel.gather_weights(model))
    record = {
        "rule": RULE,
        "steps": step,
        "alpha": chosen,
        "best_alpha": best,
        "points": [points[alpha] for alpha in sorted(points)],
        "data": evaluator.digest_data(),
    }

    def write() -> None:
        description = {**writer.description, "alpha": chosen}
        checkpoint.write_model(folder, merged, description, writer.text_files)
        # Those of another alpha; on a full disk they stay, with their model.
        (folder / "results.json").unlink(missing_ok=True)
        write_atomically(folder / FILE, to_json(seal(record), indent=2) + "\n")

    rank0_first(write)
    return {"alpha": chosen, "best_alpha": best, "start_metrics": start_metrics}


def interpolate(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Weights `(1 - alpha) start + alpha end` of two state dicts on the CPU.

    It is exactly `start` at 0 and `end` at 1. Between them whole numbers are those of `end`.
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


def score_data(metrics: Mapping[str, float]) -> dict[str, float]:
    """What the rule looks at, by data set, from metrics by `eval/<data set>/<task>/<metric>`.

    Zero-shot accuracy (mean average precision of images with several classes) or, without classes,
    the mean of recall@1, 5 and 10 both ways.
    """
    scores = dict[str, float]()
    for data in dict.fromkeys(name.split("/")[1] for name in metrics):
        classes = [
            metrics[f"eval/{data}/zero_shot/{name}"]
            for name in ("acc1", "mean_average_precision")
            if f"eval/{data}/zero_shot/{name}" in metrics
        ]
        recalls = [metrics[f"eval/{data}/{name}"] for name in RECALLS] if not classes else []
        scores[data] = classes[0] if classes else float(np.mean(recalls))
    return scores


def find_best(points: Sequence[Point]) -> float | None:
    """The alpha of `RULE` among those of the sweep; None if nothing was measured."""
    usual = [point for point in points if point["alpha"] in ALPHAS]
    best = min(usual, key=lambda point: (-point["mean"], point["alpha"]), default=None)
    return None if best is None else float(best["alpha"])


def is_done(folder: Path, results: Mapping[str, Any], config: Config, choices: Choices) -> bool:
    """Whether a finished run was evaluated as it is asked for now, by these guards too, and its
    model is that of the alpha of `choices`, or the best one."""
    was = checkpoint.read_config(folder).run
    if config.run.evaluate and not was.evaluate:
        return False
    chooses = choices.command == "finetune" and config.run.overfit is None
    has_guards = {*map(without_secrets, config.run.guard)} <= {*was.guard}
    if not has_guards and (config.run.evaluate or chooses):
        return False
    if not chooses:
        return True
    wanted = results.get("best_alpha") if choices.alpha is None else choices.alpha
    model = folder / checkpoint.MODEL
    if wanted is None or results.get("alpha") != wanted or not model.is_file():
        return False
    return bool(read_json(model).get("alpha") == wanted)


def read_points(evaluator: RunEvaluator, folder: Path, step: int) -> dict[float, Point]:
    """By alpha, the points of a complete sweep up to this step by the same data sets."""
    record = read_sealed(folder / FILE) if (folder / FILE).is_file() else {}
    now = evaluator.digest_data()
    if record.get("steps") != step or record.get("data", now) != now:  # 1.0.0 wrote no data
        return {}
    points = [point for point in record["points"] if point["scores"].keys() == now.keys()]
    return {point["alpha"]: point for point in points}


def measure_differences(
    folder: Path, start: Mapping[str, float], results: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """How much higher each metric of the chosen weights is than that of the start: the `mean`, its
    95% `interval` over samples or None, and whether it is clear, `beyond`."""
    reader, chosen = cache(read_samples), results["metrics"]
    before, after = (
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
    differences = {
        name: compare_metric(name, before, after, reader)
        for name in chosen
        if name in start and math.isfinite(start[name]) and math.isfinite(chosen[name])
    }
    mark_clear(differences.values())
    return {
        name: {key: difference[key] for key in ("mean", "interval", "beyond")}
        for name, difference in differences.items()
    }
