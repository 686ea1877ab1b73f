"""The episode loop (paper, online episodic training)."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from protoclip.clustering import KMeans
from protoclip.data.episodes import Episode
from protoclip.data.loader import Batch
from protoclip.features import EpisodeFeatures
from protoclip.losses import LossWeights, objective
from protoclip.models.protoclip import ProtoCLIP
from protoclip.prototypes import PrototypeTarget, build_targets, group
from protoclip.train.metrics import to_floats
from protoclip.train.precision import Autocast
from protoclip.train.schedule import Schedule
from protoclip.train.stages import Plan, Stage, enter_stage
from protoclip.train.state import TrainState

Targets = dict[str, PrototypeTarget]


@runtime_checkable
class FeatureSource(Protocol):
    """Where the features that are clustered come from."""

    def features(self, episode: Episode) -> EpisodeFeatures: ...


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The parts of a training run; `fit` puts them to work.

    Attributes:
        model: Trained in place.
        plan: Stage of each episode.
        episode: Episode of a number.
        batches: Batches of an episode, in the training view.
        source: Features of an episode, to be clustered.
        cluster: K-means of one space, `(space, rows) -> KMeans`.
        weights, target_temperatures, mask_empty: Of the objective.
        back_translation: Whether prototypes are translated into the student's space.
        optimizer, schedule, scaler, autocast, clip_norm: How a step is taken.
        log: Receives `(state, metrics)`; called every `log_every` steps and once an episode.
        save: Called with the state at each episode's end.
        evaluate: Called with the state at each episode's end; may return metrics to log.
        on_step: Called after each step, for progress.
    """

    model: ProtoCLIP
    plan: Plan
    episode: Callable[[int], Episode]
    batches: Callable[[Episode], Iterable[Batch]]
    source: FeatureSource
    cluster: Callable[[str, Tensor], KMeans]
    weights: LossWeights
    target_temperatures: Mapping[str, float]
    mask_empty: bool
    back_translation: bool
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    autocast: Autocast
    clip_norm: float
    log: Callable[[TrainState, Mapping[str, float]], None]
    log_every: int
    save: Callable[[TrainState], None]
    evaluate: Callable[[TrainState], Mapping[str, float]]
    on_step: Callable[[TrainState, Stage], None]

    def fit(self, state: TrainState) -> TrainState:
        """Train the episodes that remain, and return the state at the end."""
        for index in range(state.episode, self.plan.num_episodes):
            started = time.monotonic()
            stage = self.plan.stage(index)
            episode = self.episode(index)
            targets = self.targets(episode, state) if stage.needs_prototypes else None
            enter_stage(self.model, stage)
            self.run_episode(episode, stage, targets, state)
            state.episode += 1
            state.seconds += time.monotonic() - started
            self.save(state)
            if metrics := self.evaluate(state):
                self.log(state, metrics)
        return state

    def targets(self, episode: Episode, state: TrainState) -> Targets:
        """Features, prototypes and back-translated targets of an episode."""
        started = time.monotonic()
        features = self.source.features(episode)
        extracted = time.monotonic()
        spaces = dict(features.teachers)
        if self.weights.prototypical:
            spaces = {"image": features.image, "text": features.text, **spaces}
        prototypes = group(spaces, self.cluster)
        targets = build_targets(
            prototypes,
            image_projections=features.image,
            text_projections=features.text,
            back_translation=self.back_translation,
        )
        empty = {
            f"train/prototypes/empty/{space}": float(
                (torch.bincount(p.assignments, minlength=len(p.centroids)) == 0).float().mean()
            )
            for space, p in prototypes.items()
        }
        seconds = {
            "train/seconds/extract": extracted - started,
            "train/seconds/group": time.monotonic() - extracted,
        }
        self.log(state, empty | seconds)
        return targets

    def run_episode(
        self, episode: Episode, stage: Stage, targets: Targets | None, state: TrainState
    ) -> None:
        """One pass over the episode's batches."""
        for batch in self.batches(episode):
            report = self.train_step(batch, stage, targets, state)
            state.step += 1
            state.samples_seen += len(batch.position)
            if state.step % self.log_every == 0:
                self.log(state, to_floats(report))
            self.on_step(state, stage)

    def train_step(
        self, batch: Batch, stage: Stage, targets: Targets | None, state: TrainState
    ) -> dict[str, Tensor | float]:
        """Forward, backward, one optimizer step; returns what to log about it."""
        rate = self.schedule.learning_rate(state.step)
        for group_ in self.optimizer.param_groups:
            group_["lr"] = rate
        with self.autocast():
            embeddings = self.model(batch.image, batch.text, project=stage.projects)
        losses, report = objective(
            embeddings,
            targets,
            batch.position,
            weights=self.weights,
            target_temperatures=self.target_temperatures,
            mask_empty=self.mask_empty,
        )
        total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.clamp_scales()
        return {
            **report,
            "train/loss/total": total.detach(),
            "train/gradient_norm": norm.detach(),
            "train/learning_rate": rate,
        }
