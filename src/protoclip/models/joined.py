"""Towers whose features are several layers of a frozen encoder, or of several, side by side.

What a caption says of an image is not all in an encoder's last layer (STRUCTURE, arXiv 2506.16895).
So a tower may give its last layer and some before it, each pooled and of unit norm. Its projection
reads those that were chosen, so what is stored of an encoder does not depend on the choice.
"""

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from copy import deepcopy
from itertools import accumulate, chain, groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from protoclip.config import SEVERAL

AUTO, PLAIN, LAST = "auto", "plain", "last"  # settings beside lists of layers, and a layer
# The number of a block, from 1; 0 is what the encoder makes of the last one. In a tower of several
# encoders it comes behind the number of the encoder.
Layer = Any


def read_layers(setting: str, value: str, depth: int) -> list[Layer]:
    """The layers that a setting names, such as `last+8`, of an encoder of `depth` blocks."""
    layers = list[Layer]()
    for name in value.split("+"):
        number = 0 if name.strip() == LAST else int(name) if name.strip().isdigit() else -1
        if not 0 <= number <= depth or (number == 0) != (name.strip() == LAST):
            raise ValueError(
                f"{setting}: '{value}' is not a list of layers; write {LAST}, or numbers of blocks "
                f"from 1 to {depth} besides, as in {LAST}+{max(1, depth - 1)}"
            )
        layers.append(number)
    return list(dict.fromkeys(layers))


def name_layers(layers: Sequence[Layer]) -> str:
    """The setting that names layers."""
    pairs = [layer if isinstance(layer, tuple) else (0, layer) for layer in layers]
    encoders = groupby(pairs, key=lambda pair: pair[0])
    return SEVERAL.join("+".join(str(n or LAST) for _, n in own) for _, own in encoders)


def shortlist(depth: int) -> list[Layer]:
    """The layers among which `align` chooses: the last, the one before, and one at two thirds.

    >>> shortlist(12)
    [0, 11, 8]
    >>> shortlist(0)  # embeddings alone
    [0]
    """
    return [0, *sorted({depth - 1, round(2 * depth / 3)} - {-1, 0, depth}, reverse=True)]


class JoinedLinear(nn.Linear):
    """A linear layer that reads some of the columns it gets."""

    def __init__(self, spans: Sequence[tuple[int, int]], width: int) -> None:
        """`spans` are where the columns that it reads begin and end."""
        super().__init__(sum(end - begin for begin, end in spans), width, bias=False)
        self.spans = [*spans]

    def forward(self, rows: Float[Tensor, "b q"]) -> Float[Tensor, "b d"]:
        return super().forward(torch.cat([rows[:, slice(*span)] for span in self.spans], dim=1))


class JoinedTower(nn.Module):
    """What the towers of both modalities have: layers of known widths, and a choice among them."""

    given: list[Layer]  # the layers that it gives, of which its projection reads the `chosen` ones
    chosen: list[Layer]
    widths: list[int]  # the width of each

    def set_layers(self, setting: str, value: str, depth: int) -> None:
        """Read which layers are chosen; all of the short list for `auto`."""
        self.chosen = shortlist(depth) if value == AUTO else read_layers(setting, value, depth)
        self.given = sorted(
            {*shortlist(depth), *self.chosen}, key=lambda layer: (layer > 0, -layer)
        )

    def columns(self, chosen: Sequence[Layer]) -> list[tuple[int, int]]:
        """Where the columns of layers begin and end."""
        ends = accumulate(self.widths)
        spans = {
            layer: (end - width, end)
            for layer, width, end in zip(self.given, self.widths, ends, strict=True)
        }
        return [spans[layer] for layer in chosen]

    def extra_repr(self) -> str:
        """The key of what is stored tells layers apart by it."""
        return f"layers={self.given}"

    @property
    def options(self) -> list[list[Layer]]:
        """The choices of `align`: the last layer alone, or with another one of the short list."""
        return [[0], *([0, layer] for layer in self.given[1:])]

    def new_projection(self, embed_dim: int) -> JoinedLinear:
        """One that reads what is chosen, with the same numbers as one that chose afterwards."""
        whole = JoinedLinear(self.columns(self.given), embed_dim)
        return self.narrow(whole, self.chosen)

    def narrow(self, whole: JoinedLinear, layers: Sequence[Layer]) -> JoinedLinear:
        """The projection with the weights of these layers alone."""
        with torch.device("meta"):  # which draws nothing
            projection = JoinedLinear(self.columns(layers), whole.out_features)
        read, wanted = number_columns(whole.spans), {*number_columns(projection.spans)}
        kept = [place for place, column in enumerate(read) if column in wanted]
        projection.weight = nn.Parameter(whole.weight.detach()[:, kept])
        return projection

    def choose(self, layers: Sequence[Layer]) -> None:
        """Let the projection, which reads all layers, read these alone from now on."""
        parent: Any = self.head if hasattr(self, "head") else self
        self.chosen = [*layers]
        parent.proj = self.narrow(parent.proj, layers)


def number_columns(spans: Sequence[tuple[int, int]]) -> list[int]:
    """The numbers of the columns of spans, span after span."""
    return [*chain.from_iterable(range(*span) for span in spans)]


def join(features: Sequence[Tensor]) -> Float[Tensor, "b q"]:
    """Layers side by side, each of unit norm."""
    return torch.cat([F.normalize(layer.float(), dim=1) for layer in features], dim=1)


def can_join(trunk: Any) -> bool:
    """Whether a model of timm tells what its blocks give."""
    return hasattr(trunk, "forward_intermediates") and hasattr(trunk, "forward_head")


def read_columns(
    tower: Any, width: int, layers: Sequence[Layer] | None = None
) -> Int[Tensor, " c"]:
    """The columns, of `width`, of an encoder's features that some layers are; else all chosen."""
    if not isinstance(tower, JoinedTower):
        return torch.arange(width)
    return torch.tensor(number_columns(tower.columns(tower.chosen if layers is None else layers)))


class JoinedImageTower(JoinedTower, TimmModel):  # type: ignore[misc]
    """An image tower of open_clip around a model of timm, by several of its layers."""

    def __init__(self, tower: TimmModel, layers: str, embed_dim: int) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(tower.__dict__)
        # timm counts some models' blocks from their stem, 0, and others from the first.
        self.counts_stem = (
            "extra_blocks" in inspect.signature(tower.trunk.forward_intermediates).parameters
        )
        depth = len(tower.trunk.blocks if self.counts_stem else tower.trunk.feature_info)
        self.set_layers("model.image.joined_layers", layers, depth)
        self.widths = self.measure_widths()
        self.head = nn.Sequential(OrderedDict(proj=self.new_projection(embed_dim)))

    @torch.no_grad()
    def measure_widths(self) -> list[int]:
        trunk: Any = deepcopy(self.trunk)
        height, width = cast(tuple[int, int], self.image_size)
        images = torch.zeros(1, 3, height, width, device="meta")
        return [layer.shape[1] for layer in self.layers_of(trunk.to("meta").eval(), images)]

    def layers_of(self, trunk: Any, images: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """The layers that are given, each a mean over places."""
        numbers = [layer - (not self.counts_stem) for layer in self.given if layer]
        settings = {"extra_blocks": True} if self.counts_stem else {}
        last, maps = trunk.forward_intermediates(
            images, indices=sorted(numbers), output_fmt="NCHW", **settings
        )
        pooled = dict(zip(sorted(numbers), (one.mean((2, 3)) for one in maps), strict=True))
        before = [pooled[number] for number in numbers]  # behind the last, which is always given
        return [trunk.forward_head(last), *before]

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Features in the joint space; without a `head`, the layers side by side."""
        features = join(self.layers_of(self.trunk, images))
        return features if self.head is None else cast(Tensor, self.head(features))


class JoinedEncoders(JoinedTower):
    """Several encoders of a modality, each by some of its layers, with one projection."""

    def __init__(self, parts: Sequence[Any], projection: str) -> None:
        """`projection` is what a part calls its own, which goes."""
        super().__init__()
        for part in parts:
            if not isinstance(part, JoinedTower):
                name = type(part.trunk).__name__
                raise ValueError(f"model.image.name: timm lists no layers of {name}; name it alone")
            setattr(part, projection, None)
        self.parts: Any = nn.ModuleList(parts)
        self.given, self.chosen = (
            [(number, layer) for number, part in enumerate(parts) for layer in getattr(part, name)]
            for name in ("given", "chosen")
        )
        self.widths = [width for part in parts for width in part.widths]

    @property
    def options(self) -> list[list[Layer]]:
        """The last layers alone, or each with another one, at the same place of the short list."""
        options = zip(*(part.options for part in self.parts), strict=False)
        return [
            [(number, layer) for number, layers in enumerate(option) for layer in layers]
            for option in options
        ]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for part in self.parts:
            part.set_grad_checkpointing(enable)


def place_encoders(tower: Any) -> dict[str, Any]:
    """The encoders of a tower, by how the names of their weights begin there."""
    if not isinstance(tower, JoinedEncoders):
        return {"": tower}
    return {f"parts.{number}.": part for number, part in enumerate(tower.parts)}


class JoinedImageEncoders(JoinedEncoders):
    """Image encoders, which read images of one size, normalised as for the first of them."""

    def __init__(self, parts: Sequence[Any], embed_dim: int) -> None:
        super().__init__(parts, "head")
        for name in ("image_size", "image_mean", "image_std", "bands"):
            if hasattr(parts[0], name):  # of RGB there are no bands
                setattr(self, name, getattr(parts[0], name))
        self.head = nn.Sequential(OrderedDict(proj=self.new_projection(embed_dim)))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        mean, std = (
            [images.new_tensor(getattr(part, name)).view(-1, 1, 1) for part in self.parts]
            for name in ("image_mean", "image_std")
        )
        pixels, parts = images * std[0] + mean[0], zip(self.parts, mean, std, strict=True)
        features = torch.cat([part((pixels - m) / s) for part, m, s in parts], dim=1)
        return features if self.head is None else cast(Tensor, self.head(features))


class JoinedTextEncoders(JoinedEncoders):
    """Text encoders, whose tokens take turns: those of encoder i of k are `tokens[:, i::k]`."""

    pooler = None  # as that of a text model, which padding does not reach

    def __init__(self, parts: Sequence[Any], embed_dim: int) -> None:
        super().__init__(parts, "proj")
        self.proj: nn.Module | None = self.new_projection(embed_dim)

    def forward(
        self, input_ids: Int[Tensor, "b c"], attention_mask: Int[Tensor, "b c"] | None = None
    ) -> Float[Tensor, "b d"]:
        mask = (input_ids >= 0).long() if attention_mask is None else attention_mask
        turns = [slice(turn, None, len(self.parts)) for turn in range(len(self.parts))]
        parts = zip(self.parts, turns, strict=True)
        features = torch.cat([part(input_ids[:, at], mask[:, at]) for part, at in parts], dim=1)
        return features if self.proj is None else cast(Tensor, self.proj(features))
