"""Images that bring several captions: the loss of a batch, and what passes through the towers."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from protoclip.data.loader import Batch
from protoclip.data.sampler import Episode
from protoclip.losses.objective import LossWeights, objective
from protoclip.models.protoclip import ProtoCLIP
from protoclip.prototypes.features import ExtractedFeatures
from protoclip.training.optim import PROTOTYPICAL
from protoclip.training.trainer import Trainer
from testing import build_model, tiny_model

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


def gradients(model: ProtoCLIP) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


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
    slow.backward()
    torch.testing.assert_close(losses["info_nce"], slow, rtol=1e-9, atol=1e-9)
    expected = gradients(slow_model)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected.pop(name), rtol=1e-8, atol=1e-10)
    assert expected == {}


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
    slow.backward()
    torch.testing.assert_close(losses["distil_pairs"], slow, rtol=1e-9, atol=1e-9)
    expected = gradients(slow_model)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected.pop(name), rtol=1e-8, atol=1e-10)
    assert expected == {}
