"""What is clustered, and which prototype each sample of a batch belongs to: two sources of both.

`ExtractedFeatures` is the paper's: a pass over each episode before it is trained. `QueuedFeatures`
keeps what training saw last and needs no pass of its own.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.data.loader import Batch
from protoclip.data.sampler import Episode
from protoclip.distributed.collectives import (
    all_gather,
    all_gather_object,
    any_rank,
    rank,
    world_size,
)
from protoclip.models.protoclip import Embeddings, ProtoCLIP
from protoclip.prototypes.kmeans import nearest
from protoclip.prototypes.targets import Prototypes
from protoclip.teachers.store import TeacherFeatures

Assignments = dict[str, Int[Tensor, " b"]]


@dataclass(frozen=True, kw_only=True)
class EpisodeFeatures:
    """What is clustered: both modalities' projections, and each external teacher's features.

    Row `i` of each is one sample: the one at position `i` of the episode where the episode was
    extracted. A sample that a teacher has no features of is a row of NaN there. With several
    processes each has the rows that it made, and `positions` are their places among all.
    """

    image: Float[Tensor, "m p"]
    text: Float[Tensor, "m p"]
    teachers: Mapping[str, Float[Tensor, "m _"]]
    positions: Int[Tensor, " m"] | None = None


@torch.inference_mode()
def extract_features(
    model: ProtoCLIP,
    batches: Iterable[Batch],
    *,
    teachers: Mapping[str, TeacherFeatures],
    autocast: Callable[[], AbstractContextManager[object]],
    each_pair_once: bool = True,
) -> EpisodeFeatures:
    """One pass over an episode with the model in evaluation mode (paper, online episodic training).

    Args:
        model: Its training mode is restored afterwards.
        batches: The episode's batches in order.
        teachers: External teachers by name.
        autocast: Makes the context that forward passes run in.
        each_pair_once: Whether a pair that an episode holds several times, as one drawn with
            replacement may, passes once: where its view is the same whenever it comes, and ids are
            unique, which those of a stream need not be.

    Raises:
        ValueError: A projection is not finite.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    images, texts, positions, sample_ids = [], [], [], []
    passed: dict[tuple[str, bytes], int] = {}
    rows: list[int] = []
    number = 0
    try:
        for batch in batches:
            tokens = batch.text.cpu().numpy()
            fresh = []
            for place, pair in enumerate(zip(batch.sample_id, map(bytes, tokens), strict=True)):
                if pair not in passed or not each_pair_once:
                    passed[pair], number = number, number + 1
                    fresh.append(place)
                rows.append(passed[pair])
            # One at least, since a sharded model needs all processes in every pass.
            shown = fresh or [0]
            with autocast():
                embeddings = model(batch.image[shown], batch.text[shown])
            images.append(embeddings.image_projections[: len(fresh)])
            texts.append(embeddings.text_projections[: len(fresh)])
            positions.append(batch.position)
            sample_ids += batch.sample_id
    finally:
        for module, mode in modes.items():
            module.training = mode
    image, text = torch.cat(images)[rows], torch.cat(texts)[rows]
    require_finite(image, text)
    return EpisodeFeatures(
        image=image,
        text=text,
        teachers={
            name: teacher.lookup(sample_ids).to(image.device) for name, teacher in teachers.items()
        },
        positions=torch.cat(positions) if world_size() > 1 else None,
    )


def require_finite(image: Tensor, text: Tensor) -> None:
    """Raise where projections are not finite, in all processes if in one."""
    if any_rank([not bool((torch.isfinite(image) & torch.isfinite(text)).all())])[0]:
        raise ValueError(
            "projections of this episode are not finite: training has diverged; "
            "lower optim.learning_rate or train in fp32"
        )


def teacher_assignments(
    teachers: Mapping[str, TeacherFeatures],
    batch: Batch,
    prototypes: Mapping[str, Prototypes],
) -> Assignments:
    """Nearest prototype of each sample's teacher features, by sample id; -1 where it has none."""
    found = {}
    for name, teacher in teachers.items():
        if name not in prototypes:
            continue
        centroids = prototypes[name].centroids
        rows = teacher.lookup(batch.sample_id).to(centroids)
        known = torch.isfinite(rows).all(1)
        nearest_ = nearest(torch.where(known[:, None], rows, 0.0), centroids)[0]
        found[name] = torch.where(known, nearest_, -1)
    return found


@dataclass(frozen=True, kw_only=True)
class ExtractedFeatures:
    """Feature source of the paper: a pass of its own over each episode before it is trained.

    Attributes are arguments of `extract_features`.
    """

    model: ProtoCLIP
    batches: Callable[[Episode], Iterable[Batch]]
    teachers: Mapping[str, TeacherFeatures]
    autocast: Callable[[], AbstractContextManager[object]]
    each_pair_once: bool = True

    def features(self, episode: Episode) -> EpisodeFeatures:
        return extract_features(
            self.model,
            self.batches(episode),
            teachers=self.teachers,
            autocast=self.autocast,
            each_pair_once=self.each_pair_once,
        )

    def assign(
        self, batch: Batch, embeddings: Embeddings, prototypes: Mapping[str, Prototypes]
    ) -> Assignments:
        """Where clustering put each sample of a batch, in each space."""
        own = {
            space: found.assignments[batch.position]
            for space, found in prototypes.items()
            if space not in self.teachers
        }
        return own | teacher_assignments(self.teachers, batch, prototypes)

    def observe(self, batch: Batch, embeddings: Embeddings) -> None:
        """Nothing to keep: every episode has a pass of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class QueuedRows:
    """Samples of a queue, and the slots that they are in."""

    slots: Int[Tensor, " n"]
    sample_ids: list[str]
    image: Float[Tensor, "n p"]
    text: Float[Tensor, "n p"]


class FeatureQueue:
    """Projections and sample ids of the last samples that training saw, first in, first out.

    With several processes each keeps what it made of the last `size` samples of all. Samples are
    numbered as one process would see them, batch by batch and in a batch rank by rank; sample
    number `n` is in slot `n % size`.

    Args:
        size: Samples kept by all processes together.

    Attributes:
        pushed: Samples that this process took in.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.pushed = 0
        self.batch_size = 0
        self.sample_ids: list[str] = []
        self.image: Tensor | None = None
        self.text: Tensor | None = None

    @property
    def full(self) -> bool:
        return self.pushed * world_size() >= self.size

    def push(
        self, sample_ids: list[str], image: Float[Tensor, "b p"], text: Float[Tensor, "b p"]
    ) -> None:
        """Take in a batch; once the queue is full, the oldest samples make room.

        With several processes all batches have one size.
        """
        if self.image is None or self.text is None:
            self._make_room(len(sample_ids), image)
        assert self.image is not None
        assert self.text is not None
        self.pushed += len(sample_ids)
        # Of a batch larger than the queue the last samples alone: a slot is written once.
        kept = min(len(sample_ids), len(self.image))
        place = torch.arange(self.pushed - kept, self.pushed) % len(self.image)
        self.image[place] = image[len(image) - kept :].detach().float()
        self.text[place] = text[len(text) - kept :].detach().float()
        ids = sample_ids[len(sample_ids) - kept :]
        for slot, sample_id in zip(place.tolist(), ids, strict=True):
            self.sample_ids[slot] = sample_id

    def _make_room(self, batch_size: int, like: Float[Tensor, "_ p"]) -> None:
        self.batch_size, processes = batch_size, world_size()
        # The last `size` samples of all reach into one batch more than would be filled by them.
        batches = -(-self.size // (batch_size * processes))
        room = self.size if processes == 1 else batches * batch_size
        self.image = like.new_zeros(room, like.shape[1], dtype=torch.float32)
        self.text = torch.zeros_like(self.image)
        self.sample_ids = [""] * room

    def _numbers(self, own: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Among all samples, the number of those that were this process's number `own`."""
        if world_size() == 1:
            return own
        batch = own.div(self.batch_size, rounding_mode="floor")
        return own + (batch * (world_size() - 1) + rank()) * self.batch_size

    def contents(self) -> QueuedRows:
        """This process's samples among the last `size` of all, in the order of their slots."""
        assert self.image is not None
        assert self.text is not None
        own = torch.arange(max(0, self.pushed - len(self.image)), self.pushed)
        numbers = self._numbers(own)
        own = own[numbers >= self.pushed * world_size() - self.size]
        slots, order = (self._numbers(own) % self.size).sort()
        place = own[order] % len(self.image)
        return QueuedRows(
            slots=slots,
            sample_ids=[self.sample_ids[slot] for slot in place.tolist()],
            image=self.image[place],
            text=self.text[place],
        )

    def fill(self, rows: QueuedRows, *, seen: int, batch_size: int) -> None:
        """Take over the samples of all processes after `seen`; each process keeps its own.

        Args:
            rows: In the order of their slots.
            seen: Samples that all processes took in.
            batch_size: Samples of a batch of all processes, any number where there is one.
        """
        processes = world_size()
        self.pushed = seen // processes
        self._make_room(batch_size // processes, rows.image)
        assert self.image is not None
        assert self.text is not None
        own = torch.arange(max(0, self.pushed - len(self.image)), self.pushed)
        numbers = self._numbers(own)
        own = own[numbers >= seen - self.size]
        place = own % len(self.image)
        slots = self._numbers(own) % self.size
        self.image[place], self.text[place] = rows.image[slots], rows.text[slots]
        for to, slot in zip(place.tolist(), slots.tolist(), strict=True):
            self.sample_ids[to] = rows.sample_ids[slot]


@dataclass(frozen=True, kw_only=True)
class QueuedFeatures:
    """Feature source without a pass of its own: what training saw last is clustered.

    A sample's prototype is the one nearest to its current projection, so that it follows the model
    while the prototypes stay for an episode.

    Attributes:
        queue: Filled at every step of a stage that projects.
        teachers: External teachers by name.
        fallback: Used while the queue is not full, as at the start of a run without warm-up.
    """

    queue: FeatureQueue
    teachers: Mapping[str, TeacherFeatures]
    fallback: ExtractedFeatures

    def features(self, episode: Episode) -> EpisodeFeatures:
        if not self.queue.full:
            return self.fallback.features(episode)
        held = self.queue.contents()
        require_finite(held.image, held.text)
        return EpisodeFeatures(
            image=held.image,
            text=held.text,
            teachers={
                name: teacher.lookup(held.sample_ids).to(held.image.device)
                for name, teacher in self.teachers.items()
            },
            positions=held.slots.to(held.image.device) if world_size() > 1 else None,
        )

    def assign(
        self, batch: Batch, embeddings: Embeddings, prototypes: Mapping[str, Prototypes]
    ) -> Assignments:
        """Nearest prototype of each sample's projection, and of its teacher features."""
        own = {"image": embeddings.image_projections, "text": embeddings.text_projections}
        found = {
            space: nearest(rows.detach(), prototypes[space].centroids)[0]
            for space, rows in own.items()
            if space in prototypes and rows is not None
        }
        return found | teacher_assignments(self.teachers, batch, prototypes)

    def observe(self, batch: Batch, embeddings: Embeddings) -> None:
        """Keep what the step saw, where the stage projects."""
        image, text = embeddings.image_projections, embeddings.text_projections
        if image is not None and text is not None:
            self.queue.push(batch.sample_id, image, text)

    def state_dict(self) -> dict[str, Any]:
        """The queue's samples of all ranks, in the order of their slots. Collective."""
        queue = self.queue
        if queue.image is None:
            return {}
        held = queue.contents()
        order = all_gather(held.slots.to(held.image.device)).argsort()
        names = [name for part in all_gather_object(held.sample_ids) for name in part]
        return {
            "seen": queue.pushed * world_size(),
            "batch_size": queue.batch_size * world_size(),
            "sample_ids": [names[place] for place in order.tolist()],
            "image": all_gather(held.image)[order],
            "text": all_gather(held.text)[order],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            image, text = state["image"], state["text"]
            rows = QueuedRows(
                slots=torch.arange(len(image)),
                sample_ids=state["sample_ids"],
                image=image,
                text=text,
            )
            self.queue.fill(rows, seen=state["seen"], batch_size=state["batch_size"])
