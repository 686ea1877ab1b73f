"""Projections of an episode's samples, and the teachers' features of them."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.data.episodes import Episode
from protoclip.data.loader import Batch
from protoclip.models.protoclip import ProtoCLIP
from protoclip.teachers import TeacherFeatures


@dataclass(frozen=True, kw_only=True)
class EpisodeFeatures:
    """What is clustered: both modalities' projections, and each external teacher's features.

    Row `i` of each is the sample at position `i` of the episode.
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
    if not bool((torch.isfinite(image) & torch.isfinite(text)).all()):
        raise ValueError(
            "projections of this episode are not finite: training has diverged; "
            "lower optim.learning_rate or train in fp32"
        )
    return EpisodeFeatures(
        image=image,
        text=text,
        teachers={
            name: teacher.lookup(sample_ids).to(image.device) for name, teacher in teachers.items()
        },
    )


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
