"""A model of two frozen halves, divided: the halves encode once, the heads train on what they gave.

The halves are a timm image tower and a Hugging Face text model without their projections into the
joint space. These projections, with the projection heads and the temperatures, are all that
trains. They are shared: what trains on rows is at once the whole model's.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from protoclip.models.protoclip import Embeddings, ProtoCLIP, to_float


class Projections(nn.Module):
    """The projections of two halves, under the names that they have in the whole towers."""

    def __init__(self, towers: Any) -> None:
        super().__init__()
        self.visual = nn.ModuleDict({"head": towers.visual.head})
        self.text = nn.ModuleDict({"proj": towers.text.proj})
        self.logit_scale = towers.logit_scale
        if getattr(towers, "logit_bias", None) is not None:
            self.logit_bias = towers.logit_bias

    def encode_image(self, rows: Float[Tensor, "b q"]) -> Float[Tensor, "b d"]:
        projected: Tensor = self.visual["head"](rows)
        return projected

    def encode_text(self, rows: Float[Tensor, "b q"]) -> Float[Tensor, "b d"]:
        projected: Tensor = self.text["proj"](rows)
        return projected


class AlignedModel(ProtoCLIP):
    """What trains of a model of two halves: it takes their features in the place of its input.

    Args:
        whole: The model, whose parameters this one shares.
        dropout: Share of the features that a forward pass in training leaves out.
    """

    def __init__(self, whole: ProtoCLIP, *, dropout: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.towers, self.settings = Projections(whole.towers), {}
        self.image_head, self.text_head = whole.image_head, whole.text_head
        self.prototype_logit_scale = whole.prototype_logit_scale
        self.pulls: dict[str, Tensor] = {}
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, images: Float[Tensor, "b q"], tokens: Float[Tensor, "b r"], project: bool = True
    ) -> Embeddings:
        return self.embeddings(self.encode_image(images), self.encode_text(tokens), project)

    def encode_image(
        self, images: Float[Tensor, "b q"], normalize: bool = False
    ) -> Float[Tensor, "b d"]:
        features = to_float(self.towers.encode_image(self.dropout(to_float(images))))  # type: ignore[operator]
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(
        self, tokens: Float[Tensor, "b q"], normalize: bool = False
    ) -> Float[Tensor, "b d"]:
        features = to_float(self.towers.encode_text(self.dropout(to_float(tokens))))  # type: ignore[operator]
        return F.normalize(features, dim=-1) if normalize else features


class FrozenHalves(nn.Module):
    """The halves without their projections, as a model whose features are what these read."""

    def __init__(self, towers: Any) -> None:
        super().__init__()
        self.visual, self.text = towers.visual.trunk, towers.text.transformer
        self.pooler, self.padding = towers.text.pooler, int(towers.text.config.pad_token_id)

    def encode_image(
        self, images: Float[Tensor, "b 3 h w"], normalize: bool = False
    ) -> Float[Tensor, "b q"]:
        features: Tensor = self.visual(images)
        return to_float(features)

    def encode_text(
        self, tokens: Int[Tensor, "b c"], normalize: bool = False
    ) -> Float[Tensor, "b q"]:
        mask = tokens != self.padding
        # What all captions of the batch leave empty costs as much as words.
        length = max(1, int(mask.any(0).nonzero().max()) + 1) if bool(mask.any()) else 1
        tokens, mask = tokens[:, :length], mask[:, :length].long()
        states = self.text(input_ids=tokens, attention_mask=mask)
        return to_float(self.pooler(states, mask))


def is_aligned(towers: Any) -> bool:
    """Whether towers are two halves: a timm trunk and a Hugging Face text model."""
    return hasattr(towers.visual, "trunk") and hasattr(getattr(towers, "text", None), "transformer")


def require_same_halves(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse to go on between other halves than those of a checkpoint.

    Args:
        saved: The weights of the checkpoint; none on ranks that have not read it.
        own: The weights of the model, as it was begun.
    """
    halves = {"towers.visual.trunk.": "image.weights", "towers.text.transformer.": "text.name"}
    for prefix, setting in halves.items():
        for name in saved:
            if name.startswith(prefix) and not torch.equal(saved[name].cpu(), own[name].cpu()):
                raise ValueError(
                    f"model.{setting}: has other weights than when this run began; put those back, "
                    "or train in another folder"
                )
