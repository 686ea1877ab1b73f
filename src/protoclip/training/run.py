"""One training run from its settings to its results: `train`, `align` and `finetune`.

The file reads in the order of a run: plan, model, trainer, the loop over episodes, saving and going
on, evaluation and results.
"""

import signal
import tomllib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from protoclip import signals
from protoclip.config import ENCODERS, START, Config, Settings
from protoclip.data import loader as data_loader
from protoclip.data import sampler
from protoclip.data.access import cache_folder
from protoclip.data.captions import KEYS
from protoclip.data.loader import EpisodeLoader, Pass, SkipLog
from protoclip.data.pairs import Facts, Pairs
from protoclip.data.sampler import EXTRACTION_STREAM, Episode
from protoclip.data.split import read_chosen
from protoclip.data.transforms import clip_transform, light_transform
from protoclip.distributed import collectives, parallel
from protoclip.distributed.collectives import raise_on_all_ranks, rank, rank0_first, world_size
from protoclip.encode.rows import PairRows, RowLoader, side_teachers
from protoclip.encode.teachers import TeacherFeatures, embed_start
from protoclip.files import seal, to_json, write_atomically
from protoclip.losses.balance import Balance
from protoclip.losses.objective import loss_weights
from protoclip.models import loading
from protoclip.models.checkpoint import MODEL, SETTINGS, checkpoints, read_checkpoint
from protoclip.models.projections import AlignedModel, require_same_encoders
from protoclip.models.protoclip import (
    Precision,
    ProtoCLIP,
    autocast,
    evaluation_transform,
    grad_scaler,
    image_input,
    measure_convolutions,
    resolve_precision,
)
from protoclip.progress import Progress
from protoclip.prototypes.features import ExtractedFeatures, QueuedFeatures
from protoclip.terminal import say
from protoclip.training import evaluate, optim, watch
from protoclip.training import folder as run_folder
from protoclip.training.evaluate import EarlyStop, RunEvaluator
from protoclip.training.log import MetricsLog
from protoclip.training.plan import (
    Outline,
    Plan,
    encode_pairs,
    list_contents,
    make_plan,
    resolve_settings,
)
from protoclip.training.presets import Command, choose_before_data, read_given
from protoclip.training.trainer import EpisodePrototypes, Trainer
from protoclip.training.watch import Watch


def train(config: Settings, *, resume: Literal["never", "auto"] = "never") -> dict[str, Any]:
    """Train and evaluate a model, or go on with a run that was interrupted.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP stop the run after the step under way, with a checkpoint.

    Args:
        config: The settings, as a `Config` or as a recipe holds them.
        resume: With `auto` it goes on from the newest checkpoint if the run folder holds this run;
            otherwise it refuses a folder that exists.

    Returns:
        The content of `results.json` in the run folder: samples seen, wall clock, metrics. If a
        signal stopped the run: how many steps it made, and `stopped`, the name of the signal.

    Raises:
        ValueError: A setting, a file or the run folder is wrong, or training cannot go on.
        OSError: The last checkpoint could not be written, for a minute.
    """
    return perform_run("train", config, resume=resume == "auto")


def align(settings: Settings, *, resume: Literal["never", "auto"] = "never") -> dict[str, Any]:
    """Train the heads between a frozen image encoder and a frozen text encoder.

    Args:
        settings: Those of `Config` as a recipe holds them, such as `{"model": {"image": {"name":
            "timm:vit_small_patch14_dinov2.lvd142m"}, "text": {"name": "minilm"}}, "data":
            {"train": "pairs.tsv"}}`. Others get the values that suit aligning; see `presets.py`.
            Those of a `Config` that are at their default count as not given.
        resume: As for `train`, and so are what it returns and raises.
    """
    return perform_run("align", settings, resume=resume == "auto")


def finetune(
    settings: Settings, *, alpha: float | None = None, resume: Literal["never", "auto"] = "never"
) -> dict[str, Any]:
    """Adapt a model to pairs, and choose weights between it and the end by WiSE-FT.

    Args:
        settings: Those of `Config` as a recipe holds them, such as `{"model": {"start":
            "runs/small"}, "data": {"train": "pairs.tsv"}}`. Others get the values that suit
            fine-tuning; see `presets.py`. Those of a `Config` at their default are not given.
        alpha: The weights to choose, from 0 (the start) to 1 (the end); unset, the best ones by the
            rule of `evaluate.RULE`.
        resume: As for `train`. On a finished run another `alpha` costs no training.

    Returns:
        As `train`, with metrics of the chosen weights, `alpha`, `best_alpha` and `start_metrics`.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha: {alpha} is not between 0, the start, and 1, the end")
    return perform_run("finetune", settings, resume=resume == "auto", alpha=alpha)


def perform_run(
    command: Command, settings: Any, *, resume: bool, alpha: float | None = None
) -> dict[str, Any]:
    """A run of a command, by the ranks that were launched together, or by this process alone."""
    given = read_given(command, settings)
    device = collectives.choose_device(Config.from_dict(given).run.device)
    with collectives.process_group(device):
        # What the run holds is gone before the group ends: a group that anything holds does not.
        return perform_phases(command, given, device, resume=resume, alpha=alpha)


def perform_phases(
    command: Command,
    given: Mapping[str, Any],
    device: torch.device,
    *,
    resume: bool,
    alpha: float | None,
) -> dict[str, Any]:
    """A run from its settings to its results. Collective."""
    outline, results = rank0_first(lambda: look_at_folder(command, given, resume, alpha))
    if results is not None:
        return results
    plan = make_plan(outline)
    model, notes = loading.training_model(plan.config, device, plan.start)
    rows = None
    if command == "align":
        plan, rows = encode_pairs(plan, model)
    run = raise_on_all_ranks(
        lambda: Run(plan, model, folder=run_folder.name_folder(plan.config), rows=rows)
    )
    run.machines = [watch.gather_machines(device)]
    start = parallel.gather_weights(model) if plan.chooses_weights else {}
    with ExitStack() as held:
        rank0_first(lambda: held.enter_context(run_folder.claim_folder(run.folder)))
        checkpoint = rank0_first(lambda: run.enter_folder(start, notes))
        collectives.require_shared(run.folder / "config.toml", by="--run.out")
        run.prepare_teachers()
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
        try:
            with signals.handle_signals(run.stop), forked, measure_convolutions(device):
                torch.manual_seed(plan.config.run.seed + rank())  # dropout and the like draw by it
                stopped, choice = run.train(checkpoint, start)
            # From here on a signal ends the process.
            results = run.results(stopped=stopped, choice=choice)
        except BaseException:  # the store of `run.sync` gets the last state
            run.copies.finish(run_folder.STOPPED_SECONDS)
            raise
        if not stopped:
            raise_on_all_ranks(lambda: run.copies.finish(run_folder.END_SECONDS))
    return results


def look_at_folder(
    command: Command, given: Mapping[str, Any], resume: bool, alpha: float | None
) -> tuple[Outline, dict[str, Any] | None]:
    """The outline of a run, and its results if nothing is left to do. On rank 0; opens no data.

    What the folder lacks of `run.sync`'s store is fetched first. A resumed run keeps its choices.
    """
    choices = choose_before_data(command, given, alpha=alpha)
    url, folder = choices.config.run.sync, run_folder.name_folder(choices.config)
    before, there = (
        run_folder.read_begun(folder),
        None if url is None else run_folder.ask_store(url),
    )
    if before is None and there is not None:
        before = there[2]
    if resume and before is not None:
        given = run_folder.keep_chosen(command, given, before)
        choices = choose_before_data(command, given, alpha=alpha)
    if command != "align":
        for teacher in choices.config.external_teachers.values():
            if teacher.features in ENCODERS.values():
                raise ValueError(
                    f"teacher.features: {teacher.features} is an encoder of protoclip align; name "
                    "a file, a folder of protoclip embed-teacher, or emoji"
                )
    outline = resolve_settings(choices.config, None if command == "train" else choices)
    if there is not None:
        run_folder.fetch_run(outline, *there, resume=resume)
    outline, results = run_folder.inspect_folder(outline, resume=resume)
    config = choices.config
    if results is None:
        return outline, None
    if is_done := evaluate.is_done(folder, results, config, choices):
        run_folder.Copies(config, folder).finish(run_folder.END_SECONDS)
    elif not checkpoints(folder):
        raise ValueError(
            f"{folder}: its final checkpoint is gone; choose another folder with --run.out"
        )
    return outline, results if is_done else None


class Run:
    """A run on one rank: its parts, the loop over episodes, saving, going on, and results.

    Making one writes nothing. Rank 0 alone has a `log`, writes checkpoints and shows progress.
    `model` is on its device, or sharded. With `rows` its projections alone train, on these.
    """

    def __init__(
        self, plan: Plan, model: ProtoCLIP, *, folder: Path, rows: PairRows | None = None
    ) -> None:
        config, samples = plan.config, plan.samples
        self.plan, self.config, self.folder, self.model = plan, config, folder, model
        self.rows, self.trained = rows, model
        if rows is not None:
            self.trained = AlignedModel(model, dropout=config.align.dropout)
        self.log: MetricsLog | None = None
        self.recall = 0.0  # of the pairs that are to be learned by heart
        self.stopped_by: str | None = None  # the signal that asks to stop after this step
        self.early_stop: EarlyStop | None = None
        if config.run.stop_by is not None:
            self.early_stop = EarlyStop(metric=config.run.stop_by)
        device, suffix = next(model.parameters()).device, f".{rank()}" if rank() else ""
        precision = resolve_precision(config.run.precision, device)
        self.arithmetic = {"run.device": device.type, "run.precision": precision}
        chosen = read_chosen(config.data)
        self.chosen = {} if chosen is None else chosen.keys  # identifies lists of sample ids
        self.content: dict[str, list[Facts]] = {}  # identifies the samples, on rank 0
        self.machines: list[watch.Machines] = []  # where it trains, one after the other
        self.skips = SkipLog(
            folder / f"skipped{suffix}.jsonl",
            max_share=config.data.max_bad_share,
            at_least=config.episodes.size // world_size(),
        )
        self.episode = sampler.episodes(config, samples)
        augment = light_transform if config.data.augmentation == "light" else clip_transform
        self.loader = data_loader.loader(
            config,
            samples,
            tokenizer=plan.start.tokenizer(),
            captions=plan.captions,
            transform=evaluation_transform(model)
            if config.run.overfit
            else augment(**image_input(model.towers)),
            device=device,
            cut_padding=model.ignores_padding and not config.parallel.compile,
            on_read=self.skips.add,
            after=self.pass_after,
            kind=EpisodeLoader if rows is None else partial(RowLoader, encoded=rows),
        )
        self.teachers: dict[str, TeacherFeatures] = {**plan.teachers}
        if config.distilled_teachers:
            model.distils = {
                name: str(teacher.tower) for name, teacher in config.distilled_teachers.items()
            }
        if rows is not None:
            assert isinstance(samples, Pairs)
            self.teachers.update(side_teachers(config, samples, rows))
        self.loader.features_of.update({name: t.rows for name, t in self.teachers.items()})
        self.start = loading.frozen_start(config, device, plan.start) if config.uses_start else None
        self.autocast = autocast(precision, device)
        self.trainer = self.make_trainer(precision, folder / f"diverged{suffix}.json")
        self.evaluator = RunEvaluator(
            plan,
            model,
            tokenizer=self.loader.tokenizer,
            workers=self.loader.workers,
            aligns=rows is not None,
        )
        self.copies = run_folder.Copies(config, folder)
        self.writer = run_folder.CheckpointWriter(
            folder,
            description=plan.start.description,
            text_files=loading.text_files(plan.start, model, self.loader.tokenizer),
            every_steps=config.run.save_steps,
            every_minutes=config.run.save_minutes,
            keep=config.run.keep_checkpoints,
            copies=self.copies,
        )

    def enter_folder(self, start: Mapping[str, Tensor], notes: list[str]) -> Path | None:
        """Begin or go on in the folder, which is claimed; the checkpoint to go on from, if any.

        Says all notes of the run, of which these are on the built model. On rank 0.
        """
        plan, config, folder = self.plan, self.config, self.folder
        self.content = list_contents(plan, self.start or start)
        lines = list[str]()
        checkpoint = run_folder.find_newest_intact(folder, lines)
        if checkpoint is not None:
            run_folder.check_checkpoint(checkpoint, plan, self.inputs)
        is_trained = (folder / run_folder.RESULTS).is_file()
        if not is_trained:
            (folder / MODEL).unlink(missing_ok=True)  # of an ending that was cut short
        write_atomically(folder / SETTINGS, run_folder.to_toml(config))
        if is_trained:
            say(f"note: {folder}: is trained; only the steps after training run again")
            return checkpoint
        # Rows of encoders need no workers, which the notes of the loader are about.
        aligns = self.rows is not None
        lines = [
            loading.describe_training(
                config.model, self.model, self.loader.tokenizer, aligns=aligns
            ),
            self.machines[0].describe(self.loader.batch_size),
            *(*plan.notes, *notes, *(() if aligns else self.loader.notes), *lines),
        ]
        for line in lines:
            say(f"note: {line}")
        say(f"training on {plan.amount}")
        return checkpoint

    @property
    def inputs(self) -> dict[str, Mapping[str, Any]]:
        """What has to be the same when the run goes on; see `check_checkpoint`."""
        return {"arithmetic": self.arithmetic, "chosen": self.chosen, "content": self.content}

    def train(
        self, checkpoint: Path | None, start: Mapping[str, Tensor]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Train from a checkpoint, if there is one, and choose weights by WiSE-FT, if asked to.

        Returns whether a signal stopped it, and what `evaluate.choose_weights` returned.
        """
        logged = 0 if checkpoint is None else self.restore(checkpoint)
        raise_on_all_ranks(lambda: self.open_log(logged))
        choice = None
        try:
            self.train_episodes()
            self.writer.finish()
            last = self.writer.folder(self.trainer.step) if self.is_finished else None
            guard = self.trainer.guard
            # Fails if most steps were skipped.
            skipped = raise_on_all_ranks(lambda: guard.summarize(self.trainer.step, last))
            if skipped and rank() == 0:
                say(f"note: {skipped}")
            if self.plan.chooses_weights and self.is_finished and not self.asked_to_stop():
                choice = evaluate.choose_weights(
                    self.evaluator,
                    self.writer,
                    start,
                    step=self.trainer.step,
                    asked_to_stop=self.asked_to_stop,
                )
            stopped = self.asked_to_stop()  # also since then: the evaluation may take long
        finally:
            self.loader.close()
            self.writer.wait()
            if self.log is not None:
                self.log.close()
        if stopped:  # all ranks wait, since a launcher ends all when one has ended
            raise_on_all_ranks(lambda: self.copies.finish(run_folder.STOPPED_SECONDS))
        return stopped, choice

    def make_trainer(self, precision: Precision, report: Path) -> Trainer:
        config, plan, aligns = self.config, self.plan, self.rows is not None
        episodes, captions, device = config.episodes, plan.captions.number, self.loader.device
        balance = Balance() if config.sets_strengths else None
        geometry = config.align.geometry * aligns
        weights = loss_weights(config, geometry=geometry, joint=plan.joint or ())
        optimizer = optim.make_optimizer(config, self.trained)
        return Trainer(
            model=self.trained,
            stage=partial(optim.find_stage, config),
            prototypes=EpisodePrototypes(
                config=config, source=self.make_feature_source(), captions=captions
            ),
            weights=weights,
            balance=balance,
            start=self.start if config.loss.keep else None,
            guard=watch.NonFiniteGuard(optimizer, grad_scaler(precision, device), report),
            schedule=optim.make_schedule(config),
            clip_norm=config.optim.clip_norm,
            autocast=self.autocast,
            micro_batch_size=episodes.micro_batch_size,
            batches=episodes.size // episodes.batch_size,
            batch_size=episodes.batch_size,
            throughput=watch.make_throughput(
                None if aligns else plan.start, device, precision, captions
            ),
            recalls=config.run.overfit is not None,
        )

    def make_feature_source(self) -> ExtractedFeatures:
        """The features to cluster come from a pass over each episode, or from a queue."""
        config, trains = self.config, self.loader.transform
        evaluating = config.prototypes.extract_transform == "evaluation"
        transform = evaluation_transform(self.model) if evaluating else trains
        over = partial(Pass, transform=transform, stream=EXTRACTION_STREAM)
        self.extraction_pass: Callable[[Episode], Pass] = over
        settings: dict[str, Any] = {
            "model": self.trained,
            "batches": lambda episode: self.loader.batches(self.extraction_pass(episode)),
            "teachers": self.list_grouping_teachers(),
            "autocast": self.autocast,
            "each_pair_once": isinstance(self.plan.samples, Pairs) and evaluating,
            "micro_batch_size": config.episodes.micro_batch_size,
        }
        if config.prototypes.source == "queue":
            size = config.episodes.size * self.loader.captions.number
            return QueuedFeatures(size=size, **settings)
        return ExtractedFeatures(**settings)

    def list_grouping_teachers(self) -> dict[str, TeacherFeatures]:
        """The teachers whose features are clustered; that of the start once it is there."""
        names = self.config.grouping_teachers
        return {name: teacher for name, teacher in self.teachers.items() if name in names}

    def prepare_teachers(self) -> None:
        """Let the frozen start embed all captions, and whiten teachers. Collective."""
        samples = self.plan.samples
        names = [n for n, t in self.config.external_teachers.items() if t.features == START]
        if names:
            assert self.start is not None
            assert isinstance(samples, Pairs)  # `open_teachers` refuses streams
            features = embed_start(
                self.start,
                self.loader.tokenizer,
                samples,
                cache=cache_folder() / "features",
                of_run=self.folder / "start_features",
                autocast=self.autocast,
            )
            self.teachers.update({name: copy(features) for name in names})
            self.loader.features_of.update(dict.fromkeys(names, features.rows))
        if not self.config.loss.keep:
            self.start = None  # a whole model, which nothing needs any more
        for name, teacher in self.config.grouping_teachers.items():
            if teacher.whiten:
                self.teachers[name].whiten(teacher.whiten)
        self.trainer.prototypes.source.teachers.update(self.list_grouping_teachers())

    def training_pass(self, index: int, start: int = 0) -> Pass:
        """The pass that trains on an episode; it brings what a loss needs of the teachers then."""
        episode, by = self.episode(index), KEYS[self.config.loss.positives]
        learns = self.trainer.stage(index).needs_prototypes or bool(self.config.distilled_teachers)
        return Pass(episode, start, with_features=learns, group_by=by)

    def pass_after(self, current: Pass) -> Pass | None:
        """The pass that will follow: over each episode to extract its features, then to train."""
        index, trainer = current.episode.index, self.trainer
        if current.stream == EXTRACTION_STREAM:
            return self.training_pass(index)
        if index + 1 == self.config.episodes.count:
            return None
        extracts = trainer.prototypes.source.extracts_after(trainer.stage(index).projects)
        if extracts and trainer.stage(index + 1).needs_prototypes:
            return self.extraction_pass(self.episode(index + 1))
        return self.training_pass(index + 1)

    def train_episodes(self) -> None:
        """The episodes that remain (paper, "online episodic training"), until a signal stops it."""
        trainer, config, count = self.trainer, self.config, self.config.episodes.count
        if trainer.step == 0 and (self.plan.guards or self.early_stop):
            self.evaluate()
        steps = count * trainer.batches
        progress, loss = Progress(f"train {config.run.name}", steps), ""
        for index in range(trainer.episode, count):
            if self.is_finished:
                return
            episode = self.episode(index)
            if index and trainer.stage(index) != trainer.stage(index - 1):
                loss = ""  # the next stage has others
            self.write(index, trainer.start_episode(episode))  # cluster, back-translate, freeze
            collectives.barrier()  # a logger of rank 0 may have taken long
            batches = self.loader.batches(self.training_pass(index, trainer.batch))
            for batch in trainer.wait_for(batches):
                number = trainer.step + 1
                detailed = number % config.run.log_every == 0 or number == steps
                metrics = trainer.train_step(batch, detailed=detailed)
                self.write(index, metrics)
                if detailed:
                    loss = f", loss {metrics['train/loss/total']:.4g}"
                if rank() == 0:
                    position = f"episode {index + 1}/{count}, {trainer.stage(index).name}"
                    progress.update(trainer.step, position + loss + self.skips.summary)
                self.recall = metrics.get("train/recall", 0.0)
                if self.save_if_due() or self.is_finished:
                    return
            self.write(index, trainer.end_episode())
            if config.run.evaluate_every and trainer.episode % config.run.evaluate_every == 0:
                self.evaluate()
            if self.save_if_due():
                return

    def evaluate(self) -> None:
        """Evaluate on the way: which checkpoint is the best, and whether the run ends here."""
        step, keep_best, early_stop = self.trainer.step, self.config.run.keep_best, self.early_stop
        # The start may have been evaluated before, and the end is evaluated again at the very end.
        at_an_end = step == 0 or self.trainer.episode == self.config.episodes.count
        encoder = self.evaluator.make_keeping_encoder(show=False) if at_an_end else None
        metrics = self.evaluator.evaluate("validation", encoder=encoder)
        self.write(self.trainer.episode, metrics)
        if keep_best is not None and step > 0:  # before the first step there is no checkpoint
            self.writer.rate(step, metrics[keep_best])
        if early_stop is not None:
            early_stop.observe(step, metrics[early_stop.metric])
            if early_stop.is_due and rank() == 0:
                say(early_stop.reason)

    @property
    def is_finished(self) -> bool:
        """Whether all episodes are trained, or the run ended early."""
        early = self.early_stop is not None and self.early_stop.is_due
        return early or self.recall == 1 or self.trainer.episode == self.config.episodes.count

    def open_log(self, size: int) -> None:
        """On rank 0, log metrics after the first `size` bytes of the file."""
        if rank() == 0:
            config, pairs = self.config, self.trainer.batch_size * self.loader.captions.number
            main_steps, _ = optim.count_cosine_steps(config)
            self.log = MetricsLog(
                self.folder,
                size=size,
                step=self.trainer.step,
                names=[*dict.fromkeys(config.run.loggers)],
                config=tomllib.loads(run_folder.to_toml(config)),
                watch=Watch(
                    pairs=pairs,
                    warm_up=min(config.optim.warm_up_steps, main_steps // 2),
                    overfits=config.run.overfit is not None,
                ),
            )

    def write(self, episode: int, metrics: Mapping[str, float]) -> None:
        if self.log is not None:
            self.log.write(self.trainer.step, episode, metrics)

    def stop(self, by: signal.Signals) -> None:
        """Stop after the step under way. Launchers send a signal twice; the first one counts."""
        if self.stopped_by is None and rank() == 0:
            signals.write_line(f"note: {by.name}: stops after this step, with a checkpoint")
        self.stopped_by = self.stopped_by or by.name

    def asked_to_stop(self) -> bool:
        """Whether a signal asks any rank to stop, which all ranks then know. Collective."""
        signals_of_ranks = collectives.all_gather_object(self.stopped_by)
        self.stopped_by = next(filter(None, signals_of_ranks), None)
        return self.stopped_by is not None

    def save_if_due(self) -> bool:
        """Save if it is time by rank 0's clock or the run ends; returns whether to stop."""
        trainer, writer = self.trainer, self.writer
        finished = self.is_finished
        due = rank() == 0 and writer.is_due(trainer.step, episode_end=trainer.batch == 0)
        unsaved = rank() == 0 and writer.saved_step != trainer.step
        stop, due, unsaved = collectives.any_rank([self.stopped_by is not None, due, unsaved])
        stop = stop and self.asked_to_stop()
        if due or (unsaved and (stop or finished)):
            self.save()
        return stop

    def save(self) -> None:
        """Start to write the state of all ranks: rank 0 does, of a sharded model each its part."""
        trainer, size = self.trainer, self.config.episodes.size
        self.writer.wait()  # or it is not known which evaluations have a checkpoint
        position = self.loader.state_dict(trainer.episode, trainer.batch, size)
        state = {
            **trainer.state_dict(),
            "loader": collectives.all_gather_object(position),
            "skips": collectives.all_gather_object([self.skips.read, self.skips.skipped]),
            **self.inputs,
            "joint": {**(self.plan.joint or {})},
            "machines": [vars(machines) for machines in self.machines],
            "best": self.writer.find_best(trainer.step),
            "best_by": self.config.run.keep_best,
            "early_stop": self.early_stop and vars(self.early_stop).copy(),
            "recall": self.recall,
            "metrics_bytes": self.log.size if self.log is not None else 0,
        }
        if self.trained is not self.model:
            state["model"] = parallel.gather_weights(self.model)
        writes = rank() == 0 or parallel.is_sharded(self.model)
        # The one before may still be on its way to a slow disk.
        raise_on_all_ranks(lambda: self.writer.save(trainer.step, state) if writes else None)

    def restore(self, checkpoint: Path) -> int:
        """Go on from a checkpoint; returns the bytes of the metrics that were logged until then."""
        state = raise_on_all_ranks(lambda: read_checkpoint(checkpoint, self.model))
        config = self.config
        if self.trained is not self.model:
            trains = self.trained.state_dict().keys()  # rank 0 alone has read any weights
            raise_on_all_ranks(
                lambda: require_same_encoders(state["model"], self.model.state_dict())
            )
            state["model"] = {n: value for n, value in state["model"].items() if n in trains}
        self.trainer.load_state_dict(state)
        for position in state["loader"]:
            self.loader.load_state_dict(position)
        before, counts = len(state["loader"]), [[*map(int, pair)] for pair in state["skips"]]
        if before == world_size():
            self.skips.read, self.skips.skipped = counts[rank()]
        elif rank() == 0:  # the number of ranks changed
            self.skips.read, self.skips.skipped = map(sum, zip(*counts, strict=True))
        if state["best"] and state.get("best_by", config.run.keep_best) == config.run.keep_best:
            step, value = state["best"]
            self.writer.rate(int(step), float(value))
        if self.early_stop is not None:
            self.early_stop = EarlyStop(**state["early_stop"])
        self.recall = state.get("recall", 0.0)
        machines = [watch.Machines(**saved) for saved in state.get("machines", [])]  # not in 1.0.0
        if not machines or not (self.is_finished or machines[-1] == self.machines[0]):
            machines += self.machines
        self.machines = machines
        # Not written again: a process that is killed meanwhile would leave neither.
        self.writer.saved_step = self.trainer.step
        if rank() == 0:
            say(f"going on from {checkpoint}, step {self.trainer.step}")
            if before != world_size() and not self.is_finished:
                say(
                    f"note: ranks: {before} before, {world_size()} now; batches stay, and weights "
                    "are equal up to rounding, unless BatchNorm takes statistics over parts of a "
                    "batch (docs/scaling.md)"
                )
        return int(state["metrics_bytes"])

    def results(self, *, stopped: bool, choice: dict[str, Any] | None) -> dict[str, Any]:
        """Evaluate, write and return the results; or where a run stands that a signal stopped."""
        config, trainer, best = self.config, self.trainer, self.writer.find_best()
        results = {"name": config.run.name, "folder": str(self.folder), "steps": trainer.step}
        if stopped:  # as all ranks agreed; a signal may come later
            return {**results, "stopped": self.stopped_by, "metrics": {}}
        met = collectives.all_gather_object(self.skips.new)
        results |= {
            "seed": config.run.seed,
            "samples_seen": trainer.samples_seen,
            "samples_skipped": len(self.skips.known.union(*(ids for ids, _ in met))),
            "shards_broken": len(self.skips.broken.union(*(broken for _, broken in met))),
            "train_seconds": round(trainer.throughput.seconds, 2),
            "precision": self.arithmetic["run.precision"],
            "environment": {
                **watch.describe_environment(self.loader.device),
                "hosts": self.machines[-1].hosts,
                "ranks": self.machines[-1].ranks,
                "machines": [str(machines) for machines in self.machines],
            },
            "metrics": {},
        }
        if config.run.evaluate:
            to, encoder = self.folder / "results", self.evaluator.make_keeping_encoder()
            among = results["candidates"] = dict[str, int]()
            results["metrics"] = self.evaluator.evaluate(
                "test", encoder=encoder, samples_to=to, candidates=among
            )
        data_sets = (*self.plan.held_out, *self.plan.guards)
        results["trained_on"] = {one.name: one.trained_on for one in data_sets if one.trained_on}
        if choice is not None:
            results |= choice
            given = self.folder, choice["start_metrics"], results
            results["differences"] = rank0_first(lambda: evaluate.measure_differences(*given))
        if config.run.overfit is not None:
            # `align` may have left some of the pairs out.
            pairs, recall = config.episodes.size, self.recall
            results["overfit"] = {"pairs": pairs, "steps": trainer.step, "recall": recall}
            verdict = "this can learn"
            if recall < 1:
                verdict = (
                    "this does not learn; change optim.learning_rate, and look at images and "
                    "captions (protoclip data inspect)"
                )
            amount = f"{recall:.0%} of {pairs} pairs are known after {trainer.step} steps"
            say(f"run.overfit: {amount}: {verdict}")
        if self.early_stop is not None and self.early_stop.is_due:
            results["early_stop"] = vars(self.early_stop) | {"reason": self.early_stop.reason}
        if best is not None:
            results["best_checkpoint"] = f"checkpoints/step-{best[0]:09}"
        if rank() == 0:
            content = to_json(seal(results), indent=2)
            write_atomically(self.folder / "results.json", content + "\n")
        return results
