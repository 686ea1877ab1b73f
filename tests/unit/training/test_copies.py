"""What a training step copies to the device, on `meta`, where waiting for a result is an error."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from copying import Copies
from protoclip.config import Config
from protoclip.data.captions import Key
from protoclip.data.loader import EpisodeLoader, Pass
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.sampler import Episode
from protoclip.data.transforms import light_transform
from protoclip.encode.teachers import TeacherFeatures
from protoclip.losses.balance import Balance
from protoclip.losses.objective import LossWeights
from protoclip.losses.prototypical import Target
from protoclip.models.protoclip import ProtoCLIP, TowerPair, grad_scaler
from protoclip.models.start import resolve_start
from protoclip.prototypes.features import ExtractedFeatures, QueuedFeatures
from protoclip.prototypes.kmeans import KMeans
from protoclip.training.optim import PROTOTYPICAL
from protoclip.training.trainer import EpisodePrototypes, Trainer
from protoclip.training.watch import NonFiniteGuard
from testing import build_model, tiny_model, tiny_pairs

META, NUMBER, BATCH, PROTOTYPES = torch.device("meta"), 32, 16, 5
WIDTH, TEACHER_WIDTH, WHITENED = tiny_model().heads.projection_dim, 24, 8
# What a step may do besides: weights of losses, and settings of the trainer.
MORE = {"positives": "shared", "keep": 1.0, "distil": {"bert": 1.0}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "extraction": ({}, {}),
    "queue, shared, keep, distil": (MORE, {"source": QueuedFeatures}),
    "micro-batches, strengths, keep, distil": (
        MORE,
        {"micro_batch_size": BATCH // 2, "balance": Balance()},
    ),
}


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device=META)


def teacher_of(pairs: ImageTextPairs) -> TeacherFeatures:
    rows = np.random.default_rng(0).normal(size=(len(pairs), TEACHER_WIDTH)).astype(np.float16)
    ids = list(pairs.sample_ids())
    teacher = TeacherFeatures.of_array(name="bert", sample_ids=ids, features=rows)
    teacher.whiten(WHITENED)
    return teacher


def trainer_of(
    model: ProtoCLIP, weights: LossWeights, source: ExtractedFeatures, **settings: Any
) -> Trainer:
    """A trainer amid an episode that has its prototypes."""
    # The fused AdamW of a run has no form for `meta`; this one asks the host nothing, either.
    optimizer = torch.optim.Adamax([{"params": [*model.parameters()], "scale": 1.0}])
    scaler = grad_scaler("fp32", META)
    trainer = Trainer(
        model=model,
        stage=lambda episode: PROTOTYPICAL,
        prototypes=EpisodePrototypes(config=Config(), source=source),
        weights=weights,
        schedule=lambda step: 0.1,
        guard=NonFiniteGuard(optimizer, scaler, Path("unused")),
        autocast=nullcontext,
        clip_norm=1.0,
        batches=NUMBER // BATCH,
        batch_size=BATCH,
        **{"micro_batch_size": None, **settings},
    )
    for space in ("image", "text", "bert"):
        trainer.prototypes.clusters[space] = KMeans(
            centroids=empty(PROTOTYPES, WHITENED if space == "bert" else WIDTH),
            assignments=empty(NUMBER).long(),
            inertia=0.0,
            history=(),
        )
        trainer.prototypes.reached[space] = empty(PROTOTYPES + 1)
        for student in {"image", "text"} - {space}:
            trainer.prototypes.targets[student, space] = Target(
                classes=empty(PROTOTYPES, WIDTH),
                class_index=empty(PROTOTYPES).long(),
                lookup=empty(PROTOTYPES, WIDTH),
            )
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_a_step_copies_its_batch_at_once(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Two copies a batch, with augmentation, a whitened teacher and groups of positives; none from
    then to the end of the optimizer's step."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # `meta` has none
    monkeypatch.setattr(torch, "autocast", lambda kind, **settings: autocast("cpu", **settings))
    of_losses, settings = CASES[case]
    pairs = ImageTextPairs(tiny_pairs(), name="tiny")
    model = build_model(tiny_model(), seed=0)
    if "distil" in of_losses:
        model.distils = {"bert": "text"}
    model = model.to(META)
    teacher = teacher_of(pairs)
    loader = EpisodeLoader(
        pairs=pairs,
        tokenizer=resolve_start(tiny_model()).tokenizer(),
        transform=light_transform(size=32, mean=(0.5,) * 3, std=(0.5,) * 3),
        batch_size=BATCH,
        seed=0,
        device=META,
        features_of={"bert": teacher.rows},
    )
    kind = settings.get("source", ExtractedFeatures)
    source = kind(
        model=model,
        batches=loader.batches,
        teachers={"bert": teacher},
        autocast=nullcontext,
        **({"size": NUMBER} if kind is QueuedFeatures else {}),
    )
    weights = LossWeights(teachers={"bert": 1.0}, **of_losses)
    start = TowerPair(build_model(tiny_model(), seed=0).towers).to(META) if weights.keep else None
    trainer = trainer_of(model, weights, **settings | {"source": source, "start": start})
    episode = Episode(index=0, rows=torch.arange(NUMBER))
    trainer.start_episode(episode)
    by: tuple[Key, ...] = ("caption", "image")
    batches = loader.batches(Pass(episode, with_features=True, group_by=by))
    for number in range(trainer.batches):
        with Copies() as of_batch:
            batch = next(batches)
        with Copies() as of_step:
            assert trainer.train_step(batch, detailed=False) == {}
        if number:  # constants, such as the transform's mean, were copied once
            assert (len(of_batch.names), of_step.names) == (2, [])
    assert trainer.batch == NUMBER // BATCH
