"""One training run from beginning to end: what `protoclip train` does.

The file reads in the order of a run: settings, data, model, teachers and trainer, the loop over
episodes, saving and going on, evaluation and results. Run folders are at the end.
"""

import difflib
import platform
import re
import signal
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import tomli_w
import torch
from filelock import FileLock, Timeout
from torch import Tensor

import protoclip
from protoclip import signals
from protoclip.config import (
    PERMISSIONS,
    START,
    Config,
    PrototypeConfig,
    TeacherConfig,
    check,
    shown,
)
from protoclip.data import loader as data_loader
from protoclip.data import sampler, sources
from protoclip.data.chosen import read_chosen
from protoclip.data.content import Facts, content, difference
from protoclip.data.loader import Pass, SkipLog
from protoclip.data.pairs import Pairs, SampleStream
from protoclip.data.sampler import EXTRACTION_STREAM, Episode
from protoclip.distributed import collectives
from protoclip.distributed.collectives import raise_on_all_ranks, rank, rank0_first, world_size
from protoclip.evaluation.compare import read_results
from protoclip.evaluation.datasets import EvaluationData
from protoclip.evaluation.suite import evaluate_run, metric_names
from protoclip.evaluation.validation import guards, judged
from protoclip.files import (
    SEAL,
    has_changed,
    read_json,
    read_toml,
    sealed,
    to_json,
    write_atomically,
)
from protoclip.losses.balance import Balance
from protoclip.losses.objective import LossWeights
from protoclip.losses.prototypical import make_targets
from protoclip.models import loading
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.saved import (
    MODEL,
    checkpoints,
    facts_of,
    model_json,
    read_checkpoint,
    remove_unfinished,
    understood,
)
from protoclip.models.start import resolve_start
from protoclip.paths import require_paths
from protoclip.progress import Progress
from protoclip.prototypes.features import ExtractedFeatures, QueuedFeatures
from protoclip.prototypes.kmeans import KMeans, kmeans
from protoclip.teachers import store
from protoclip.teachers.encode import embed_start
from protoclip.terminal import say, without_secrets
from protoclip.training import optim, sizes
from protoclip.training.checkpoint import CheckpointWriter, newest_intact
from protoclip.training.early_stop import EarlyStop
from protoclip.training.guard import Guard
from protoclip.training.logging import MetricsLog
from protoclip.training.precision import Autocast, autocast, grad_scaler, resolve
from protoclip.training.stages import stage_of
from protoclip.training.trainer import Trainer

# Settings that may change when a run goes on; all others decide which samples a step sees, or what
# is learned of them. These say what is kept and shown, and change no bit of any batch or weight.
FREE = (
    *("run.name", "run.out", "run.log_every", "run.save_steps", "run.save_minutes"),
    *("run.keep_checkpoints", "run.keep_best", "run.wandb", "run.evaluate", "run.evaluate_every"),
    *("run.guard", "data.workers", "data.cache", "data.cache_gb"),
    "data.max_bad_share",
)
# These change memory, time and rounding alone, so a run that lacks memory can go on with others.
ROUNDING = (
    *("run.device", "run.precision", "episodes.micro_batch_size", "parallel.strategy"),
    *("parallel.activation_checkpointing", "parallel.compile"),
)
# These say where data are, as `data.root` does. They may move, if what is there is the same.
MOVABLE = ("data.train", "data.sources", "data.validation", "data.only", "data.without")
# With `run.stop_by` these decide when the run ends.
STOPS = ("run.evaluate_every", "run.guard")


def train(config: Config, *, resume: Literal["never", "auto"] = "never") -> dict[str, Any]:
    """Train and evaluate a model, or go on with a run that was interrupted.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP stop the run after the step under way, with a checkpoint.

    With `resume="auto"` it goes on from the newest checkpoint if the run folder holds this run;
    otherwise it refuses a folder that exists.

    Returns:
        The content of `results.json` in the run folder: samples seen, wall clock, metrics. If a
        signal stopped the run: how many steps it made, and `stopped`, the name of the signal.

    Raises:
        ValueError: A setting, a file or the run folder is wrong. Nothing was written.
        OSError: The last checkpoint could not be written, for a minute.
    """
    notes = check(config)
    device = collectives.device(config.run.device)
    with collectives.process_group(device):
        before = folder_of(config) if resume == "auto" else None
        # One rank decides for all: each reading of the data may miss other samples.
        config, decided = rank0_first(lambda: resolved(config, before=before))
        return train_together(config, device, resume=resume == "auto", notes=notes + decided)


def resolved(config: Config, *, before: Path | None = None) -> tuple[Config, list[str]]:
    """The configuration with all that it leaves to the data and the model, and notes on these.

    Raises:
        ValueError: As `sizes.sized` and `optim.resolved` do, or the settings do not go together.
    """
    loading.check_parallel(config)
    config, notes = sizes.sized(config, before=before)
    check(config)
    config, decided = optim.resolved(config)
    return config, notes + decided


def folder_of(config: Config) -> Path:
    return Path(config.run.out or f"runs/{slug(config.run.name)}-{config.run.seed}")


@runtime_checkable
class Ending(Protocol):
    """What is done with a trained model before the results are written."""

    def is_done(self, folder: Path, results: Mapping[str, Any]) -> bool:
        """Whether the results in a run folder are already those of this ending."""

    def begin(self, run: "Run") -> None:
        """Look at the run before its first step, or its first one after an interruption."""

    def finish(self, run: "Run") -> None:
        """Change the trained model; sets `run.ending` to None unless a signal stops it."""


def train_together(
    config: Config,
    device: torch.device,
    *,
    resume: bool,
    notes: list[str],
    ending: Ending | None = None,
) -> dict[str, Any]:
    """`train` on each rank of a process group, or in the only process."""
    folder = folder_of(config)

    def look() -> tuple[bool, dict[str, Any] | None, bool]:
        begun, results, said = check_folder(folder, config, resume=resume)
        notes.extend(said)
        done = results is not None and (ending is None or ending.is_done(folder, results))
        if results is not None and not done and not checkpoints(folder):
            raise ValueError(
                f"{folder}: holds no checkpoint of its end any more; choose another folder with "
                "--run.out"
            )
        return begun, results, done

    begun, results, done = rank0_first(look)
    if results is not None and done:
        return results
    raise_on_all_ranks(lambda: require_paths(config))
    samples = raise_on_all_ranks(lambda: sources.pairs(config))
    samples, held_out, divided = raise_on_all_ranks(lambda: judged(config, samples))
    watched = raise_on_all_ranks(lambda: guards(config, held_out))
    raise_on_all_ranks(lambda: check_metrics(config, held_out, watched))
    model, said = loading.training_model(config, device)
    run = raise_on_all_ranks(
        lambda: Run(config, model, samples, held_out, guards=watched, folder=folder)
    )
    if ending is not None:
        run.ending = ending
        ending.begin(run)
    trains = loading.in_words(config.model, model, run.loader.tokenizer)
    notes = [trains, *notes, *divided, *said, *run.notes]
    count, size, batch = config.episodes.count, config.episodes.size, config.episodes.batch_size
    amount = f"{count:,} episodes of {size:,} pairs in batches of {batch:,}"
    if isinstance(samples, Pairs):
        passes = size * count / len(samples)
        amount = f"{len(samples):,} pairs: {amount}, {passes:.3g} passes over the data"
    with ExitStack() as stack:

        def claim() -> Path | None:
            folder.mkdir(parents=True, exist_ok=resume)
            try:
                stack.enter_context(FileLock(folder / ".lock", timeout=0))
            except Timeout:
                raise ValueError(
                    f"{folder}: another process is running in this folder; wait for it, or choose "
                    "another with --run.out"
                ) from None
            remove_unfinished(folder)
            if results is None:
                (folder / MODEL).unlink(missing_ok=True)  # of an ending that was cut short
            if results is not None:
                notes.clear()  # the run is known
            checkpoint = newest_intact(folder, notes) if begun else None
            if checkpoint is not None:
                run.check_arithmetic(checkpoint)
                run.check_chosen(checkpoint)
            run.check_content(checkpoint, samples)
            write_atomically(folder / "config.toml", to_toml(config))
            for note in notes:
                say(f"note: {note}")
            if results is None:
                say(f"training on {amount}")
            else:
                say(f"note: {folder}: is trained; only what follows training is done again")
            return checkpoint

        checkpoint = rank0_first(claim)
        run.prepare_teachers(samples)
        stack.enter_context(signals.handled(run.stop))
        # Dropout and the like draw from the global generator, so the seed sets it too.
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(config.run.seed + rank())
        kept = 0 if checkpoint is None else run.restore(checkpoint)
        raise_on_all_ranks(lambda: run.open_log(kept))
        try:
            run.train_episodes()
            raise_on_all_ranks(run.writer.finish)
            run.count_skipped_steps()
            if ending is not None and run.is_finished and not run.asked_to_stop():
                ending.finish(run)
            run.asked_to_stop()  # one that came since: the evaluation may take long
        finally:
            run.loader.close()
            run.writer.wait()
            if run.log is not None:
                run.log.close()
    return run.results()


class Run:
    """A run on one rank: its parts, the loop over episodes, saving, going on, and results.

    Making one writes nothing. Rank 0 alone has a `log`, writes checkpoints and shows progress.
    `model` is on its device, or sharded.
    """

    def __init__(
        self,
        config: Config,
        model: ProtoCLIP,
        samples: Pairs | SampleStream,
        held_out: Sequence[EvaluationData],
        *,
        guards: Sequence[EvaluationData] = (),
        folder: Path,
    ) -> None:
        self.config, self.folder, self.model, self.held_out = config, folder, model, held_out
        self.guards = guards
        self.log: MetricsLog | None = None
        self.stopped_by: str | None = None  # the signal that asks to stop after this step
        self.early_stop: EarlyStop | None = None
        if config.run.stop_by is not None:
            self.early_stop = EarlyStop(metric=config.run.stop_by, patience=config.run.patience)
        self.ending: Ending | None = None  # what is still to be done before the results
        self.more_results: dict[str, Any] = {}  # what it adds to them
        self.notes: list[str] = []
        for data in guards:
            self.notes += data.notes
        device, number = next(model.parameters()).device, f".{rank()}" if rank() else ""
        precision = resolve(config.run.precision, device)
        self.arithmetic = {"run.device": device.type, "run.precision": precision}
        if self.arithmetic == {"run.device": "cpu", "run.precision": "fp16"}:
            self.notes.append("run.precision: fp16 is slow on a CPU; auto is faster")
        chosen = read_chosen(config.data)
        self.chosen = {} if chosen is None else chosen.keys  # identifies lists of sample ids
        self.content: list[Facts] = []  # identifies the samples, on rank 0
        self.skips = SkipLog(
            folder / f"skipped{number}.jsonl",
            max_share=config.data.max_bad_share,
            at_least=config.episodes.size // world_size(),
        )
        self.episode = sampler.episodes(config, samples)
        self.loader = data_loader.loader(
            config,
            samples,
            tokenizer=loading.tokenizer(config.model),
            transform=loading.training_transform(model, config.data.augmentation),
            device=device,
            on_read=self.skips.add,
            after=self.pass_after,
        )
        teachers = config.external_teachers
        spaces: dict[str, PrototypeConfig | TeacherConfig] = {**teachers}
        spaces |= {"image": config.prototypes, "text": config.prototypes}
        sigmoid = config.loss.instance == "sigmoid"
        optimizer, scaler = optim.optimizer(config, model), grad_scaler(precision, device)
        self.start = loading.frozen_start(config, device) if config.uses_start else None
        weights = LossWeights(
            info_nce=0.0 if sigmoid else config.loss.info_nce,
            sigmoid=config.loss.info_nce if sigmoid else 0.0,
            prototypical=config.loss.prototypical,
            teachers={n: t.weight * config.loss.teacher for n, t in teachers.items()},
            keep=config.loss.keep,
            keep_by=config.loss.keep_by,
        )
        self.trainer = Trainer(
            model=model,
            stage=partial(stage_of, config),
            source=self.feature_source(samples, autocast(precision, device)),
            cluster=self.cluster,
            weights=weights,
            balance=Balance() if config.sets_strengths else None,
            start=self.start if config.loss.keep else None,
            make_targets=partial(
                make_targets,
                target_temperatures={
                    name: 0.0 if space.hard_targets else space.target_temperature
                    for name, space in spaces.items()
                },
                mask_empty=config.prototypes.mask_empty,
                back_translation=config.prototypes.back_translation,
            ),
            optimizer=optimizer,
            schedule=optim.schedule(config),
            scaler=scaler,
            guard=Guard(optimizer, scaler, folder / f"diverged{number}.json"),
            autocast=autocast(precision, device),
            clip_norm=config.optim.clip_norm,
            micro_batch_size=config.episodes.micro_batch_size,
        )
        known = self.trainer.source.teachers
        self.loader.features_of.update({name: each.rows for name, each in known.items()})
        start = resolve_start(config.model)
        self.writer = CheckpointWriter(
            folder,
            description=model_json(start.model, start.architecture.towers_json),
            text_files=loading.text_files(start, model, self.loader.tokenizer),
            every_steps=config.run.save_steps,
            every_minutes=config.run.save_minutes,
            keep=config.run.keep_checkpoints,
        )
        self.notes += [*sources.notes(samples), *self.loader.notes]
        part = config.episodes.micro_batch_size
        if part is not None and part >= self.loader.batch_size:
            why = f"since this rank's share of a batch is {self.loader.batch_size} pairs"
            self.notes.append(f"episodes.micro_batch_size: no effect, {why}")
        if config.run.evaluate and not held_out and not guards:
            self.notes.append("no evaluation at the end, since no pairs are held out")
        if world_size() > 1:
            self.notes.append(
                f"{world_size()} ranks, each with {self.loader.batch_size} pairs of every batch; "
                "learning rate, batch and episode are for all ranks together"
            )

    def feature_source(self, samples: Pairs | SampleStream, context: Autocast) -> ExtractedFeatures:
        """The features to cluster come from a pass over each episode, or from a queue."""
        config, transform = self.config, self.loader.transform
        teachers = store.teachers(config, samples, self.notes.append)
        evaluating = config.prototypes.extract_transform == "evaluation"
        if evaluating:
            transform = loading.evaluation_transform(self.model)
        over = partial(self.loader.pass_over, transform=transform, stream=EXTRACTION_STREAM)
        self.extraction_pass: Callable[[Episode], Pass] = over
        settings: dict[str, Any] = {
            "model": self.model,
            "batches": lambda episode: self.loader.batches_of(self.extraction_pass(episode)),
            "teachers": teachers,
            "autocast": context,
            "each_pair_once": isinstance(samples, Pairs) and evaluating,
        }
        if config.prototype_source == "queue":
            return QueuedFeatures(size=config.episodes.size, **settings)
        return ExtractedFeatures(**settings)

    def prepare_teachers(self, samples: Pairs | SampleStream) -> None:
        """Embed all captions by the frozen start, once a run, and whiten teachers. Collective."""
        teachers = self.trainer.source.teachers
        names = [n for n, t in self.config.external_teachers.items() if t.features == START]
        if names:
            assert self.start is not None
            assert isinstance(samples, Pairs)  # `store.teachers` refuses streams
            features = embed_start(
                self.start,
                self.loader.tokenizer,
                samples,
                self.folder / "start_features",
                autocast=self.trainer.autocast,
            )
            teachers.update({name: copy(features) for name in names})
            self.loader.features_of.update(dict.fromkeys(names, features.rows))
        store.whiten(self.config, teachers)

    def training_pass(self, index: int, start: int = 0) -> Pass:
        """The pass that trains on an episode; it brings features if they have prototypes then."""
        with_features = self.trainer.stage(index).needs_prototypes
        return self.loader.pass_over(self.episode(index), start, with_features=with_features)

    def pass_after(self, current: Pass) -> Pass | None:
        """The pass that will follow: over each episode to extract its features, then to train."""
        index, trainer = current.episode.index, self.trainer
        if current.stream == EXTRACTION_STREAM:
            return self.training_pass(index)
        if index + 1 == self.config.episodes.count:
            return None
        extracts = trainer.source.extracts_after(trainer.stage(index).projects)
        if extracts and trainer.stage(index + 1).needs_prototypes:
            return self.extraction_pass(self.episode(index + 1))
        return self.training_pass(index + 1)

    def cluster(self, space: str, rows: Tensor, positions: Tensor | None) -> KMeans:
        """K-means with the settings of a space."""
        settings, teacher = self.config.prototypes, self.config.external_teachers.get(space)
        number = settings.number if teacher is None else teacher.number
        # A teacher may know fewer samples of an episode than it has prototypes.
        known = collectives.all_reduce(torch.tensor(len(rows), device=rows.device))
        return kmeans(
            rows,
            min(number, int(known)),
            iterations=settings.iterations,
            restarts=settings.restarts,
            init=settings.init,
            seed=self.config.run.seed,
            positions=positions,
        )

    def train_episodes(self) -> None:
        """The episodes that remain (paper, "online episodic training"), until a signal stops it."""
        trainer, config = self.trainer, self.config
        if trainer.step == 0 and (self.guards or self.early_stop):
            self.judge()
        steps = config.episodes.count * (config.episodes.size // config.episodes.batch_size)
        progress, loss = Progress(f"train {config.run.name}", steps), ""
        for index in range(trainer.episode, config.episodes.count):
            if self.early_stop is not None and self.early_stop.is_due:
                return
            episode = self.episode(index)
            self.write(index, trainer.start_episode(episode))  # cluster, back-translate, freeze
            for batch in self.loader.batches_of(self.training_pass(index, trainer.batch)):
                number = trainer.step + 1
                detailed = number % config.run.log_every == 0 or number == steps
                metrics = trainer.train_step(batch, detailed=detailed)
                self.write(index, metrics)
                if detailed:
                    loss = f", loss {metrics['train/loss/total']:.4g}"
                if rank() == 0:
                    stage = trainer.stage(index).name
                    where = f"episode {index + 1}/{config.episodes.count}, {stage}"
                    progress.update(trainer.step, where + loss + self.skips.summary)
                if self.save_if_due():
                    return
            self.write(index, trainer.end_episode())
            if config.run.evaluate_every and trainer.episode % config.run.evaluate_every == 0:
                self.judge()
            if self.save_if_due():
                return

    def judge(self) -> None:
        """Evaluate on the way: which checkpoint is the best, and whether the run ends here."""
        step, keep_best, early_stop = self.trainer.step, self.config.run.keep_best, self.early_stop
        metrics = self.evaluate("validation", show=False)
        self.write(self.trainer.episode, metrics)
        if keep_best is not None and step > 0:  # before the first step there is no checkpoint
            self.writer.rate(step, metrics[keep_best])
        if early_stop is not None:
            early_stop.observe(step, metrics[early_stop.metric])
            if early_stop.is_due and rank() == 0:
                say(early_stop.reason)

    @property
    def is_finished(self) -> bool:
        """Whether all episodes are trained, or the last evaluation ended the run."""
        early = self.early_stop is not None and self.early_stop.is_due
        return early or self.trainer.episode == self.config.episodes.count

    def count_skipped_steps(self) -> None:
        """Say how many steps were skipped, if any.

        Raises:
            ValueError: The run is finished, and half of its steps or more were skipped, in fp16
                more than its loss scale may need to settle.
        """
        skipped, steps = self.trainer.guard.skipped, self.trainer.step
        said = f"{skipped:,} of {steps:,} steps were skipped: their loss or gradient was not finite"
        # In fp16 the loss scale starts at 2^16, and the steps that halve it are skipped.
        settling = 16 if self.trainer.scaler.is_enabled() else 0
        if self.is_finished and skipped > settling and 2 * skipped >= steps:
            raise ValueError(
                f"{said}; change optim.learning_rate, optim.heads_lr_scale, the weights of [loss] "
                "or prototypes.target_temperature (the last checkpoint is "
                f"{self.writer.folder(steps)})"
            )
        if skipped and rank() == 0:
            say(f"note: {said}")

    def open_log(self, size: int) -> None:
        """On rank 0, log metrics after the first `size` bytes of the file."""
        if rank() == 0:
            wandb, settings = self.config.run.wandb, tomllib.loads(to_toml(self.config))
            self.log = MetricsLog(
                self.folder, size=size, step=self.trainer.step, wandb=wandb, config=settings
            )

    def write(self, episode: int, metrics: Mapping[str, float]) -> None:
        if self.log is not None:
            self.log.write(self.trainer.step, episode, metrics)

    def evaluate(
        self, split: Literal["validation", "test"], *, quick: bool = False, **more: Any
    ) -> dict[str, float]:
        """Metrics on what is held out, and on each guard: on the split, if they have it.

        Held-out pairs but the emoji have no test split, and not all guards have a validation split.
        `quick` is for a comparison of models: zero-shot and retrieval, and of a mixture all sources
        together.
        """
        transform = loading.evaluation_transform(self.model)
        tokenizer = loading.tokenizer(self.config.model)
        metrics: dict[str, float] = {}
        more["workers"] = self.loader.workers

        def measure(
            data: EvaluationData, split: Literal["validation", "test"], *, quick: bool
        ) -> dict[str, float]:
            model = self.model
            return evaluate_run(
                model, transform, tokenizer, data=data, split=split, quick=quick, **more
            )

        for data in self.held_out[:1] if quick else self.held_out:
            own = split if split in data.splits else "validation"
            metrics |= measure(data, own, quick=quick)
        for data in self.guards:
            metrics |= measure(data, split if split in data.splits else "test", quick=True)
        return metrics

    def stop(self, by: signal.Signals) -> None:
        """Stop after the step under way. Launchers send a signal twice; the first one counts."""
        self.stopped_by = self.stopped_by or by.name

    def asked_to_stop(self) -> bool:
        """Whether a signal asks any rank to stop. Collective."""
        (stop,) = collectives.any_rank([self.stopped_by is not None])
        if stop:
            self.stopped_by = next(filter(None, collectives.all_gather_object(self.stopped_by)))
        return stop

    def save_if_due(self) -> bool:
        """Save if it is time by rank 0's clock or the run ends; returns whether to stop."""
        trainer, writer = self.trainer, self.writer
        finished = self.is_finished
        due = rank() == 0 and writer.due(trainer.step, episode_end=trainer.batch == 0)
        unsaved = rank() == 0 and writer.saved_step != trainer.step
        stop, due, unsaved = collectives.any_rank([self.stopped_by is not None, due, unsaved])
        if stop:
            self.stopped_by = next(filter(None, collectives.all_gather_object(self.stopped_by)))
        if due or (unsaved and (stop or finished)):
            self.save()
        return stop

    def save(self) -> None:
        """Gather the state of all ranks; rank 0 starts to write it."""
        trainer, size = self.trainer, self.config.episodes.size
        position = self.loader.state_dict(trainer.episode, trainer.batch, size)
        state = {
            **trainer.state_dict(),
            "loader": collectives.all_gather_object(position),
            "skips": collectives.all_gather_object([self.skips.read, self.skips.skipped]),
            "arithmetic": self.arithmetic,
            "chosen": self.chosen,
            "content": {"sources": self.content},
            "best": self.writer.best,
            "best_by": self.config.run.keep_best,
            "early_stop": self.early_stop and self.early_stop.state_dict(),
        }

        def write() -> None:
            """The one before may still be on its way to a slow disk."""
            if self.log is not None:
                self.writer.save(trainer.step, {**state, "metrics_bytes": self.log.size})

        raise_on_all_ranks(write)

    def check_arithmetic(self, checkpoint: Path) -> None:
        """Refuse another device or precision, which would round differently, unless it is named."""
        for setting, before in facts_of(checkpoint, "arithmetic").items():
            named = flat(asdict(self.config))[setting] != "auto"
            if not named and before != self.arithmetic.get(setting, before):
                raise ValueError(
                    f"{setting}: this run was computed with {before}, and here it would be "
                    f"{self.arithmetic[setting]}; go on on a machine like the first, or name it "
                    f"(--{setting} {self.arithmetic[setting]}) to go on with other rounding"
                )

    def check_chosen(self, checkpoint: Path) -> None:
        """Refuse to go on with other lists of sample ids, which would mean other data."""
        before = facts_of(checkpoint, "chosen")
        for setting, key in self.chosen.items():
            if before.get(setting) != key:
                path = getattr(self.config.data, setting.removeprefix("data."))
                raise ValueError(
                    f"{setting}: the ids in {path} have changed since the run began; restore them, "
                    "or choose another folder with --run.out"
                )

    def check_content(self, checkpoint: Path | None, samples: Pairs | SampleStream) -> None:
        """Learn what the data hold, and refuse to go on with others than the run began with."""
        self.content = content(samples)
        before = facts_of(checkpoint, "content").get("sources") if checkpoint else None
        if before and (differs := difference(before, self.content)):
            raise ValueError(
                f"{samples.name}: not the data that the run began with ({differs}), so what judges "
                "it may have been trained on; restore them, or choose another folder with --run.out"
            )

    def restore(self, checkpoint: Path) -> int:
        """Go on from a checkpoint; returns the bytes of the metrics that were logged until then.

        Raises:
            ValueError: The checkpoint does not fit this version or this run.
        """
        state = raise_on_all_ranks(lambda: read_checkpoint(checkpoint, self.model))
        with understood(checkpoint):
            size = self.load_state_dict(state)
        # Not written again: a process that is killed meanwhile would leave neither.
        self.writer.saved_step = self.trainer.step
        if rank() == 0:
            say(f"going on from {checkpoint}, step {self.trainer.step}")
        return size

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """Load what `save` saved; returns the bytes of the metrics that were logged until then."""
        config = self.config
        self.trainer.load_state_dict(state)
        for position in state["loader"]:
            self.loader.load_state_dict(position)
        counts = [(int(read), int(skipped)) for read, skipped in state["skips"]]
        if len(counts) == world_size():
            self.skips.read, self.skips.skipped = counts[rank()]
        elif rank() == 0:  # the number of ranks changed
            self.skips.read, self.skips.skipped = map(sum, zip(*counts, strict=True))
        if state["best"] and state.get("best_by", config.run.keep_best) == config.run.keep_best:
            step, value = state["best"]
            self.writer.best = int(step), float(value)
        if self.early_stop is not None:
            self.early_stop.load_state_dict(state["early_stop"])
        return int(state["metrics_bytes"])

    def results(self) -> dict[str, Any]:
        """Evaluate, write and return the results; or where a run stands that a signal stopped."""
        config, trainer, best = self.config, self.trainer, self.writer.best
        results = {"name": config.run.name, "folder": str(self.folder), "steps": trainer.step}
        if self.stopped_by is not None:
            return {**results, "stopped": self.stopped_by, "metrics": {}}
        results |= {
            "seed": config.run.seed,
            "samples_seen": trainer.samples_seen,
            "samples_skipped": sum(collectives.all_gather_object(len(self.skips.known))),
            "shards_broken": sum(collectives.all_gather_object(len(self.skips.broken))),
            "train_seconds": round(trainer.seconds, 2),
            "precision": self.arithmetic["run.precision"],
            "environment": environment(self.loader.device),
            "metrics": {},
        }
        if config.run.evaluate:
            results["metrics"] = self.evaluate("test", samples_to=self.folder / "results")
        results |= self.more_results
        if self.early_stop is not None and self.early_stop.is_due:
            facts = self.early_stop.state_dict()
            results["early_stop"] = {**facts, "reason": self.early_stop.reason}
        if best is not None and self.writer.folder(best[0]).is_dir():
            results["best_checkpoint"] = f"checkpoints/step-{best[0]:09}"
        if rank() == 0:
            content = to_json(sealed(results), indent=2)
            write_atomically(self.folder / "results.json", content + "\n")
        return results


def check_metrics(
    config: Config, held_out: Sequence[EvaluationData], guards: Sequence[EvaluationData]
) -> None:
    """Refuse the name of a metric that no evaluation of this run gives."""
    known = [name for data in held_out for name in metric_names(data)]
    for data in guards:
        split = "validation" if "validation" in data.splits else "test"
        known += metric_names(data, split, quick=True)
    for setting in ("keep_best", "stop_by"):
        metric = getattr(config.run, setting)
        if metric is not None and metric not in known:
            close = ", ".join(difflib.get_close_matches(metric, known, n=3, cutoff=0.0)) or "none"
            raise ValueError(f"run.{setting}: no metric {metric!r}; the closest are {close}")


def environment(device: torch.device) -> dict[str, str]:
    """Hardware and versions, without which a number means little."""
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "protoclip": protoclip.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
    }


def check_folder(
    folder: Path, config: Config, *, resume: bool
) -> tuple[bool, dict[str, Any] | None, list[str]]:
    """Whether a folder holds a run that was begun, its results if it is finished, and notes."""
    begun = (folder / "config.toml").is_file()
    # A run that was killed at its very start leaves hidden files at most.
    empty = folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())
    if folder.exists() and not (resume and (begun or empty)):
        way = ", or go on with --resume auto" if begun else ""
        raise ValueError(f"{folder}: run folder exists; choose another with --run.out{way}")
    path = folder / "results.json"
    finished, notes = begun and path.is_file(), list[str]()
    if begun:
        notes = check_settings(folder, to_toml(config), finished=finished)
    if not finished:
        return begun, None, notes
    read_results(folder)  # or they are damaged
    results = read_json(path)
    if has_changed(results):  # people may edit it
        say(f"warning: {path}: not what the run wrote: its checksum differs")
    results = {key: value for key, value in results.items() if key != SEAL}
    return begun, {**results, "folder": str(folder)}, notes


def check_settings(folder: Path, config: str, *, finished: bool = False) -> list[str]:
    """Refuse to go on with settings that would make another run; returns notes on the others.

    Raises:
        ValueError: `config.toml` is damaged, or a setting differs that may not; see `FREE`.
    """
    # What earlier versions did, without a setting for it.
    known: dict[str, Any] = {"loss.instance": "info_nce", "loss.strengths": "constant"}
    try:
        saved = flat(as_kept(read_toml(folder / "config.toml")))
        for name in ("teachers", "data.sources"):
            tables = saved.get(name, [])
            if not (isinstance(tables, list) and all(isinstance(each, dict) for each in tables)):
                raise ValueError(f"{folder / 'config.toml'}: damaged ({name} holds no tables)")
    except ValueError as error:
        raise ValueError(
            f"{error}; restore it from a copy, or choose another folder with --run.out"
        ) from error
    if "teacher.features" in saved:
        known["teacher.whiten"] = 0
    for teacher in saved.get("teachers", []):
        teacher.setdefault("whiten", 0)
    before = known | saved
    before = {**flat(tomllib.loads(to_toml(Config()))), **before}  # some settings are newer
    if "model.checkpoint" in before:  # what version 0.2 called it
        before["model.start"] = before.pop("model.checkpoint")
    now = flat(tomllib.loads(config))
    differ = {
        key: f"{key} ({told(before, key)} before, {told(now, key)} now)"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }
    stops = STOPS if before.get("run.stop_by") or now.get("run.stop_by") else ()
    free = {*FREE, *ROUNDING} - {*stops}
    if not finished:  # of a finished run nobody opens the data to compare
        free |= {"data.root"}
        free |= {key for key in MOVABLE if unplaced(before.get(key)) == unplaced(now.get(key))}
    if refused := [text for key, text in differ.items() if key not in free]:
        raise ValueError(
            f"{folder}: the run was started with other settings: {', '.join(refused)}; "
            "restore them, or choose another folder with --run.out"
        )
    noted = {key: text for key, text in differ.items() if key in ROUNDING}
    parts = {"episodes.micro_batch_size", "parallel.strategy"} & noted.keys()
    also = ", and of BatchNorm the statistics" if parts else ""
    told_of = ", ".join(noted.values())
    return [f"going on with {told_of}: batches stay, rounding changes{also}"] if noted else []


def unplaced(value: Any) -> Any:
    """A setting without the places that it names, which may move; a share is no place."""
    if isinstance(value, list):
        return [{k: v for k, v in source.items() if k not in ("path", "root")} for source in value]
    return "" if isinstance(value, str) and value != "emoji" else value


def told(settings: Mapping[str, Any], key: str) -> str:
    """A setting as a recipe holds it; texts without quotes."""
    value = settings.get(key, "unset")
    return value if isinstance(value, str) else shown(value)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested settings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def slug(name: str) -> str:
    """A run's name as a folder name: `ProtoCLIP + teacher` is `protoclip-teacher`."""
    return "-".join(re.findall(r"[a-z0-9._]+", name.lower())) or "run"


def to_toml(config: Config) -> str:
    """The configuration as TOML, without what is unset, permissions, and secrets in URLs.

    A run that goes on reads the URLs that it is given then.
    """
    tree = asdict(config, dict_factory=lambda items: {k: v for k, v in items if v is not None})
    for permission in PERMISSIONS:
        del tree["data"][permission]
    return without_secrets(tomli_w.dumps(tree))


def as_kept(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run folder, of which earlier versions kept secrets in URLs, without these."""
    return tomllib.loads(without_secrets(tomli_w.dumps(tree)))
