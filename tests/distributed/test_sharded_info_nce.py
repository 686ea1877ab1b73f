"""InfoNCE of a batch on several ranks is that of the whole batch, plain or tile by tile."""

import pytest
import torch
from torch import Tensor

from protoclip.distributed import collectives
from protoclip.losses import info_nce as instance
from protoclip.losses import tiles
from protoclip.losses.info_nce import sharded_info_nce
from protoclip.testing import run_distributed

PAIRS, WIDTH = 20, 6


def plain(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    logits = scale * images @ texts.T
    return -(logits.log_softmax(0) + logits.log_softmax(1)).diagonal().mean() / 2


def part_of(images: Tensor, texts: Tensor, scale: Tensor, tiled_above: int) -> list[Tensor]:
    """Means over ranks of the loss and of the gradients of features and scale."""
    world_size = collectives.world_size()
    share = PAIRS // world_size
    own = slice(collectives.rank() * share, (collectives.rank() + 1) * share)
    leaves = [value.clone().requires_grad_() for value in (images[own], texts[own], scale)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instance, "TILED_ABOVE", tiled_above)
        patch.setattr(tiles, "ROWS", 3)
        patch.setattr(tiles, "CPU_SCORES", 3 * 7)
        loss = sharded_info_nce(*leaves)
        loss.backward()
    to_images, to_texts, to_scale = (leaf.grad for leaf in leaves)
    sums = [
        collectives.all_reduce(loss.detach()),
        collectives.all_gather(to_images),
        collectives.all_gather(to_texts),
        collectives.all_reduce(to_scale),
    ]
    return [value / world_size for value in sums]


@pytest.mark.parametrize("tiled_above", [0, 10**6], ids=["tiled", "plain"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_means_over_ranks_are_those_of_the_whole_batch(world_size, tiled_above, generator):
    """In float64 to 1e-9: the value, and the gradients of features and scale."""
    rows = torch.randn(2, PAIRS, WIDTH, generator=generator, dtype=torch.float64)
    images, texts = rows / rows.norm(dim=2, keepdim=True)
    leaves = [images, texts, torch.tensor(9.0, dtype=torch.float64)]
    whole = [value.clone().requires_grad_() for value in leaves]
    loss = plain(*whole)
    expected = [loss.detach(), *torch.autograd.grad(loss, whole)]
    for found in run_distributed(part_of, world_size, *leaves, tiled_above):
        for ours, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
