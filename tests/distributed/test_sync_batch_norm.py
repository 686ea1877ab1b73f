"""BatchNorm over ranks: every layer of real towers, with the result of one process."""

import pytest
import timm
import torch
from torch import Tensor, nn

from protoclip.distributed import collectives
from protoclip.models.batch_norm import SyncBatchNorm, has_own_statistics, synchronise
from protoclip.testing import run_distributed


@pytest.mark.parametrize(
    ("name", "number"), [("efficientnet_b0", 49), ("resnet10t", 14), ("nfnet_l0", 0)]
)
def test_every_batch_norm_of_a_tower_is_converted(name, number):
    """Also subclasses that activate; names of parameters and buffers stay."""
    with torch.device("meta"):
        tower = timm.create_model(name)
    names = list(tower.state_dict())
    assert synchronise(tower) == number
    assert sum(isinstance(part, SyncBatchNorm) for part in tower.modules()) == number
    assert not has_own_statistics(tower)
    assert list(tower.state_dict()) == names
    assert synchronise(tower) == number  # and again changes nothing


def test_a_batch_norm_that_computes_something_else_is_refused():
    """It is neither left unsynchronised nor turned into another layer."""

    class Doubled(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(ValueError, match=r"sync_batch_norm: Doubled layers cannot be synchronised"):
        synchronise(nn.Sequential(Doubled(3)))


def through_tower(images: Tensor, converted: bool) -> dict[str, Tensor]:
    """Outputs, gradients and statistics for this rank's part of a batch."""
    torch.manual_seed(0)
    tower = timm.create_model("mobilenetv3_small_050", num_classes=0).double()
    if converted:
        synchronise(tower)
    share = len(images) // collectives.world_size()
    own = images[collectives.rank() * share :][:share].clone().requires_grad_()
    output = tower(own)
    output.square().sum().backward()
    with torch.no_grad():
        evaluated = tower.eval()(own)
    return {
        "output": collectives.all_gather(output.detach()),
        "evaluated": collectives.all_gather(evaluated),
        "input's gradient": collectives.all_gather(own.grad),
        **{n: collectives.all_reduce(p.grad) for n, p in tower.named_parameters()},
        **{n: b for n, b in tower.named_buffers() if "running" in n},
    }


def test_a_converted_tower_on_two_ranks_equals_the_plain_one_on_the_whole_batch():
    """In float64: training and evaluation, all gradients, and running statistics."""
    images = torch.randn(8, 3, 64, 64, dtype=torch.float64)
    expected = through_tower(images, False)
    alone = through_tower(images, True)
    assert all(torch.equal(alone[name], value) for name, value in expected.items())
    for found in run_distributed(through_tower, 2, images, True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # A bias before a BatchNorm has no gradient but rounding.
            size = max(1.0, float(value.abs().max()))
            assert float((found[name] - value).abs().max()) <= 1e-9 * size, name
