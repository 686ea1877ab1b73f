"""Prototypes pull on each tower as hard as their weights say, whatever the data."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from protoclip.losses.balance import MOST, Balance, measure
from protoclip.losses.distil import StartFeatures
from protoclip.losses.grad_cache import forward_in_chunks
from protoclip.losses.objective import LossWeights, objective
from testing import build_model, tiny_model

TAKEN = torch.tensor(True)
EQUAL = {"image": 1.0, "text": 1.0}  # weights


def pulls(**norms: tuple[float, float]) -> dict[str, torch.Tensor]:
    """By tower, the pulls of InfoNCE and of the prototypes."""
    return {tower: torch.tensor(pair) for tower, pair in norms.items()}


def test_factors_settle_where_the_pulls_have_the_target_ratio():
    """Measured with the factor that was in use, by tower, and smoothed over steps."""
    balance, weights = Balance(), {"image": 0.5, "text": 2.0}
    assert balance.factor("image") == balance.factor("text") == 1.0
    for _ in range(3):
        image, text = float(balance.factor("image")), float(balance.factor("text"))
        balance.update(pulls(image=(3.0, 2.0 * image), text=(1.0, 4.0 * text)), weights, TAKEN)
        # The pulls are 0.5 * 3.0 and 2.0 * 1.0.
        assert 2.0 * float(balance.factor("image")) == pytest.approx(1.5)
        assert 4.0 * float(balance.factor("text")) == pytest.approx(2.0)
    # The prototypes pull twice as hard as before.
    balance.update(pulls(image=(3.0, 4.0 * 0.75)), weights, TAKEN)
    assert 0.375 < float(balance.factor("image")) < 0.75
    assert float(balance.factor("text")) == pytest.approx(0.5)


def test_other_weights_change_the_pull_at_once():
    """As they do from episode to episode, with the confidence of targets."""
    balance = Balance()
    balance.update(pulls(image=(3.0, 2.0)), {"image": 1.0}, TAKEN)
    # Now the prototypes pull a tenth as hard, at factor 1.
    assert 0.2 * float(balance.factor("image")) == pytest.approx(0.1 * 3.0)
    balance.update(pulls(image=(3.0, 0.2 * float(balance.factor("image")))), {"image": 0.1}, TAKEN)
    assert 0.2 * float(balance.factor("image")) == pytest.approx(0.1 * 3.0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("first", [True, False])
def test_steps_without_a_pull_change_nothing(wrong, place, first):
    """Those of a batch that is not finite, or in which no sample has a prototype."""
    balance = Balance()
    if not first:
        balance.update(pulls(image=(2.0, 1.0)), EQUAL, TAKEN)
    before = float(balance.factor("image"))
    pair = (wrong, 1.0) if place == 0 else (1.0, wrong)
    balance.update(pulls(image=pair), EQUAL, TAKEN)
    assert float(balance.factor("image")) == before == (1.0 if first else 2.0)


def test_prototypes_that_hardly_pull_are_not_blown_up():
    balance = Balance()
    balance.update(pulls(text=(1.0, 1e-9)), EQUAL, TAKEN)
    assert float(balance.factor("text")) == MOST


@pytest.mark.parametrize("chunk", [8, 3])
def test_pulls_are_norms_of_gradients_at_the_outputs_of_the_towers(chunk):
    """Of both branches apart, in one pass and with GradCache; once taken, they start anew."""
    model = build_model(tiny_model(), seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(8, 3, 32, 32, generator=generator)
    tokens = torch.randint(1, 90, (8, 8), generator=generator)
    widths = {"features": 16, "projections": 8}
    directions = {
        f"{tower}_{branch}": torch.randn(8, width, generator=generator)
        for tower in ("image", "text")
        for branch, width in widths.items()
    }
    outputs = {
        "image": model.encode_image(images).detach().requires_grad_(),
        "text": model.encode_text(tokens).detach().requires_grad_(),
    }
    heads = {"image": model.image_head, "text": model.text_head}
    expected = {}
    for name, direction in directions.items():
        tower, _, branch = name.partition("_")
        own = heads[tower](outputs[tower]) if branch == "projections" else outputs[tower]
        loss = (F.normalize(own, dim=1) * direction).sum()
        (gradient,) = torch.autograd.grad(loss, outputs[tower])
        expected[name] = gradient.square().sum()

    def encode(image, text):
        return model.encode_image(image), model.encode_text(text)

    def loss(embeddings):
        return sum((getattr(embeddings, n) * d).sum() for n, d in directions.items())

    parts = zip(images.split(chunk), tokens.split(chunk), strict=True)
    chunks = [partial(encode, *part) for part in parts]
    outputs, backward = forward_in_chunks(chunks, trains=model.towers_train(), buffers=())
    (8 * loss(model.embeddings(*outputs))).backward()
    backward()
    found = measure(model.take_pulls(), loss_scale=8.0)
    for tower, pull in found.items():
        right = torch.stack([expected[f"{tower}_{branch}"] for branch in widths]).sqrt()
        torch.testing.assert_close(pull, right, rtol=1e-4, atol=0)
    assert [*found] == ["image", "text"]
    assert measure(model.take_pulls(), loss_scale=8.0) == {}


def test_start_and_teacher_have_no_part_in_the_pull_of_info_nce():
    """Or prototypes would grow with what is distilled. The gradient is that of all."""
    model = build_model(tiny_model(), seed=0).eval().double()
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(8, 3, 32, 32, generator=generator).double()
    tokens = torch.randint(1, 90, (8, 8), generator=generator)
    rows = F.normalize(torch.randn(2, 8, 16, generator=generator).double(), dim=-1)
    start = StartFeatures(image=rows[0], text=rows[1], logit_scale=torch.tensor(5.0).double())
    model.distils = {"teacher": "text"}
    more = {"start": start, "teachers": {"teacher": rows[0]}}
    found, gradients = [], []
    for info_nce, distil in ((1.0, 0.0), (0.0, 5.0), (1.0, 5.0)):
        weights = LossWeights(info_nce=info_nce, keep=distil, distil={"teacher": distil})
        embeddings = model(images, tokens, teach=True)
        losses, _ = objective(embeddings, None, {}, weights=weights, **more)
        model.zero_grad()
        sum(losses.values()).backward()
        found.append(model.take_pulls())
        gradients.append(model.towers.text_projection.grad.clone())
    assert found[2] == found[0]
    assert found[1] == {}
    torch.testing.assert_close(gradients[2], gradients[0] + gradients[1])
