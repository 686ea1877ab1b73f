"""What happens beside the steps of a run: logging, saving, evaluating, showing progress."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import protoclip
from protoclip.config import Config
from protoclip.data.loader import SkipLog
from protoclip.data.pairs import Pairs, SampleStream
from protoclip.data.transforms import EvaluationTransform
from protoclip.distributed.collectives import (
    all_gather_object,
    any_rank,
    raise_on_all_ranks,
    rank,
    world_size,
)
from protoclip.distributed.parallel import load_weights
from protoclip.evaluation import datasets, suite
from protoclip.models import loading
from protoclip.models.loading import STATE, read_weights
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.towers import Tokenizer
from protoclip.progress import Progress
from protoclip.training import snapshot
from protoclip.training.health import Watch
from protoclip.training.logging import MetricsSink
from protoclip.training.run_folder import Interrupted, StopRequest
from protoclip.training.saver import Saver
from protoclip.training.stages import Stage
from protoclip.training.state import TrainState
from protoclip.training.trainer import Grouping, Trainer


class Session:
    """What one process does beside the steps of a run; the first alone writes and speaks."""

    def __init__(
        self,
        config: Config,
        *,
        folder: Path,
        model: ProtoCLIP,
        samples: Pairs | SampleStream,
        skips: SkipLog,
        arithmetic: Mapping[str, str],
    ) -> None:
        self.config, self.folder, self.model, self.skips = config, folder, model, skips
        # `run.device` and `run.precision`, decided: a run goes on with the same.
        self.arithmetic = arithmetic
        self.first = rank() == 0
        self.sink: MetricsSink | None = None
        self.watch = Watch()
        # The step with the best of `run.keep_best` so far, and its value.
        self.best: Sequence[Any] | None = None
        self.transform, self.tokenizer = (
            loading.evaluation_transform(model),
            loading.tokenizer(config.model),
        )
        # Other data is not judged by emoji.
        self.evaluates = config.run.evaluate and config.data.has_held_out_splits
        self.notes: list[str] = []
        if config.run.evaluate and not self.evaluates:
            self.notes.append(
                "this run ends without an evaluation, since data.train has no held-out split"
            )
        steps = config.episodes.count * (config.episodes.size // config.episodes.batch_size)
        self.progress = Progress(f"train {config.run.name}", steps)
        self.saver = Saver(
            folder,
            description={"protoclip": protoclip.__version__, "model": asdict(config.model)},
            every_steps=config.run.save_steps,
            every_minutes=config.run.save_minutes,
            keep=config.run.keep_checkpoints,
        )

    def run(
        self, trainer: Trainer, request: StopRequest, interrupted: Interrupted | None
    ) -> TrainState:
        """Train from the beginning or the interruption to the end or the request to stop."""
        self.trainer, self.request = trainer, request
        state, grouping, size = TrainState(), None, 0
        if interrupted is not None:
            state, grouping, size = self.restore(interrupted)
        self.sink = raise_on_all_ranks(
            lambda: self.open_sink(size, state.step) if self.first else None
        )
        self.progress.start()
        try:
            state = trainer.fit(state, grouping)
            raise_on_all_ranks(self.saver.insist)
            return state
        finally:
            self.saver.finish()
            if self.sink is not None:
                self.sink.close()

    def open_sink(self, size: int, step: int) -> MetricsSink:
        return MetricsSink(
            self.folder,
            size=size,
            step=step,
            wandb=self.config.run.wandb,
            name=self.folder.name,
            config=asdict(self.config),
        )

    def restore(self, interrupted: Interrupted) -> tuple[TrainState, Grouping | None, int]:
        """Where a run goes on, its prototypes, and the bytes of its metrics until then.

        Raises:
            ValueError: The checkpoint is not this run's.
        """
        folder, facts = interrupted.folder, interrupted.facts
        weights = raise_on_all_ranks(lambda: read_weights(folder, self.model) if self.first else {})
        load_weights(self.model, weights)
        try:
            state, grouping = snapshot.restore(
                self.trainer, interrupted.optimizer, interrupted.tensors, facts
            )
            for position in facts["position"]:
                self.trainer.restore_position(position)
            self.restore_skips(facts["skips"])
            self.best = facts["best"]
            size = int(facts["metrics_bytes"])
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{folder / STATE}: not what this version of protoclip writes ({error!r}); restore "
                f"it from a copy, or delete {folder} to go on from the checkpoint before"
            ) from error
        if self.first:
            print(f"going on from {folder}, step {state.step}", file=sys.stderr)
        return state, grouping, size

    def restore_skips(self, counts: list[list[int]]) -> None:
        """Each process's numbers of samples read and skipped; the first's sums if they changed."""
        if len(counts) == world_size():
            self.skips.read, self.skips.skipped = counts[rank()]
        elif self.first:
            self.skips.read, self.skips.skipped = map(sum, zip(*counts, strict=True))

    def log(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        if self.sink is None:
            return
        self.sink.write(step=state.step, episode=state.episode, metrics=metrics)
        for warning in self.watch.warnings(state.step, metrics):
            print(f"warning: {warning}", file=sys.stderr)

    def save(self, state: TrainState, grouping: Grouping | None) -> bool:
        """Save when it is time by the first process's clock; whether the run is to stop."""
        due = self.first and self.saver.due(state.step, episode_end=state.batch == 0)
        is_best = self.best is not None and self.best[0] == state.step
        lost = self.best is not None and self.best[0] == self.saver.failed_step
        stop, due, lost = any_rank([self.request.by is not None, due, lost])
        if lost:
            self.best = None
        due = due or (is_best and self.saver.saved_step != state.step)
        if stop:
            told = [by for by in all_gather_object(self.request.by) if by is not None]
            self.request.by = told[0]
        finished = state.episode == self.config.episodes.count
        if due or ((stop or finished) and self.saver.saved_step != state.step):
            contents = snapshot.take(self.trainer, state, grouping)
            position = all_gather_object(self.trainer.position(state))
            skips = all_gather_object([self.skips.read, self.skips.skipped])
            if self.sink is not None:
                contents.facts.update(
                    position=position,
                    skips=skips,
                    best=self.best,
                    arithmetic=dict(self.arithmetic),
                    metrics_bytes=self.sink.size,
                )
                best = self.best[0] if self.best is not None else None
                self.saver.save(state.step, contents, best=best)
            self.saver.saved_step = state.step
        return stop

    def evaluate(self, state: TrainState) -> Mapping[str, float]:
        every = self.config.run.evaluate_every
        if not every or state.episode % every:
            return {}
        found = evaluate(self.model, self.transform, self.tokenizer, split="validation", show=False)
        metric = self.config.run.keep_best
        if metric is not None and (self.best is None or found[metric] > self.best[1]):
            self.best = (state.step, found[metric])
        return found

    def on_step(self, state: TrainState, stage: Stage) -> None:
        if not self.first:
            return
        number = min(state.episode + 1, self.config.episodes.count)
        skipped = f", {self.skips.distinct} samples skipped" if self.skips.distinct else ""
        detail = f"episode {number}/{self.config.episodes.count}, {stage.name}{skipped}"
        self.progress.update(state.step, detail)

    def final_metrics(self) -> dict[str, float]:
        if not self.evaluates:
            return {}
        return evaluate(
            self.model,
            self.transform,
            self.tokenizer,
            split="test",
            samples_to=self.folder / "results",
        )


def evaluate(
    model: ProtoCLIP,
    transform: EvaluationTransform,
    tokenizer: Tokenizer,
    *,
    split: Literal["validation", "test"],
    show: bool = True,
    samples_to: Path | None = None,
) -> dict[str, float]:
    """All metrics on the bundled data's held-out concepts, with progress where asked.

    `samples_to` is a folder for what was found of each sample; one that cannot be written costs a
    warning.
    """
    data = datasets.emoji()
    shown: dict[str, Progress] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in shown:
            shown[stage] = Progress(f"evaluate: {stage}", total)
        shown[stage].update(done)

    metrics, samples = suite.evaluate_samples(
        model,
        transform,
        tokenizer,
        data,
        split=split,
        device=next(model.parameters()).device,
        progress=progress if show else None,
    )
    if samples_to is not None and rank() == 0:
        path = samples_to / f"{data.name}-{split}.parquet"
        try:
            samples.write(path)
        except OSError as error:
            print(f"warning: {path}: not written ({error})", file=sys.stderr)
    return metrics
