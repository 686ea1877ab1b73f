"""Data sets that models are evaluated on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from protoclip.data.emoji import emoji_table
from protoclip.data.pairs import ImageTextPairs

SPLITS: tuple[Literal["train", "validation", "test"], ...] = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """One data set in three splits.

    Columns: `concept`, which relates images and captions in retrieval; `label`, the concept's name,
    which zero-shot classification chooses; and `subgroup`, a coarser class that all splits share,
    for the linear probe, kNN and clustering.
    """

    name: str
    train: ImageTextPairs
    validation: ImageTextPairs
    test: ImageTextPairs

    def split(self, name: str) -> ImageTextPairs:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    def classes(self) -> list[str]:
        """The distinct classes over all splits, sorted."""
        return sorted({value for split in SPLITS for value in self.split(split).column("subgroup")})

    def labels(self, split: str) -> Int[Tensor, " n"]:
        """The class of each pair of a split, as a position in `classes()`."""
        return positions(self.split(split).column("subgroup"), self.classes())


def positions(values: Iterable[str], among: Sequence[str]) -> Int[Tensor, " n"]:
    """Where each value stands in a list of distinct ones."""
    position = {value: index for index, value in enumerate(among)}
    return torch.tensor([position[value] for value in values])


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
    splits = {split: ImageTextPairs(emoji_table(split), name=f"emoji/{split}") for split in SPLITS}
    return EvaluationData(name="emoji", **splits)
