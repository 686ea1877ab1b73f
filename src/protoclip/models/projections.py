"""A model in two parts: frozen encoders that run once, and what `align` trains on their features.

The encoders are the towers without their projections into the joint space. These projections, the
projection heads and the temperatures train. Both parts share their weights with the whole model.
"""

from collections.abc import Mapping
from copy import deepcopy
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from protoclip.models.joined import JoinedTower, place_encoders
from protoclip.models.protoclip import PROJECTIONS, ProtoCLIP, to_float

NAMES = ("head", "proj", "text_projection")  # of a tower's projection, which is the first it has


def projection_name(tower: nn.Module) -> str:
    return next(name for name in NAMES if getattr(tower, name, None) is not None)


class Projection(nn.Module):
    """The projection of a tower, under the name that it has there."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.name = projection_name(tower)
        setattr(self, self.name, getattr(tower, self.name))

    def forward(self, rows: Float[Tensor, "b q"]) -> Float[Tensor, "b d"]:
        through: Any = getattr(self, self.name)  # open_clip has a matrix where others have layers
        projected: Tensor = rows @ through if isinstance(through, Tensor) else through(rows)
        return projected


class Projections(nn.Module):
    """The projections of both towers, under the names that they have in the whole towers.

    In training, `dropout` is the share of the features that a forward pass leaves out.
    """

    def __init__(self, towers: Any, dropout: float = 0.0) -> None:
        super().__init__()
        self.visual, self.text = Projection(towers.visual), Projection(towers.text)
        self.logit_scale = towers.logit_scale
        if getattr(towers, "logit_bias", None) is not None:
            self.logit_bias = towers.logit_bias
        self.dropout = nn.Dropout(dropout)

    def encode_image(
        self, rows: Float[Tensor, "b q"], normalize: bool = False
    ) -> Float[Tensor, "b d"]:
        projected: Tensor = self.visual(self.dropout(to_float(rows)))
        return projected

    def encode_text(
        self, rows: Float[Tensor, "b q"], normalize: bool = False
    ) -> Float[Tensor, "b d"]:
        projected: Tensor = self.text(self.dropout(to_float(rows)))
        return projected


@torch.no_grad()
def start_projections(towers: Any, image: Float[Tensor, "q k"], text: Float[Tensor, "r k"]) -> None:
    """Let the projections of both towers begin as linear maps, whose first columns matter most.

    What they leave free stays as drawn, at a tenth of its size: it may train, and disturbs little.
    """
    for tower, linear in ((towers.visual, image), (towers.text, text)):
        weight = getattr(tower, projection_name(tower))  # a matrix in open_clip's own towers
        if not isinstance(weight, Tensor):
            (layer,) = (part for part in weight.modules() if isinstance(part, nn.Linear))
            if layer.bias is not None:
                layer.bias.zero_()
            weight = layer.weight.T
        weight.mul_(0.1)
        rows, columns = min(len(weight), len(linear)), min(weight.shape[1], linear.shape[1])
        values = linear[:rows, :columns]
        # At the size that layers are drawn at.
        size = len(weight) ** -0.5 / values.square().mean().sqrt().clamp(min=1e-12)
        weight[:rows, :columns] = (values * size).to(weight)


class AlignedModel(ProtoCLIP):
    """The trained part of a model between frozen encoders: its inputs are their features.

    Args:
        whole: The model, whose parameters this one shares.
        dropout: Share of the features that a forward pass in training leaves out.
    """

    def __init__(self, whole: ProtoCLIP, *, dropout: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.towers = Projections(whole.towers, dropout)
        self.image_head, self.text_head = whole.image_head, whole.text_head
        self.prototype_logit_scale = whole.prototype_logit_scale
        self.pulls: dict[str, Tensor] = {}
        self.distils: dict[str, str] = {}


class FrozenEncoders(nn.Module):
    """The towers without their projections, as a model whose features are what these read."""

    def __init__(self, towers: Any) -> None:
        super().__init__()
        image, text = towers.visual, towers.text
        is_plain = hasattr(image, "trunk") and not isinstance(image, JoinedTower)
        self.visual: Any = image.trunk if is_plain else remove_projection(image)
        self.ignores_padding = hasattr(text, "pooler")  # as `TowerPair.ignores_padding`
        self.pooler = None if isinstance(text, JoinedTower) else getattr(text, "pooler", None)
        self.text: Any = remove_projection(text) if self.pooler is None else text.transformer
        self.padding = -1 if self.pooler is None else int(text.config.pad_token_id)

    def encode_image(
        self, images: Float[Tensor, "b c h w"], normalize: bool = False
    ) -> Float[Tensor, "b q"]:
        features: Tensor = self.visual(images)
        return to_float(features)

    def encode_text(
        self, tokens: Int[Tensor, "b c"], normalize: bool = False
    ) -> Float[Tensor, "b q"]:
        if self.pooler is None:
            return to_float(self.text(tokens))
        mask = (tokens != self.padding).long()
        states = self.text(input_ids=tokens, attention_mask=mask)
        return to_float(self.pooler(states, mask))

    def split(self, name: str) -> list["FrozenEncoders"]:
        """The encoders of `visual`, or of `text`, one by one, where a tower joins several."""
        towers, parts = dict(self.named_children()), [*place_encoders(getattr(self, name)).values()]
        pairs = [SimpleNamespace(**{**towers, name: part}) for part in parts]
        return [FrozenEncoders(pair).eval() for pair in pairs] if len(pairs) > 1 else [self]


def remove_projection(tower: nn.Module) -> nn.Module:
    """A tower of open_clip's own that ends before its projection; it shares the weights."""
    if not any(getattr(tower, name, None) is not None for name in NAMES):
        return tower
    shared = {id(one): one for one in chain(tower.parameters(), tower.buffers())}
    encoder = deepcopy(tower, shared)
    setattr(encoder, projection_name(tower), None)
    return encoder


def require_same_encoders(saved: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    """Refuse to go on between other encoders than those of a checkpoint.

    `saved` are its weights, or none on ranks that have not read it.
    """
    settings = {"visual": "image.weights", "text": "text.name"}
    for name, value in saved.items():
        plain = name.removeprefix("towers.")
        setting = settings.get(plain.partition(".")[0])
        if setting is None or plain.startswith(PROJECTIONS):
            continue
        # Embeddings of positions are interpolated, by some machines with other last digits.
        same = torch.allclose if "pos" in plain else torch.equal
        if not same(value.cpu(), current[name].cpu()):
            raise ValueError(
                f"model.{setting}: has other weights than when this run began; put those back, "
                "or train in another folder"
            )
