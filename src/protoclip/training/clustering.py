"""The prototypes of an episode: K-means of each space, and the targets that follow from it.

How K-means works is in `prototypes/kmeans.py`, which spaces there are in `prototypes/targets.py`,
and what is clustered in `prototypes/features.py`.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from protoclip.config import HALVES, Config
from protoclip.data.loader import Batch
from protoclip.data.sampler import Episode
from protoclip.distributed.collectives import all_reduce, rank
from protoclip.losses.prototypical import Target
from protoclip.models.protoclip import Embeddings
from protoclip.prototypes.features import Assignments, ExtractedFeatures
from protoclip.prototypes.kmeans import KMeans, kmeans
from protoclip.prototypes.nearest import nearest
from protoclip.prototypes.targets import cluster_spaces, in_order
from protoclip.terminal import say
from protoclip.training.sizes import PAIRS_A_PROTOTYPE


class Clusterings:
    """Clusters one space after the other. Frozen halves never change, so once for a run."""

    def __init__(self, config: Config, *, captions: int = 1) -> None:
        self.config, self.captions = config, captions  # of an image, each a row
        self.fixed: dict[str, KMeans] = {}  # of the halves

    def __call__(self, space: str, rows: Tensor, positions: Tensor | None) -> KMeans:
        """The clusters of this rank's rows, at these positions of the episode. Collective."""
        settings, teacher = self.config.prototypes, self.config.external_teachers.get(space)
        number = settings.number if teacher is None else teacher.number
        if (fixed := self.fixed.get(space)) is not None:
            return replace(fixed, assignments=nearest(rows, fixed.centroids)[0])
        known = int(all_reduce(torch.tensor(len(rows), device=rows.device)))
        # A teacher that knows a part of the pairs has a tenth of these, or its number's share.
        pairs = known // self.captions
        share = number * pairs // self.config.episodes.size
        number = max(share, min(number, pairs // PAIRS_A_PROTOTYPE), 2)
        made = kmeans(
            rows,
            min(number, known),
            iterations=settings.iterations,
            restarts=settings.restarts,
            init=settings.init,
            seed=self.config.run.seed,
            positions=positions,
        )
        self.keep({space: made})
        return made

    def keep(self, clusters: Mapping[str, KMeans]) -> None:
        """Take those of the halves for the rest of the run."""
        teachers = self.config.external_teachers
        halves = {name for name, each in teachers.items() if each.features in HALVES.values()}
        self.fixed |= {space: made for space, made in clusters.items() if space in halves}


@dataclass(kw_only=True)
class EpisodePrototypes:
    """Makes the prototypes of each episode, and looks up those of each batch.

    With several ranks every method is collective.

    Attributes:
        source: Gives the features to cluster, and the prototypes that samples belong to.
        cluster: K-means of one space.
        make_targets: `losses.prototypical.make_targets` with its settings.
        groups_modalities: Cluster the projections, too, beside what teachers know.
        targets: By `(student, teacher)`, of the episode under way; empty without prototypes.
        clusters: Of the episode under way, or else of the last one that had prototypes.
        reached: By space, 1 for each prototype that a sample of this episode was assigned to. The
            first entry is for samples without an assignment (-1).
    """

    source: ExtractedFeatures
    cluster: Clusterings
    make_targets: Callable[..., dict[tuple[str, str], Target]]
    groups_modalities: bool
    clusters: dict[str, KMeans] = field(default_factory=dict)
    targets: dict[tuple[str, str], Target] = field(default_factory=dict)
    reached: dict[str, Tensor] = field(default_factory=dict)

    def make(self, episode: Episode) -> dict[str, float]:
        """Features, clusters and back-translated targets of an episode; returns metrics."""
        times = [time.monotonic()]
        self.clusters = {}
        features = self.source.features(episode)
        times.append(time.monotonic())
        spaces = dict(features.teachers)
        if self.groups_modalities:
            spaces = {"image": features.image, "text": features.text, **spaces}
        self.clusters = cluster_spaces(spaces, self.cluster, features.positions)
        times.append(time.monotonic())
        self.source.remember(in_order(features.keys, features.positions))
        self.targets = self.make_targets(
            self.clusters,
            image_projections=features.image,
            text_projections=features.text,
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

    def assign(self, batch: Batch, embeddings: Embeddings) -> Assignments:
        """Prototype of each sample in each space; none without prototypes."""
        return self.source.assign(batch, embeddings, self.clusters) if self.targets else {}

    def record(self, assignments: Assignments, taken: Tensor) -> None:
        """Mark the prototypes that a step reached, if it was taken."""
        for space, prototypes in assignments.items():
            marks, entries = self.reached[space], prototypes + 1
            marks[entries] = torch.maximum(marks[entries], taken.to(marks))

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
            "clusters": {space: vars(each) for space, each in self.clusters.items()},
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
        self.cluster.keep(self.clusters)
        self.targets = {(to, by): Target(**fields) for to, by, fields in state["targets"]}
        self.reached = dict(state["reached"])
