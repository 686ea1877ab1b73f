"""Data sets that models are evaluated on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor

from protoclip.config import DataConfig
from protoclip.data.emoji import emoji_table
from protoclip.data.pairs import ImageTextPairs
from protoclip.files import checksum

SPLITS: tuple[Literal["train", "validation", "test"], ...] = ("train", "validation", "test")


@runtime_checkable
class Images(Protocol):
    """Images in a fixed order. `image` raises `BadSample` if one cannot be used."""

    name: str
    key: str  # Identifies the content, for the feature cache; an empty one is never cached.

    def __len__(self) -> int: ...
    def sample_id(self, row: int) -> str: ...
    def image(self, row: int) -> Image.Image: ...  # upright, RGB


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images, and what is known of each."""

    images: Images
    # Class numbers; of multilabel data, which classes are present.
    labels: Int[Tensor, " n"] | Bool[Tensor, "n k"] | None = None
    captions: Sequence[tuple[str, ...]] | None = None  # Of each image, one or more.
    groups: Sequence[int] | None = None  # Images of one group share their captions.


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """One data set. `class_names` has the name of class number `i` at position `i`."""

    name: str
    splits: Mapping[str, Split]
    class_names: Sequence[str] = ()
    templates: Sequence[str] = ("{c}",)
    language: str = "en"
    image_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: Sequence[str] = ()


def positions(values: Iterable[str], among: Sequence[str]) -> Int[Tensor, " n"]:
    """Where each value stands in a list of distinct ones."""
    position = {value: index for index, value in enumerate(among)}
    return torch.tensor([position[value] for value in values])


@cache
def emoji() -> EvaluationData:
    """The bundled emoji, drawn in seven styles and split by concept family."""
    pairs: dict[str, ImageTextPairs] = {
        split: ImageTextPairs(
            emoji_table(split), name=f"emoji/{split}", key=checksum(f"emoji/{split}".encode())
        )
        for split in SPLITS
    }
    return of_pairs("emoji", pairs)


def of_pairs(name: str, pairs: Mapping[str, ImageTextPairs]) -> EvaluationData:
    """Data with the emoji's columns: `subgroup`, `concept` and `label`."""
    classes = sorted({value for part in pairs.values() for value in part.column("subgroup")})
    splits = {}
    for split, part in pairs.items():
        concepts = part.column("concept")
        splits[split] = Split(
            images=part,
            labels=positions(part.column("subgroup"), classes),
            captions=[(part.caption(row),) for row in range(len(part))],
            groups=positions(concepts, sorted(set(concepts))).tolist(),
        )
    return EvaluationData(
        name=name,
        splits=splits,
        class_names=[value.replace("-", " ") for value in classes],
        image_names={split: list(part.column("label")) for split, part in pairs.items()},
    )


def open_data(
    reference: str,
    *,
    root: str | None = None,
    class_column: str | None = None,
    split: str = "test",
    config: DataConfig | None = None,
) -> EvaluationData:
    """Open a data set by its name."""
    if reference != "emoji":
        raise ValueError(f"{reference}: no such data set; choose emoji")
    return emoji()
