"""Pairs that are only a number of rows and captions."""

from typing import Any


class Numbered:
    """So many pairs, with so many different captions."""

    name = "numbered"

    def __init__(self, rows: int, captions: int) -> None:
        self.rows, self.captions = rows, captions

    def __len__(self) -> int:
        return self.rows

    def sample_captions(self, row: int) -> tuple[str, ...]:
        return (f"caption {row % self.captions}",)

    def sample(self, row: int) -> Any: ...
    def sample_id(self, row: int) -> Any: ...
    def sample_ids(self) -> Any: ...
