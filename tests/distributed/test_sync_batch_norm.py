"""BatchNorm over ranks: every layer of real towers, with the result of one process."""

import pytest
import timm
import torch
from torch import Tensor, nn

from protoclip.models.batch_norm import SyncBatchNorm, has_own_statistics, synchronise

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "number"), [("efficientnet_b0", 49), ("resnet10t", 14), ("nfnet_l0", 0)]
)
def test_every_batch_norm_of_a_tower_is_converted(name, number):
    """Also subclasses that activate; names of parameters and buffers stay."""
    with torch.device("meta"):
        tower = timm.create_model(name)
    names = list(tower.state_dict())
    assert synchronise(tower, CPU) == number
    assert sum(isinstance(part, SyncBatchNorm) for part in tower.modules()) == number
    assert not has_own_statistics(tower)
    assert list(tower.state_dict()) == names
    assert synchronise(tower, CPU) == number  # and again changes nothing


def test_a_batch_norm_that_computes_something_else_is_refused():
    """It is neither left unsynchronised nor turned into another layer."""

    class Doubled(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(ValueError, match=r"sync_batch_norm: Doubled layers cannot be synchronised"):
        synchronise(nn.Sequential(Doubled(3)), CPU)
