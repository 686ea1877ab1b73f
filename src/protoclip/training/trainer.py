"""Training steps, episodes and their prototypes (paper, "online episodic training").

The loop over episodes is in `run.py`.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from protoclip.config import ENCODERS, Config
from protoclip.data.loader import Batch
from protoclip.data.sampler import Episode
from protoclip.distributed import collectives, parallel
from protoclip.distributed.collectives import all_gather, all_reduce, rank, world_size
from protoclip.files import checksum
from protoclip.losses import grad_cache
from protoclip.losses.balance import Balance, measure
from protoclip.losses.distil import StartFeatures
from protoclip.losses.objective import LossWeights, objective
from protoclip.losses.prototypical import Target, make_targets
from protoclip.losses.tiles import mean_positives
from protoclip.models import layers
from protoclip.models.protoclip import Autocast, Embeddings, ProtoCLIP, TowerPair
from protoclip.prototypes.features import Assignments, ExtractedFeatures
from protoclip.prototypes.kmeans import KMeans, kmeans, nearest
from protoclip.prototypes.targets import cluster_spaces, in_order
from protoclip.terminal import say
from protoclip.training.log import feature_statistics, to_floats
from protoclip.training.optim import Stage, enter_stage
from protoclip.training.presets import PAIRS_A_PROTOTYPE
from protoclip.training.watch import NonFiniteGuard, Throughput, measure_repeats


@dataclass(kw_only=True)
class EpisodePrototypes:
    """Makes the prototypes of each episode, and looks up those of each batch. Collective."""

    config: Config
    # Gives the features to cluster, and the prototypes that samples belong to.
    source: ExtractedFeatures
    captions: int = 1  # of an image, each a row
    # Of the episode under way, or else of the last one that had prototypes.
    clusters: dict[str, KMeans] = field(default_factory=dict)
    # By `(student, teacher)`, of the episode under way; empty without prototypes.
    targets: dict[tuple[str, str], Target] = field(default_factory=dict)
    # By space, 1 for each prototype that a sample of this episode was assigned to. The first entry
    # is for samples without an assignment (-1).
    reached: dict[str, Tensor] = field(default_factory=dict)

    def cluster(self, space: str, rows: Tensor, positions: Tensor | None) -> KMeans:
        """The clusters of this rank's rows, at these positions of the episode. Collective."""
        settings, teacher = self.config.prototypes, self.config.external_teachers.get(space)
        number = settings.number if teacher is None else teacher.number
        if (fixed := self.clusters.get(space)) is not None:
            return replace(fixed, assignments=nearest(rows, fixed.centroids)[0])
        found = int(all_reduce(torch.tensor(len(rows), device=rows.device)))
        # A teacher that knows a part of the pairs has a tenth of these, or its number's share.
        pairs = found // self.captions
        share = number * pairs // self.config.episodes.size
        number = max(share, min(number, pairs // PAIRS_A_PROTOTYPE), 2)
        return kmeans(
            rows,
            min(number, found),
            iterations=settings.iterations,
            restarts=settings.restarts,
            init=settings.init,
            seed=self.config.run.seed,
            positions=positions,
        )

    def make(self, episode: Episode) -> dict[str, float]:
        """Cluster an episode's features, and back-translate the prototypes; returns metrics."""
        times, config = [time.monotonic()], self.config
        # Frozen encoders never change, so their clusters are those of the whole run.
        teachers = config.external_teachers
        sides = [name for name, it in teachers.items() if it.features in ENCODERS.values()]
        self.clusters = {name: self.clusters[name] for name in sides if name in self.clusters}
        features = self.source.features(episode)
        times.append(time.monotonic())
        spaces = dict(features.teachers)
        if config.groups_modalities:
            spaces = {"image": features.image, "text": features.text, **spaces}
        self.clusters = cluster_spaces(spaces, self.cluster, features.positions)
        times.append(time.monotonic())
        self.source.remember(in_order(features.keys, features.positions))
        own = 0.0 if config.prototypes.hard_targets else config.prototypes.target_temperature
        self.targets = make_targets(
            self.clusters,
            image_projections=features.image,
            text_projections=features.text,
            target_temperatures={**dict.fromkeys(teachers, 0.0), "image": own, "text": own},
            back_translation=config.prototypes.back_translation,
            mask_empty=config.prototypes.mask_empty,
            positions=features.positions,
            keys=self.source.keys,
        )
        metrics = {
            f"train/prototypes/agreement/{student}_from_{teacher}": target.confidence
            for (student, teacher), target in self.targets.items()
            if student in self.clusters  # or nothing was measured
        }
        for space, clustering in self.clusters.items():
            number, assigned = len(clustering.centroids), clustering.assignments
            self.reached[space] = torch.zeros(number + 1, device=clustering.centroids.device)
            sizes = torch.bincount(assigned[assigned >= 0], minlength=number)
            metrics[f"train/prototypes/empty/{space}"] = float((sizes == 0).float().mean())
        times.append(time.monotonic())
        for number, part in enumerate(("extract", "cluster", "back_translate")):
            metrics[f"train/seconds/{part}"] = times[number + 1] - times[number]
        return metrics

    def end_episode(self, number: int, device: torch.device) -> dict[str, float]:
        """Let go of the targets of episode `number`; returns metrics.

        Its clusters stay until others are made, so the last checkpoint of a run holds the last.
        """
        metrics = {}
        for space, marks in self.reached.items():
            marks = all_reduce(marks, "max")
            if bool(marks.any()):  # or no step of the episode was taken
                metrics[f"train/prototypes/dead/{space}"] = 1 - float(marks[1:].mean())
        unknown = torch.as_tensor(self.source.unknown, device=device)
        if self.reached and (lost := int(all_reduce(unknown))) and rank() == 0:
            why = "a shard was lost in one of the two passes over it"
            say(f"note: {lost:,} pairs of episode {number} had no prototype: {why}")
        self.targets, self.reached = {}, {}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {
            "source": self.source.state_dict(),
            "clusters": {space: vars(clusters) for space, clusters in self.clusters.items()},
            # In order, since the sum of the losses depends on it.
            "targets": [[*key, vars(target)] for key, target in self.targets.items()],
            "reached": {space: all_reduce(marks, "max") for space, marks in self.reached.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.source.load_state_dict(state["source"])
        self.clusters = {
            space: KMeans(**{**fields, "history": tuple(fields["history"])})  # JSON has no tuples
            for space, fields in state["clusters"].items()
        }
        self.targets = {(to, by): Target(**fields) for to, by, fields in state["targets"]}
        self.reached = dict(state["reached"])


@dataclass(kw_only=True)
class Trainer:
    """A model in training, with all that changes while it trains.

    For each episode call `start_episode`, `train_step` with each batch of `wait_for`, and
    `end_episode`; they return metrics by name. With several ranks every method is collective.
    """

    model: ProtoCLIP
    stage: Callable[[int], Stage]  # of each episode, by its number
    prototypes: EpisodePrototypes  # those of the episode under way
    weights: LossWeights
    guard: NonFiniteGuard  # takes the steps of the optimizer that it has
    schedule: Callable[[int], float]  # the learning rate, by the number of steps before it
    autocast: Autocast
    clip_norm: float  # largest norm of the whole gradient
    micro_batch_size: int | None  # images that pass through the towers at once; None for all
    batches: int  # of an episode
    batch_size: int  # images in a batch, of all ranks
    throughput: Throughput = field(default_factory=Throughput)
    balance: Balance | None = None  # sets the strengths of prototypical losses; else the weights do
    start: TowerPair | None = None  # frozen towers, where a loss keeps the model close to them
    recalls: bool = False  # report how many pairs of a batch are nearest to each other
    episode: int = 0  # finished ones
    batch: int = 0  # finished ones of the next episode

    def __post_init__(self) -> None:
        self._stage: Stage | None = None
        self._module: nn.Module = self.model  # the model, wrapped for the stage
        self._checksums: dict[str, str] = {}  # of images by sample id, where it recalls

    @property
    def step(self) -> int:
        """Optimizer steps so far, those that were skipped included."""
        return self.episode * self.batches + self.batch

    @property
    def samples_seen(self) -> int:
        """Pairs trained on by all ranks."""
        return self.step * self.batch_size

    def start_episode(self, episode: Episode) -> dict[str, float]:
        """Make the prototypes if the stage needs any, freeze and wrap the model."""
        self.throughput.pause()
        stage, metrics = self.stage(episode.index), {}
        if stage.needs_prototypes and not self.prototypes.targets:
            metrics = self.prototypes.make(episode)
        enter_stage(self.model, stage)
        if stage != self._stage:
            local = layers.has_own_statistics(self.model)
            self._module = parallel.distribute(self.model, broadcast_buffers=local)
            self._stage = stage
        self._statistics = layers.Statistics(self.model)
        self.throughput.start(self.model, self.samples_seen)
        return metrics

    def wait_for(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, each with the seconds that it is waited for counted as such."""
        following = iter(batches)
        while True:
            self.throughput.tick()  # what came since the last step: a line of the log, a checkpoint
            batch = next(following, None)
            self.throughput.waited += self.throughput.tick()
            if batch is None:
                return
            yield batch

    def train_step(self, batch: Batch, *, detailed: bool = True) -> dict[str, float]:
        """One optimizer step with this rank's share of a batch; metrics if `detailed`, for which
        it waits for the device."""
        self.throughput.tick()
        rate, targets = self.schedule(self.step), self.prototypes.targets
        optimizer, scaler = self.guard.optimizer, self.guard.scaler
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        embeddings, finish_backward = self._forward(batch)
        assignments: Assignments = {}
        if targets:
            source, clusters = self.prototypes.source, self.prototypes.clusters
            assignments = source.assign(batch, embeddings, clusters)
        samples = None
        # Ranks cannot tell without a collective whether another one has the sample, too.
        if world_size() > 1 or len({*batch.sample_id}) < len(batch.sample_id):
            samples = batch.keys & torch.iinfo(torch.int64).max  # numbers are at least 0
        taught = {**batch.features}
        for name in self.weights.joint:
            taught[name] = self.prototypes.source.teachers[name].join_rows(taught[name])
        losses, report = objective(
            embeddings,
            targets or None,
            assignments,
            weights=self.weights,
            balance=self.balance,
            start=self._start_features(batch),
            frozen=(batch.image, batch.text) if self.weights.geometry else None,
            teachers=taught,
            groups=batch.groups,
            samples=samples,
            captions=len(batch.text) // len(batch.image),
            detailed=detailed,
        )
        # There is none where a teacher, whose groups are all that teaches, knows no sample.
        parts = [*losses.values()] or [0.0 * embeddings.logit_scale]
        total = torch.stack(parts).sum()
        if world_size() > 1:
            total = total + parallel.reach_everything(embeddings)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        finish_backward()
        self._drop_gradients_without_loss()
        squares = self.model.take_pulls()
        pulls: Mapping[str, Tensor] = {}
        if self.balance is not None or detailed:
            pulls = measure(squares, loss_scale=scaler.get_scale())
        scaler.unscale_(optimizer)
        norm = parallel.clip_gradients(self.model, self.clip_norm)
        # Projections without a loss must be finite too, since they are clustered.
        with torch.no_grad():
            checked = total + parallel.reach_everything(embeddings)
        taken = self.guard.step(self.step + 1, checked, norm, batch.sample_id)
        self._record(batch, embeddings, assignments, pulls, taken)
        self.batch += 1
        self.throughput.steps += 1
        metrics: dict[str, float] = {}
        if detailed:
            report |= self._details(batch, embeddings, pulls)
            report |= {"train/loss/total": total.detach(), "train/gradient_norm": norm.detach()}
            self.guard.count_skipped()  # waits for the device
            report |= self.throughput.measure_shares(self._module, total.device)
            if batch.groups is None and self._tells_pairs_apart:
                metrics["train/repeated/captions"] = measure_repeats(batch.captions, batch.keys)
            metrics |= to_floats({**report, "train/learning_rate": rate})
            metrics["train/skipped_steps"] = float(self.guard.skipped)
            metrics |= self.throughput.report(self.samples_seen, total.device)
        self.throughput.trained += self.throughput.tick()
        return metrics

    @property
    def _tells_pairs_apart(self) -> bool:
        """Whether an instance loss trains, of which the other pairs of a batch are negatives."""
        return bool(self.weights.info_nce or self.weights.sigmoid)

    def _details(
        self, batch: Batch, embeddings: Embeddings, pulls: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What is reported of a step beside its losses. Collective."""
        report = feature_statistics(
            all_gather(embeddings.image_features.detach()),
            all_gather(embeddings.text_features.detach()),
        )
        if batch.groups is not None:
            report["train/positives"] = mean_positives(all_gather(batch.groups))
        if self.recalls:
            report["train/recall"] = measure_recall(embeddings, batch, self._checksums)
        if self._tells_pairs_apart and self.prototypes.targets:
            for student, (instance, prototypes) in pulls.items():
                report[f"train/pull/{student}"] = prototypes / instance
        return report

    def _drop_gradients_without_loss(self) -> None:
        """Where a tower has no loss, let it have no gradient, or its weights would decay."""
        weights = self.weights
        if self._tells_pairs_apart or weights.keep or weights.geometry or self.prototypes.targets:
            return
        taught = {*self.model.distils.values()}
        for name, parameter in self.model.named_parameters():
            of_image = name.startswith("towers.visual.")
            of_text = name.startswith("towers.") and not of_image and "logit_" not in name
            if (of_image and "image" not in taught) or (of_text and "text" not in taught):
                parameter.grad = None

    @torch.no_grad()
    def _record(
        self,
        batch: Batch,
        embeddings: Embeddings,
        assignments: Assignments,
        pulls: Mapping[str, Tensor],
        taken: Tensor,
    ) -> None:
        """Keep what a step leaves behind besides weights and moments, if it was taken."""
        self._statistics.update(taken)
        is_free = self.weights.info_nce == 0 and embeddings.logit_bias is not None
        self.model.clamp_scales(taken, sigmoid=is_free)
        if self.balance is not None:
            self.balance.update(pulls, self.weights.by_student(self.prototypes.targets), taken)
        for space, prototypes in assignments.items():
            marks, entries = self.prototypes.reached[space], prototypes + 1
            marks[entries] = torch.maximum(marks[entries], taken.to(marks))
        self.prototypes.source.observe(batch, embeddings, taken)

    def _forward(self, batch: Batch) -> tuple[Embeddings, Callable[[], None]]:
        """The embeddings of a batch's pairs, and what is left to do after `backward`."""
        assert self._stage is not None, "start_episode comes first"
        size, projects = self.micro_batch_size, self._stage.projects
        if size is None or size >= len(batch.image):
            embeddings = self._embed(batch.image, batch.text, project=projects, teach=True)
            return embeddings.paired(), lambda: None
        number = grad_cache.number_of_chunks(len(batch.image), size)
        images, texts = batch.image.tensor_split(number), batch.text.tensor_split(number)
        outputs, backward = grad_cache.forward_in_chunks(
            [partial(self._encode, *part) for part in zip(images, texts, strict=True)],
            trains=self.model.towers_train(),
            buffers=self.model.towers.buffers(),
            no_sync=parallel.no_sync(self._module),
        )
        with self.autocast():
            embeddings = self.model.embeddings(outputs[0], outputs[1], projects, teach=True)
        return embeddings.paired(), backward

    def _embed(
        self, image: Tensor, text: Tensor, *, project: bool, teach: bool = False
    ) -> Embeddings:
        with self.autocast():
            output: Embeddings = self._module(image, text, project=project, teach=teach)
        return output

    def _encode(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """The towers' outputs for a part of a batch."""
        output = self._embed(image, text, project=False)
        outputs = [x for x in (output.image_outputs, output.text_outputs) if x is not None]
        if self._module is self.model:
            return tuple(outputs)
        # DDP averages gradients once, with the last part, those of the heads too.
        zero = parallel.reach_everything(output, self.model.image_head, self.model.text_head)
        return tuple(features + zero for features in outputs)

    @torch.no_grad()
    def _start_features(self, batch: Batch) -> StartFeatures | None:
        """What the frozen start makes of a batch, in micro-batches as the model."""
        if self.start is None:
            return None
        size, features = self.micro_batch_size or len(batch.text), []
        encoders = (self.start.encode_image, batch.image), (self.start.encode_text, batch.text)
        for encode, inputs in encoders:
            parts = []
            for part in torch.split(inputs, size):
                with self.autocast():
                    parts.append(encode(part, normalize=True))
            features.append(torch.cat(parts))
        scale = self.start.towers.get_parameter("logit_scale").exp()
        image = features[0].repeat_interleave(len(batch.text) // len(batch.image), 0)
        return StartFeatures(image=image, text=features[1], logit_scale=scale)

    def end_episode(self) -> dict[str, float]:
        """Count the episode as finished, and let go of its targets."""
        self.guard.count_skipped()
        if layers.has_own_statistics(self.model):  # of rank 0, as DDP does before each step
            for buffer in self.model.buffers():
                collectives.broadcast(buffer)
        clock = self.throughput
        clock.tick()
        metrics = {"train/seconds/data": clock.waited, "train/seconds/train": clock.trained}
        self.episode, self.batch = self.episode + 1, 0
        device = next(self.model.parameters()).device
        return metrics | self.prototypes.end_episode(self.episode, device)

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on, as nested dicts of tensors and JSON values.

        `model` and `optimizer` are whole copies on the CPU of rank 0, and empty on other ranks; or
        copies of each rank's parts, if the model is sharded.
        `model` is the plain one: LoRA is merged into it, and `adapters` are what it takes to go on.
        """
        self.guard.count_skipped()
        plain, adapters = layers.merge_adapters(self.model, parallel.copy_weights(self.model))
        return {
            "episode": self.episode,
            "batch": self.batch,
            "seconds": self.throughput.seconds,
            "scaler": self.guard.scaler.state_dict(),
            "guard": self.guard.state_dict(),
            "random": collectives.all_gather_object(grad_cache.random_state()),
            "balance": {**self.balance.means} if self.balance is not None else {},
            **self.prototypes.state_dict(),
            "adapters": adapters,
            "model": plain,
            "optimizer": parallel.copy_moments(self.model, self.guard.optimizer),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called, with tensors on the model's device.

        With another number of ranks than before, random states start from the seed again.
        """
        whole = layers.unmerge_adapters(self.model, state["model"], state.get("adapters", {}))
        parallel.load_weights(self.model, whole)
        parallel.load_moments(self.model, self.guard.optimizer, state["optimizer"])
        self.episode, self.batch = int(state["episode"]), int(state["batch"])
        self.throughput.seconds = float(state["seconds"])
        if state["scaler"]:
            self.guard.scaler.load_state_dict(state["scaler"])
        self.guard.load_state_dict(state["guard"])
        if len(state["random"]) == world_size():
            grad_cache.set_random_state(state["random"][collectives.rank()])
        if self.balance is not None:
            self.balance.means = dict(state["balance"])
        self.prototypes.load_state_dict(state)


def measure_recall(
    embeddings: Embeddings, batch: Batch, checksums: dict[str, str]
) -> Float[Tensor, ""]:
    """The share of images and texts whose nearest text or image is of their pair, or of a pair with
    an equal image or caption. `checksums` of images by sample id, all transformed alike, grow."""
    image, text = embeddings.image_features.detach(), embeddings.text_features.detach()
    captions = len(batch.sample_id) // len(batch.image)
    for pixels, name in zip(batch.image, batch.sample_id[::captions], strict=True):
        if name not in checksums:
            checksums[name] = checksum(pixels.contiguous().cpu().numpy().tobytes())
    same = torch.zeros(len(image), len(text), dtype=torch.bool, device=image.device)
    for names in ([checksums[name] for name in batch.sample_id], batch.captions):
        numbers = {name: number for number, name in enumerate(names)}
        keys = torch.tensor([numbers[name] for name in names], device=image.device)
        same |= keys[:, None] == keys
    similarity = image.float() @ text.float().T
    nearest = similarity.argmax(1)[:, None], similarity.argmax(0)[:, None]
    return torch.cat([same.gather(1, rows) for rows in nearest]).float().mean()
