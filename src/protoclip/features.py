"""What is clustered, and which prototype each sample of a batch belongs to: two sources of both.

`ExtractedFeatures` is the paper's: a pass over each episode before it is trained. `QueuedFeatures`
keeps what training saw last and needs no pass of its own.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.clustering import nearest
from protoclip.data.episodes import Episode
from protoclip.data.loader import Batch
from protoclip.models.protoclip import Embeddings, ProtoCLIP
from protoclip.prototypes import Prototypes
from protoclip.teachers import TeacherFeatures

Assignments = dict[str, Int[Tensor, " b"]]


@dataclass(frozen=True, kw_only=True)
class EpisodeFeatures:
    """What is clustered: both modalities' projections, and each external teacher's features.

    Row `i` of each is one sample: the one at position `i` of the episode where the episode was
    extracted. A sample that a teacher has no features of is a row of NaN there.
    """

    image: Float[Tensor, "m p"]
    text: Float[Tensor, "m p"]
    teachers: Mapping[str, Float[Tensor, "m _"]]


@torch.inference_mode()
def extract_features(
    model: ProtoCLIP,
    batches: Iterable[Batch],
    *,
    teachers: Mapping[str, TeacherFeatures],
    autocast: Callable[[], AbstractContextManager[object]],
) -> EpisodeFeatures:
    """One pass over an episode with the model in evaluation mode (paper, online episodic training).

    Args:
        model: Its training mode is restored afterwards.
        batches: The episode's batches in order, in the view that is to be clustered.
        teachers: External teachers by name.
        autocast: Makes the context that forward passes run in.

    Raises:
        ValueError: A projection is not finite.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    images, texts, sample_ids = [], [], []
    try:
        for batch in batches:
            with autocast():
                embeddings = model(batch.image, batch.text)
            images.append(embeddings.image_projections)
            texts.append(embeddings.text_projections)
            sample_ids += batch.sample_id
    finally:
        for module, mode in modes.items():
            module.training = mode
    image, text = torch.cat(images), torch.cat(texts)
    require_finite(image, text)
    return EpisodeFeatures(
        image=image,
        text=text,
        teachers={
            name: teacher.lookup(sample_ids).to(image.device) for name, teacher in teachers.items()
        },
    )


def require_finite(image: Tensor, text: Tensor) -> None:
    if not bool((torch.isfinite(image) & torch.isfinite(text)).all()):
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
    """Feature source of the paper: a pass of its own over each episode before it is trained."""

    model: ProtoCLIP
    batches: Callable[[Episode], Iterable[Batch]]
    teachers: Mapping[str, TeacherFeatures]
    autocast: Callable[[], AbstractContextManager[object]]

    def features(self, episode: Episode) -> EpisodeFeatures:
        return extract_features(
            self.model,
            self.batches(episode),
            teachers=self.teachers,
            autocast=self.autocast,
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


class FeatureQueue:
    """Projections and sample ids of the last samples that training saw, first in, first out.

    Args:
        size: Samples kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.pushed = 0
        self.sample_ids: list[str] = []
        self.image: Tensor | None = None
        self.text: Tensor | None = None

    @property
    def full(self) -> bool:
        return self.pushed >= self.size

    def push(
        self, sample_ids: list[str], image: Float[Tensor, "b p"], text: Float[Tensor, "b p"]
    ) -> None:
        """Take in a batch; once the queue is full, the oldest samples make room."""
        if self.image is None or self.text is None:
            self.image = image.new_zeros(self.size, image.shape[1], dtype=torch.float32)
            self.text = torch.zeros_like(self.image)
            self.sample_ids = [""] * self.size
        place = torch.arange(self.pushed, self.pushed + len(sample_ids)) % self.size
        self.image[place] = image.detach().float()
        self.text[place] = text.detach().float()
        for slot, sample_id in zip(place.tolist(), sample_ids, strict=True):
            self.sample_ids[slot] = sample_id
        self.pushed += len(sample_ids)


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
        image, text = self.queue.image, self.queue.text
        if not self.queue.full or image is None or text is None:
            return self.fallback.features(episode)
        require_finite(image, text)
        return EpisodeFeatures(
            image=image,
            text=text,
            teachers={
                name: teacher.lookup(self.queue.sample_ids).to(image.device)
                for name, teacher in self.teachers.items()
            },
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
