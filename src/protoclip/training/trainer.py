"""The episode loop (paper, online episodic training)."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from protoclip.data.loader import Batch
from protoclip.data.sampler import Episode
from protoclip.distributed.collectives import all_gather, all_reduce, world_size
from protoclip.distributed.parallel import (
    clip_gradients,
    distribute,
    no_sync,
    reach_everything,
)
from protoclip.losses.grad_cache import forward_in_chunks
from protoclip.losses.objective import LossWeights, objective
from protoclip.losses.prototypical import Target, make_targets
from protoclip.models.batch_norm import agree_on_statistics, has_own_statistics
from protoclip.models.protoclip import Embeddings, ProtoCLIP
from protoclip.prototypes.features import Assignments, EpisodeFeatures
from protoclip.prototypes.kmeans import KMeans
from protoclip.prototypes.targets import cluster_spaces
from protoclip.training.guard import Guard
from protoclip.training.logging import feature_statistics, to_floats
from protoclip.training.optim import set_learning_rate
from protoclip.training.precision import Autocast
from protoclip.training.schedule import Schedule
from protoclip.training.stages import Plan, Stage, enter_stage
from protoclip.training.state import TrainState


@runtime_checkable
class FeatureSource(Protocol):
    """Where the features that are clustered come from, and which prototype a sample belongs to."""

    def features(self, episode: Episode) -> EpisodeFeatures: ...

    def assign(
        self, batch: Batch, embeddings: Embeddings, clusters: Mapping[str, KMeans]
    ) -> Assignments: ...

    def observe(self, batch: Batch, embeddings: Embeddings) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """Prototypes of an episode by space, and the targets made of them by student and teacher.

    `reached` marks, for each space, the prototypes that a sample of the episode fell into so far,
    after a first place for samples that it knows nothing of.
    """

    prototypes: Mapping[str, KMeans]
    targets: Mapping[tuple[str, str], Target]
    reached: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The parts of a training run; `fit` puts them to work.

    Attributes:
        model: Trained in place.
        plan: Stage of each episode.
        episode: Episode of a number.
        batches: Batches of an episode in the training transform, from a number on.
        source: Features of an episode, to be clustered.
        cluster: K-means of one space, `(space, rows, positions) -> KMeans`.
        weights, target_temperatures, mask_empty: Of the objective.
        back_translation: Whether prototypes are translated into the student's space.
        optimizer, schedule, scaler, guard, autocast, clip_norm: How a step is taken.
        micro_batch_size: Pairs that pass through the towers at once; the whole batch if unset.
        log: Receives `(state, metrics)`; called every `log_every` steps and once an episode.
        save: Called after each step with the state and the episode's prototypes, and at its end
            without; says whether to stop there.
        evaluate: Called with the state at each episode's end; may return metrics to log.
        on_step: Called after each step, for progress.
        position, restore_position: The loader's place, which some sources need to go on quickly.
    """

    model: ProtoCLIP
    plan: Plan
    episode: Callable[[int], Episode]
    batches: Callable[[Episode, int], Iterable[Batch]]
    source: FeatureSource
    cluster: Callable[[str, Tensor, Tensor | None], KMeans]
    weights: LossWeights
    target_temperatures: Mapping[str, float]
    mask_empty: bool
    back_translation: bool
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    guard: Guard
    autocast: Autocast
    clip_norm: float
    micro_batch_size: int | None
    log: Callable[[TrainState, Mapping[str, float]], None]
    log_every: int
    save: Callable[[TrainState, Grouping | None], bool]
    evaluate: Callable[[TrainState], Mapping[str, float]]
    on_step: Callable[[TrainState, Stage], None]
    position: Callable[[TrainState], dict[str, Any]]
    restore_position: Callable[[dict[str, Any]], None]

    def fit(self, state: TrainState, grouping: Grouping | None = None) -> TrainState:
        """Train what remains of the run, or until `save` says to stop; returns where it stands.

        `grouping` is that of an episode which was interrupted, of whose batches some are done.
        """
        module: nn.Module = self.model
        entered: Stage | None = None
        for index in range(state.episode, self.plan.num_episodes):
            stage = self.plan.stage(index)
            episode = self.episode(index)
            if stage.needs_prototypes and grouping is None:
                grouping = self.group(episode, state)
            enter_stage(self.model, stage)
            if stage is not entered:
                module = distribute(
                    self.model, broadcast_buffers=has_own_statistics(self.model)
                )
                entered = stage
            if self.run_episode(module, episode, stage, grouping, state):
                return state
            state.episode, state.batch, grouping = state.episode + 1, 0, None
            if metrics := self.evaluate(state):
                self.log(state, metrics)
            if self.save(state, None):
                return state
        return state

    def group(self, episode: Episode, state: TrainState) -> Grouping:
        """Features, prototypes and back-translated targets of an episode."""
        started = time.monotonic()
        features = self.source.features(episode)
        extracted = time.monotonic()
        spaces = dict(features.teachers)
        if self.weights.prototypical:
            spaces = {"image": features.image, "text": features.text, **spaces}
        prototypes = cluster_spaces(spaces, self.cluster, features.positions)
        clustered = time.monotonic()
        targets = make_targets(
            prototypes,
            image_projections=features.image,
            text_projections=features.text,
            target_temperatures=self.target_temperatures,
            back_translation=self.back_translation,
            mask_empty=self.mask_empty,
            positions=features.positions,
        )
        empty = {
            f"train/prototypes/empty/{space}": empty_share(found)
            for space, found in prototypes.items()
        }
        seconds = {
            "train/seconds/extract": extracted - started,
            "train/seconds/cluster": clustered - extracted,
            "train/seconds/back_translate": time.monotonic() - clustered,
        }
        self.log(state, empty | seconds)
        state.seconds += time.monotonic() - started
        reached = {
            space: torch.zeros(len(found.centroids) + 1, device=found.centroids.device)
            for space, found in prototypes.items()
        }
        return Grouping(prototypes=prototypes, targets=targets, reached=reached)

    def run_episode(
        self,
        module: nn.Module,
        episode: Episode,
        stage: Stage,
        grouping: Grouping | None,
        state: TrainState,
    ) -> bool:
        """The batches of an episode that remain; True if `save` said to stop among them."""
        waited = trained = 0.0
        samples, logged = 0, time.monotonic()
        asked = logged
        for batch in self.batches(episode, state.batch):
            began = time.monotonic()
            due = (state.step + 1) % self.log_every == 0
            report = self.train_step(module, batch, stage, grouping, state, detailed=due)
            pairs = len(batch.position) * world_size()
            state.step += 1
            state.batch += 1
            state.samples_seen += pairs
            samples += pairs
            if due:
                self.guard.look()
                metrics = mean_over_processes(report)
                metrics["train/skipped_steps"] = self.guard.health.skipped
                metrics["train/samples_per_second"] = samples / (time.monotonic() - logged)
                self.log(state, metrics)
                logged, samples = time.monotonic(), 0
            self.on_step(state, stage)
            waited, trained = waited + began - asked, trained + time.monotonic() - began
            state.seconds += time.monotonic() - asked
            asked = time.monotonic()
            if self.save(state, grouping):
                return True
        self.guard.look()
        agree_on_statistics(self.model)
        seconds = {"train/seconds/data": waited, "train/seconds/train": trained}
        self.log(state, seconds | dead_shares(grouping))
        return False

    def train_step(
        self,
        module: nn.Module,
        batch: Batch,
        stage: Stage,
        grouping: Grouping | None,
        state: TrainState,
        *,
        detailed: bool = True,
    ) -> dict[str, Tensor | float]:
        """Forward, backward, one optimizer step; returns what to log about it.

        `module` is the model as the stage trains it; `detailed` asks for what costs time of its
        own, such as accuracies. With several processes losses are parts, see `objective`.
        """
        rate = self.schedule.learning_rate(state.step)
        set_learning_rate(self.optimizer, rate)
        embeddings, finish = self.embed(module, batch, stage)
        assignments: Assignments = {}
        if grouping is not None:
            assignments = self.source.assign(batch, embeddings, grouping.prototypes)
            for space, found in assignments.items():
                grouping.reached[space].index_fill_(0, found + 1, 1.0)
        losses, report = objective(
            embeddings,
            grouping.targets if grouping is not None else None,
            assignments,
            weights=self.weights,
            detailed=detailed,
        )
        total = torch.stack(list(losses.values())).sum()
        if world_size() > 1:
            total = total + reach_everything(embeddings)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        finish()
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.model, self.clip_norm)
        self.guard.step(state.step + 1, total, norm, batch.sample_id)
        self.model.clamp_scales()
        self.source.observe(batch, embeddings)
        if detailed:
            report |= feature_statistics(
                all_gather(embeddings.image_features.detach()),
                all_gather(embeddings.text_features.detach()),
            )
        return {
            **report,
            "train/loss/total": total.detach(),
            "train/gradient_norm": norm.detach(),
            "train/learning_rate": rate,
        }

    def embed(
        self, module: nn.Module, batch: Batch, stage: Stage
    ) -> tuple[Embeddings, Callable[[], None]]:
        """The model's output for a batch, and what is left to do once its gradients are there."""

        def forward(image: Tensor, text: Tensor) -> Embeddings:
            with self.autocast():
                output: Embeddings = module(image, text, project=stage.projects)
            return output

        if self.micro_batch_size is None or self.micro_batch_size >= len(batch.position):
            return forward(batch.image, batch.text), lambda: None
        images = torch.split(batch.image, self.micro_batch_size)
        texts = torch.split(batch.text, self.micro_batch_size)
        chunks = [partial(forward, image, text) for image, text in zip(images, texts, strict=True)]
        return forward_in_chunks(chunks, buffers=self.model.buffers(), no_sync=no_sync(module))


def mean_over_processes(report: Mapping[str, Tensor | float]) -> dict[str, float]:
    """A report as floats; what is a process's part of a mean becomes the mean."""
    if world_size() == 1:
        return to_floats(report)
    tensors = {name: value.float() for name, value in report.items() if isinstance(value, Tensor)}
    means = all_reduce(torch.stack(list(tensors.values()))) / world_size()
    return to_floats({**report, **dict(zip(tensors, means, strict=True))})


def dead_shares(grouping: Grouping | None) -> dict[str, float]:
    """Share of prototypes that no sample of the episode fell into, by space."""
    return {
        f"train/prototypes/dead/{space}": 1 - float(all_reduce(marks, "max")[1:].mean())
        for space, marks in (grouping.reached.items() if grouping is not None else ())
    }


def empty_share(prototypes: KMeans) -> float:
    """Share of prototypes that no sample fell into."""
    known = prototypes.assignments[prototypes.assignments >= 0]
    return float((torch.bincount(known, minlength=len(prototypes.centroids)) == 0).float().mean())
