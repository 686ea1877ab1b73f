"""What a card gets that a CPU does not, by what is passed on: no test here needs a card."""

import pytest
import timm
import torch
from timm.layers.norm_act import SyncBatchNormAct
from torch import Tensor, nn

from protoclip.distributed import collectives, parallel
from protoclip.encode.encoder import print_layers
from protoclip.models import layers
from protoclip.models.protoclip import ProtoCLIP
from testing import run_distributed

CARD, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "types"),
    [
        (CARD, {nn.SyncBatchNorm, SyncBatchNormAct}),
        (CPU, {layers.SyncBatchNorm, layers.SyncBatchNormAct}),
    ],
)
def test_every_batch_norm_of_a_tower_is_synchronised(device, types):
    """Also timm's, which activates: by those of torch and timm on a card. Names of parameters and
    buffers stay, and so do the parameters."""
    tower = timm.create_model("resnet10t")
    towers = nn.ModuleDict({"timm": timm.create_model("efficientnet_b0"), "torch": tower})
    names, weight = list(towers.state_dict()), tower.bn1.weight
    printed = repr(towers)
    assert layers.synchronise(towers, device) == 49 + 14
    synced = [type(part) for part in towers.modules() if isinstance(part, (*types,))]
    assert (len(synced), {*synced}) == (49 + 14, types)
    assert not layers.has_own_statistics(towers)
    assert list(towers.state_dict()) == names
    assert tower.bn1.weight is weight
    assert print_layers(towers) == printed != repr(towers)
    assert layers.synchronise(towers, device) == 49 + 14  # and again changes nothing


def test_a_batch_norm_that_computes_something_else_is_refused():
    """It is neither left unsynchronised nor turned into another layer."""

    class Doubled(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(ValueError, match=r"sync_batch_norm: Doubled layers cannot be synchronised"):
        layers.synchronise(nn.Sequential(Doubled(3)), CPU)


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.norm, self.last = nn.BatchNorm1d(6), nn.Linear(6, 4)
        self.mix = nn.Conv2d(3, 3, 1)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        pixels = self.mix(images.contiguous(memory_format=torch.channels_last))
        # A gathered weight has lost this order of memory, but what is computed keeps the images'.
        assert pixels.is_contiguous(memory_format=torch.channels_last)
        assert not pixels.is_contiguous()
        rows = pixels.flatten(1)
        for block in self.blocks:
            rows = block(rows).relu()
        return self.last(self.norm(rows).to(self.last.weight.dtype))


def features_and_gradient(gathered: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """In evaluation, of a model on one rank or sharded over all."""
    torch.manual_seed(0)
    model = ProtoCLIP(Layered(), nn.Linear(4, 4)).eval()
    images = torch.randn(8, 3, 1, 2)
    if collectives.world_size() > 1:
        whole = model
        model = ProtoCLIP(Layered(), nn.Linear(4, 4)).to("meta").eval()
        parallel.shard(model, CPU, gathered=gathered)
        parallel.load_whole(model, whole if collectives.rank() == 0 else None)
        assert parallel.clip_gradients(model, 1.0) == 0
    features = model.encode_image(images)
    features.float().square().sum().backward()
    gradient = model.towers.blocks[0].weight.grad
    whole_gradient = gradient if collectives.world_size() == 1 else gradient.full_tensor()
    return features.detach(), whole_gradient


def test_a_model_gathered_in_bf16_computes_the_same_up_to_its_rounding():
    """Its gradients are summed and kept in float32."""
    features, gradient = features_and_gradient(None)
    for rows, of_shards in run_distributed(features_and_gradient, 2, torch.bfloat16):
        assert of_shards.dtype == torch.float32
        assert not torch.allclose(rows, features)
        torch.testing.assert_close(rows, features, atol=0.02, rtol=0.02)
        torch.testing.assert_close(of_shards, gradient, atol=0.05, rtol=0.05)
