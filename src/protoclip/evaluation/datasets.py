"""Data sets that models are evaluated on."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

from protoclip.data.emoji import emoji_table
from protoclip.data.pairs import ImageTextPairs

SPLITS: tuple[Literal["train", "validation", "test"], ...] = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """One data set in three splits, and which of its columns say what.

    Raises:
        ValueError: A split lacks one of the columns, or a value in it.
    """

    name: str
    train: ImageTextPairs
    validation: ImageTextPairs
    test: ImageTextPairs
    group_column: str = "concept"
    """Pictures and captions of an equal concept are relevant to each other in retrieval."""
    name_column: str = "label"
    """Name of the concept: what zero-shot classification chooses from."""
    class_column: str = "subgroup"
    """Coarser class that all splits share: linear probe, nearest neighbours, clustering."""

    def __post_init__(self) -> None:
        for split in SPLITS:
            pairs = self.split(split)
            for column in (self.group_column, self.name_column, self.class_column):
                missing = sum(value is None for value in pairs.column(column))
                if missing:
                    raise ValueError(
                        f"{pairs.name}: column '{column}' is empty for {missing} samples; "
                        "fill it or leave them out"
                    )

    def split(self, name: str) -> ImageTextPairs:
        """The pairs of `train`, `validation` or `test`.

        Raises:
            ValueError: No such split.
        """
        if name not in SPLITS:
            raise ValueError(f"split={name!r}: choose one of {', '.join(SPLITS)}")
        pairs: ImageTextPairs = getattr(self, name)
        return pairs

    def classes(self) -> list[str]:
        """The values of the class column over all splits, sorted."""
        return sorted({v for split in SPLITS for v in self.split(split).column(self.class_column)})


@cache
def emoji() -> EvaluationData:
    """The bundled emoji: art of seven styles, split by concept family."""
    train, validation, test = (
        ImageTextPairs(emoji_table(split), name=f"emoji/{split}") for split in SPLITS
    )
    return EvaluationData(name="emoji", train=train, validation=validation, test=test)
