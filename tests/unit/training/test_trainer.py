"""A training step: what it copies to a device; images that bring several captions."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from protoclip.config import Config
from protoclip.data.captions import Key
from protoclip.data.loader import Batch, EpisodeLoader, Pass
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.sampler import Episode
from protoclip.data.transforms import light_transform
from protoclip.encode.teachers import TeacherFeatures
from protoclip.losses.balance import Balance
from protoclip.losses.objective import LossWeights, objective
from protoclip.losses.prototypical import Target
from protoclip.models.protoclip import ProtoCLIP, TowerPair, grad_scaler
from protoclip.models.start import resolve_start
from protoclip.prototypes.features import ExtractedFeatures, QueuedFeatures
from protoclip.prototypes.kmeans import KMeans
from protoclip.training.optim import PROTOTYPICAL
from protoclip.training.trainer import EpisodePrototypes, Trainer
from protoclip.training.watch import NonFiniteGuard
from testing import build_model, tiny_model, tiny_pairs

IMAGES, EACH = 5, 3
PAIRS = IMAGES * EACH


def model_and_batch() -> tuple[ProtoCLIP, Batch]:
    """In float64. The towers are in evaluation mode, or micro-batches would be another model."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64)
    batch = Batch(
        position=torch.arange(PAIRS),
        sample_id=[f"s{pair // EACH}" for pair in range(PAIRS)],
        image=images,
        text=torch.randint(1, 400, (PAIRS, 8), generator=generator),
        captions=[str(pair).encode() for pair in range(PAIRS)],
        groups=torch.arange(PAIRS)[:, None] // EACH,
    )
    return build_model(tiny_model(), seed=0).double().eval(), batch


def embed(model: ProtoCLIP, batch: Batch, micro_batch: int | None) -> tuple[Any, Any]:
    trainer = Trainer.__new__(Trainer)
    trainer.model, trainer._module, trainer._stage = model, model, PROTOTYPICAL
    trainer.autocast, trainer.micro_batch_size = nullcontext, micro_batch
    return trainer._forward(batch)


def assert_same(loss: Tensor, slow: Tensor, model: ProtoCLIP, slow_model: ProtoCLIP) -> None:
    """The loss, and gradients of all that has any."""
    slow.backward()
    torch.testing.assert_close(loss, slow, rtol=1e-9, atol=1e-9)
    found, expected = (
        {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        for one in (model, slow_model)
    )
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_loss_is_that_of_images_with_all_their_captions(micro_batch: int | None) -> None:
    """Each image is to find its captions among all, and each caption its image among the images,
    of which all copies have an equal share. In float64, with gradients."""
    model, batch = model_and_batch()
    embeddings, finish = embed(model, batch, micro_batch)
    weights = LossWeights(positives="shared", prototypical=0.0)
    losses, _ = objective(embeddings, None, {}, weights=weights, groups=batch.groups)
    losses["info_nce"].backward()
    finish()
    slow_model, _ = model_and_batch()
    image, text = (
        slow_model.encode_image(batch.image, True),
        slow_model.encode_text(batch.text, True),
    )
    terms = (slow_model.towers.logit_scale.exp() * image @ text.T).exp()
    slow = torch.zeros((), dtype=torch.float64)
    for pair in range(PAIRS):
        own = pair // EACH
        slow = slow - (terms[own, pair] / terms[own].sum()).log() / (2 * PAIRS)
        slow = slow - (terms[own, pair] / (EACH * terms[:, pair].sum())).log() / (2 * PAIRS)
    assert_same(losses["info_nce"], slow, model, slow_model)


def test_an_image_passes_through_its_tower_once() -> None:
    """In a step, in each of the two passes of micro-batches, and to extract features, where each
    caption is a row beside a copy of its image's."""
    model, batch = model_and_batch()
    passed: dict[str, int] = {"visual": 0, "text": 0}

    def count(kind: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            passed[kind] += len(inputs[0])

        return hook

    model.towers.visual.register_forward_pre_hook(count("visual"))
    model.towers.token_embedding.register_forward_pre_hook(count("text"))
    embeddings, _ = embed(model, batch, None)
    assert passed == {"visual": IMAGES, "text": PAIRS}
    embeddings, finish = embed(model, batch, 2)
    embeddings.text_features.sum().backward()
    finish()
    assert passed == {"visual": 3 * IMAGES, "text": 3 * PAIRS}
    source = ExtractedFeatures(
        model=model, batches=lambda episode: [batch, batch], teachers={}, autocast=nullcontext
    )
    found = source.features(Episode(index=0, rows=torch.arange(2 * IMAGES)))
    # The second batch is known: one image passes, which a sharded model would need.
    assert passed == {"visual": 4 * IMAGES + 1, "text": 4 * PAIRS + EACH}
    with torch.no_grad():
        expected = embed(model, batch, None)[0]
    for space in ("image", "text"):
        rows = getattr(expected, f"{space}_projections")
        assert torch.equal(getattr(found, space), torch.cat([rows, rows]))


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_teachers_in_one_space_teach_each_caption_beside_its_image(micro_batch: int | None) -> None:
    """As rows of a batch that has the image once for each of its captions."""
    model, batch = model_and_batch()
    model.distils = {"seen": "image", "read": "text"}
    draws = torch.Generator().manual_seed(1)
    known = torch.randn(2, IMAGES, 4, generator=draws, dtype=torch.float64)
    teachers = dict(zip(("seen", "read"), known.repeat_interleave(EACH, 1), strict=True))
    embeddings, finish = embed(model, batch, micro_batch)
    weights = LossWeights(
        info_nce=0.0, distil={"seen": 1.0, "read": 1.0}, joint=("seen", "read"), prototypical=0.0
    )
    losses, _ = objective(embeddings, None, {}, weights=weights, teachers=teachers, captions=EACH)
    losses["distil_pairs"].backward()
    finish()
    slow_model, _ = model_and_batch()
    image = slow_model.encode_image(batch.image, True).repeat_interleave(EACH, 0)
    text = slow_model.encode_text(batch.text, True)
    seen, read = (torch.nn.functional.normalize(rows, dim=1) for rows in teachers.values())
    slow = torch.zeros((), dtype=torch.float64)
    for own, other, of_own, of_other in ((image, text, seen, read), (text, image, read, seen)):
        for row in range(PAIRS):
            p, q = (20 * of_own[row] @ of_other.T).softmax(0), (20 * own[row] @ other.T).softmax(0)
            slow = slow + (p * (p / q).log()).sum() / (2 * PAIRS)
    assert_same(losses["distil_pairs"], slow, model, slow_model)


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


class Copies(TorchDispatchMode):
    """Collects the operations that bring a tensor from the CPU to `meta`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        # A single number travels with the kernel that uses it.
        from_cpu = any(one.device.type == "cpu" and one.dim() for one in given)
        if from_cpu and any(one.device.type == "meta" for one in made):
            self.names.append(str(func))
        return result


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
