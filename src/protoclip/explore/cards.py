"""What pages show of a pair. `render.py` fills it in, and `templates/macros.html` draws it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A pair that the card of another one lists, since both show the same image."""

    sample_id: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class Card(Listed):
    """A pair, as pages show it."""

    position: int
    row: int
    facts: Sequence[str] = ()
    prototype: tuple[str, int, str] | None = None  # modality, number, name
    others: Sequence[Listed] = ()  # pairs with the same image
    file: str = ""  # name of the file that is the image; empty for an image in the data
    is_again: bool = False  # whether an image that is alike comes earlier in the data


@dataclass(frozen=True, kw_only=True)
class Section:
    """Cards under a heading. `note` says what may be missing."""

    title: str
    cards: Sequence[Card]
    note: str = ""
