"""Data sets that models are evaluated on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor

from protoclip.data.access import digest, fingerprint
from protoclip.data.emoji import emoji_path, emoji_table
from protoclip.data.pairs import ImageTextPairs

SPLITS: tuple[Literal["train", "validation", "test"], ...] = ("train", "validation", "test")


@runtime_checkable
class Images(Protocol):
    """Images in a fixed order. `image` is upright and RGB, or raises `BadSample`.

    `key` identifies the content, for caches of features; if it is empty, nothing is cached.
    """

    @property
    def name(self) -> str: ...
    @property
    def key(self) -> str: ...
    def __len__(self) -> int: ...
    def sample_id(self, row: int) -> str: ...
    def image(self, row: int) -> Image.Image: ...


@dataclass(frozen=True, kw_only=True)
class Split:
    """The images of one split, and what is known of each."""

    images: Images
    #: Class numbers; of multilabel data, which classes are present.
    labels: Int[Tensor, " n"] | Bool[Tensor, "n k"] | None = None
    #: One or more of each image.
    captions: Sequence[tuple[str, ...]] | None = None
    #: Images of one group share their captions. Unset, each image is its own group.
    groups: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """One data set. Its splits are some of `train`, `validation` and `test`."""

    name: str  # as in records, such as "cifar10"
    splits: Mapping[str, Split]
    class_names: Sequence[str] = ()  # by class number
    templates: Sequence[str] = ("{c}",)  # prompts; "{c}" stands for the class name
    language: str = "en"
    #: Split -> a name for every image. Only the emoji have them, beside the classes.
    image_names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    # Below: what the suite used before the splits above.

    def split(self, name: str) -> ImageTextPairs:
        pairs = self.splits[name].images
        assert isinstance(pairs, ImageTextPairs)
        return pairs

    def classes(self) -> list[str]:
        return list(self.class_names)

    def labels(self, split: str) -> Int[Tensor, " n"]:
        labels = self.splits[split].labels
        assert labels is not None
        return labels


def positions(values: Iterable[str], among: Sequence[str]) -> Int[Tensor, " n"]:
    """Where each value stands in a list of distinct ones."""
    position = {value: index for index, value in enumerate(among)}
    return torch.tensor([position[value] for value in values], dtype=torch.long)


def distinct_captions(pairs: ImageTextPairs) -> tuple[list[str], list[str], list[int]]:
    """The distinct captions of each concept, their concepts, and the caption number of each row."""
    number: dict[tuple[str, str], int] = {}
    of_row = [
        number.setdefault((pairs.caption(row), concept), len(number))
        for row, concept in enumerate(pairs.column("concept"))
    ]
    return [caption for caption, _ in number], [concept for _, concept in number], of_row


@cache
def emoji() -> EvaluationData:
    """The bundled emoji, drawn in seven styles and split by concept family."""
    file = fingerprint(str(emoji_path()))
    pairs: dict[str, ImageTextPairs] = {}
    for split in SPLITS:
        key = digest({"file": file, "split": split})
        pairs[split] = ImageTextPairs(emoji_table(split), name=f"emoji/{split}", key=key)
    return concept_data("emoji", pairs)


def concept_data(name: str, pairs: Mapping[str, ImageTextPairs]) -> EvaluationData:
    """A data set of concepts, given the pairs of each split.

    Columns of the pairs: `concept`, whose images share their captions; `label`, the concept's
    name; and `subgroup`, a coarser class that all splits share.
    """
    classes = sorted({value for split in pairs.values() for value in split.column("subgroup")})
    splits: dict[str, Split] = {}
    for split, images in pairs.items():
        concepts = images.column("concept")
        splits[split] = Split(
            images=images,
            labels=positions(images.column("subgroup"), classes),
            captions=[images.sample_captions(row) for row in range(len(images))],
            groups=positions(concepts, sorted(set(concepts))).tolist(),
        )
    return EvaluationData(
        name=name,
        splits=splits,
        class_names=[value.replace("-", " ") for value in classes],
        image_names={split: list(images.column("label")) for split, images in pairs.items()},
    )
