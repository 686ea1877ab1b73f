"""What a step copies to the device, counted on `meta`, where waiting for a result is an error."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from copying import Copies
from protoclip.data.groups import Key
from protoclip.data.loader import EpisodeLoader
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.sampler import Episode
from protoclip.data.transforms import light_transform
from protoclip.features.store import StoredFeatures
from protoclip.losses.objective import LossWeights, objective
from protoclip.losses.positives import Positives
from protoclip.losses.prototypical import Target
from protoclip.models import loading
from protoclip.prototypes.features import ExtractedFeatures
from protoclip.prototypes.kmeans import KMeans
from protoclip.testing import tiny_model, tiny_pairs

META, NUMBER, PROTOTYPES = torch.device("meta"), 64, 5


@pytest.mark.parametrize("positives", ["masked", "shared"])
def test_a_step_copies_its_batch_at_once(
    monkeypatch: pytest.MonkeyPatch, positives: Positives
) -> None:
    """Two copies a batch, with augmentation, a whitened teacher and groups of positives; none from
    then to the loss."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # `meta` has none
    monkeypatch.setattr(torch, "autocast", lambda kind, **settings: autocast("cpu", **settings))
    pairs = ImageTextPairs(tiny_pairs(), name="tiny")
    model = loading.model(tiny_model(), seed=0).to(META)
    rows = np.random.default_rng(0).normal(size=(len(pairs), 24)).astype(np.float16)
    teacher = StoredFeatures.in_memory(
        name="bert", sample_ids=list(pairs.sample_ids()), features=rows
    )
    teacher.whiten(8)
    loader = EpisodeLoader(
        pairs=pairs,
        tokenizer=loading.tokenizer(tiny_model()),
        transform=light_transform(size=32, mean=(0.5,) * 3, std=(0.5,) * 3),
        batch_size=16,
        seed=0,
        device=META,
        features_of={"bert": teacher.rows},
    )
    source = ExtractedFeatures(
        model=model, batches=loader.batches, teachers={"bert": teacher}, autocast=nullcontext
    )

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=META)

    width = tiny_model().heads.projection_dim
    clusters, targets = {}, {}
    for space in ("image", "text", "bert"):
        clusters[space] = KMeans(
            centroids=empty(PROTOTYPES, 8 if space == "bert" else width),
            assignments=empty(NUMBER).long(),
            inertia=0.0,
            history=(),
        )
        for student in {"image", "text"} - {space}:
            targets[student, space] = Target(
                classes=empty(PROTOTYPES, width),
                class_index=empty(PROTOTYPES).long(),
                lookup=empty(PROTOTYPES, width),
            )
    episode = Episode(index=0, rows=torch.arange(NUMBER))
    by: tuple[Key, ...] = ("caption", "image")
    batches, number = loader.batches(episode, with_features=True, group_by=by), 0
    weights = LossWeights(teachers={"bert": 1.0}, positives=positives)
    for number in range(1, 5):
        with Copies() as of_batch:
            batch = next(batches)
        with Copies() as of_step:
            embeddings = model(batch.image, batch.text)
            assignments = source.assign(batch, embeddings, clusters)
            losses, _ = objective(
                embeddings, targets, assignments, weights=weights, groups=batch.groups
            )
            torch.stack(list(losses.values())).sum().backward()
        assert len(losses) == 1 + 4
        if number > 1:  # constants, such as the transform's mean, were copied once
            assert (len(of_batch.names), of_step.names) == (2, [])
    assert number == 4
