"""The features that are clustered, and the prototype of each sample of a batch.

`ExtractedFeatures` follows the paper: it passes over each episode before training on it.
`QueuedFeatures` keeps what training saw last, and needs no pass of its own.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protoclip.data.loader import Batch, Packed
from protoclip.data.sampler import Episode
from protoclip.distributed import collectives
from protoclip.distributed.collectives import rank, world_size
from protoclip.encode.store import hash_ids
from protoclip.encode.teachers import TeacherFeatures
from protoclip.models.protoclip import Embeddings, ProtoCLIP, evaluation_mode
from protoclip.prototypes.kmeans import KMeans, nearest

Assignments = dict[str, Int[Tensor, " b"]]


@dataclass(frozen=True, kw_only=True)
class EpisodeFeatures:
    """Projections and external teachers' features, one row per sample; NaN if a teacher has none.

    `keys` are hashes of the sample ids. Each of several ranks has a part of the episode's
    rows, at these `positions`.
    """

    image: Float[Tensor, "m p"]
    text: Float[Tensor, "m p"]
    teachers: Mapping[str, Float[Tensor, "m _"]]
    keys: Int[Tensor, " m"]
    positions: Int[Tensor, " m"] | None = None


@dataclass(kw_only=True)
class ExtractedFeatures:
    """Features by one pass over an episode, with the model in evaluation mode (as in the paper)."""

    model: ProtoCLIP
    batches: Callable[[Episode], Iterable[Batch]]
    teachers: dict[str, TeacherFeatures]
    autocast: Callable[[], AbstractContextManager[object]]
    # Pass a pair that an episode repeats through the model once. Needs unique sample ids and a
    # transform without random draws.
    each_pair_once: bool = True
    # Images that pass through the model at once; unset for the whole batch.
    micro_batch_size: int | None = None
    # Hashes of the sample ids that were clustered, in the order of the episode, and the rows in
    # ascending order of these.
    keys: Int[Tensor, " m"] | None = field(default=None, init=False)
    order: Int[Tensor, " m"] | None = field(default=None, init=False)
    # Pairs of this rank that were trained on since and were not among these.
    unknown: int | Tensor = field(default=0, init=False)

    def features(self, episode: Episode) -> EpisodeFeatures:
        """Features of the episode's samples.

        Raises:
            ValueError: A projection is not finite. Every rank raises.
        """
        images, texts = list[Tensor](), list[Tensor]()
        positions, sample_ids = [], []
        passed: dict[tuple[str, bytes], int] = {}
        rows, number = [], 0
        with evaluation_mode(self.model):
            for batch in self.batches(episode):
                new, image, text = [], batch.image, batch.text
                per_image = len(text) // len(image)  # captions of an image
                for row, sample_id in enumerate(batch.sample_id[::per_image]):
                    visit = (
                        sample_id,
                        b"".join(batch.captions[row * per_image : (row + 1) * per_image]),
                    )
                    if visit not in passed or not self.each_pair_once:
                        passed[visit], number = number, number + 1
                        new.append(row)
                    rows += [passed[visit] * per_image + caption for caption in range(per_image)]
                parts = -(-len(image) // (self.micro_batch_size or len(image)))
                if len(new) < len(image):
                    # A sharded model needs every rank in every pass: a pair a part at least.
                    filled = new + [0] * (parts - len(new))
                    passed_rows = Packed.pack({"rows": torch.tensor(filled)})
                    chosen = passed_rows.send(image.device)["rows"]
                    image = image[chosen]
                    text = text.view(-1, per_image, *text.shape[1:])[chosen].flatten(0, 1)
                made = [
                    self._projections(some, words)
                    for some, words in zip(
                        torch.tensor_split(image, parts),
                        text.view(-1, per_image, *text.shape[1:]).tensor_split(parts),
                        strict=True,
                    )
                ]
                for rows_so_far, of_parts in zip(
                    (images, texts), zip(*made, strict=True), strict=True
                ):
                    rows_so_far.append(torch.cat(of_parts)[: len(new) * per_image])
                positions.append(batch.position)
                sample_ids += batch.sample_id
        image, text = torch.cat(images)[rows], torch.cat(texts)[rows]
        return self._with_teachers(image, text, sample_ids, torch.cat(positions))

    def _projections(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Of images, and of their captions `(b, each, c)`: a row a caption."""
        with self.autocast():
            embeddings = self.model(image, text.flatten(0, 1)).paired()
        return embeddings.image_projections, embeddings.text_projections

    def _with_teachers(
        self, image: Tensor, text: Tensor, sample_ids: list[str], positions: Tensor
    ) -> EpisodeFeatures:
        """These projections, checked, beside the teachers' features of the same samples."""
        finite = bool((torch.isfinite(image) & torch.isfinite(text)).all())
        collectives.raise_on_all_ranks(lambda: require_finite(finite))
        return EpisodeFeatures(
            image=image,
            text=text,
            teachers={
                name: teacher.whiten_rows(teacher.rows(sample_ids).to(image.device))
                for name, teacher in self.teachers.items()
            },
            keys=torch.from_numpy(hash_ids(sample_ids).view(np.int64)).to(image.device),
            positions=positions.to(image.device) if world_size() > 1 else None,
        )

    def assign(
        self, batch: Batch, embeddings: Embeddings, clusters: Mapping[str, KMeans]
    ) -> Assignments:
        """Prototype of each sample in each space; -1 where a teacher has no features for it."""
        assignments = self._assign(batch, embeddings, clusters)
        for name, teacher in self.teachers.items():
            if name in clusters:
                centroids = clusters[name].centroids
                rows = teacher.whiten_rows(batch.features[name]).to(centroids)
                finite = torch.isfinite(rows).all(1)
                prototypes = nearest(torch.where(finite[:, None], rows, 0.0), centroids)[0]
                assignments[name] = torch.where(finite, prototypes, -1)
        return assignments

    def extracts_after(self, stage_projects: bool) -> bool:
        """Whether `features` will pass over an episode, after one whose stage projects or not."""
        return True

    def _assign(
        self, batch: Batch, embeddings: Embeddings, clusters: Mapping[str, KMeans]
    ) -> Assignments:
        """Prototypes of the projections: those that clustering gave them."""
        spaces, rows = clusters.keys() - self.teachers.keys(), self._rows(batch)
        if not spaces:
            return {}
        self.unknown = self.unknown + (rows < 0).sum()
        return {
            space: torch.where(rows < 0, -1, clusters[space].assignments[rows])
            for space in sorted(spaces)
        }

    def _rows(self, batch: Batch) -> Int[Tensor, " n"]:
        """The row of each pair among those that were clustered, or -1.

        It is the position, unless a stream lost a shard in one of the two passes.
        """
        if self.keys is None or self.order is None:  # checkpoints up to version 1.0.0 have none
            return batch.position
        first = torch.searchsorted(self.keys, batch.keys, sorter=self.order)
        caption = batch.position % (len(batch.text) // len(batch.image))
        by_id = self.order[(first + caption).clamp(max=len(self.order) - 1)]
        at_position = self.keys[batch.position] == batch.keys
        rows = torch.where(at_position, batch.position, by_id)
        return torch.where(self.keys[rows] == batch.keys, rows, -1)

    def remember(self, keys: Int[Tensor, " m"] | None) -> None:
        """Keep the hashes of the sample ids that were clustered, in the order of the episode."""
        self.keys, self.unknown = keys, 0
        self.order = None if keys is None else keys.argsort(stable=True)

    def observe(self, batch: Batch, embeddings: Embeddings, taken: Bool[Tensor, ""]) -> None:
        """Called after each training step. Extraction keeps nothing of it."""

    def state_dict(self) -> dict[str, Any]:
        return {"keys": self.keys}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.remember(state.get("keys"))


def require_finite(finite: bool) -> None:
    if not finite:
        raise ValueError(
            "projections of this episode are not finite: training has diverged; go on with "
            "--run.precision fp32 --resume auto, unless it ran in fp32, or start again "
            "with a lower optim.learning_rate or optim.heads_lr_scale"
        )


@dataclass(kw_only=True)
class QueuedFeatures(ExtractedFeatures):
    """The last `size` projections that training saw, and extraction while these are too few.

    Each rank keeps its own samples. They are numbered batch by batch, and within a batch rank by
    rank. A sample's prototype is the one nearest to its current projection, since projections move
    during an episode and prototypes do not. `pushed` and `batch_size` count this rank's samples.
    `size`, that of all ranks, is a multiple of the batch size: a new batch overwrites the oldest.

    The device knows which steps were taken, and so where the next batch goes. The host hears of it
    when the queue is read.
    """

    size: int
    pushed: int = 0
    batch_size: int = 0
    sample_ids: list[str] = field(default_factory=list)
    image: Float[Tensor, "n p"] | None = None
    text: Float[Tensor, "n p"] | None = None
    _unread: list[tuple[list[str], Tensor]] = field(default_factory=list)  # of steps; whether taken
    _next: Tensor | None = None  # rows for the next batch, on the device

    def features(self, episode: Episode) -> EpisodeFeatures:
        self._read()
        if self.image is None or self.text is None or self.pushed < len(self.sample_ids):
            return super().features(episode)
        return self._with_teachers(self.image, self.text, self.sample_ids, self._positions())

    def extracts_after(self, stage_projects: bool) -> bool:
        return not stage_projects  # the queue is one episode long

    def _assign(
        self, batch: Batch, embeddings: Embeddings, clusters: Mapping[str, KMeans]
    ) -> Assignments:
        projections = {"image": embeddings.image_projections, "text": embeddings.text_projections}
        return {
            space: nearest(rows.detach(), clusters[space].centroids)[0]
            for space, rows in projections.items()
            if space in clusters and rows is not None
        }

    def observe(self, batch: Batch, embeddings: Embeddings, taken: Bool[Tensor, ""]) -> None:
        image, text = embeddings.image_projections, embeddings.text_projections
        if image is None or text is None:
            return
        room = self.size // world_size()
        if self.image is None or self.text is None:
            self.batch_size = len(image)
            self.image = image.new_zeros(room, image.shape[1], dtype=torch.float32)
            self.text = torch.zeros_like(self.image)
            self.sample_ids = [""] * room
        if self._next is None:
            rows = torch.arange(len(image), device=image.device)
            self._next = (self.pushed + rows) % room
        for queue, new in ((self.image, image), (self.text, text)):
            queue[self._next] = torch.where(taken, new.detach().to(queue), queue[self._next])
        self._next = (self._next + taken * len(image)) % room
        self._unread.append((batch.sample_id, taken))

    def _read(self) -> None:
        """Count the samples of the steps that were taken since the last call."""
        unread, self._unread = self._unread, []
        flags = torch.stack([taken for _, taken in unread]).tolist() if unread else []
        for (sample_ids, _), taken in zip(unread, flags, strict=True):
            if taken:
                first = self.pushed % len(self.sample_ids)
                self.sample_ids[first : first + len(sample_ids)] = sample_ids
                self.pushed += len(sample_ids)

    def _positions(self) -> Int[Tensor, " n"]:
        rows = torch.arange(self.size // world_size())
        batch = rows.div(self.batch_size, rounding_mode="floor")
        return rows + (batch * (world_size() - 1) + rank()) * self.batch_size

    def state_dict(self) -> dict[str, Any]:
        """The samples of all ranks in the order of their numbers. Collective."""
        self._read()
        if self.image is None or self.text is None:
            return {}
        order = collectives.all_gather(self._positions().to(self.image.device)).argsort()
        names = [name for part in collectives.all_gather_object(self.sample_ids) for name in part]
        return {
            "pushed": self.pushed * world_size(),
            "batch_size": self.batch_size * world_size(),
            "sample_ids": [names[index] for index in order.tolist()],
            "image": collectives.all_gather(self.image)[order],
            "text": collectives.all_gather(self.text)[order],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take this rank's samples from the state, which any number of ranks may have made."""
        if not state:
            return
        device = next(self.model.parameters()).device
        self.pushed = state["pushed"] // world_size()
        self.batch_size = state["batch_size"] // world_size()
        self._next, self._unread = None, []
        positions = self._positions()
        self.sample_ids = [state["sample_ids"][position] for position in positions.tolist()]
        self.image, self.text = (state[name][positions].to(device) for name in ("image", "text"))
